"""An optimiser step of a training preset on its architecture with random weights.

    python tests/tools/cuda/training.py sdxl

A step is refine, sample N steps, loss, backward, for every batch that is accumulated, and AdamW.
The parts are timed alone: N + 1 forwards and a backward (the goal: at most 1.05 times their sum).
"""

import statistics
from typing import Any

import torch
from arms import PROMPT, small_pipeline
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from results import arguments, device, peak_gib, report, reset_peak, timed
from train.options import DTYPES, Options, parse

from noiserefine import Refiner, draw_noise
from noiserefine.denoiser import denoiser
from noiserefine.guidance import sample_latents
from noiserefine.msd import msd_loss, sampler_gain
from noiserefine.noise import encode_prompt
from noiserefine.samplers import with_sampler
from train.tools.architectures import random_pipeline


class Step:
    """What an optimiser step needs."""

    def __init__(self, pipe: DiffusionPipeline, options: Options, dtype: torch.dtype):
        self.pipe, self.options, self.dtype = pipe, options, dtype
        self.sampler = with_sampler(pipe, options.sampler)
        self.refiner = Refiner.create(pipe, options.rank)
        denoiser(pipe).requires_grad_(False)
        network = self.refiner.network
        cast_training_params(network)
        if options.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=options.lr)
        self.gain = sampler_gain(self.sampler.scheduler, options.steps)
        self.x_T = draw_noise(pipe, 0, options.batch_size).to(device())
        self.embeds = encode_prompt(pipe, [PROMPT] * options.batch_size, guided=False)

    def refine(self) -> torch.Tensor:
        enabled = self.dtype != torch.float32
        with torch.autocast(device().type, self.dtype, enabled=enabled):
            return self.refiner.correction(self.x_T, self.embeds)

    def sample(self, x: torch.Tensor) -> torch.Tensor:
        return sample_latents(self.sampler, x, self.embeds, self.options.steps)

    def batch(self) -> None:
        """Accumulate the gradient of a batch."""
        x_hat = self.x_T + self.refine()
        x0 = self.sample(x_hat)
        msd_loss(x0.float(), x_hat, torch.zeros_like(x_hat), self.gain).backward()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parts(self) -> float:
        """Return the seconds of a batch's parts: N forwards, the refining pass, the backward."""
        forwards, _ = timed(lambda: self.sample(self.x_T))
        refining, correction = timed(self.refine)
        backward, _ = timed(lambda: correction.square().mean().backward())
        return forwards + refining + backward


def measure(step: Step, rounds: int) -> dict[str, Any]:
    """Return seconds of a batch, an update and an optimiser step, the peak and the parts' ratio."""
    step.batch()
    step.update()  # allocates AdamW's state
    reset_peak()
    batches, parts = [], []
    for _ in range(rounds):
        batches.append(timed(step.batch)[0])
        parts.append(step.parts())
    update, _ = timed(step.update)
    peak, batch = peak_gib(), statistics.median(batches)
    accumulated = step.options.gradient_accumulation_steps
    return {
        "batch_size": step.options.batch_size,
        "batch_seconds": round(batch, 3),
        "update_seconds": round(update, 3),
        "optimiser_step_seconds": round(accumulated * batch + update, 3),
        "accumulated_batches": accumulated,
        "batch_over_parts": round(
            statistics.median(a / b for a, b in zip(batches, parts, strict=True)), 3
        ),
        "peak_gib": peak,
        "finite": all(bool(p.isfinite().all()) for p in step.parameters),
    }


def main() -> None:
    args = arguments(__doc__, "preset")
    name = args.preset
    options = parse(["--preset", name, "--prompts", "none", "--output_dir", "none"])
    if args.small:
        options.mixed_precision, options.rank, options.batch_size = "no", 8, 2
    dtype = DTYPES[options.mixed_precision]
    torch.manual_seed(0)
    pipe = (
        small_pipeline(name).to(device()) if args.small else random_pipeline(name, device(), dtype)
    )
    built, step = timed(lambda: Step(pipe, options, dtype))
    trained = sum(p.numel() for p in step.parameters)
    report(
        f"{name}, refiner created", seconds=round(built, 1), parameters=trained, rank=options.rank
    )
    report(f"{name}, training", **measure(step, 1 if args.small else 2))


if __name__ == "__main__":
    main()
