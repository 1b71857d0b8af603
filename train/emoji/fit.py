"""One resumable training loop for the small networks of this folder."""

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

LOG_EVERY = 50  # steps
WARMUP, FINAL_LR = 0.02, 0.03  # shares of the training and of the learning rate


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Length, speed and seed of a training.

    Attributes:
        lr: The highest learning rate.
        steps: The number of steps, where `until` is None.
        until: The time, in seconds since 1970, at which to be done; steps are not counted then, and
            the learning rate follows the clock.
        seed: Every step draws its randomness from (seed, step).
        ema: Decay of the average over the weights, shorter at the start.
        save_every: Steps between two checkpoints.
    """

    lr: float
    steps: int
    until: float | None = None
    seed: int = 0
    ema: float = 0.999
    save_every: int = 500


def add_options(parser: argparse.ArgumentParser, *, steps: int, lr: float, batch_size: int) -> None:
    """Add the options of a training: how long, how fast, on which device."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument(
        "--until",
        type=float,
        help="train until this time (seconds since 1970, `date +%%s`) and not for --steps",
    )
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--batch_size", type=int, default=batch_size)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))


def fit(
    model: nn.Module,
    loss: Callable[[torch.Generator], torch.Tensor],
    checkpoint: Path,
    settings: Settings,
) -> nn.Module:
    """Minimise loss(generator) over the model's parameters; return the model with averaged weights.

    AdamW with gradients clipped to norm 1. On a GPU the loss is computed under autocast in
    bfloat16. A run that is started again continues from the checkpoint as if it had not stopped.
    """
    state = _State(model, settings, checkpoint)
    schedule = _Schedule(settings, state.done)
    generator = torch.Generator(state.device)
    log = _Log(checkpoint, state.step, settings)
    while (progress := schedule.progress(state.step)) < 1:
        generator.manual_seed(settings.seed * 10**9 + state.step)
        with torch.autocast(state.device.type, torch.bfloat16, enabled=state.device.type == "cuda"):
            value = loss(generator)
        state.descend(value, schedule.lr(progress))
        log.add(state.step, value.detach())
        if state.step % settings.save_every == 0:
            state.save(progress)
    log.close()
    state.save(1.0)
    state.use_average()
    return model.eval()


class _Schedule:
    """Measure a training by its steps or by the clock, and set the learning rate accordingly."""

    def __init__(self, settings: Settings, done: float):
        self.settings, self.done, self.began = settings, done, time.time()

    def progress(self, step: int) -> float:
        """Return the share of the training that is done before a step; 1 ends it."""
        if self.settings.until is None:
            return step / self.settings.steps if step < self.settings.steps else 1.0
        left = self.settings.until - time.time()
        if left <= 0:
            return 1.0
        return 1 - (1 - self.done) * left / (self.settings.until - self.began)

    def lr(self, progress: float) -> float:
        """Return the learning rate: a linear warm-up times a cosine."""
        cosine = (1 + math.cos(math.pi * progress)) / 2
        warmup = min(1, (progress + 1e-3) / WARMUP)
        return self.settings.lr * warmup * (FINAL_LR + (1 - FINAL_LR) * cosine)


class _State:
    """Hold what a checkpoint restores: weights, their average, the optimizer and the progress."""

    def __init__(self, model: nn.Module, settings: Settings, checkpoint: Path):
        self.checkpoint, self.ema = checkpoint, settings.ema
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.lr,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=self.device.type == "cuda",
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self.step, self.done = 0, 0.0  # the progress at the start of this run
        if checkpoint.exists():
            self._load()

    def descend(self, loss: torch.Tensor, lr: float) -> None:
        """Take one step along the loss's gradient and update the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        weights = [p.detach() for p in self.parameters]
        torch._foreach_lerp_(self.average, weights, 1 - min(self.ema, self.step / (self.step + 9)))

    def save(self, progress: float) -> None:
        """Write the checkpoint; one that is interrupted leaves the previous checkpoint intact."""
        state = {
            "parameters": [p.detach() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "done": progress,
        }
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.checkpoint)

    def use_average(self) -> None:
        """Give the model the averaged weights."""
        for p, mean in zip(self.parameters, self.average, strict=True):
            p.data.copy_(mean)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True, map_location=self.device)
        for p, value in zip(self.parameters, state["parameters"], strict=True):
            p.data.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.step, self.done = state["average"], state["step"], state["done"]


class _Log:
    """Show the loss in a progress bar and write its mean beside the checkpoint."""

    def __init__(self, checkpoint: Path, step: int, settings: Settings):
        self.file = checkpoint.with_suffix(".log").open("a", encoding="utf-8")
        total = settings.steps if settings.until is None else None
        self.bar = tqdm(initial=step, total=total, mininterval=10, desc=checkpoint.stem)
        self.began = time.time()
        self.values: list[torch.Tensor] = []

    def add(self, step: int, loss: torch.Tensor) -> None:
        """Record the loss of the step that was just taken."""
        self.bar.update()
        self.values.append(loss)
        if step % LOG_EVERY == 0:
            mean = torch.stack(self.values).mean().item()
            self.values.clear()
            self.bar.set_postfix(loss=f"{mean:.4f}")
            seconds = time.time() - self.began
            print(f"{step}\t{seconds:.1f}\t{mean:.5f}", file=self.file, flush=True)

    def close(self) -> None:
        """End the bar and close the file."""
        self.bar.close()
        self.file.close()
