"""One prompt and one seed, three ways to an image."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from noiserefine.guidance import sample
from noiserefine.noise import check_prompt_length, check_seed, draw_noise, encode_prompt, image_size
from noiserefine.refiner import Refiner, check_strength
from noiserefine.samplers import SAMPLERS, with_sampler

MAX_STEPS = 200


@dataclass(frozen=True)
class Arm:
    """A finished column of the comparison."""

    name: str  # gaussian, guided or refined
    image: Image.Image
    x_T: np.ndarray  # the noise it started from, (1, C, h, w) in float32, unit variance
    forwards: int  # of the UNet, for one image
    seconds: float


class ForwardCounter:
    """Counts the images that pass through UNets: a guided step counts two."""

    def __init__(self) -> None:
        self.count = 0

    @contextlib.contextmanager
    def watch(self, *unets: torch.nn.Module) -> Iterator["ForwardCounter"]:
        def count(module: torch.nn.Module, args: tuple) -> None:
            self.count += len(args[0])

        handles = [unet.register_forward_pre_hook(count) for unet in unets]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def check_request(prompt: str, seed: int, steps: int, guidance_scale: float, strength: float, sampler: str) -> None:
    """Raises ValueError for what no model can make an image from."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("The prompt is empty: describe a picture, for example “a red apple on a blue background”.")
    check_seed(seed)
    check_settings(steps, guidance_scale, strength, sampler)


def check_settings(steps: int, guidance_scale: float, strength: float, sampler: str) -> None:
    """Raises ValueError for values no sampling can be done with."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"The number of steps is a whole number from 1 to {MAX_STEPS}; got {steps!r}.")
    if not 1 <= guidance_scale <= 30:
        raise ValueError(f"The guidance scale is a number from 1 (none) to 30; got {guidance_scale}.")
    check_strength(strength)
    if sampler not in SAMPLERS:
        raise ValueError(f"There is no sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}.")


def compare(pipe: DiffusionPipeline, refiner: Refiner | None, prompt: str, seed: int, *, steps: int = 20,
            guidance_scale: float = 7.0, strength: float = 1.0, sampler: str = "DDIM", height: int | None = None,
            width: int | None = None, guided: bool = True, known: Mapping[str, Arm] = MappingProxyType({})) -> Iterator[Arm]:
    """An iterator over the three arms, which are sampled as it is advanced, all from the same x_T:

    gaussian   unguided, N forwards
    guided     classifier-free guidance, 2N forwards; left out where guided is False, for models without guidance
    refined    unguided from refiner(x_T, prompt), N + 1 forwards; left out where refiner is None.
               A refiner that takes a guidance scale is given that of the guided arm

    N is the steps for first-order samplers.  Sizes in pixels, the model's own where None.  Arms in known are not
    sampled again but yielded as they are.
    Raises ValueError for bad input at once.
    """
    check_request(prompt, seed, steps, guidance_scale, strength, sampler)
    check_prompt_length(pipe, prompt)
    refiner_scale = refiner.scale_input(guidance_scale) if refiner else None
    height, width = image_size(pipe, height, width)
    names = ["gaussian"] + ["guided"] * guided + ["refined"] * (refiner is not None)

    def arms() -> Iterator[Arm]:
        x_T = draw_noise(pipe, seed, height=height, width=width)
        embeds = encode_prompt(pipe, prompt, guided=guided) if set(names) - known.keys() else {}
        for name in names:
            if name in known:
                yield known[name]
                continue
            began, counter = time.perf_counter(), ForwardCounter()
            with counter.watch(pipe.unet, *([refiner.unet] if refiner else [])):
                latents = refiner(x_T, embeds, strength, refiner_scale) if name == "refined" else x_T.to(pipe._execution_device, pipe.unet.dtype)
                # Stochastic samplers draw from the seed too, so that the arms differ in one thing only.
                image = sample(with_sampler(pipe, sampler), guidance_scale=guidance_scale if name == "guided" else 1.0, latents=latents,
                               num_inference_steps=steps, height=height, width=width, generator=torch.Generator().manual_seed(seed),
                               **embeds).images[0]
            yield Arm(name, image, latents.float().cpu().numpy(), counter.count, time.perf_counter() - began)

    return arms()
