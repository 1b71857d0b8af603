"""One resumable training loop for the small networks of this folder."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm


def fit(
    model: nn.Module,
    loss: Callable[[torch.Generator], torch.Tensor],
    checkpoint: Path,
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    ema: float = 0.999,
    save_every: int = 500,
) -> nn.Module:
    """Minimises loss(generator) over the model's parameters; returns the model with averaged weights.

    AdamW, gradients clipped to norm 1, a warm-up over the first 2 % of the steps and a cosine down to 3 % of lr.
    Every step draws its randomness from (seed, step), so a run that is started again from the checkpoint
    goes on as if it had not stopped.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = [p.detach().clone() for p in parameters]
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for p, value in zip(parameters, state["parameters"], strict=True):
            p.data.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        average, start = state["average"], state["step"]

    running, progress = (
        None,
        tqdm(range(start, steps), initial=start, total=steps, mininterval=10, desc=checkpoint.stem),
    )
    for step in progress:
        factor = min(1, (step + 1) / (0.02 * steps)) * (
            0.03 + 0.97 * (1 + math.cos(math.pi * step / steps)) / 2
        )
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        value = loss(torch.Generator().manual_seed(seed * 10**9 + step))
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(
            average, [p.detach() for p in parameters], 1 - min(ema, (step + 1) / (step + 10))
        )
        running = value.item() if running is None else 0.99 * running + 0.01 * value.item()
        progress.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {
                "parameters": [p.detach() for p in parameters],
                "optimizer": optimizer.state_dict(),
                "average": average,
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
    for p, mean in zip(parameters, average):
        p.data.copy_(mean)
    return model.eval()
