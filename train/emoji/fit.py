"""One resumable training loop for the small networks of this folder."""

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

LOG_EVERY = 50  # steps


def add_options(parser: argparse.ArgumentParser, *, steps: int, lr: float, batch_size: int) -> None:
    """Add the options of a training: how long, how fast, where."""
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
    *,
    lr: float,
    steps: int,
    until: float | None = None,
    seed: int = 0,
    ema: float = 0.999,
    save_every: int = 500,
    device: torch.device = torch.device("cpu"),
) -> nn.Module:
    """Minimise loss(generator) over the model's parameters; return the model with averaged weights.

    AdamW, gradients clipped to norm 1, a warm-up over the first 2 % of the training and a cosine down to 3 % of lr.
    On a GPU the loss is computed under autocast in bfloat16.  Every step draws its randomness from
    (seed, step), so a run that is started again from the checkpoint goes on as if it had not stopped.

    Args:
        until: The time, in seconds since 1970, at which to be done; steps are not counted then, and the
            learning rate follows the clock.
        ema: Decay of the average over the weights, shorter at the start.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
    )
    average = [p.detach().clone() for p in parameters]
    start, done = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        for p, value in zip(parameters, state["parameters"], strict=True):
            p.data.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        average, start, done = state["average"], state["step"], state["done"]

    def progress(step: int) -> float:
        if until is None:
            return step / steps
        left = until - time.time()
        return 1 - (1 - done) * left / (until - began) if left > 0 else 1

    def save(step: int, progress: float) -> None:
        state = {
            "parameters": [p.detach() for p in parameters],
            "optimizer": optimizer.state_dict(),
            "average": average,
            "step": step,
            "done": progress,
        }
        torch.save(state, checkpoint.with_suffix(".part"))
        os.replace(checkpoint.with_suffix(".part"), checkpoint)

    began, running, step = time.time(), torch.zeros((), device=device), start
    generator = torch.Generator(device)
    log = checkpoint.with_suffix(".log").open("a", encoding="utf-8")
    bar = tqdm(initial=start, total=steps if until is None else None, mininterval=10)
    bar.set_description(checkpoint.stem)
    while (fraction := progress(step)) < 1:
        cosine = (1 + math.cos(math.pi * fraction)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (fraction + 1e-3) / 0.02) * (0.03 + 0.97 * cosine)
        generator.manual_seed(seed * 10**9 + step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value = loss(generator)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        torch._foreach_lerp_(
            average, [p.detach() for p in parameters], 1 - min(ema, step / (step + 9))
        )
        running += value.detach()
        bar.update()
        if step % LOG_EVERY == 0:
            mean = running.item() / LOG_EVERY
            running.zero_()
            bar.set_postfix(loss=f"{mean:.4f}")
            print(f"{step}\t{time.time() - began:.1f}\t{mean:.5f}", file=log, flush=True)
        if step % save_every == 0:
            save(step, fraction)
    bar.close()
    log.close()
    save(step, 1.0)
    for p, mean in zip(parameters, average, strict=True):
        p.data.copy_(mean)
    return model.eval()
