"""Measures the three arms on the embedded backbone's held-out prompts.

    python train/evaluate.py --backbone assets/emoji --refiner assets/refiners/emoji --n 1000 --output results.json

Image i is prompt i of the held-out (object, background) pairs, taken in turns, with seed 10**6 + i,
which no refiner is trained on.  A classifier trained on real renders only (train/emoji/classifier.py)
tells whether object and background are those of the prompt; the Frechet distance is that of its
features to real held-out renders.  Intervals are 95 % bootstrap intervals over images, the same
resamples for all arms; "gap_closed" is (gaussian - refined) / (gaussian - guided).
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root, when run as a script

from noiserefine import Refiner, draw_noise
from noiserefine.backbones import load_pipeline
from noiserefine.guidance import sample
from noiserefine.noise import encode_prompt
from noiserefine.recipe import ForwardCounter, check_settings
from noiserefine.record import versions
from noiserefine.samplers import SAMPLERS, with_sampler
from train.emoji.classifier import Judge
from train.emoji.render import held_out_pairs, prompt

FIRST_SEED = 10**6
ARMS = ("gaussian", "guided", "refined")


def held_out_prompts(n: int) -> tuple[np.ndarray, list[str]]:
    """n held-out (object, background) pairs, taken in turns, as class indices (n, 2) and as prompts."""
    pairs = np.resize(np.random.default_rng(0).permutation(np.argwhere(held_out_pairs())), (n, 2))
    return pairs, [prompt(*pair) for pair in pairs]


def frechet_distance(features: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """Between Gaussians fitted to features (N, D) and given by mean (D,) and covariance (D, D)."""
    ours = np.cov(features, rowvar=False)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ ours @ root).clip(0)).sum()
    return float(((features.mean(0) - mean) ** 2).sum() + np.trace(ours) + np.trace(covariance) - 2 * cross)


def interval(values: np.ndarray, name: str) -> list[float]:
    """A 95 % bootstrap interval: values[0] is the estimate, the rest are its resamples.

    Percentiles for shares of images.  Resamples repeat images, which biases a Frechet distance upwards:
    there the basic interval, which takes that bias off.
    """
    low, high = np.percentile(values[1:], (2.5, 97.5)).tolist()
    return [2 * float(values[0]) - high, 2 * float(values[0]) - low] if name == "frechet_distance" else [low, high]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="assets/emoji", help="folder or hub id of the pipeline")
    parser.add_argument("--refiner", required=True, help="folder or hub id of the refiner")
    parser.add_argument("--n", type=int, default=1000, help="images of each arm")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps of every arm")
    parser.add_argument("--guidance_scale", type=float, default=2.5, help="of the guided arm")
    parser.add_argument("--strength", type=float, default=1.0, help="of the refinement")
    parser.add_argument("--sampler", default="DDIM", choices=list(SAMPLERS))
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--bootstrap", type=int, default=300, help="resamples for the intervals")
    parser.add_argument("--images", type=Path, help="folder to write the first hundred images of each arm to")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    args = parser.parse_args()
    check_settings(args.steps, args.guidance_scale, args.strength, args.sampler)
    if args.n < 2 or args.batch_size < 1 or args.bootstrap < 1:
        parser.error("--n must be at least 2, --batch_size and --bootstrap at least 1.")
    pipe = load_pipeline(args.backbone)
    refiner = Refiner.from_pretrained(args.refiner, pipe)
    refiner_scale = refiner.scale_input(args.guidance_scale)
    judge = Judge.from_pretrained(Path(__file__).parent / "emoji" / "classifier.safetensors")
    sampling_pipe = with_sampler(pipe, args.sampler)

    pairs, prompts = held_out_prompts(args.n)
    correct = {arm: np.zeros((args.n, 2)) for arm in ARMS}
    parts: dict[str, list[np.ndarray]] = {arm: [] for arm in ARMS}
    cost = {arm: [0, 0.0] for arm in ARMS}
    for start in tqdm(range(0, args.n, args.batch_size)):
        chosen = slice(start, min(start + args.batch_size, args.n))
        x_T = draw_noise(pipe, FIRST_SEED + start, chosen.stop - start).to(pipe.device)
        embeds: dict[str, Any] = encode_prompt(pipe, prompts[chosen])
        for arm in ARMS:
            began, counter = time.perf_counter(), ForwardCounter()
            with counter.watch(pipe.unet, refiner.unet):
                latents = refiner(x_T, embeds, args.strength, refiner_scale) if arm == "refined" else x_T.to(pipe.unet.dtype)
                images = sample(sampling_pipe, guidance_scale=args.guidance_scale if arm == "guided" else 1.0, latents=latents,
                                num_inference_steps=args.steps, generator=torch.Generator().manual_seed(start), **embeds).images
            cost[arm][0] += counter.count
            cost[arm][1] += time.perf_counter() - began
            thing, colour, batch_features = judge.judge(images)
            correct[arm][chosen] = np.stack([thing, colour], 1) == pairs[chosen]
            parts[arm].append(batch_features)
            if args.images and start < 100:
                write(images[: 100 - start], args.images / arm, start)

    features = {arm: np.concatenate(of_arm) for arm, of_arm in parts.items()}
    real = judge.real_mean.double().numpy(), judge.real_covariance.double().numpy()
    rng = np.random.default_rng(0)
    resamples = [np.arange(args.n), *rng.integers(args.n, size=(args.bootstrap, args.n))]  # the first is the sample itself
    measured = {arm: {"object_accuracy": np.array([correct[arm][r, 0].mean() for r in resamples]),
                      "background_accuracy": np.array([correct[arm][r, 1].mean() for r in resamples]),
                      "frechet_distance": np.array([frechet_distance(features[arm][r], *real) for r in resamples])} for arm in ARMS}
    result = {"n": args.n, "first_seed": FIRST_SEED, "settings": {key: str(value) for key, value in vars(args).items()}, "arms": {}}
    for arm, metrics in measured.items():
        result["arms"][arm] = {"forwards": cost[arm][0] / args.n, "seconds": cost[arm][1] / args.n}
        for name, values in metrics.items():
            result["arms"][arm] |= {name: float(values[0]), f"{name}_interval": interval(values, name)}
    result["gap_closed"] = {}
    for name in ("object_accuracy", "frechet_distance"):
        gaussian, guided, refined = (measured[arm][name] for arm in ARMS)
        share = (gaussian - refined) / (gaussian - guided)
        result["gap_closed"] |= {name: float(share[0]), f"{name}_interval": interval(share, name)}
    result["versions"] = versions()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


def write(images: list[Image.Image], folder: Path, start: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images, start):
        image.save(folder / f"{i:05d}.png")


def table(result: dict) -> str:
    """The results as a Markdown table."""
    def cell(values: dict, name: str, digits: int) -> str:
        low, high = values[f"{name}_interval"]
        return f"{values[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    rows = ["| arm | object accuracy | background accuracy | Fréchet distance | forwards |", "|---|---|---|---|---|"]
    for arm, values in result["arms"].items():
        rows.append(f"| {arm} | {cell(values, 'object_accuracy', 3)} | {cell(values, 'background_accuracy', 3)} | "
                    f"{cell(values, 'frechet_distance', 2)} | {values['forwards']:.0f} |")
    gap = result["gap_closed"]
    rows.append(f"| gap closed | {cell(gap, 'object_accuracy', 2)} | | {cell(gap, 'frechet_distance', 2)} | |")
    return "\n".join(rows)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
