"""Time the whole pipeline of the three arms: text encoder, (refiner,) sampling, decoding.

    python train/tools/benchmark.py --backbone assets/emoji --refiner assets/refiners/emoji \\
        --output benchmark.json
    python train/tools/benchmark.py --backbone sdxl --random_weights --dtype fp16

Speed and memory do not depend on weights: without --refiner an untrained one is timed, and with
--random_weights the bare architecture. The arms take turns, so that a slower minute of the machine
slows all of them; the ratios are medians over the rounds of the ratio within a round. A model that
cannot be guided has no guided arm.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from noiserefine import Refiner, draw_noise
from noiserefine.denoiser import ForwardCounter, as_latents, can_guide, denoiser, precision
from noiserefine.guidance import sample
from noiserefine.models.devices import default_device, default_dtype
from noiserefine.models.loading import load_pipeline
from noiserefine.noise import encode_prompt
from noiserefine.samplers import SAMPLER_NAMES, samplers_of, with_sampler
from train.common import argument_parser, run_script, write_json
from train.tools.architectures import BACKBONE_HELP, DTYPES, PROMPT, random_pipeline
from train.tools.memory import peak_bytes, reset_peak, timed

ARMS = ("unguided", "guided", "refined")
GUIDANCE_SCALE = 7.0


def main(arguments: list[str] | None = None) -> None:
    """Time what the command line asks for and write the figures."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--backbone", default="assets/emoji", help=BACKBONE_HELP)
    add("--random_weights", action="store_true", help="build the architecture, load nothing")
    add("--refiner", help="folder or hub id; an untrained refiner if not given, as fast")
    add(
        "--mode",
        choices=["merged", "shared"],
        default="merged",
        help="merged: the LoRA is folded into weights of the refiner's own; shared: it is not",
    )
    add("--rank", type=int, default=128, help="rank of the untrained refiner")
    add("--dtype", choices=DTYPES, help="by default the device's own")
    add("--sampler", choices=SAMPLER_NAMES, help="by default the model's own")
    add("--steps", type=int, default=20)
    add("--batch_size", type=int, default=1, help="images a call")
    add("--rounds", type=int, default=20, help="calls of each arm after the --warmup ones")
    add("--warmup", type=int, default=2)
    add("--output", type=Path, help="JSON file of the figures")
    args = parser.parse_args(arguments)
    device = default_device()
    dtype = DTYPES[args.dtype] if args.dtype else default_dtype(device)
    load = random_pipeline if args.random_weights else load_pipeline
    pipe = load(args.backbone, device, dtype)
    args.sampler = args.sampler or samplers_of(pipe)[0]
    if args.refiner:
        refiner = Refiner.from_pretrained(args.refiner, pipe, merge=args.mode == "merged")
    else:
        refiner = Refiner.create(pipe, args.rank)
        if args.mode == "merged":
            refiner.merge()
        refiner.network.to(dtype)  # a new LoRA is in single precision, for training
    result = measure(pipe, refiner, args)
    if args.output:
        write_json(args.output, result)
    print(json.dumps(result, indent=2))


def measure(pipe: DiffusionPipeline, refiner: Refiner, args: argparse.Namespace) -> dict:
    """Return seconds, forwards and peak bytes of each arm, and the ratios of their times."""
    arms = [arm for arm in ARMS if arm != "guided" or can_guide(pipe)]
    weights = {id(p): p.numel() * p.element_size() for p in denoiser(pipe).parameters()}
    added = [p for p in refiner.network.parameters() if id(p) not in weights]
    x_T = draw_noise(pipe, 0, args.batch_size)
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    forwards, peaks = {}, {}
    pipe = with_sampler(pipe, args.sampler)
    for round_number in range(args.rounds + args.warmup):
        for arm in arms:
            reset_peak(pipe.device)
            make = partial(_run_arm, arm, pipe, refiner, x_T, args.steps)
            with ForwardCounter().watch(denoiser(pipe), refiner.network) as counter:
                taken, _ = timed(make, pipe.device)
            forwards[arm], peaks[arm] = counter.count // args.batch_size, peak_bytes(pipe.device)
            if round_number >= args.warmup:
                seconds[arm].append(taken)

    settings = ("backbone", "random_weights", "sampler", "batch_size", "steps", "rounds", "warmup")
    return {
        **{name: getattr(args, name) for name in (*settings, "mode")},
        "device": device_name(pipe.device),
        "dtype": str(precision(denoiser(pipe))),
        **{
            f"refined_over_{arm}": _ratio(seconds["refined"], seconds[arm])
            for arm in arms
            if arm != "refined"
        },
        "denoiser_bytes": sum(weights.values()),
        "refiner_bytes": sum(p.numel() * p.element_size() for p in added),
        "arms": {
            arm: {
                "seconds": statistics.median(seconds[arm]),
                "forwards": forwards[arm],
                "peak_bytes": peaks[arm],
            }
            for arm in arms
        },
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the threads of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{device.type}, {torch.get_num_threads()} threads"


def _run_arm(
    arm: str, pipe: DiffusionPipeline, refiner: Refiner, x_T: torch.Tensor, steps: int
) -> None:
    """Make the images of an arm; the refiner and the sampling share one encoding."""
    embeds = encode_prompt(pipe, [PROMPT] * len(x_T), guided=arm == "guided")
    scales = refiner.config.guidance_scale_range
    latents = as_latents(pipe, x_T)
    if arm == "refined":
        latents = refiner(x_T, embeds, guidance_scale=scales[1] if scales else None)
    scale = GUIDANCE_SCALE if arm == "guided" else 1.0
    sample(pipe, latents=latents, guidance_scale=scale, num_inference_steps=steps, **embeds)


def _ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


if __name__ == "__main__":
    run_script(main)
