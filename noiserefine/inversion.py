"""DDIM inversion: the noise from which unguided sampling gives an image back (section 3.1)."""

from typing import Any

import torch
from diffusers import DDIMInverseScheduler, DiffusionPipeline

from noiserefine.denoiser import with_parts
from noiserefine.guidance import sample_latents
from noiserefine.samplers import has_beta_schedule, make_scheduler


def ddim_inversion(
    pipe: DiffusionPipeline, x0: torch.Tensor, embeds: dict[str, Any], steps: int
) -> torch.Tensor:
    """Return the noise, (B, C, h, w), that DDIM turns into about x0 (Song et al., 2020, 4.3).

    x0: latents, (B, C, h, w); embeds: what `encode_prompt` returns, for B prompts.
    Raises ValueError for a model that DDIM does not sample.
    """
    if not has_beta_schedule(pipe.scheduler):
        raise ValueError(f"DDIM does not sample {type(pipe).__name__}, so nothing inverts it.")
    inverse = DDIMInverseScheduler.from_config(make_scheduler("DDIM", pipe).config)
    return sample_latents(with_parts(pipe, scheduler=inverse), x0, embeds, steps)
