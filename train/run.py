"""A training's progress in its folder: checkpoint, log, validation, and when it stops."""

import contextlib
import json
import math
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from train.common import atomic, interruptible, memory_advice
from train.options import Options

STATS = "stats.jsonl"
WRONG_CHECKPOINTING = ("ChromaTransformer2DModel",)  # diffusers 0.42: without its attention mask
MAX_SKIPPED = 20  # steps in a row; fp16's loss scale needs a few to come down
STAGES = {  # in which the memory may not be enough
    "loading": "to load the model",
    "encoding": "to encode prompts",
    "sampling": "to sample targets or validation images",
    "training": "to train",
}


class Run:
    """The steps of a training: from the last checkpoint on, logged, validated and saved."""

    def __init__(
        self,
        options: Options,
        accelerator: Accelerator,
        total_steps: int,
        checkpoint: "Checkpoint",
        validate: Callable[[int], dict[str, float]] | None = None,
    ):
        self.options, self.accelerator, self.total_steps = options, accelerator, total_steps
        self.checkpoint, self.validate = checkpoint, validate
        self.start = checkpoint.load()
        self.folder, self.log = Path(options.output_dir), None
        if accelerator.is_main_process:
            self.log = Log(self.folder, self.start)
        accelerator.wait_for_everyone()
        self.values: dict[str, float] = {}  # of the step in progress
        self.skipped_in_a_row = 0

    def steps(self) -> Iterator[int]:
        """Yield the number of every step, from 0; record what was done after each.

        Raise KeyboardInterrupt at the end of a step, with a checkpoint, once any process is asked
        to stop, and ArithmeticError after MAX_SKIPPED steps in a row that were not finite.
        """
        progress = tqdm(
            range(self.start, self.total_steps),
            initial=self.start,
            total=self.total_steps,
            desc="train",
            disable=not self.accelerator.is_local_main_process,
        )
        to_guided = "?"  # how far the refined latents have come, at the last validation
        with interruptible() as self.stop:
            for step in progress:
                if self._has_converged(step):
                    progress.write(f"Stopped at step {step}: no closer to guided (--patience).")
                    return
                began = time.perf_counter()
                yield step
                self.values["seconds"] = time.perf_counter() - began
                self._record(step + 1)
                shown = {"loss": f"{self.values['loss']:.4f}"}
                if "validation_percent" in self.values:
                    to_guided = f"{self.values['validation_percent']:.0f} %"
                progress.set_postfix(shown | {"to guided": to_guided})
                self._end_early()

    def accept(self, loss: torch.Tensor, gradient_norm: torch.Tensor, lr: float) -> bool:
        """Return whether the optimiser may step: a step that is not finite changes nothing.

        fp16's scaler skips such a step by itself, and lowers its scale then.
        """
        stop = torch.tensor(float(self.stop.is_set()), device=loss.device)
        both = self.accelerator.reduce(torch.stack([loss.float(), stop]), "mean")
        mean_loss, self.stopping = both.tolist()  # the same in every process
        norm = float(gradient_norm)
        finite = math.isfinite(mean_loss) and math.isfinite(norm)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.values = {"loss": mean_loss, "grad_norm": norm, "lr": lr, "skipped": int(not finite)}
        return finite or self.accelerator.scaler is not None

    def _has_converged(self, step: int) -> bool:
        """Return whether --patience ends the run, of which every process reads in the log."""
        patience = self.options.patience
        validated = step == self.start or step % self.options.validate_every == 0
        return bool(patience) and validated and has_converged(read_log(self.folder), patience)

    def _record(self, done: int) -> None:
        last = done == self.total_steps
        if self.log:
            if self.validate and (last or done % self.options.validate_every == 0):
                self.values |= self.validate(done)
            self.log.write({"step": done} | self.values)
            validated = "validation_refined" in self.values and bool(self.options.patience)
            if last or validated or self.stopping or done % self.options.save_every == 0:
                self.checkpoint.save(done)
        self.accelerator.wait_for_everyone()

    def _end_early(self) -> None:
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise ArithmeticError(
                f"The loss or its gradient was not finite for {MAX_SKIPPED} steps in a row, which "
                "changed nothing. Try a lower --lr, --mixed_precision bf16 or no, or targets of a "
                "lower guidance scale, in another --output_dir."
            )
        if self.stopping:
            raise KeyboardInterrupt


