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
from pathlib import Path

import torch
from diffusers.training_utils import cast_training_params

from noiserefine import Refiner, draw_noise
from noiserefine.denoiser import as_latents, denoiser, first_step, guidance_arguments
from noiserefine.models.devices import default_device
from noiserefine.models.loading import load_pipeline
from noiserefine.noise import encode_prompt
from noiserefine.samplers import samplers_of
from train.common import argument_parser, run_script, write_json
from train.options import Options
from train.targets import Batch
from train.tools.architectures import BACKBONE_HELP, DTYPES, PROMPT, random_pipeline
from train.tools.memory import peak_bytes, timed
from train.train_refiner import MSD

STEPS = 10  # N of the timed step
PEAK_STEPS = (5, 20)


class Step:
    """One step of training on random noise, and its parts."""

    def __init__(self, args: argparse.Namespace, steps: int):
        self.dtype = DTYPES[args.dtype]
        load = random_pipeline if args.random_weights else load_pipeline
        self.pipe = load(args.backbone, default_device(), self.dtype)
        self.refiner = Refiner.create(self.pipe, args.rank)
        denoiser(self.pipe).requires_grad_(False)
        cast_training_params(self.refiner.network)
        options = Options(sampler=samplers_of(self.pipe)[0], steps=steps)
        self.steps, self.loss = steps, MSD(self.pipe, options)
        x_T = draw_noise(self.pipe, 0, args.batch_size).to(self.pipe.device)
        embeds = encode_prompt(self.pipe, [PROMPT] * args.batch_size, guided=False)
        scales = torch.ones(args.batch_size)
        self.batch = Batch(x_T, embeds, scales, torch.zeros_like(x_T), extra={}, seed=0)

    def refine(self) -> torch.Tensor:
        """Return the correction, with gradient."""
        enabled = self.dtype != torch.float32
        with torch.autocast(self.pipe.device.type, self.dtype, enabled=enabled):
            return self.refiner.correction(self.batch.x_T, self.batch.embeds)

    def whole(self) -> None:
        """Refine, sample, and go backward."""
        self.loss(self.batch.x_T + self.refine(), self.batch).backward()

    @torch.no_grad()
    def forwards(self) -> None:
        """Evaluate the bare network as often as the sampling does."""
        call = {"latents": as_latents(self.pipe, self.batch.x_T)}
        call |= guidance_arguments(self.pipe) | self.batch.embeds
        for _ in range(self.steps):
            first_step(self.pipe, denoiser(self.pipe), **call)

    def ratio(self) -> float:
        """Return the time of the step over that of its parts."""
        device = self.pipe.device
        whole, _ = timed(self.whole, device)
        refining, correction = timed(self.refine, device)
        backward, _ = timed(lambda: correction.square().mean().backward(), device)
        forwards, _ = timed(self.forwards, device)
        return whole / (refining + backward + forwards)


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
    step = Step(args, args.peak or STEPS)
    if args.peak:
        step.whole()
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
