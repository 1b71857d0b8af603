"""The initial noise x_T and the conditioning that a prompt becomes, for any Stable Diffusion-family pipeline."""

from typing import Any

import torch
from diffusers import DiffusionPipeline

MAX_SEED = 2**32 - 1


def image_size(
    pipe: DiffusionPipeline, height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """Height and width in pixels, the model's native size where None.

    Raises ValueError where the model cannot make that size: both must be multiples of 8 pixels, which
    diffusers' pipelines ask for, from half the native size to twice it.
    """
    native, multiple = (
        pipe.unet.config.sample_size * pipe.vae_scale_factor,
        max(8, pipe.vae_scale_factor),
    )
    size = tuple(native if side is None else side for side in (height, width))
    for side in size:
        if (
            isinstance(side, bool)
            or side != side
            or side != int(side)
            or side % multiple
            or not native / 2 <= side <= native * 2
        ):
            raise ValueError(
                f"This model makes pictures of {native // 2} to {native * 2} pixels a side in steps of {multiple}; "
                f"{size[1]} x {size[0]} is not one of them. Its native size is {native} x {native}."
            )
    return int(size[0]), int(size[1])


def draw_noise(
    pipe: DiffusionPipeline,
    seed: int,
    count: int = 1,
    height: int | None = None,
    width: int | None = None,
) -> torch.Tensor:
    """x_T ~ N(0, I), float32 on the CPU, (count, channels, height / f, width / f) with f the VAE's factor.

    Image i of the batch is what seed + i draws alone, on every device.  Unit variance: the pipelines
    multiply `latents` by the scheduler's init_noise_sigma themselves.

    Raises ValueError for a seed outside 0 .. 2**32 - 1 and for a size the model cannot make.
    """
    check_seed(seed)
    if count < 1:
        raise ValueError(f"The number of images is at least 1; got {count}.")
    height, width = image_size(pipe, height, width)
    shape = (
        1,
        pipe.unet.config.in_channels,
        height // pipe.vae_scale_factor,
        width // pipe.vae_scale_factor,
    )
    generators = (torch.Generator().manual_seed(seed + i) for i in range(count))
    return torch.cat([torch.randn(shape, generator=generator) for generator in generators])


def step_generator(seed: int) -> torch.Generator:
    """Of the noise that stochastic samplers add at their steps.

    A generator of the seed itself would begin with x_T once more.  The CPU's uses 32 bits, which `~` all turns over.
    """
    return torch.Generator().manual_seed(~seed)


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that is no whole number from 0 to 2**32 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"The seed is a whole number from 0 to {MAX_SEED}; got {seed!r}.")


def check_prompt_length(pipe: DiffusionPipeline, prompt: str) -> None:
    """Raises ValueError for a prompt that the model's tokenizer would cut off."""
    limit = pipe.tokenizer.model_max_length
    length = len(pipe.tokenizer(prompt, truncation=False, verbose=False).input_ids)
    if length > limit:
        raise ValueError(
            f"The prompt is {length} tokens long and this model reads {limit} at most: shorten it."
        )


@torch.no_grad()
def encode_prompt(
    pipe: DiffusionPipeline, prompt: str | list[str], guided: bool = True, negative_prompt: str = ""
) -> dict[str, torch.Tensor]:
    """The prompts as the pipeline's own keyword arguments, so that one encoding serves several calls.

    prompt_embeds, (B, tokens, width); with two text encoders (SDXL) pooled_prompt_embeds, (B, width); and,
    if guided, negative_prompt_embeds and negative_pooled_prompt_embeds, of one negative prompt for all.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    embeds = pipe.encode_prompt(
        prompt=prompts,
        device=pipe._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
        negative_prompt=[negative_prompt] * len(prompts) if negative_prompt else None,
    )
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    return {name: value for name, value in zip(names, embeds) if value is not None}


def unet_conditioning(
    pipe: DiffusionPipeline, embeds: dict[str, torch.Tensor], height: int, width: int
) -> dict:
    """The UNet's keyword arguments for unguided prompt embeddings, as the pipeline's own call makes them.

    height and width in pixels: SDXL's UNet is told them (its "time ids"), the others' are not.
    """
    prompt_embeds = embeds["prompt_embeds"]
    conditioning: dict[str, Any] = {"encoder_hidden_states": prompt_embeds}
    if "pooled_prompt_embeds" in embeds:
        pooled = embeds["pooled_prompt_embeds"]
        time_ids = pipe._get_add_time_ids(
            (height, width),
            (0, 0),
            (height, width),
            dtype=prompt_embeds.dtype,
            text_encoder_projection_dim=pooled.shape[-1],
        )
        conditioning["added_cond_kwargs"] = {
            "text_embeds": pooled,
            "time_ids": time_ids.to(pooled.device).repeat(len(pooled), 1),
        }
    return conditioning


def slerp(x: torch.Tensor, y: torch.Tensor, fraction: float) -> torch.Tensor:
    """From x (fraction 0) to y (1) along the sphere, (B, C, h, w): what lies between two noises is noise of the same norm."""
    if fraction in (0, 1):
        return y if fraction else x
    angle = torch.arccos(
        (x.flatten(1) * y.flatten(1)).sum(1) / (x.flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1))
    )[:, None, None, None]
    return (torch.sin((1 - fraction) * angle) * x + torch.sin(fraction * angle) * y) / torch.sin(
        angle
    )
