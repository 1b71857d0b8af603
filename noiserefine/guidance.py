"""Sampling with classifier-free guidance, perturbed-attention guidance, or both, on one set of weights."""

import copy

from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from diffusers.utils import BaseOutput


def sample(
    pipe: DiffusionPipeline, *, guidance_scale: float = 1.0, pag_scale: float = 0.0, **kwargs
) -> BaseOutput:
    """Calls the pipeline, by default unguided, and leaves it as it was found.

    guidance_scale is diffusers' g in e_u + g (e_c - e_u), so the paper's w of equation 31 is g - 1 and
    1 means unguided.  pag_scale is s of equation 32; 0 means none.  kwargs go to the pipeline's call.
    """
    if pag_scale == 0:
        return pipe(guidance_scale=guidance_scale, **kwargs)
    # A PAG pipeline swaps attention processors on the shared UNet and restores them only if nothing interrupts it.
    processors = dict(pipe.unet.attn_processors)
    try:
        guided = AutoPipelineForText2Image.from_pipe(
            pipe, enable_pag=True, pag_applied_layers=["mid"]
        )
        guided.scheduler = copy.deepcopy(pipe.scheduler)
        guided.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
        return guided(guidance_scale=guidance_scale, pag_scale=pag_scale, **kwargs)
    finally:
        pipe.unet.set_attn_processor(processors)
