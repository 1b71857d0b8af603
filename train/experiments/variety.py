"""Measure quality against the variety among the seeds of a prompt.

    python train/experiments/variety.py --refiner assets/refiners/emoji \\
        --output runs/variety-emoji.json

Every prompt has --seeds images in every arm: unguided, guided at several scales, refined at several
strengths. Variety is the Vendi score (Friedman and Dieng 2023) of a prompt's images, the number of
different images that would be as various: exp of the entropy of the eigenvalues of the cosine
kernel of the first metric's features, divided by their number; and the features' variance. Both
are means over prompts. Compare curves, not points: less variety is the price of fidelity in any
guidance, and what matters is who gets more of one at equal other.

Beside --output: a plot (.png), and a folder that keeps what was measured, so that the same command
continues.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure as Plot
from PIL import Image

from noiserefine.guidance import check_guidance
from noiserefine.samplers import NATIVE
from train.captions import chosen_prompts
from train.common import argument_parser, interval, run_script, write_json
from train.emoji.judge import EmojiJudge
from train.experiments.bench import Bench, Images, add_options, open_bench
from train.measurement import (
    Batch,
    add_sampler,
    all_figures,
    arms_table,
    sampler_of,
    summary,
)
from train.metrics import Figure, Inception, Metric, Rows

SCALES = (1.5, 2.0, 3.0, 4.0, 6.0)
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
SEEDS, MIN_SEEDS = 16, 2
VARIETIES = ("vendi_score", "feature_variance")


class Vendi(Metric):
    """The Vendi score of each prompt's images, from the features that another metric measured."""

    default_source = "judge"
    figures = {"vendi_score": Figure("Vendi score ↑", in_gap=False)}

    def __init__(self, source: str, real_images: Path | None, device: torch.device):
        self.about = {"vendi_features": source}

    def measure(self, images: list[Image.Image], prompts: list[str]) -> Rows:
        """Return nothing: the features are there."""
        return {}

    def summarise(self, rows: Rows, groups: list[np.ndarray]) -> dict[str, float]:
        """Return the mean over prompts."""
        features = next(value for name, value in rows.items() if name.endswith("features"))
        return {"vendi_score": float(np.mean([vendi_score(features[g]) for g in groups]))}


def vendi_score(features: np.ndarray) -> float:
    """Return exp of the entropy of the cosine kernel's eigenvalues; features: (N, D).

    It is 1 where all are alike and N where all are orthogonal.
    """
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / len(unit))
    values = values[values > np.finfo(float).eps]
    return float(np.exp(-(values * np.log(values)).sum()))


