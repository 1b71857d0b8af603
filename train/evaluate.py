"""Measures arms of the embedded backbone on its held-out prompts: noise x guidance.

    python train/evaluate.py --backbone assets/emoji --refiner assets/refiners/emoji --n 1000 --output results.json
    accelerate launch train/evaluate.py --refiner assets/refiners/emoji --arms gaussian guided pag refined refined_guided --output results.json

Image i is prompt i of the held-out (object, background) pairs, taken in turns, with seed 10**6 + i,
which no refiner is trained on.  A classifier trained on real renders only (train/emoji/classifier.py)
tells whether object and background are those of the prompt; the Frechet distance is that of its
features to real held-out renders, and feature_variance, for diversity, their variance among the images of
one prompt.  Intervals are 95 % bootstrap intervals over prompts, the same resamples for all arms;
"differences" are to the guided arm, "gap_closed" is (gaussian - refined) / (gaussian - guided).

What was measured is kept in the folder beside --output that has its name: the same command goes on where it stopped.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
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
from train.train_refiner import atomic

FIRST_SEED = 10**6


@dataclass(frozen=True)
class Arm:
    """How an image is made."""

    refined: bool = False  # the noise
    cfg: bool = False
    pag: bool = False


ARMS = {"gaussian": Arm(), "guided": Arm(cfg=True), "pag": Arm(pag=True), "guided_pag": Arm(cfg=True, pag=True), "refined": Arm(refined=True),
        "refined_guided": Arm(refined=True, cfg=True)}
METRICS = ("object_accuracy", "background_accuracy", "frechet_distance", "feature_variance")


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

    Percentiles for means.  Resamples repeat images, which biases a Frechet distance upwards:
    there the basic interval, which takes that bias off.
    """
    low, high = np.percentile(values[1:], (2.5, 97.5)).tolist()
    return [2 * float(values[0]) - high, 2 * float(values[0]) - low] if name == "frechet_distance" else [low, high]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="assets/emoji", help="folder or hub id of the pipeline")
    parser.add_argument("--refiner", required=True, help="folder or hub id of the refiner")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["gaussian", "guided", "refined"])
    parser.add_argument("--n", type=int, default=1000, help="images of each arm")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps of every arm")
    parser.add_argument("--guidance_scale", type=float, default=2.5, help="CFG scale of the guided arms, diffusers' g")
    parser.add_argument("--pag_scale", type=float, default=3.0, help="PAG scale s (equation 32) of the arms with PAG")
    parser.add_argument("--strength", type=float, default=1.0, help="of the refinement")
    parser.add_argument("--sampler", default="DDIM", choices=list(SAMPLERS))
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--bootstrap", type=int, default=300, help="resamples for the intervals")
    parser.add_argument("--images", type=Path, help="folder to write the images of each arm to")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    args = parser.parse_args()
    check_settings(args.steps, args.guidance_scale, args.strength, args.sampler)
    if args.n < 2 or args.batch_size < 1 or args.bootstrap < 1:
        parser.error("--n must be at least 2, --batch_size and --bootstrap at least 1.")
    return args


