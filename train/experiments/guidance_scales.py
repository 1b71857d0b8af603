"""Whether a refiner that takes the guidance scale follows it (paper, appendix A.4, figures 23 and 24).

    python train/experiments/guidance_scales.py --refiner runs/refiner-emoji-scales --output guidance_scales.json

For the same held-out prompts and seeds: guided images at every scale, and unguided images from noise
refined for every scale.  Writes the share of images whose object the judge recognises, with 95 %
bootstrap intervals, and the mean squared distance between the latents of each refined and each guided arm: where the
input is followed, a row of that table is smallest near its own scale.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from noiserefine import Refiner, draw_noise
from noiserefine.latents import decode
from noiserefine.models.loading import load_pipeline
from noiserefine.noise import encode_prompt
from noiserefine.samplers import with_sampler
from train.evaluate import FIRST_SEED, held_out_prompts, interval
from train.metrics import load_metrics
from train.train_refiner import latents_from


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backbone", default="assets/emoji", help="folder or hub id of the pipeline"
    )
    parser.add_argument(
        "--refiner",
        required=True,
        help="folder or hub id of a refiner that takes the guidance scale",
    )
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--n", type=int, default=200, help="prompts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    args = parser.parse_args()
    pipe = load_pipeline(args.backbone)
    refiner = Refiner.from_pretrained(args.refiner, pipe)
    for scale in args.scales:
        refiner.check_guidance_scale(scale)
    (judge,), pipe, prompts = (
        load_metrics(["judge"], None, pipe.device),
        with_sampler(pipe, "DDIM"),
        held_out_prompts(args.n),
    )
    recognised: dict[str, list[list[np.bool_]]] = {
        arm: [[] for _ in args.scales] for arm in ("guided", "refined")
    }
    distances = []
    for start in tqdm(range(0, args.n, args.batch_size)):
        chosen = slice(start, min(start + args.batch_size, args.n))
        x_T = draw_noise(pipe, FIRST_SEED + start, chosen.stop - start).to(pipe.device)
        embeds = encode_prompt(pipe, prompts[chosen])
        x0 = {
            "guided": [
                latents_from(pipe, x_T, embeds, args.steps, start, guidance_scale=scale)
                for scale in args.scales
            ],
            "refined": [
                latents_from(
                    pipe, refiner(x_T, embeds, guidance_scale=scale), embeds, args.steps, start
                )
                for scale in args.scales
            ],
        }
        for arm, latents in x0.items():
            for i, of_scale in enumerate(latents):
                recognised[arm][i].extend(
                    judge.measure(decode(pipe, of_scale), prompts[chosen])["correct"][:, 0]
                )
        guided = torch.stack(x0["guided"]).float()
        distances.append(
            torch.stack(
                [(guided - refined.float()).pow(2).mean((2, 3, 4)) for refined in x0["refined"]]
            )
        )
    distance = torch.cat(distances, 2)  # (refined scales, guided scales, images)
    resamples = [np.arange(args.n), *np.random.default_rng(0).integers(args.n, size=(300, args.n))]
    result = {
        "n": args.n,
        "first_seed": FIRST_SEED,
        "steps": args.steps,
        "scales": args.scales,
        "refiner": args.refiner,
        "distance_of_refined_to_guided": distance.mean(2).tolist(),
    }
    for arm, rows in recognised.items():
        accuracies = [np.array([np.array(row)[r].mean() for r in resamples]) for row in rows]
        result[arm] = [
            {
                "object_accuracy": float(values[0]),
                "object_accuracy_interval": interval(values, "object_accuracy"),
            }
            for values in accuracies
        ]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


def table(result: dict) -> str:
    """The results as a Markdown table: a row for each input scale."""
    scales = [f"{scale:g}" for scale in result["scales"]]
    rows = [
        "| g | guided: accuracy | refined for g: accuracy | "
        + " | ".join(f"distance to guided {g}" for g in scales)
        + " |",
        "|---|---|---|" + "---|" * len(scales),
    ]
    for g, guided, refined, distances in zip(
        scales, result["guided"], result["refined"], result["distance_of_refined_to_guided"]
    ):
        cells = [
            "{:.3f} [{:.3f}, {:.3f}]".format(
                arm["object_accuracy"], *arm["object_accuracy_interval"]
            )
            for arm in (guided, refined)
        ]
        rows.append(
            f"| {g} | {' | '.join(cells)} | "
            + " | ".join(f"{value:.4f}" for value in distances)
            + " |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
