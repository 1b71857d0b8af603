"""Latents as pictures, exactly and roughly."""

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch.nn.functional import interpolate, pad

from noiserefine.denoiser import (
    canvas,
    canvas_like,
    guidance_arguments,
    pure_noise_scheduler,
    size_arguments,
    with_parts,
)
from noiserefine.noise import encode_prompt, encoding_for

PREVIEW_SIDE = 16  # of the latents that a preview is fitted to


@torch.no_grad()
def decode(
    pipe: DiffusionPipeline, x0: torch.Tensor, embeds: dict[str, Any] | None = None
) -> list[Image.Image]:
    """Return the pictures of latents, as the pipeline itself decodes them.

    One after the other: each takes gigabytes at the big models' sizes.

    x0      (B, C, h, w)
    embeds  what `encode_prompt` made of any one prompt: the pipeline's call needs one, and no
            picture depends on it; None encodes the empty one

    Raises ValueError for a pipeline without a decoder.
    """
    if getattr(pipe, "vae", None) is None:
        raise ValueError(f"{type(pipe).__name__} makes no pictures of its latents: it has no vae.")
    embeds = encode_prompt(pipe, "", guided=False) if embeds is None else encoding_for(embeds, 1)
    return [_decode(pipe, latents, embeds) for latents in x0.split(1)]


def _decode(pipe: DiffusionPipeline, x0: torch.Tensor, embeds: dict[str, Any]) -> Image.Image:
    """Return the picture of latents (1, C, h, w), which a call without steps decodes."""
    size = canvas_like(pipe, x0)
    x0 = x0.to(pipe._execution_device, pipe.vae.dtype)
    call = embeds | guidance_arguments(pipe) | size_arguments(pipe, size.height, size.width)
    call |= {"num_inference_steps": 1, "generator": torch.Generator()}
    try:
        return _call(pipe, size.to_sample(x0), False, latents=size.to_latents(x0), **call)
    except UnboundLocalError:  # it decodes what its last step denoised, and so needs one
        return _call(pipe, size.to_sample(x0), True, **call)


def _call(pipe: DiffusionPipeline, sample: torch.Tensor, steps: bool, **call) -> Image.Image:
    """Decode by calling the pipeline with no steps, or with one that returns `sample`."""
    scheduler = copy.deepcopy(pure_noise_scheduler(pipe.scheduler))
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def set_few(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        scheduler.timesteps = scheduler.timesteps[: None if steps else 0]

    @functools.wraps(scheduler.step)
    def step(model_output, timestep, latents, *args, return_dict=True, **kwargs):
        made = SimpleNamespace(prev_sample=sample, denoised=sample)
        return made if return_dict else (sample, sample)

    # Some pipelines round latents to the precision of the prompt, which the decoder may not have.
    vae = copy.copy(pipe.vae)

    @functools.wraps(pipe.vae.decode)
    def decode(z, *args, **kwargs):
        return pipe.vae.decode(z.to(pipe.vae.dtype), *args, **kwargs)

    scheduler.set_timesteps, scheduler.step, vae.decode = set_few, step, decode
    twin = with_parts(pipe, scheduler=scheduler)
    vars(twin)["vae"] = vae
    twin.set_progress_bar_config(disable=True)
    return twin(**call).images[0]


@torch.no_grad()
def fit_preview(pipe: DiffusionPipeline) -> Callable[[torch.Tensor], Image.Image]:
    """Return a function from latents (1, C, h, w) to a rough picture of h x w pixels.

    It costs one matrix product in place of the decoder.  The linear map from a latent to its
    pixel is fitted, by least squares, to what the decoder makes of smooth random latents.  The
    safety checker, which may mistake these for something, does not see them.
    """
    unscreened = copy.copy(pipe)
    vars(unscreened)["safety_checker"] = None
    channels = canvas(pipe).shape[0]
    coarse = torch.randn(8, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = interpolate(coarse, size=PREVIEW_SIDE, mode="bicubic")
    pictures = torch.from_numpy(pipe.image_processor.pil_to_numpy(decode(unscreened, latents)))
    colours = torch.nn.functional.adaptive_avg_pool2d(pictures.movedim(-1, 1), PREVIEW_SIDE)
    rows = _with_one(latents).flatten(0, 2)
    matrix = torch.linalg.lstsq(rows, colours.movedim(1, -1).flatten(0, 2)).solution

    def preview(x0: torch.Tensor) -> Image.Image:
        colours = (_with_one(x0) @ matrix)[0]
        return Image.fromarray(colours.clamp(0, 1).mul(255).round().byte().numpy())

    return preview


def _with_one(latents: torch.Tensor) -> torch.Tensor:
    """Return latents (B, C, h, w) as rows (B, h, w, C + 1) with a last entry of 1, on the CPU."""
    return pad(latents.float().cpu().movedim(1, -1), (0, 1), value=1.0)
