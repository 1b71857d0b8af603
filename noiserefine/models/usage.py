"""How a loaded model is best used: the catalogue's word, its family's, or its pipeline's own."""

import inspect

from diffusers import DiffusionPipeline

from noiserefine.models.catalogue import FAMILIES, Backbone, Usage


def usage_of(pipe: DiffusionPipeline, backbone: Backbone | None) -> Usage:
    """Return where a model's sliders start, for a model of any pipeline class."""
    if backbone:
        return backbone.usage
    kind = type(pipe)
    if kind.__name__ in FAMILIES:
        return FAMILIES[kind.__name__]
    parameters = inspect.signature(kind.__call__).parameters
    scale = parameters.get("true_cfg_scale", parameters.get("guidance_scale"))
    steps = parameters.get("num_inference_steps")
    return Usage(
        kind.__name__.removesuffix("Pipeline"),
        float(scale.default) if scale and isinstance(scale.default, int | float) else None,
        steps.default if steps and isinstance(steps.default, int) else 28,
    )