class Checkpoint:
    """The state of training after a step: parameters, optimiser, learning rate, loss scale."""

    def __init__(self, path: Path, parameters: list[torch.nn.Parameter], **parts: Any):
        self.path, self.parameters = path, parameters
        self.parts = {name: part for name, part in parts.items() if part is not None}

    def load(self) -> int:
        """Restore the saved state and return its step; 0 if nothing was saved.

        Raise ValueError for a damaged file.
        """
        if not self.path.exists():
            return 0
        if not zipfile.is_zipfile(self.path):
            raise ValueError(
                f"{self.path} is damaged: remove it, and the same command trains from the first "
                "step on, with the targets that exist."
            )
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for parameter, value in zip(self.parameters, state["parameters"], strict=True):
            parameter.data.copy_(value)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        return state["step"]

    def save(self, step: int) -> None:
        """Write the state after a step."""
        state = {name: part.state_dict() for name, part in self.parts.items()} | {
            "step": step,
            "parameters": [parameter.detach().cpu() for parameter in self.parameters],
        }
        with atomic(self.path) as part:
            torch.save(state, part)


class Log:
    """STATS, a line for each step, and the same values as TensorBoard's curves."""

    def __init__(self, folder: Path, start: int):
        """Continue a log after its first `start` lines: later steps are taken again."""
        self.path = folder / STATS
        lines = self.path.read_text().splitlines()[:start] if self.path.exists() else []
        with atomic(self.path) as part:
            part.write_text("".join(line + "\n" for line in lines))
        self.board = SummaryWriter(folder / "tensorboard", purge_step=start + 1)

    def write(self, line: dict[str, float]) -> None:
        """Append the values of a step."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            self.board.add_scalar(name, value, line["step"])


def stage_advice(
    options: Options, stage: str, network: Any = None
) -> contextlib.AbstractContextManager[None]:
    """Return what turns running out of memory into a MemoryError with options that need less.

    stage: of STAGES, in which it runs out; network: the refining one, of the training.
    """
    return memory_advice(STAGES[stage], _advice(options, stage, network))


def _advice(options: Options, stage: str, network: Any) -> str:
    """Return what to change: only what takes memory in this stage."""
    half = ["--mixed_precision bf16"] * (options.mixed_precision == "no")
    if stage == "loading":
        return "The model alone needs more" + "".join(f": give {change}" for change in half) + "."
    advice, changes = [], ["a smaller --rank", *half]
    binding = options.guidance_scale_range  # each call has one scale: its size binds the targets
    if stage != "training" and options.target_batch_size > 1 and not binding:
        advice.append(f"--target_batch_size {options.target_batch_size // 2}")
    if stage == "training":
        if not options.gradient_checkpointing and not checkpointing_problem(network):
            advice.append("--gradient_checkpointing True")
        if options.batch_size > 1:
            accumulated = options.gradient_accumulation_steps * options.batch_size
            advice.append(f"--batch_size 1 --gradient_accumulation_steps {accumulated}")
        changes += ["--optimizer adamw8bit"] * (options.optimizer == "adamw")
        changes += ["--fp8 True"] * (options.gradient_checkpointing and not options.fp8)
    advice.append(f"{' and '.join(changes)} in another --output_dir, with --targets_of this one")
    return (
        f"Run the same command again with {', or '.join(advice)}: targets and checkpoints that "
        "exist are kept."
    )


def checkpointing_problem(network: Any) -> str:
    """Return why a network cannot recompute activations in its backward pass; empty if it can."""
    kind = type(network).__name__
    if kind in WRONG_CHECKPOINTING:
        return f"diffusers' gradient checkpointing gives {kind} wrong gradients"
    if not getattr(network, "_supports_gradient_checkpointing", False):
        return f"{kind} offers no gradient checkpointing"
    return ""


def has_converged(log: list[dict[str, float]], patience: int) -> bool:
    """Return whether the last `patience` validations came no closer to the guided latents."""
    distances = [line["validation_refined"] for line in log if "validation_refined" in line]
    if len(distances) <= patience:
        return False
    return min(distances[-patience:]) >= min(distances[:-patience])


def read_log(folder: Path) -> list[dict[str, float]]:
    """Return the values of all steps of a run."""
    return [json.loads(line) for line in (folder / STATS).read_text().splitlines()]
