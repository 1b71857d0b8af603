"""Measure how far refining carries unguided latents towards the guided ones, by rank and steps.

    python train/experiments/latent_distance.py --backbone assets/emoji \\
        --refiner assets/refiners/emoji --guidance_scale 2 --ranks 4 8 16 --steps 20 10 6 4 \\
        --output distances.json

The distance is the mean squared one to the guided latents of the same prompt and seed, which take
the first of --steps: that is the image to reach, in fewer steps too. "Percent of the way" is the
share of the unguided distance that refining takes away: 100 if the refined image were the guided
one. A few images that change altogether weigh much in it, so "nearer" counts the images that come
nearer. The refiner is compressed to each of --ranks by train/tools/compress.py, and measured with
the first of --steps; at its own rank it is measured with all of them. Intervals are 95 % bootstrap
intervals over images.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from noiserefine import Refiner, draw_noise
from noiserefine.analysis.versions import package_versions
from noiserefine.guidance import sample_latents
from noiserefine.lora import adapted
from noiserefine.models.loading import load_pipeline
from noiserefine.noise import encode_prompt
from noiserefine.samplers import samplers_of, with_sampler
from train.captions import HELD_OUT, read_prompts, repeat_to
from train.common import (
    FIRST_EVALUATION_SEED,
    argument_parser,
    interval,
    markdown_table,
    run_script,
    with_interval,
    write_json,
)
from train.tools.compress import compress

MEGABYTE, BYTES_16 = 10**6, 2
RESAMPLES = 1000


class GuidedBatch(NamedTuple):
    """Noise (B, C, h, w), the encoded prompts, and the guided latents (B, C, h, w) of it."""

    x_T: torch.Tensor
    embeds: dict[str, Any]
    x0: torch.Tensor


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--backbone", default="assets/emoji", help="folder or hub id of the pipeline")
    add("--refiner", required=True, help="folder or hub id of the refiner")
    add("--prompts", default=HELD_OUT, help="prompt file")
    add("--guidance_scale", type=float, required=True)
    add("--ranks", type=int, nargs="*", default=[], help="lower ranks to compress it to")
    add("--steps", type=int, nargs="+", default=[20])
    add("--n", type=int, default=50, help="images of each arm")
    add("--batch_size", type=int, default=25)
    add("--output", type=Path, required=True, help="JSON file of the results")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure the distances, write and print them."""
    args = parse(arguments)
    pipe = load_pipeline(args.backbone)
    refiner = Refiner.from_pretrained(args.refiner, pipe, merge=False)
    prompts = repeat_to(read_prompts(args.prompts, pipe), args.n)
    pipe = with_sampler(pipe, samplers_of(pipe)[0])

    largest = refiner.config.rank
    refiners = {largest: refiner} | {rank: compress(refiner, rank)[0] for rank in args.ranks}
    rows = [(steps, [largest]) for steps in args.steps]
    rows[0] = (args.steps[0], list(refiners))
    batches = guided_batches(pipe, prompts, args)
    results = []
    for steps, ranks in rows:
        chosen = {rank: refiners[rank] for rank in ranks}
        found = distances(pipe, chosen, batches, steps, args.guidance_scale)
        for rank in ranks:
            percent, bounds = percent_of_the_way(found["gaussian"], found[rank])
            results.append(
                {
                    "steps": steps,
                    "rank": rank,
                    "megabytes": megabytes(refiners[rank]),
                    "gaussian": found["gaussian"].mean(),
                    "refined": found[rank].mean(),
                    "percent": percent,
                    "percent_interval": bounds,
                    "nearer": float((found[rank] < found["gaussian"]).mean()),
                }
            )
    settings = {name: str(value) for name, value in vars(args).items() if name != "output"}
    result = {
        "n": args.n,
        "first_seed": FIRST_EVALUATION_SEED,
        "settings": settings | {"versions": package_versions()},
        "results": results,
    }
    write_json(args.output, result)
    print(table(result))


