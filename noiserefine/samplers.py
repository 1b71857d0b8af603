"""The samplers people know by name, as diffusers schedulers (paper, appendix A.10)."""

import contextlib
import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from noiserefine.denoiser import accepts_scheduler, guidance_arguments, with_parts
from noiserefine.noise import encode_prompt
from noiserefine.sampler_names import FLOW_SAMPLERS, NATIVE, SAMPLER_NAMES, SAMPLERS

__all__ = ["NATIVE", "SAMPLER_NAMES", "SAMPLERS"]


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Return whether the scheduler is one of flow matching: x_t = (1 - sigma) x0 + sigma x_T."""
    return hasattr(scheduler, "scale_noise") or bool(scheduler.config.get("use_flow_sigmas"))


def has_beta_schedule(scheduler: SchedulerMixin) -> bool:
    """Return whether Stable Diffusion's samplers read this noise schedule from its config."""
    config = scheduler.config
    special = "snr_shift_scale" in config or "original_inference_steps" in config
    return "beta_schedule" in config and not special and not is_flow(scheduler)


def samplers_of(pipe: DiffusionPipeline) -> list[str]:
    """Return the names of the samplers that the pipeline's family takes, its default first.

    Flow matching takes its own and those that the pipeline's call accepts: some pipelines pass
    their own sigmas, which not every scheduler takes.  Other
    pipelines keep their own sampler.
    """
    if has_beta_schedule(pipe.scheduler):
        spacing = timestep_spacing(pipe.scheduler)  # of all samplers that set no other
        return [
            name
            for name, (_, settings) in SAMPLERS.items()
            if settings.get("timestep_spacing") != spacing
        ]
    if not is_flow(pipe.scheduler):
        return [NATIVE]
    native_kind = type(pipe.scheduler).__name__
    call = encode_prompt(pipe, "", guided=False) | guidance_arguments(pipe)
    return [NATIVE] + [
        name
        for name, (kind, _) in FLOW_SAMPLERS.items()
        if kind != native_kind and accepts_scheduler(pipe, make_scheduler(name, pipe), **call)
    ]


def timestep_spacing(scheduler: SchedulerMixin) -> str:
    """Return the model's timestep spacing, or Stable Diffusion's "leading" if it sets none.

    SD-Turbo's is "trailing", to start at t = 999 even in one step.
    """
    config = scheduler.config
    default = "timestep_spacing" in config.get("_use_default_values", ())
    return "leading" if default else config.timestep_spacing


def make_scheduler(sampler: str, pipe: DiffusionPipeline) -> SchedulerMixin:
    """Return a new scheduler of that name with the noise schedule of the pipeline's own.

    Raises ValueError for a name that this family does not have.
    """
    native = pipe.scheduler
    if sampler == NATIVE:
        return copy.deepcopy(native)
    beta = has_beta_schedule(native)
    table = SAMPLERS if beta else FLOW_SAMPLERS if is_flow(native) else {}
    if sampler not in table:
        names = ", ".join([NATIVE, *table])
        raise ValueError(
            f"There is no sampler {sampler!r} for {type(pipe).__name__}; choose one of {names}."
        )
    name, settings = table[sampler]
    kind = getattr(diffusers, name)
    if beta:
        usual = {"timestep_spacing": timestep_spacing(native), "steps_offset": 1}
        return kind.from_config(native.config, **usual | settings)
    shift = native.config.get("shift", native.config.get("flow_shift", 1.0))
    taken = inspect.signature(kind.__init__).parameters
    shared = {key: value for key, value in native.config.items() if key in taken}
    return kind(**shared | {"flow_shift" if "flow_shift" in taken else "shift": shift} | settings)


def forwards(sampler: str | SchedulerMixin, steps: int) -> int:
    """Return the forwards of an unguided sampling; second-order methods make 2 N - 1.

    sampler: a name, or a scheduler, which counts its own timesteps.
    """
    if isinstance(sampler, str):
        name, _ = (SAMPLERS | FLOW_SAMPLERS).get(sampler, ("SchedulerMixin", {}))
        second_order = getattr(getattr(diffusers, name), "order", 1) > 1
        return 2 * steps - 1 if second_order else steps
    walker = copy.deepcopy(sampler)
    set_steps(walker, steps)
    return len(walker.timesteps)


def set_steps(scheduler: SchedulerMixin, steps: int) -> None:
    """Set a scheduler's timesteps without a pipeline, which gives some a shift by the size."""
    arguments: dict[str, float | None] = {}
    if scheduler.config.get("use_dynamic_shifting"):
        arguments["mu"] = 1.0
    if "intermediate_timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        arguments["intermediate_timesteps"] = None  # theirs are for two steps only
    scheduler.set_timesteps(steps, **arguments)


def with_sampler(pipe: DiffusionPipeline, sampler: str) -> DiffusionPipeline:
    """Return the same pipeline with a scheduler of its own; the given one stays as it is."""
    return with_parts(pipe, scheduler=make_scheduler(sampler, pipe))


def predicted_x0(
    scheduler: SchedulerMixin,
    model_output: torch.Tensor,
    timestep: torch.Tensor,
    sample: torch.Tensor,
) -> torch.Tensor:
    """Return the x0 that a prediction at a step amounts to, like sample.

    Equation 2 of the paper for predicted noise e, x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) e,
    and its counterparts: for v, for a flow's velocity, x_t = x0 + sigma v, and a rotation for the
    consistency models of trigonometric flow.
    sample and timestep as `scheduler.step` takes them, which was not called for this step yet.
    """
    if scheduler.config.get("prediction_type") == "sample":
        return model_output
    if scheduler.config.get("prediction_type") == "trigflow":
        angle = float(timestep)
        return math.cos(angle) * sample - math.sin(angle) * model_output
    if hasattr(scheduler, "sigmas"):
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        sigma = scheduler.sigmas[scheduler.step_index]
        if is_flow(scheduler):
            return sample - sigma.item() * model_output
        alpha_bar = 1 / (1 + sigma**2)
    elif hasattr(scheduler, "alphas_cumprod"):
        alpha_bar = scheduler.alphas_cumprod[timestep]
    else:
        raise ValueError(f"{type(scheduler).__name__} does not tell its noise levels.")
    x = scheduler.scale_model_input(sample, timestep)  # of unit variance, for every sampler
    signal, noise = alpha_bar.sqrt().item(), (1 - alpha_bar).sqrt().item()
    if scheduler.config.prediction_type == "v_prediction":
        return signal * x - noise * model_output
    return (x - noise * model_output) / signal


@contextlib.contextmanager
def with_step(scheduler: SchedulerMixin, step: Callable) -> Iterator[None]:
    """While open, a function stands in for the scheduler's step."""
    before = vars(scheduler).get("step")
    scheduler.step = functools.wraps(scheduler.step)(step)  # pipelines read from its signature
    try:
        yield
    finally:  # a step of its own would hold the scheduler until the next full garbage collection
        del scheduler.step
        if before is not None:
            scheduler.step = before


@contextlib.contextmanager
def watch_x0(scheduler: SchedulerMixin, on_x0: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """While open, a scheduler of the caller's own calls on_x0 with the predicted x0 each step."""
    step = scheduler.step

    def watched(model_output, timestep, sample, *args, **kwargs):
        on_x0(predicted_x0(scheduler, model_output, timestep, sample))
        return step(model_output, timestep, sample, *args, **kwargs)

    with with_step(scheduler, watched):
        yield
