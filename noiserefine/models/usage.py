"""How a model is best used: as the catalogue, its family or its own pipeline says."""

import re
from dataclasses import replace

from diffusers import DiffusionPipeline

from noiserefine.denoiser import call_parameters, can_guide, guidance_arguments
from noiserefine.models.catalogue import BACKBONES, FAMILIES, Backbone, Usage
from noiserefine.models.devices import default_device
from noiserefine.models.folder import examine
from noiserefine.models.loading import read_source
from noiserefine.models.single_file import identify
from noiserefine.models.sources import HUB_ID, exists, is_safetensors, local_file
from noiserefine.samplers import samplers_of


def usage_by_name(source: str) -> Usage | None:
    """Return how a model is best used as far as small files tell, None where they do not.

    source: as load_pipeline takes it. Raises what load_pipeline raises.
    """
    name, asked, backbone = read_source(source)
    if backbone:
        return backbone.usage
    if is_safetensors(name):
        if not exists(name) and re.match(f"{HUB_ID.pattern}/", name):
            return None  # a whole model, which is downloaded when an image is made
        return BACKBONES[identify(local_file(name), asked)[0]].usage
    kind, *_ = examine(name, default_device(), None, None)
    return FAMILIES.get(kind.__name__)


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


def usual_guidance_scale(pipe: DiffusionPipeline, source: str) -> float:
    """Return the guidance scale g that suits a loaded model, 1 for one that is sampled unguided.

    source: what the pipeline was loaded from.
    """
    _, _, backbone = read_source(source)
    scale = usage_of(pipe, backbone).guidance_scale
    return 1.0 if scale is None else scale


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
