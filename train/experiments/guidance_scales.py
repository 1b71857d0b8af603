"""Measure whether a refiner follows its guidance-scale input (appendix A.4, figures 23 and 24).

    python train/experiments/guidance_scales.py --refiner runs/refiner-emoji-scales \\
        --output guidance_scales.json

For the same held-out prompts and seeds: guided images at every scale, and unguided images from
noise refined for every scale. Reports the share of images whose object the judge recognises, with
95 % bootstrap intervals, and the mean squared distance between the latents of each refined and each
guided arm. If the refiner follows its input, each row is smallest near its own scale.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from noiserefine import Refiner, draw_noise
from noiserefine.guidance import sample_latents
from noiserefine.latents import decode
from noiserefine.models.loading import load_pipeline
from noiserefine.noise import encode_prompt
from noiserefine.samplers import samplers_of, with_sampler
from train.captions import held_out_prompts
from train.common import (
    FIRST_EVALUATION_SEED,
    argument_parser,
    markdown_table,
    mean_and_interval,
    run_script,
    with_interval,
    write_json,
)
from train.measurement import add_precision, autocast_to
from train.metrics import load_metrics


def main(arguments: list[str] | None = None) -> None:
    """Sample, measure and write the figures."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--backbone", default="assets/emoji", help="folder or hub id of the pipeline")
    add("--refiner", required=True, help="folder or hub id of a refiner that takes the scale")
    add("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    add("--n", type=int, default=200, help="prompts")
    add("--steps", type=int, default=20)
    add("--batch_size", type=int, default=50)
    add_precision(parser)
    add("--output", type=Path, required=True, help="JSON file of the results")
    args = parser.parse_args(arguments)
    pipe = load_pipeline(args.backbone)
    refiner = Refiner.from_pretrained(args.refiner, pipe)
    for scale in args.scales:
        refiner.check_guidance_scale(scale)
    (judge,) = load_metrics(["judge"], None, pipe.device)
    pipe, prompts = with_sampler(pipe, samplers_of(pipe)[0]), held_out_prompts(args.n)
    autocast = autocast_to(args.mixed_precision, pipe.device)

    arms = ("guided", "refined")
    recognised: dict[str, list[list[bool]]] = {arm: [[] for _ in args.scales] for arm in arms}
    distances = []
    for start in tqdm(range(0, args.n, args.batch_size)):
        batch_prompts = prompts[start : start + args.batch_size]
        x_T = draw_noise(pipe, FIRST_EVALUATION_SEED + start, len(batch_prompts)).to(pipe.device)
        embeds = encode_prompt(pipe, batch_prompts)
        x0: dict[str, list[torch.Tensor]] = {arm: [] for arm in arms}
        for scale in args.scales:
            with autocast:
                x_hat = refiner.refine(x_T, embeds, guidance_scale=scale)
                guided = sample_latents(pipe, x_T, embeds, args.steps, guidance_scale=scale)
                refined = sample_latents(pipe, x_hat, embeds, args.steps)
            x0["guided"].append(guided.float())
            x0["refined"].append(refined.float())
        for arm, all_latents in x0.items():
            for latents, found in zip(all_latents, recognised[arm], strict=True):
                rows = judge.measure(decode(pipe, latents), batch_prompts)
                found.extend(rows["correct"][:, 0])
        guided = torch.stack(x0["guided"])
        distances.append(torch.stack([(guided - x).pow(2).mean((2, 3, 4)) for x in x0["refined"]]))

    result = {
        "n": args.n,
        "first_seed": FIRST_EVALUATION_SEED,
        "steps": args.steps,
        "scales": args.scales,
        "refiner": args.refiner,
        "mixed_precision": args.mixed_precision,
        # Rows: the scale refined for. Columns: the scale of the guided images.
        "distance_of_refined_to_guided": torch.cat(distances, 2).mean(2).tolist(),
    }
    for arm, all_found in recognised.items():
        estimates = [mean_and_interval(found, resamples=300) for found in all_found]
        result[arm] = [
            {"object_accuracy": mean, "object_accuracy_interval": bounds}
            for mean, bounds in estimates
        ]
    write_json(args.output, result)
    print(table(result))


def table(result: dict) -> str:
    """Return the results as a Markdown table, a row for each input scale."""
    scales = [f"{scale:g}" for scale in result["scales"]]
    distances = np.array(result["distance_of_refined_to_guided"])
    header = ["g", "guided: accuracy", "refined for g: accuracy"]
    return markdown_table(
        header + [f"distance to guided {g}" for g in scales],
        [
            [
                g,
                *(
                    with_interval(
                        result[arm][i]["object_accuracy"],
                        result[arm][i]["object_accuracy_interval"],
                        digits=3,
                    )
                    for arm in ("guided", "refined")
                ),
                *(f"{value:.4f}" for value in distances[i]),
            ]
            for i, g in enumerate(scales)
        ],
    )


if __name__ == "__main__":
    run_script(main)
