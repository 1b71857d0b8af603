"""The initial noise x_T and what a prompt becomes, for any text-to-image pipeline."""

import ast
import copy
import functools
import inspect
import math
import textwrap
from fractions import Fraction
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase

from noiserefine.denoiser import (
    call_parameters,
    can_guide,
    canvas,
    denoiser,
    guidance_arguments,
    reach_latents,
)
from noiserefine.limits import MAX_SEED


def image_size(
    pipe: DiffusionPipeline, height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """Return height and width in pixels, the model's native size where None.

    Raises ValueError where the model cannot make that size: both are from half the native size to
    twice it, in multiples of 8 pixels and of the patches that the network reads.
    """
    native = canvas(pipe)
    multiple = size_multiple(pipe)
    natives, sides = (native.height, native.width), []
    for side, native_side in zip((height, width), natives, strict=True):
        sides.append(native_side if side is None else side)
    for side, native_side in zip(sides, natives, strict=True):
        if (
            isinstance(side, bool)
            or not math.isfinite(side)
            or side != int(side)
            or side % multiple
            or not native_side / 2 <= side <= native_side * 2
        ):
            raise ValueError(
                f"This model makes pictures of {native_side // 2} to {native_side * 2} pixels a "
                f"side in steps of {multiple}; {sides[1]} x {sides[0]} is not one of them. Its "
                f"native size is {natives[1]} x {natives[0]}."
            )
    made = canvas(pipe, int(sides[0]), int(sides[1]))
    if (made.height, made.width) != tuple(sides):
        raise ValueError(
            f"This model turns {sides[1]} x {sides[0]} pixels into {made.width} x {made.height}: "
            "ask for those."
        )
    return made.height, made.width


def size_multiple(pipe: DiffusionPipeline) -> int:
    """Return the number of pixels in steps of which height and width can be chosen."""
    native, config = canvas(pipe), denoiser(pipe).config
    channels, height, width = native.shape
    if native.sample != native.shape and len(native.sample) < len(native.shape):
        patch = math.isqrt(height * width // native.sample[0])  # of latents in a token
    else:
        patch = config.get("patch_size") or config.get("all_patch_size") or 1
        patch = max(patch) if isinstance(patch, list | tuple) else patch
    return math.lcm(8, (Fraction(native.height, height) * patch).numerator)


def half_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """Return about half the native height and width in pixels: a quarter of the cost."""
    native, multiple = canvas(pipe), size_multiple(pipe)
    return native.height // 2 // multiple * multiple, native.width // 2 // multiple * multiple


def draw_noise(
    pipe: DiffusionPipeline,
    seed: int,
    count: int = 1,
    height: int | None = None,
    width: int | None = None,
) -> torch.Tensor:
    """Return x_T ~ N(0, I), float32 on the CPU, (count, C, h, w).

    Image i of the batch is what seed + i draws alone, on every device.  Unit variance: the
    pipelines multiply `latents` by the scheduler's init_noise_sigma themselves.

    Raises ValueError for a seed outside 0 .. 2**32 - 1 and for a size the model cannot make.
    """
    check_seed(seed)
    if count < 1:
        raise ValueError(f"The number of images is at least 1; got {count}.")
    shape = (1, *canvas(pipe, *image_size(pipe, height, width)).shape)
    generators = (torch.Generator().manual_seed(seed + i) for i in range(count))
    return torch.cat([torch.randn(shape, generator=generator) for generator in generators])


def step_generator(seed: int) -> torch.Generator:
    """Return the generator of the noise that stochastic samplers add at their steps.

    A generator with the same seed would repeat x_T.  `~seed` inverts all 32 bits that the CPU's
    generator uses, so the two streams differ.
    """
    return torch.Generator().manual_seed(~seed)


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that is no whole number from 0 to 2**32 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"The seed is a whole number from 0 to {MAX_SEED}; got {seed!r}.")


def check_negative_prompt(pipe: DiffusionPipeline, negative_prompt: str) -> None:
    """Raise ValueError for a negative prompt that the pipeline's call has no argument for."""
    if negative_prompt and "negative_prompt" not in call_parameters(pipe):
        raise ValueError(f"{type(pipe).__name__} takes no negative prompt: leave it empty.")


def check_prompt_length(pipe: DiffusionPipeline, prompt: str) -> None:
    """Raise ValueError for a prompt that all of the pipeline's tokenizers would cut off."""
    longest = call_parameters(pipe).get("max_sequence_length")
    tokenizers = [
        part for part in pipe.components.values() if isinstance(part, PreTrainedTokenizerBase)
    ]
    found = []
    for tokenizer in tokenizers:
        limit = tokenizer.model_max_length
        if longest is not None and tokenizer is tokenizers[-1]:  # T5 or a language model
            limit = min(limit, longest.default)
        length = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if length <= limit:
            return
        found.append((limit, length))
    if found:
        limit, length = max(found)
        raise ValueError(
            f"The prompt is {length} tokens long and this model reads {limit} at most: shorten it."
        )


@torch.no_grad()
def encode_prompt(
    pipe: DiffusionPipeline, prompt: str | list[str], guided: bool = True, negative_prompt: str = ""
) -> dict[str, Any]:
    """Return the prompts as the pipeline's own arguments: one encoding serves several calls.

    They are what the pipeline's call makes of its `encode_prompt`: prompt_embeds, (B, tokens,
    width), and masks, pooled embeddings and, if guided, negative ones, of one negative prompt for
    all, under the names that the family has for them.  A pipeline that takes no embeddings gets
    the prompts themselves.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    guided = guided and can_guide(pipe)
    call: dict[str, Any] = {"prompt": prompts}
    if guided and (negative_prompt or "true_cfg_scale" in call_parameters(pipe)):
        call["negative_prompt"] = [negative_prompt] * len(prompts)
    kind: Any = type(pipe)
    names = _encodings(kind)
    if not names:
        return call
    twin, encoded = copy.copy(pipe), []

    @functools.wraps(pipe.encode_prompt)
    def record(*args, **kwargs):
        made = pipe.encode_prompt(*args, **kwargs)
        encoded.append(made if isinstance(made, tuple) else (made,))
        return made

    vars(twin)["encode_prompt"] = record
    reach_latents(twin, **call, **guidance_arguments(pipe, 2.0 if guided else 1.0))
    taken = call_parameters(pipe)
    embeds: dict[str, Any] = {
        name: value
        for named, values in zip(names, encoded, strict=False)
        for name, value in zip(named, values, strict=True)
        if name in taken and value is not None
    }
    negative = taken.get("negative_prompt")
    if "negative_prompt_embeds" in embeds and negative and negative.default is not None:
        embeds["negative_prompt"] = (
            None  # some default to "", which they reject together with embeddings
        )
    return embeds


def encoding_for(embeds: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the encoded prompts of `count` images, without negative ones.

    One prompt is for all of them.  Raises ValueError for another number of prompts.
    """
    prompts = len(next(iter(embeds.values())))
    if prompts not in (1, count):
        raise ValueError(
            f"Prompts: {prompts}, images: {count}. Give one prompt for all or one for each."
        )
    embeds = {name: value for name, value in embeds.items() if not name.startswith("negative")}
    return embeds if prompts == count else {k: _repeat(v, count) for k, v in embeds.items()}


def join_encodings(encodings: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the encoded prompts of several images, each encoded alone, as one for all of them."""
    return {name: _join([encoded[name] for encoded in encodings]) for name in encodings[0]}


def _join(encoded: list[Any]) -> Any:
    """Return lists joined, or tensors along their first axis of length 1."""
    if isinstance(encoded[0], list):
        return [entry for entries in encoded for entry in entries]
    return torch.cat(encoded, dim=encoded[0].shape.index(1))


def _repeat(encoded: Any, count: int) -> Any:
    """Return `count` of one prompt: a list's entries or along a tensor's first axis of length 1."""
    if isinstance(encoded, list):
        return encoded * count
    axis = encoded.shape.index(1)
    return encoded.expand(*encoded.shape[:axis], count, *encoded.shape[axis + 1 :])


@functools.cache
def _encodings(kind: type) -> list[list[str]]:
    """Return the variables that a pipeline's call assigns each encode_prompt's results to.

    diffusers' pipelines give them the names of their own parameters: `prompt_embeds, ... =
    self.encode_prompt(...)`. Their order differs from family to family.
    """
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.__call__)))
    assigned = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "self.encode_prompt"
    ]
    names = [
        [
            name.id if isinstance(name, ast.Name) else ""
            for name in getattr(node.targets[0], "elts", node.targets)
        ]
        for node in sorted(assigned, key=lambda node: node.lineno)
    ]
    taken = inspect.signature(kind.__call__).parameters
    return names if any(name in taken for named in names for name in named) else []


def slerp(x: torch.Tensor, y: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return noise between x and y, (B, C, h, w), along the sphere, so that it has their norm."""
    if fraction in (0, 1):
        return y if fraction else x
    cosine = (x.flatten(1) * y.flatten(1)).sum(1)
    angle = torch.arccos(cosine / (x.flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1)))
    angle = angle[:, None, None, None]
    mixed = torch.sin((1 - fraction) * angle) * x + torch.sin(fraction * angle) * y
    return mixed / torch.sin(angle)
