"""The samplers people know by name, as diffusers schedulers (paper, appendix A.10)."""

import copy

from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
)

# What another scheduler's config may lack is always set: from_config would take defaults that Stable Diffusion does not use.
SAMPLERS = {
    "DDIM": (DDIMScheduler, {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False,
                             "thresholding": False}),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {"timestep_spacing": "leading", "steps_offset": 1, "algorithm_type": "dpmsolver++", "thresholding": False,
                                               "use_karras_sigmas": False, "final_sigmas_type": "zero"}),
    "DPM++ SDE": (DPMSolverMultistepScheduler, {"timestep_spacing": "leading", "steps_offset": 1, "algorithm_type": "sde-dpmsolver++", "thresholding": False,
                                                "use_karras_sigmas": False, "final_sigmas_type": "zero"}),
    "Euler": (EulerDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": False}),
    # The paper's "EDM": its second-order Heun solver on Karras sigmas; two forwards a step but for the last.
    "Heun (EDM)": (HeunDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": True}),
}


def make_scheduler(sampler: str, pipe: DiffusionPipeline) -> SchedulerMixin:
    """A new scheduler of that name with the noise schedule and prediction type of the pipeline's own.

    Raises ValueError for an unknown name.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"There is no sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}.")
    scheduler_class, settings = SAMPLERS[sampler]
    return scheduler_class.from_config(pipe.scheduler.config, **settings)


def with_sampler(pipe: DiffusionPipeline, sampler: str) -> DiffusionPipeline:
    """The same pipeline, on the same weights, with a scheduler of its own; the given one is left as it is."""
    twin = copy.copy(pipe)
    twin.scheduler = make_scheduler(sampler, pipe)
    return twin
