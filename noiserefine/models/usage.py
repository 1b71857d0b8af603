"""How a loaded model is best used: as the catalogue, its family or its own pipeline says."""

from dataclasses import replace

from diffusers import DiffusionPipeline

from noiserefine.denoiser import call_parameters, can_guide, guidance_arguments
from noiserefine.models.catalogue import FAMILIES, Backbone, Usage
from noiserefine.samplers import samplers_of


def usage_of(pipe: DiffusionPipeline, backbone: Backbone | None) -> Usage:
    """Return where a model's sliders start, for a model of any pipeline class.

    A model that cannot be guided has no guidance scale, and the sampler is one that the model
    takes.
    """
    family = FAMILIES.get(type(pipe).__name__)
    usage = backbone.usage if backbone else family or _own_usage(pipe)
    if not can_guide(pipe):
        usage = replace(usage, guidance_scale=None)
    samplers = samplers_of(pipe)
    if usage.sampler not in samplers:
        usage = replace(usage, sampler=samplers[0])
    return usage


def _own_usage(pipe: DiffusionPipeline) -> Usage:
    """Return the defaults of the pipeline's own call, its scale as diffusers' g."""
    parameters = call_parameters(pipe)
    scale = parameters.get("true_cfg_scale", parameters.get("guidance_scale"))
    steps = parameters.get("num_inference_steps")
    guidance_scale = None
    if scale and isinstance(scale.default, int | float) and can_guide(pipe):
        offset = 2.0 - next(iter(guidance_arguments(pipe, 2.0).values()))  # 1 where theirs is g - 1
        guidance_scale = scale.default + offset
    return Usage(
        type(pipe).__name__.removesuffix("Pipeline"),
        guidance_scale,
        steps.default if steps and isinstance(steps.default, int) else 28,
    )
