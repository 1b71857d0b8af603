"""An optimiser step of a training preset on its architecture with random weights.

    python tests/tools/cuda/training.py sdxl

A step is refine, sample N steps, loss, backward, for every batch that is accumulated, and AdamW.
The parts are timed alone: N + 1 forwards and a backward (the goal: at most 1.05 times their sum).
The preset is measured, and what needs the least memory: one target a batch, gradient checkpointing
and a small rank.
"""

import statistics
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from arms import small_pipeline
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from results import arguments, device, free_memory, peak_gib, report, reset_peak, timed

from noiserefine import Refiner, draw_noise
from noiserefine.denoiser import denoiser
from noiserefine.guidance import sample_latents
from noiserefine.noise import encode_prompt
from noiserefine.samplers import samplers_of
from train.options import DTYPES, Options, default_options
from train.tools.architectures import PROMPT, random_pipeline
from train.train_refiner import MSD

LEAST_MEMORY: dict[str, Any] = dict(batch_size=1, gradient_checkpointing=True, rank=32)
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class Step:
    """What an optimiser step of the trainer works with."""

    def __init__(self, pipe: DiffusionPipeline, options: Options):
        self.options, self.dtype = options, DTYPES[options.mixed_precision]
        self.refiner = Refiner.create(pipe, options.rank)
        denoiser(pipe).requires_grad_(False)
        network = self.refiner.network
        cast_training_params(network)
        if options.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=options.lr)
        self.loss = MSD(pipe, options)
        x_T = draw_noise(pipe, 0, options.batch_size).to(device())
        embeds = encode_prompt(pipe, [PROMPT] * options.batch_size, guided=False)
        self.batch = SimpleNamespace(x_T=x_T, embeds=embeds, seed=0, x0_guide=torch.zeros_like(x_T))

    def refine(self) -> torch.Tensor:
        enabled = self.dtype != torch.float32
        with torch.autocast(device().type, self.dtype, enabled=enabled):
            return self.refiner.correction(self.batch.x_T, self.batch.embeds)

    def accumulate(self) -> None:
        """Add the gradient of a batch."""
        self.loss(self.batch.x_T + self.refine(), self.batch).backward()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parts(self) -> float:
        """Return the seconds of a batch's parts: N forwards, the refining pass, the backward."""
        x_T, embeds, steps = self.batch.x_T, self.batch.embeds, self.options.steps
        forwards, _ = timed(lambda: sample_latents(self.loss.pipe, x_T, embeds, steps))
        refining, correction = timed(self.refine)
        backward, _ = timed(lambda: correction.square().mean().backward())
        return forwards + refining + backward


def measure(step: Step, rounds: int) -> dict[str, Any]:
    """Return seconds of a batch, an update and an optimiser step, the peak and the parts' ratio."""
    step.accumulate()
    step.update()  # allocates AdamW's state
    reset_peak()
    batches, ratios = [], []
    for _ in range(rounds):
        batches.append(timed(step.accumulate)[0])
        ratios.append(batches[-1] / step.parts())
    update, _ = timed(step.update)
    batch, accumulated = statistics.median(batches), step.options.gradient_accumulation_steps
    return {
        "rank": step.options.rank,
        "parameters": sum(p.numel() for p in step.parameters),
        "batch_size": step.options.batch_size,
        "gradient_checkpointing": step.options.gradient_checkpointing,
        "accumulated_batches": accumulated,
        "batch_seconds": round(batch, 3),
        "update_seconds": round(update, 3),
        "optimiser_step_seconds": round(accumulated * batch + update, 3),
        "batch_over_parts": round(statistics.median(ratios), 3),
        "peak_gib": peak_gib(),
    }


def gib(pipe: DiffusionPipeline, *names: str) -> float:
    """Return what the weights of a pipeline's parts take."""
    networks = [pipe.components[name] for name in names if pipe.components.get(name) is not None]
    weights = [p.numel() * p.element_size() for part in networks for p in part.parameters()]
    return round(sum(weights) / 2**30, 2)


def main() -> None:
    args = arguments(__doc__, "preset")
    name, options = args.preset, default_options(args.preset)
    torch.manual_seed(0)
    if args.small:
        options = replace(options, mixed_precision="no", rank=8, batch_size=2)
        pipe = small_pipeline(name).to(device())
    else:
        pipe = random_pipeline(name, device(), DTYPES[options.mixed_precision])
    options.sampler = options.sampler or samplers_of(pipe)[0]
    report(f"{name}, text encoders", gib=gib(pipe, *TEXT_ENCODERS), vae_gib=gib(pipe, "vae"))
    for title, chosen in (
        (f"{name}, training", options),
        (f"{name}, training in the least memory", replace(options, **LEAST_MEMORY)),
    ):
        report(title, **measure(Step(pipe, chosen), 1 if args.small else 3))
        free_memory()


if __name__ == "__main__":
    main()