class Measurement:
    """Features, verdicts and cost of the images of each arm, in files of one batch each."""

    def __init__(self, args: argparse.Namespace, process: PartialState):
        self.args, self.process, self.folder = args, process, args.output.with_suffix("")
        self.pairs, self.prompts = held_out_prompts(args.n)
        self.starts = range(0, args.n, args.batch_size)
        self.settings = {name: str(value) for name, value in vars(args).items() if name not in ("arms", "output", "images", "bootstrap")} | {"versions": versions()}

    def begin(self) -> None:
        """Raises ValueError where the folder holds the measurements of other settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = self.folder / "settings.json"
        if settings.exists() and json.loads(settings.read_text()) != self.settings:
            raise ValueError(f"{self.folder} holds measurements of other settings: give another --output, or remove the folder.")
        if self.process.is_main_process:
            with atomic(settings) as part:
                part.write_text(json.dumps(self.settings, indent=2) + "\n")

    def file(self, arm: str, start: int) -> Path:
        return self.folder / f"{arm}-{start:06d}.npz"

    def make(self, judge: Judge) -> None:
        """Makes and judges the images that were not yet, every process its share."""
        args = self.args
        pipe = load_pipeline(args.backbone, self.process.device)
        refiner = Refiner.from_pretrained(args.refiner, pipe)
        refiner_scale = refiner.scale_input(args.guidance_scale)
        sampling_pipe = with_sampler(pipe, args.sampler)
        for start in tqdm(self.starts[self.process.process_index::self.process.num_processes], disable=not self.process.is_local_main_process):
            missing = [name for name in args.arms if not self.file(name, start).exists()]
            if not missing:
                continue
            chosen = slice(start, min(start + args.batch_size, args.n))
            x_T = draw_noise(pipe, FIRST_SEED + start, chosen.stop - start).to(pipe.device)
            embeds: dict[str, Any] = encode_prompt(pipe, self.prompts[chosen])
            for name in missing:
                arm, began, counter = ARMS[name], time.perf_counter(), ForwardCounter()
                with counter.watch(pipe.unet, refiner.unet):
                    latents = refiner(x_T, embeds, args.strength, refiner_scale) if arm.refined else x_T.to(pipe.unet.dtype)
                    images = sample(sampling_pipe, guidance_scale=args.guidance_scale if arm.cfg else 1.0, pag_scale=args.pag_scale if arm.pag else 0.0,
                                    latents=latents, num_inference_steps=args.steps, generator=torch.Generator().manual_seed(start), **embeds).images
                seconds = time.perf_counter() - began
                thing, colour, features = judge.judge(images)
                if args.images:
                    write(images, args.images / name, start)
                with atomic(self.file(name, start)) as part, part.open("wb") as file:
                    np.savez(file, features=features, correct=np.stack([thing, colour], 1) == self.pairs[chosen], forwards=counter.count, seconds=seconds)
        self.process.wait_for_everyone()

    def results(self, judge: Judge) -> dict:
        """The figures of every arm with their intervals, and the differences between arms."""
        args, rng = self.args, np.random.default_rng(0)
        _, prompt_of = np.unique(self.pairs, axis=0, return_inverse=True)
        groups = [np.flatnonzero(prompt_of == k) for k in range(prompt_of.max() + 1)]
        resamples = [np.arange(len(groups)), *rng.integers(len(groups), size=(args.bootstrap, len(groups)))]  # the first is the sample itself
        real = judge.real_mean.double().numpy(), judge.real_covariance.double().numpy()
        values, result = {}, {"n": args.n, "prompts": len(groups), "first_seed": FIRST_SEED, "settings": self.settings, "arms": {}, "differences": {}}
        for name in args.arms:
            files = [np.load(self.file(name, start)) for start in self.starts]
            features, correct = (np.concatenate([file[key] for file in files]) for key in ("features", "correct"))
            variances = np.array([features[group].var(0, ddof=1).sum() if len(group) > 1 else np.nan for group in groups])
            values[name] = {metric: np.zeros(len(resamples)) for metric in METRICS}
            for i, resample in enumerate(resamples):
                images = np.concatenate([groups[k] for k in resample])
                measured = (*correct[images].mean(0), frechet_distance(features[images], *real), np.nanmean(variances[resample]) if args.n > len(groups) else np.nan)
                for metric, value in zip(METRICS, measured):
                    values[name][metric][i] = value
            result["arms"][name] = {key: sum(float(file[key]) for file in files) / args.n for key in ("forwards", "seconds")} | figures(values[name])
        if "guided" in values:
            result["differences"] = {name: figures({metric: values[name][metric] - values["guided"][metric] for metric in METRICS})
                                     for name in args.arms if name != "guided"}
        if {"gaussian", "guided", "refined"} <= values.keys():
            result["gap_closed"] = figures({metric: (values["gaussian"][metric] - values["refined"][metric]) / (values["gaussian"][metric] - values["guided"][metric])
                                            for metric in ("object_accuracy", "frechet_distance")})
        return result


def figures(values: dict[str, np.ndarray]) -> dict:
    """Each metric's estimate and its interval; a metric that these images don't tell is left out."""
    known = {metric: array for metric, array in values.items() if np.isfinite(array).all()}
    return {metric: float(array[0]) for metric, array in known.items()} | {f"{metric}_interval": interval(array, metric) for metric, array in known.items()}


def write(images: list[Image.Image], folder: Path, start: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images, start):
        image.save(folder / f"{i:05d}.png")


def table(result: dict) -> str:
    """The results as a Markdown table."""
    def cell(values: dict, name: str, digits: int) -> str:
        if name not in values:
            return "–"
        low, high = values[f"{name}_interval"]
        return f"{values[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    rows = ["| arm | object accuracy ↑ | background accuracy ↑ | Fréchet distance ↓ | feature variance ↑ | UNet forwards |", "|---|---|---|---|---|---|"]
    for arm, values in result["arms"].items():
        rows.append(f"| {arm} | {cell(values, 'object_accuracy', 3)} | {cell(values, 'background_accuracy', 3)} | {cell(values, 'frechet_distance', 2)} | "
                    f"{cell(values, 'feature_variance', 2)} | {values['forwards']:.0f} |")
    if gap := result.get("gap_closed"):
        rows.append(f"| gap closed | {cell(gap, 'object_accuracy', 2)} | | {cell(gap, 'frechet_distance', 2)} | | |")
    return "\n".join(rows)


def main() -> None:
    args, process = parse(), PartialState()
    judge = Judge.from_pretrained(Path(__file__).parent / "emoji" / "classifier.safetensors")
    measurement = Measurement(args, process)
    measurement.begin()
    measurement.make(judge)
    if process.is_main_process:
        result = measurement.results(judge)
        with atomic(args.output) as part:
            part.write_text(json.dumps(result, indent=2) + "\n")
        print(table(result))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
