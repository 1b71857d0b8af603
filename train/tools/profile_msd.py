"""Time one training step against its parts: N + 1 forwards and one backward.

    python train/tools/profile_msd.py --backbone assets/emoji --output msd.json
    python train/tools/profile_msd.py --backbone sd21-base --random_weights --dtype bf16 \\
        --rank 128 --batch_size 1 --rounds 1

The step is refine, sample N steps, loss, backward, as in train_refiner.py. The parts are timed
alone on the same tensors, taking turns with the step; the ratio is the median over rounds. Peak
memory is that of a process of its own which takes one step of N = 5 or 20: resident memory on a
CPU, allocated memory on CUDA.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params

from noiserefine import Refiner, draw_noise
from noiserefine.denoiser import as_latents, denoiser, first_step, guidance_arguments
from noiserefine.guidance import sample_latents
from noiserefine.models.devices import default_device
from noiserefine.models.loading import load_pipeline
from noiserefine.msd import msd_loss, sampler_gain
from noiserefine.noise import encode_prompt
from noiserefine.samplers import with_sampler
from train.common import argument_parser, run_script, write_json
from train.tools.architectures import BACKBONE_HELP, DTYPES, random_pipeline
from train.tools.benchmark import synchronize
from train.tools.memory import peak_bytes

STEPS = 10  # N of the timed step
PEAK_STEPS = (5, 20)


class Step:
    """One step of training on random noise, and its parts."""

    def __init__(self, args: argparse.Namespace):
        self.dtype = DTYPES[args.dtype]
        load = random_pipeline if args.random_weights else load_pipeline
        self.pipe = load(args.backbone, default_device(), self.dtype)
        self.refiner = Refiner.create(self.pipe, args.rank)
        denoiser(self.pipe).requires_grad_(False)
        cast_training_params(self.refiner.network)
        self.sampling_pipe = with_sampler(self.pipe, "DDIM")
        self.x_T = draw_noise(self.pipe, 0, args.batch_size).to(self.pipe.device)
        self.embeds: dict[str, Any] = encode_prompt(self.pipe, ["a cat"] * args.batch_size)

    def refine(self) -> torch.Tensor:
        """Return the correction, with gradient."""
        enabled = self.dtype != torch.float32
        with torch.autocast(self.pipe.device.type, self.dtype, enabled=enabled):
            return self.refiner.correction(self.x_T, self.embeds)

    def whole(self, steps: int) -> None:
        """Refine, sample, and go backward."""
        x_hat = self.x_T + self.refine()
        x0 = sample_latents(self.sampling_pipe, x_hat, self.embeds, steps).float()
        gain = sampler_gain(self.sampling_pipe.scheduler, steps)
        msd_loss(x0, x_hat, torch.zeros_like(x0), gain).backward()

    @torch.no_grad()
    def forwards(self) -> None:
        """Evaluate the bare network as often as the sampling does."""
        call = {"latents": as_latents(self.pipe, self.x_T)}
        call |= guidance_arguments(self.pipe) | self.embeds
        for _ in range(STEPS):
            first_step(self.pipe, denoiser(self.pipe), **call)

    def ratio(self) -> float:
        """Return the time of the step over that of its parts."""
        whole, _ = self._time(lambda: self.whole(STEPS))
        refining, correction = self._time(self.refine)
        backward, _ = self._time(lambda: correction.square().mean().backward())
        forwards, _ = self._time(self.forwards)
        return whole / (refining + backward + forwards)

    def _time(self, call):
        synchronize(self.pipe.device)
        began = time.perf_counter()
        result = call()
        synchronize(self.pipe.device)
        return time.perf_counter() - began, result


def peak(arguments: list[str], steps: int) -> int:
    """Return the peak memory of a step in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--peak", str(steps)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def main(arguments: list[str] | None = None) -> None:
    """Time what the command line asks for and write the figures."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--backbone", default="assets/emoji", help=BACKBONE_HELP)
    add("--random_weights", action="store_true", help="build the architecture, load nothing")
    add("--dtype", choices=DTYPES, default="fp32", help="of the frozen model, not the LoRA")
    add("--rank", type=int, default=32)
    add("--batch_size", type=int, default=32)
    add("--rounds", type=int, default=5)
    add("--output", type=Path, help="JSON file of the figures")
    add("--peak", type=int, help="print the peak memory of a step of this N, in bytes, and stop")
    args = parser.parse_args(arguments)
    step = Step(args)
    if args.peak:
        step.whole(args.peak)
        print(peak_bytes(step.pipe.device))
        return
    names = ("backbone", "random_weights", "dtype", "rank", "batch_size", "rounds")
    result = {name: getattr(args, name) for name in names} | {
        "step_over_parts": statistics.median(step.ratio() for _ in range(args.rounds)),
        "peak_bytes": {steps: peak(arguments, steps) for steps in PEAK_STEPS},
    }
    if args.output:
        write_json(args.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run_script(main)