def guided_batches(
    pipe: DiffusionPipeline, prompts: list[str], args: argparse.Namespace
) -> list[GuidedBatch]:
    """Return the noise, the encoded prompts and the guided latents of all prompts, in batches."""
    batches = []
    for start in tqdm(range(0, len(prompts), args.batch_size), desc="guided"):
        texts = prompts[start : start + args.batch_size]
        x_T = draw_noise(pipe, FIRST_EVALUATION_SEED + start, len(texts)).to(pipe.device)
        embeds, scale = encode_prompt(pipe, texts), args.guidance_scale
        x0 = sample_latents(pipe, x_T, embeds, args.steps[0], guidance_scale=scale)
        batches.append(GuidedBatch(x_T, embeds, x0))
    return batches


def distances(
    pipe: DiffusionPipeline,
    refiners: dict[int, Refiner],
    batches: list[GuidedBatch],
    steps: int,
    guidance_scale: float,
) -> dict[int | str, np.ndarray]:
    """Return the distances (n,) to guided latents of "gaussian" and of each refiner's latents."""
    found: dict[int | str, list[float]] = {"gaussian": []}
    found |= {rank: [] for rank in refiners}
    for x_T, embeds, guided in tqdm(batches, desc=f"{steps} steps"):
        noises: dict[int | str, torch.Tensor] = {"gaussian": x_T}
        for rank, refiner in refiners.items():
            scale = refiner.scale_input(guidance_scale)
            noises[rank] = refiner.refine(x_T, embeds, guidance_scale=scale)
        for name, noise in noises.items():
            x0 = sample_latents(pipe, noise, embeds, steps)
            found[name] += squared_distances(x0, guided).tolist()
    return {name: np.array(values) for name, values in found.items()}


def squared_distances(
    x0: torch.Tensor | np.ndarray, guided: torch.Tensor | np.ndarray
) -> np.ndarray:
    """Return the mean squared distance of each latent to its guided one, (n,); of (n, C, h, w)."""
    difference = torch.as_tensor(x0) - torch.as_tensor(guided)
    return difference.float().flatten(1).pow(2).mean(1).cpu().numpy()


def percent_of_the_way(
    gaussian: np.ndarray, refined: np.ndarray, guided: np.ndarray | float = 0.0
) -> tuple[float, list[float]]:
    """Return 100 (gaussian - refined) / (gaussian - guided) of means, and its 95 % interval.

    gaussian, refined, guided: values of the same images, (n,). Distances to the guided latents are
    0 for the guided ones. Not a number where unguided and guided values have the same mean.
    """
    rng, n = np.random.default_rng(0), len(gaussian)
    arms = np.stack([gaussian, refined, np.broadcast_to(guided, n)]).astype(float)
    samples = [np.arange(n), *(rng.integers(n, size=n) for _ in range(RESAMPLES))]
    means = np.stack([arms[:, chosen].mean(1) for chosen in samples], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        percents = 100 * (means[0] - means[1]) / (means[0] - means[2])
    return float(percents[0]), interval(percents)


def megabytes(refiner: Refiner) -> float:
    """Return the size of the LoRA in 16 bits, in 10^6 bytes."""
    count = sum(
        weight.numel()
        for _, layer in adapted(refiner.network)
        for name, weight in layer.named_parameters()
        if "lora_" in name
    )
    return BYTES_16 * count / MEGABYTE


def table(result: dict) -> str:
    """Return what was measured, and the results as a Markdown table."""
    rows = markdown_table(
        [
            *("steps", "rank", "MB", "distance unguided", "distance refined"),
            *("percent of the way", "images that come nearer, %"),
        ],
        [
            [
                row["steps"],
                row["rank"],
                f"{row['megabytes']:.1f}",
                f"{row['gaussian']:.3f}",
                f"{row['refined']:.3f}",
                with_interval(row["percent"], row["percent_interval"], digits=0),
                f"{100 * row['nearer']:.0f}",
            ]
            for row in result["results"]
        ],
    )
    return (
        f"n = {result['n']}, seeds from {result['first_seed']}, guidance scale "
        f"{result['settings']['guidance_scale']}.\n\n{rows}"
    )


if __name__ == "__main__":
    run_script(main)
