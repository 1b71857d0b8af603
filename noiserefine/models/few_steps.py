"""The schedulers that few-step LoRAs need (LCM, TCD, Lightning, ...)."""

import json
import re
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin

# By a word in the LoRA's name, as their makers publish them: the scheduler, and the steps it is
# for.
FEW_STEPS = {
    "lcm": ("LCMScheduler", "4 to 8"),
    "tcd": ("TCDScheduler", "4 to 8"),
    "dmd2": ("LCMScheduler", "1 to 4"),
    "hyper": ("DDIMScheduler", "2 to 8"),
    "lightning": ("EulerDiscreteScheduler", "2 to 8"),
    "turbo": ("EulerDiscreteScheduler", "1 to 4"),
}


def few_step_scheduler(
    pipe: DiffusionPipeline, path: Path, name: str
) -> tuple[SchedulerMixin, str] | None:
    """Return the scheduler that a LoRA needs and what to say of it; None for a LoRA of many steps.

    It is the one in the LoRA's folder (scheduler/scheduler_config.json or scheduler_config.json),
    else the one that a word in its name stands for, starting at the last timestep ("trailing").
    Raises ValueError for an unusable configuration; its message completes "The LoRA NAME ...".
    """
    if not hasattr(pipe.scheduler.config, "beta_start"):  # of another kind than these LoRAs are for
        return None
    for file in ("scheduler/scheduler_config.json", "scheduler_config.json"):
        if (path.parent / file).is_file():
            scheduler = _read_scheduler(pipe, path.parent / file)
            return scheduler, _says("The LoRA's folder", scheduler, "few")
    words = re.split(r"[^a-z0-9]+", " ".join([*Path(name).parts[-2:], path.stem]).lower())
    for word, (kind_name, steps) in FEW_STEPS.items():
        if word in words:
            kind: Any = getattr(diffusers, kind_name)
            scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing="trailing")
            return scheduler, _says("The LoRA's name", scheduler, steps)
    return None


def _read_scheduler(pipe: DiffusionPipeline, file: Path) -> SchedulerMixin:
    """Return the scheduler of a configuration, which the pipeline's own completes."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        kind: Any = getattr(diffusers, str(settings.pop("_class_name", "")), None)
        sound = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
        if not sound:
            raise ValueError("it names no scheduler of diffusers")
        return kind.from_config({**pipe.scheduler.config, **settings})
    except Exception as error:  # what a stranger's configuration makes diffusers raise
        raise ValueError(f"brings {file}, which makes no scheduler: {error}") from error


def _says(where: str, scheduler: SchedulerMixin, steps: str) -> str:
    name = type(scheduler).__name__.removesuffix("Scheduler").removesuffix("Discrete")
    return (
        f"{where} says that it is for few steps: sample it with {steps} steps, guidance scale 1 "
        f"and the sampler Native, which is now {name} from the last timestep on."
    )
