"""DDIM inversion: the noise that unguided sampling would have made an image of (paper, section 3.1)."""

import copy
from typing import Any

import torch
from diffusers import DDIMInverseScheduler, DiffusionPipeline

from noiserefine.guidance import sample
from noiserefine.samplers import make_scheduler


def ddim_inversion(
    pipe: DiffusionPipeline, x0: torch.Tensor, embeds: dict[str, Any], steps: int
) -> torch.Tensor:
    """The noise, (B, C, h, w), that DDIM turns into about x0 (Song et al. 2020, section 4.3).

    x0: latents, (B, C, h, w); embeds: what `encode_prompt` returns, for B prompts.
    """
    inverse = copy.copy(pipe)
    inverse.scheduler = DDIMInverseScheduler.from_config(make_scheduler("DDIM", pipe).config)
    height, width = (side * pipe.vae_scale_factor for side in x0.shape[-2:])
    return sample(
        inverse,
        latents=x0.to(pipe.device, pipe.unet.dtype),
        num_inference_steps=steps,
        height=height,
        width=width,
        output_type="latent",
        **embeds,
    ).images
