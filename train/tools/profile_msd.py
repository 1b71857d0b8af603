"""Time and memory of one training step's loss against its parts: N + 1 forwards and one backward.

    python train/tools/profile_msd.py --backbone assets/emoji --json msd.json
    python train/tools/profile_msd.py --backbone sd21-base --random_weights --dtype bf16 --rank 128 --batch_size 1 --rounds 1

The step is refine, sample N steps, loss, backward, as in train_refiner.py.  The parts are timed alone on
the same tensors, taking turns with the step; the ratio is the median over rounds.  Peak memory is that
of a process of its own which takes one step of N = 5 or 20: resident memory on a CPU, allocated memory on CUDA.
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
from noiserefine.denoiser import first_step
from noiserefine.guidance import sample
from noiserefine.models.devices import default_device
from noiserefine.models.loading import load_pipeline
from noiserefine.msd import msd_loss, sampler_gain
from noiserefine.noise import encode_prompt
from noiserefine.samplers import with_sampler
from train.tools.architectures import random_pipeline
from train.tools.benchmark import DTYPES, synchronize
from train.tools.memory import peak_bytes


def timed(call, device: torch.device):
    synchronize(device)
    began = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - began, result


def peak(args: argparse.Namespace, steps: int) -> int:
    command = [
        sys.executable,
        __file__,
        "--backbone",
        args.backbone,
        "--rank",
        args.rank,
        "--batch_size",
        args.batch_size,
        "--dtype",
        args.dtype,
        *(["--random_weights"] if args.random_weights else []),
        "--peak",
        steps,
    ]
    return int(
        subprocess.run(
            [str(part) for part in command], check=True, capture_output=True, text=True
        ).stdout.split()[-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backbone",
        default="assets/emoji",
        help="folder or hub id of the pipeline; with --random_weights sd21, sd21-base, sd-turbo or sdxl",
    )
    parser.add_argument(
        "--random_weights",
        action="store_true",
        help="build the architecture instead of loading a model",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="fp32",
        help="of the frozen model; the LoRA is in float32",
    )
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument(
        "--peak",
        type=int,
        help="only take a step of this N and print the process's peak memory in bytes",
    )
    args = parser.parse_args()
    dtype = DTYPES[args.dtype]
    pipe = (
        random_pipeline(args.backbone, default_device(), dtype)
        if args.random_weights
        else load_pipeline(args.backbone, dtype=dtype)
    )
    refiner = Refiner.create(pipe, args.rank)
    pipe.unet.requires_grad_(False)
    cast_training_params(refiner.network)
    sampling_pipe = with_sampler(pipe, "DDIM")
    x_T = draw_noise(pipe, 0, args.batch_size).to(pipe.device)
    embeds: dict[str, Any] = encode_prompt(pipe, ["a cat"] * args.batch_size)
    target, call = torch.zeros_like(x_T), {"latents": x_T.to(dtype), "guidance_scale": 1.0} | embeds

    def refine() -> torch.Tensor:
        with torch.autocast(pipe.device.type, dtype, enabled=dtype != torch.float32):
            return refiner.correction(x_T, embeds)

    def loss(steps: int) -> torch.Tensor:
        x_hat = x_T + refine()
        x0 = sample(
            sampling_pipe,
            num_inference_steps=steps,
            latents=x_hat.detach().to(dtype),
            output_type="latent",
            **embeds,
        ).images
        return msd_loss(x0.float(), x_hat, target, gains[steps])

    gains = {steps: sampler_gain(sampling_pipe.scheduler, steps) for steps in (5, 10, 20)}
    if args.peak:
        loss(args.peak).backward()
        print(peak_bytes(pipe.device))
        return
    ratios = []
    for _ in range(args.rounds):
        step, _ = timed(lambda: loss(10).backward(), pipe.device)
        refining, correction = timed(refine, pipe.device)
        backward, _ = timed(lambda c=correction: c.square().mean().backward(), pipe.device)
        with torch.no_grad():
            forward, _ = timed(
                lambda: [first_step(pipe, pipe.unet, **call) for _ in range(10)],
                pipe.device,
            )
        ratios.append(step / (refining + backward + forward))
    result = {
        "backbone": args.backbone,
        "random_weights": args.random_weights,
        "dtype": args.dtype,
        "rank": args.rank,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "step_over_parts": statistics.median(ratios),
        "peak_bytes": {steps: peak(args, steps) for steps in (5, 20)},
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
