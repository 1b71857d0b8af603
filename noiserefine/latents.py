"""Latents as pictures, exactly and roughly."""

import contextlib
from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from torch.nn.functional import interpolate, pad


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: torch.Tensor) -> list[Image.Image]:
    """The pictures of latents (B, C, h, w), by the pipeline's VAE, one after the other: each takes gigabytes at the big models' sizes."""
    vae = pipe.vae
    # SDXL's own VAE overflows in float16; bfloat16 has the range. Other families' configurations say "force_upcast" without need.
    overflows = (
        vae.dtype == torch.float16
        and vae.config.force_upcast
        and isinstance(pipe, StableDiffusionXLPipeline)
    )
    with (
        torch.autocast(latents.device.type, torch.bfloat16)
        if overflows
        else contextlib.nullcontext()
    ):
        images = [
            vae.decode(x0 / vae.config.scaling_factor).sample.float()
            for x0 in latents.to(vae.dtype).split(1)
        ]
    return pipe.image_processor.postprocess(torch.cat(images))


@torch.no_grad()
def fit_preview(pipe: DiffusionPipeline) -> Callable[[torch.Tensor], Image.Image]:
    """A function from latents (1, C, h, w) to a small rough picture, h x w pixels, for one matrix product instead of the VAE.

    The linear map from a latent to its pixel is fitted, by least squares, to what the VAE makes of smooth random latents.
    """
    channels, factor = pipe.unet.config.in_channels, pipe.vae_scale_factor
    coarse = torch.randn(8, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = interpolate(coarse, size=16, mode="bicubic").to(
        pipe._execution_device, pipe.unet.dtype
    )
    pictures = torch.from_numpy(pipe.image_processor.pil_to_numpy(decode(pipe, latents)))
    colours = torch.nn.functional.avg_pool2d(pictures.movedim(-1, 1), factor).movedim(1, -1)
    matrix = torch.linalg.lstsq(with_one(latents).flatten(0, 2), colours.flatten(0, 2)).solution

    def preview(x0: torch.Tensor) -> Image.Image:
        return Image.fromarray(
            (with_one(x0) @ matrix)[0].clamp(0, 1).mul(255).round().byte().numpy()
        )

    return preview


def with_one(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) as rows (B, h, w, C + 1) whose last entry is 1, on the CPU in float32."""
    return pad(latents.float().cpu().movedim(1, -1), (0, 1), value=1.0)
