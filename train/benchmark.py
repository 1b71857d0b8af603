"""Times the whole pipeline of the three arms: text encoder, (refiner,) sampling, decoding.

    python train/benchmark.py --backbone assets/emoji --refiner assets/refiners/emoji --json benchmark.json

The arms take turns, so that a slower minute of the machine slows all three; the ratios are medians over
the rounds of the ratio within a round.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root, when run as a script

from noiserefine import Refiner, draw_noise
from noiserefine.backbones import load_pipeline
from noiserefine.compare import ForwardCounter
from noiserefine.noise import encode_prompt
from noiserefine.samplers import with_sampler

PROMPT = "a red apple on a blue background"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="assets/emoji", help="folder or hub id of the pipeline")
    parser.add_argument("--refiner", help="folder or hub id of the refiner; an untrained one if not given, which is as fast")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=1, help="images a call")
    parser.add_argument("--rounds", type=int, default=20, help="calls of each arm, after two that are not counted")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    pipe = load_pipeline(args.backbone)
    if args.refiner:
        refiner = Refiner.from_pretrained(args.refiner, pipe)
    else:
        refiner = Refiner.create(pipe)
        refiner.merge()
    x_T = draw_noise(pipe, 0, args.batch_size)
    start = x_T.to(pipe.device, pipe.unet.dtype)
    prompts, settings = [PROMPT] * args.batch_size, {"num_inference_steps": args.steps}
    seconds, forwards = {name: [] for name in ("unguided", "guided", "refined")}, {}
    pipe = with_sampler(pipe, "DDIM")
    for round in range(args.rounds + 2):
        for name in seconds:
            synchronize(pipe.device)
            began, counter = time.perf_counter(), ForwardCounter()
            with counter.watch(pipe.unet, refiner.unet):
                embeds = encode_prompt(pipe, prompts, guided=name == "guided")  # once, for the refiner and the sampling
                latents = refiner(x_T, embeds) if name == "refined" else start
                pipe(latents=latents, guidance_scale=7.0 if name == "guided" else 1.0, **embeds, **settings)
            synchronize(pipe.device)
            forwards[name] = counter.count // args.batch_size
            if round >= 2:
                seconds[name].append(time.perf_counter() - began)
    ratio = {f"refined_over_{name}": statistics.median(a / b for a, b in zip(seconds["refined"], seconds[name]))
             for name in ("unguided", "guided")}
    result = {"backbone": args.backbone, "device": str(pipe.device), "dtype": str(pipe.unet.dtype), "batch_size": args.batch_size,
              "steps": args.steps, "rounds": args.rounds, **ratio,
              "arms": {name: {"seconds": statistics.median(seconds[name]), "forwards": forwards[name]} for name in seconds}}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
