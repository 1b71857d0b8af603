"""Times the whole pipeline of the three arms: text encoder, (refiner,) sampling, decoding.

    python train/tools/benchmark.py --backbone assets/emoji --refiner assets/refiners/emoji --json benchmark.json
    python train/tools/benchmark.py --backbone sdxl --random_weights --dtype fp16

Speed and memory do not depend on weights: without --refiner an untrained one is timed, and with
--random_weights the bare architecture.  The arms take turns, so that a slower minute of the machine
slows all three; the ratios are medians over the rounds of the ratio within a round.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from noiserefine import Refiner, draw_noise
from noiserefine.denoiser import ForwardCounter
from noiserefine.models.devices import default_device, default_dtype
from noiserefine.models.loading import load_pipeline
from noiserefine.noise import encode_prompt
from noiserefine.samplers import SAMPLERS, with_sampler
from train.tools.architectures import random_pipeline
from train.tools.memory import peak_bytes, reset_peak

PROMPT = "a red apple on a blue background"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
        "--refiner",
        help="folder or hub id of the refiner; an untrained one if not given, which is as fast",
    )
    parser.add_argument(
        "--mode",
        choices=["merged", "shared"],
        default="merged",
        help="merged: the LoRA in weights of the refiner's own; shared: apart",
    )
    parser.add_argument("--rank", type=int, default=128, help="of the untrained refiner")
    parser.add_argument("--dtype", choices=DTYPES, help="the device's own if not given")
    parser.add_argument("--sampler", choices=list(SAMPLERS), default="DDIM")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=1, help="images a call")
    parser.add_argument(
        "--rounds",
        type=int,
        default=20,
        help="calls of each arm, after --warmup ones that are not counted",
    )
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    device = default_device()
    dtype = DTYPES[args.dtype] if args.dtype else default_dtype(device)
    pipe = (
        random_pipeline(args.backbone, device, dtype)
        if args.random_weights
        else load_pipeline(args.backbone, device, dtype)
    )
    if args.refiner:
        refiner = Refiner.from_pretrained(args.refiner, pipe, merge=args.mode == "merged")
    else:
        refiner = Refiner.create(pipe, args.rank)
        if args.mode == "merged":
            refiner.merge()
        refiner.network.to(dtype)  # a new LoRA is in single precision, for training
    result = measure(pipe, refiner, args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measure(pipe: DiffusionPipeline, refiner: Refiner, args: argparse.Namespace) -> dict:
    """Seconds, forwards and peak bytes of each arm, and the ratios."""
    weights = {id(p): p.numel() * p.element_size() for p in pipe.unet.parameters()}
    extra = sum(
        p.numel() * p.element_size() for p in refiner.network.parameters() if id(p) not in weights
    )
    x_T = draw_noise(pipe, 0, args.batch_size)
    start = x_T.to(pipe.device, pipe.unet.dtype)
    scale = refiner.config.guidance_scale_range[1] if refiner.takes_guidance_scale else None
    prompts, settings = [PROMPT] * args.batch_size, {"num_inference_steps": args.steps}
    arms = ("unguided", "guided", "refined")
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    forwards, peaks = {}, {}
    pipe = with_sampler(pipe, args.sampler)
    for round in range(args.rounds + args.warmup):
        for name in arms:
            reset_peak(pipe.device)
            synchronize(pipe.device)
            began, counter = time.perf_counter(), ForwardCounter()
            with counter.watch(pipe.unet, refiner.network):
                embeds = encode_prompt(
                    pipe, prompts, guided=name == "guided"
                )  # once, for the refiner and the sampling
                latents = refiner(x_T, embeds, guidance_scale=scale) if name == "refined" else start
                pipe(
                    latents=latents,
                    guidance_scale=7.0 if name == "guided" else 1.0,
                    **embeds,
                    **settings,
                )
            synchronize(pipe.device)
            forwards[name], peaks[name] = counter.count // args.batch_size, peak_bytes(pipe.device)
            if round >= args.warmup:
                seconds[name].append(time.perf_counter() - began)
    ratio = {
        f"refined_over_{name}": statistics.median(
            a / b for a, b in zip(seconds["refined"], seconds[name])
        )
        for name in ("unguided", "guided")
    }
    name = (
        torch.cuda.get_device_name()
        if pipe.device.type == "cuda"
        else f"{pipe.device.type}, {torch.get_num_threads()} threads"
    )
    return {
        "backbone": args.backbone,
        "random_weights": args.random_weights,
        "device": name,
        "dtype": str(pipe.unet.dtype),
        "sampler": args.sampler,
        "batch_size": args.batch_size,
        "steps": args.steps,
        "rounds": args.rounds,
        "warmup": args.warmup,
        "mode": args.mode,
        **ratio,
        "unet_bytes": sum(weights.values()),
        "refiner_bytes": extra,
        "arms": {
            name: {
                "seconds": statistics.median(seconds[name]),
                "forwards": forwards[name],
                "peak_bytes": peaks[name],
            }
            for name in arms
        },
    }


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