def main(arguments: list[str] | None = None) -> None:
    """Sample, measure, plot and write the figures."""
    args = parse(arguments)
    bench = open_bench(args, few_step=args.few_step)
    if not isinstance(bench.metrics[0], EmojiJudge | Inception):
        raise ValueError("Variety is that of features: begin --metrics with judge or inception.")
    bench.metrics.append(Vendi(args.metrics[0], None, bench.process.device))
    check_guidance(bench.pipe, max(args.scales))
    sampling = {"steps": args.steps, "sampler": sampler_of(bench.pipe, args)}
    bench.about |= sampling | {"few_steps": args.few_steps}
    prompts = np.repeat(chosen_prompts(args.prompts, args.n // args.seeds, bench.pipe), args.seeds)
    texts = prompts.tolist()
    curves = {
        "guided": {f"guided, g {g:g}": partial(_guided, bench, sampling, g) for g in args.scales},
        "refined": {
            f"refined, strength {strength:g}": partial(_refined, bench, sampling, strength)
            for strength in (args.strengths if bench.refiner else ())
        },
    }
    arms = {
        "unguided": partial(_guided, bench, sampling, 1.0),
        **curves["guided"],
        **curves["refined"],
    }
    if bench.few_step:
        arms["few-step"] = partial(_few_step, bench, args)
    measurement = bench.measure(args.output.with_suffix("") / "measured", arms, texts, args)
    if not bench.process.is_main_process:
        return

    figures = all_figures(bench.metrics)
    estimates = measurement.estimates(texts, bench.metrics)
    quality = next(key for key, figure in figures.items() if figure.in_gap)
    sign = 1 if "↑" in figures[quality].title else -1
    varieties: list[str] = [key for key in VARIETIES if key in figures]
    result = measurement.head(texts) | {
        "seeds": args.seeds,
        "steps": args.steps,
        "quality": quality,
        "varieties": varieties,
        "titles": {key: figures[key].title for key in (quality, *varieties)},
        "curves": {name: ["unguided", *arms] for name, arms in curves.items() if arms},
        "arms": {
            name: measurement.cost(name) | summary(values, figures)
            for name, values in estimates.items()
        },
        "refined_minus_guided": matched(estimates, curves, quality, varieties, sign),
    }
    write_json(args.output, result)
    plot(result, args.output.with_suffix(".png"))
    print(table(result))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line; end the process for values that cannot work."""
    parser = argument_parser(__doc__)
    add_options(parser, n=1024)
    add = parser.add_argument
    add("--few_step", help="few-step LoRA")
    add("--few_steps", type=int, default=4, help="its steps")
    add("--seeds", type=int, default=SEEDS, help="images of each prompt in every arm")
    add("--steps", type=int, default=20, help="sampling steps")
    add_sampler(parser)
    add("--scales", type=float, nargs="+", default=list(SCALES), help="of guidance")
    add("--strengths", type=float, nargs="+", default=list(STRENGTHS), help="of the refinement")
    args = parser.parse_args(arguments)
    if args.seeds < MIN_SEEDS or args.n % args.seeds:
        parser.error("--seeds must be at least 2, and --n a multiple of it.")
    return args


def matched(
    estimates: dict[str, dict[str, np.ndarray]],
    curves: dict[str, dict[str, Any]],
    quality: str,
    varieties: list[str],
    sign: int,
) -> dict[str, dict[str, Any]]:
    """Return how much more variety each refined arm has than guidance at the same quality.

    Between two scales the guided curve is a straight line, and it ends at its best quality. Where
    it does not reach the refined one, in the estimate or in a resample, nothing is said.

    sign: -1 for a quality of which less is better
    """
    guided = [estimates[name] for name in ("unguided", *curves["guided"])]
    best = max(range(len(guided)), key=lambda i: sign * guided[i][quality][0])
    guided = guided[: best + 1]
    heights = np.stack([arm[quality] for arm in guided])  # (scales, 1 + resamples)
    found: dict[str, dict[str, Any]] = {}
    for name in curves["refined"]:
        for key in varieties:
            widths = np.stack([arm[key] for arm in guided])
            others = [
                np.interp(at, height[order], width[order], left=np.nan, right=np.nan)
                for at, height, width in zip(
                    estimates[name][quality], heights.T, widths.T, strict=True
                )
                for order in [np.argsort(height, kind="stable")]
            ]
            difference = estimates[name][key] - np.array(others)
            if np.isfinite(difference).all():
                value = {key: float(difference[0]), f"{key}_interval": interval(difference)}
                found.setdefault(name, {}).update(value)
    return found


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw quality by variety: a curve over guidance scales, and one over strengths."""
    varieties, titles = result["varieties"], result["titles"]
    drawn = Plot(figsize=(6 * len(varieties), 5), layout="constrained", dpi=110)
    panels = drawn.subplots(1, len(varieties), squeeze=False)[0]
    for axes, key in zip(panels, varieties, strict=True):
        for title, names in result["curves"].items():
            points = [result["arms"][name] for name in names]
            xs, ys = ([point[figure] for point in points] for figure in (key, result["quality"]))
            axes.plot(xs, ys, "o-", label=title)
            for name, x, y in zip(names, xs, ys, strict=True):
                axes.annotate(name.split()[-1], (x, y), fontsize="small")
        if few := result["arms"].get("few-step"):
            axes.plot(few[key], few[result["quality"]], "s", label="few-step")
        axes.set(xlabel=titles[key], ylabel=titles[result["quality"]])
        axes.legend()
    drawn.savefig(path)


def table(result: dict[str, Any]) -> str:
    """Return the arms, and refined minus guided at equal quality, as Markdown tables."""
    figures = EmojiJudge.figures | Inception.figures | Vendi.figures
    parts = [
        f"{result['seeds']} seeds of {result['prompts']} prompts an arm, {result['steps']} steps.",
        arms_table(list(result["arms"].items()), figures),
    ]
    if rows := list(result["refined_minus_guided"].items()):
        parts.append("Variety of refined noise minus that of guidance at the same quality:")
        parts.append(arms_table(rows, figures))
    return "\n\n".join(parts)


def _guided(bench: Bench, sampling: dict[str, Any], scale: float, batch: Batch) -> Images:
    return bench.sample(batch, guidance_scale=scale, **sampling)


def _refined(bench: Bench, sampling: dict[str, Any], strength: float, batch: Batch) -> Images:
    return bench.sample(bench.refine(batch, strength), **sampling)


def _few_step(bench: Bench, args: argparse.Namespace, batch: Batch) -> Images:
    return bench.sample(batch, args.few_steps, NATIVE, bench.few_step)


if __name__ == "__main__":
    run_script(main)
