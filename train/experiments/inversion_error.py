"""What DDIM inversion of guided images loses (paper, appendix A.11, table 11).

    python train/experiments/inversion_error.py --backbone assets/emoji --n 100 --output inversion.json

Guided images are inverted to noise and sampled again without guidance, in as many steps; the error is that of the pictures.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from noiserefine import draw_noise
from noiserefine.inversion import ddim_inversion
from noiserefine.latents import decode
from noiserefine.models.loading import load_pipeline
from noiserefine.noise import encode_prompt
from noiserefine.samplers import with_sampler
from train.evaluate import FIRST_SEED, chosen_prompts
from train.train_refiner import atomic, latents_from


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backbone", default="assets/emoji", help="folder or hub id of the pipeline"
    )
    parser.add_argument("--prompts", help="as for evaluate.py")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50, 100, 200, 500, 999])
    parser.add_argument("--guidance_scale", type=float, default=2.5)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    args = parser.parse_args(arguments)
    pipe = load_pipeline(args.backbone)
    ddim, prompts = with_sampler(pipe, "DDIM"), chosen_prompts(args.prompts, args.n, pipe)
    psnr: dict[int, list[float]] = {steps: [] for steps in args.steps}
    for start in tqdm(range(0, args.n, args.batch_size)):
        here = prompts[start : start + args.batch_size]
        embeds: dict[str, Any] = encode_prompt(pipe, here)
        x0 = latents_from(
            ddim,
            draw_noise(pipe, FIRST_SEED + start, len(here)),
            embeds,
            20,
            start,
            guidance_scale=args.guidance_scale,
        )
        pictures = [np.asarray(image, float) for image in decode(pipe, x0)]
        for steps in args.steps:
            again = latents_from(
                ddim, ddim_inversion(pipe, x0, embeds, steps), embeds, steps, start
            )
            psnr[steps] += [
                10 * np.log10(255**2 / ((a - np.asarray(b, float)) ** 2).mean())
                for a, b in zip(pictures, decode(pipe, again))
            ]
    rng = np.random.default_rng(0)
    rows = {}
    for steps, values in psnr.items():
        means = [np.mean(rng.choice(values, len(values))) for _ in range(1000)]
        rows[steps] = {
            "psnr": float(np.mean(values)),
            "psnr_interval": np.percentile(means, (2.5, 97.5)).tolist(),
        }
    with atomic(args.output) as part:
        part.write_text(
            json.dumps(
                {
                    "n": args.n,
                    "first_seed": FIRST_SEED,
                    "guidance_scale": args.guidance_scale,
                    "steps": rows,
                },
                indent=2,
            )
            + "\n"
        )
    print("| steps | PSNR in dB ↑ |\n|---|---|")
    for steps, row in rows.items():
        print("| {} | {:.2f} [{:.2f}, {:.2f}] |".format(steps, row["psnr"], *row["psnr_interval"]))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
