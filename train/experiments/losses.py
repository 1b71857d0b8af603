"""Losses to compare multistep score distillation with, for train_refiner.py's `--loss`.

A loss is made of the pipeline and the trainer's options and gives the loss of a batch. It says
how many network evaluations it takes (appendix A.7) and what else it needs for each target.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline

from noiserefine.inversion import ddim_inversion
from train.options import Options
from train.targets import Batch

INVERSION_STEPS = 50


class NoiseLoss:
    """The distance of refined noise to the DDIM inversion of the guided image (section 3.1)."""

    def __init__(self, pipe: DiffusionPipeline, options: Options):
        self.pipe = pipe

    @staticmethod
    def evaluations(options: Options) -> tuple[int, int]:
        """Return the evaluations for each target, beside its sampling, and for each item."""
        return INVERSION_STEPS, 0

    def extra_tensors(self, x0: torch.Tensor, embeds: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the noise that each guided image is inverted to, (B, C, h, w)."""
        return {"inverted": ddim_inversion(self.pipe, x0, embeds, INVERSION_STEPS)}

    def __call__(self, x_hat: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the mean squared distance of x_hat, (B, C, h, w), to the inverted noise."""
        return F.mse_loss(x_hat, batch.extra["inverted"])
