"""The samplers people know by name, as diffusers schedulers (paper, appendix A.10)."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from noiserefine.models.catalogue import SAMPLERS


def timestep_spacing(scheduler: SchedulerMixin) -> str:
    """The spacing a model asks for (SD-Turbo: "trailing", to start at t = 999 even in one step), else Stable Diffusion's "leading"."""
    config = scheduler.config
    return (
        "leading"
        if "timestep_spacing" in config.get("_use_default_values", ())
        else config.timestep_spacing
    )


def make_scheduler(sampler: str, pipe: DiffusionPipeline) -> SchedulerMixin:
    """A new scheduler of that name with the noise schedule and prediction type of the pipeline's own.

    Raises ValueError for an unknown name.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"There is no sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}.")
    name, settings = SAMPLERS[sampler]
    return getattr(diffusers, name).from_config(
        pipe.scheduler.config,
        timestep_spacing=timestep_spacing(pipe.scheduler),
        steps_offset=1,
        **settings,
    )


def unet_calls(sampler: str, steps: int) -> int:
    """Of an unguided sampling: Heun's method evaluates twice in every step but the last."""
    return 2 * steps - 1 if sampler.startswith("Heun") else steps


def with_sampler(pipe: DiffusionPipeline, sampler: str) -> DiffusionPipeline:
    """The same pipeline, on the same weights, with a scheduler of its own; the given one is left as it is."""
    twin = copy.copy(pipe)
    twin.scheduler = make_scheduler(sampler, pipe)
    return twin


def predicted_x0(
    scheduler: SchedulerMixin,
    model_output: torch.Tensor,
    timestep: torch.Tensor,
    sample: torch.Tensor,
) -> torch.Tensor:
    """The x0 that a prediction at a step amounts to, (B, C, h, w): equation 2 of the paper, for ε, and its counterpart for v.

    sample and timestep as `scheduler.step` takes them, which must not have been called for this step yet.
    """
    x = scheduler.scale_model_input(
        sample, timestep
    )  # of unit variance at every noise level, for every sampler
    if hasattr(scheduler, "sigmas"):
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        alpha_bar = 1 / (1 + scheduler.sigmas[scheduler.step_index] ** 2)
    else:
        alpha_bar = scheduler.alphas_cumprod[timestep]
    signal, noise = alpha_bar.sqrt().item(), (1 - alpha_bar).sqrt().item()
    if scheduler.config.prediction_type == "v_prediction":
        return signal * x - noise * model_output
    return (x - noise * model_output) / signal


@contextlib.contextmanager
def watch_x0(scheduler: SchedulerMixin, on_x0: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """While open, the scheduler, one of the caller's own, calls on_x0 with the predicted x0 before every step."""
    step = scheduler.step

    @functools.wraps(step)  # pipelines read from the signature what the sampler takes
    def watched(model_output, timestep, sample, *args, **kwargs):
        on_x0(predicted_x0(scheduler, model_output, timestep, sample))
        return step(model_output, timestep, sample, *args, **kwargs)

    scheduler.step = watched
    try:
        yield
    finally:
        del (
            scheduler.step
        )  # it holds the scheduler, which would live on until the next full garbage collection
