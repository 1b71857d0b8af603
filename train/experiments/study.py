"""Measure how a refiner grows with its training recipe, a factor at a time around a preset.

The preset is that of an embedded model, whose images the judge knows.

    python train/experiments/study.py --preset emoji-sit --dry_run
    python train/experiments/study.py --preset emoji-sit --output study-emoji-sit.json --jobs 4
    python train/experiments/study.py --preset emoji --quick --factors rank=4,16 epochs teacher \\
        --output study-emoji.json

All other options are the trainer's: they change the base recipe, e.g. --num_targets 1024, or the
speed, e.g. --target_batch_size 256. Every recipe is trained and measured once: its figures are
written at once, to OUTPUT.partial.json until all are there. The same command continues from it, and
one with other --factors adds to --output. --work_dir keeps targets and the training in progress.

Refined images of held-out prompts are compared with the unguided and guided ones of the same seeds,
the guided ones at the preset's scale whatever the recipe's teacher. "Percent of the way" is that of
their latents (see latent_distance.py), the gap closed that of the judge's accuracy. Intervals are
95 % bootstrap intervals over images. Seconds depend on what else the device does, e.g. by --jobs.
"""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor as Pool
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from noiserefine import Refiner, draw_noise
from noiserefine.checkpoint import signature
from noiserefine.denoiser import denoiser
from noiserefine.guidance import sample_both
from noiserefine.models.loading import load_pipeline
from noiserefine.noise import encode_prompt
from noiserefine.refiner import check_strength
from noiserefine.samplers import samplers_of, with_sampler
from train import train_refiner
from train.captions import read_prompts, repeat_to
from train.common import (
    FIRST_EVALUATION_SEED,
    argument_parser,
    atomic,
    check_recorded,
    markdown_table,
    mean_and_interval,
    run_script,
    with_interval,
    write_json,
)
from train.experiments.latent_distance import megabytes, percent_of_the_way
from train.metrics import load_metrics
from train.options import TARGET_OPTIONS, TRAINING_OPTIONS, Options, check, parse, plan

STEPS = 20  # of the measured images
# The values of each factor, in the order in which they are tried; teachers' scales are multiples of
# the base recipe's. The number of targets alone is varied at equal steps: few are seen often.
FACTORS: dict[str, tuple] = {
    "num_targets": (64, 128, 256, 512, 1024, 2048, 4096),
    "epochs": (0.25, 0.5, 1.0, 4.0),
    "rank": (4, 8, 16, 64, 128),
    "lr": (3e-4, 3e-3),
    "steps": (2, 3, 4, 10, 20),
    "teacher": ("interval", "rescale", "apg"),
    "guidance_scale": (1.5, 2.0, 3.0),
    "layers": ("attention", "outer"),
    "strength": (0.5, 1.5, 2.0),
    "target_steps": (5, 20, 40),
    "batch_size": (16, 64, 128),
    "seed": (10_000_000, 20_000_000),
    "size": (64, 256, 1024, 4096, 12_000),  # targets at equal epochs, as --hours chooses them
}
TITLES = {
    "num_targets": "targets, at equal steps",
    "epochs": "epochs",
    "rank": "rank",
    "lr": "learning rate",
    "steps": "N, steps in the loss",
    "teacher": "teacher",
    "guidance_scale": "teacher's scale by the base's",
    "layers": "layers with a LoRA",
    "strength": "strength",
    "target_steps": "N', steps of the targets",
    "batch_size": "batch size, at equal epochs",
    "seed": "seed",
    "size": "targets, at equal epochs",
}
# Regular expressions of layers' names. The outer blocks are the first two and the last two, of six
# or seven.
ATTENTION = r"\battn"
LAYERS = {
    "emoji": r"^(conv_in|down_blocks\.[01]|up_blocks\.[12])\b",
    "emoji-flow": r"^(pos_embed|context_embedder|transformer_blocks\.[0145])\b",
    "emoji-sit": r"^(pos_embed|transformer_blocks\.[0156])\b",
}
BASE = "base"
SHARED = [name for name in TARGET_OPTIONS if name != "num_targets"]
BOUND = (*TARGET_OPTIONS, *TRAINING_OPTIONS, "batch_size", "gradient_accumulation_steps")
PANELS = 4  # in a row of the plot
COLOURS = ("tab:orange", "tab:blue", "tab:green")


@dataclass(frozen=True)
class Recipe:
    """The base recipe with another value of one factor."""

    factor: str
    value: Any
    options: Options  # of the training
    strength: float = 1.0  # of the refinement when measured

    @property
    def name(self) -> str:
        """The key of its figures."""
        return self.factor if self.value is None else f"{self.factor}={self.value}"

    @property
    def training(self) -> str:
        """The name of its training, which recipes of other strengths share."""
        return BASE if self.factor == "strength" else self.name


def parse_all(arguments: list[str] | None) -> tuple[argparse.Namespace, Options]:
    """Return the study's options, and the base recipe: the trainer's options.

    Raise ValueError for values that cannot work.
    """
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add(
        "--factors",
        nargs="+",
        default=list(FACTORS),
        help=f"NAME or NAME=VALUE,VALUE of {', '.join(FACTORS)}; all if not given",
    )
    add("--n", type=int, default=512, help="images of each arm")
    add("--jobs", type=int, default=1, help="recipes trained at the same time")
    add("--output", type=Path, help="JSON file of the results; beside it a plot of them")
    add("--work_dir", type=Path, help="folder to continue from; the name of --output if not given")
    add("--dry_run", action="store_true", help="print the recipes and their cost, and stop")
    args, others = parser.parse_known_args(arguments)
    args.output = args.output or Path("study.json")
    if args.output.suffix != ".json":
        raise ValueError("--output is a .json file.")
    args.work_dir = args.work_dir or args.output.with_suffix("")
    args.factors = dict(map(_factor, args.factors))
    base = parse([*others, "--output_dir", str(args.work_dir / BASE)])
    if not base.validation_prompts:
        raise ValueError("--validation_prompts is missing: the prompts that are measured.")
    return args, base


def _factor(text: str) -> tuple[str, list]:
    """Return a factor and its values, of NAME or NAME=VALUE,VALUE."""
    name, given, values = text.partition("=")
    if name not in FACTORS:
        raise ValueError(f"There is no factor {name!r}; choose from {', '.join(FACTORS)}.")
    kind = type(FACTORS[name][0])
    try:
        return name, [kind(value) for value in values.split(",")] if given else list(FACTORS[name])
    except ValueError as error:
        shown = ",".join(map(str, FACTORS[name][:2]))
        raise ValueError(f"--factors {text} is no list like {name}={shown}.") from error


def recipes(base: Options, factors: dict[str, list]) -> list[Recipe]:
    """Return the base recipe and those with another value of each factor.

    Raise ValueError for values that cannot work.
    """
    varied = [
        Recipe(factor, value, base, value)
        if factor == "strength"
        else Recipe(factor, value, changed(base, factor, value))
        for factor, values in factors.items()
        for value in values
        if value != base_value(vars(base), factor)
    ]
    for recipe in varied:
        check(recipe.options)
        check_strength(recipe.strength)
    return [Recipe(BASE, None, base), *varied]


def changed(base: Options, factor: str, value: Any) -> Options:
    """Return the base recipe with another value of a factor.

    Raise ValueError for layers that have no names in the base's preset.
    """
    if factor == "num_targets":
        epochs = base.epochs * base.num_targets / value
        return replace(base, num_targets=value, epochs=epochs)
    if factor == "size":
        return replace(base, num_targets=value)
    if factor == "guidance_scale":
        return replace(base, guidance_scale=value * base.guidance_scale)
    if factor == "layers":
        layers = {"attention": ATTENTION, "outer": LAYERS.get(base.preset)}.get(value)
        if layers is None:
            raise ValueError(
                f"--factors layers is attention, or outer for the presets {', '.join(LAYERS)}; "
                f"got {value} for {base.preset}."
            )
        return replace(base, layers=layers)
    return replace(base, **{factor: value})


def base_value(base: dict[str, Any], factor: str) -> Any:
    """Return the value of a factor that the base recipe's options stand for."""
    special = {
        "size": base.get("num_targets"),
        "guidance_scale": 1.0,
        "strength": 1.0,
        "layers": base.get("layers") or "all",
    }
    return special.get(factor, base.get(factor))


def shares_targets(recipe: Recipe, base: Options) -> bool:
    """Return whether a recipe's targets are the first of the base's, or more of them."""
    return all(getattr(recipe.options, name) == getattr(base, name) for name in SHARED)


class Study:
    """A model, its unguided and guided images, and what trains and measures its refiners."""

    def __init__(self, args: argparse.Namespace, base: Options, targets: int):
        self.args, self.base, self.targets = args, base, targets
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32
        pipe = load_pipeline(base.backbone, self.device, torch.float32)
        self.pipe = with_sampler(pipe, base.sampler or samplers_of(pipe)[0])
        self.prompts = repeat_to(read_prompts(str(base.validation_prompts), pipe), args.n)
        (self.judge,) = load_metrics(["judge"], None, self.device)

    def settings(self) -> dict[str, Any]:
        """Return what all figures depend on."""
        return {name: getattr(self.base, name) for name in BOUND} | {
            "preset": self.base.preset,
            "validation_prompts": self.base.validation_prompts,
            "n": self.args.n,
            "measured_steps": STEPS,
            "first_seed": FIRST_EVALUATION_SEED,
            "backbone_signature": signature(denoiser(self.pipe)),
        }

    def prepare(self, recipes: Iterable[Recipe]) -> dict[str, Any]:
        """Make what the recipes share: the base's targets, the unguided and guided images.

        Return the figures of the latter.
        """
        if any(shares_targets(recipe, self.base) for recipe in recipes):
            one_step = replace(self.base, num_targets=self.targets, epochs=1e-9)
            self.train(one_step, self.targets_folder)
        if not self.arms_file.exists():
            gaussian, guided = self.sample(None), self.sample(None, self.base.guidance_scale)
            distances = gaussian["x0"] - guided["x0"]
            self.arms_file.parent.mkdir(parents=True, exist_ok=True)
            with atomic(self.arms_file) as part, part.open("wb") as file:
                np.savez(
                    file,
                    guided=guided["x0"],
                    distance=(distances**2).mean((1, 2, 3)),
                    gaussian_correct=gaussian["correct"],
                    guided_correct=guided["correct"],
                )
        return {
            name: {"object_accuracy": accuracy, "object_accuracy_interval": bounds}
            for name in ("gaussian", "guided")
            for accuracy, bounds in [mean_and_interval(self.arms[f"{name}_correct"])]
        }

    @property
    def targets_folder(self) -> Path:
        """The run whose targets most recipes use."""
        return self.args.work_dir / f"targets-{self.targets}"

    @property
    def arms_file(self) -> Path:
        """The unguided and guided images' latents and judgements."""
        return self.args.work_dir / "arms.npz"

    @cached_property
    def arms(self) -> dict[str, np.ndarray]:
        """What is in the file of the arms."""
        with np.load(self.arms_file) as file:
            return dict(file)

    def train(self, options: Options, folder: Path, targets_of: Path | None = None) -> None:
        """Train a refiner in a folder, or continue."""
        if not (folder / "refiner.json").exists():
            shared = targets_of and str(targets_of)
            given: dict[str, Any] = {"output_dir": str(folder), "targets_of": shared}
            given |= {"validation_prompts": None, "push_to_hub": None}
            train_refiner.run(replace(options, **given))

    def measure(self, recipes: list[Recipe]) -> dict[str, dict[str, Any]]:
        """Train the one refiner of some recipes, and return each recipe's figures."""
        first = recipes[0]
        folder = self.args.work_dir / first.training
        shared = shares_targets(first, self.base)
        self.train(first.options, folder, self.targets_folder if shared else None)
        refiner = Refiner.from_pretrained(folder, self.pipe, merge=False)
        seconds, size = refiner.config.results["seconds_of_steps"], megabytes(refiner)
        refiner.merge()
        cost = {
            "optimizer_steps": refiner.config.training["optimizer_steps"],
            "evaluations": plan(first.options)[1],
            "seconds_of_steps": seconds,
            "device": _device_name(self.device),
            "megabytes": size,
        }
        return {
            recipe.name: {"factor": recipe.factor, "value": recipe.value}
            | cost
            | self.figures(refiner, recipe.strength)
            for recipe in recipes
        }

    def figures(self, refiner: Refiner, strength: float) -> dict[str, Any]:
        """Return what is measured of refined images beside the unguided and guided ones."""
        refined, arms = self.sample(refiner, strength=strength), self.arms
        distance = ((refined["x0"] - arms["guided"]) ** 2).mean((1, 2, 3))
        correct = [arms["gaussian_correct"], refined["correct"], arms["guided_correct"]]
        estimates = {
            "percent_of_the_way": percent_of_the_way(arms["distance"], distance),
            "object_accuracy": mean_and_interval(refined["correct"]),
            "gap_closed": percent_of_the_way(*correct),
        }
        return {
            key: value
            for name, (estimate, bounds) in estimates.items()
            if np.isfinite([estimate, *bounds]).all()  # the judge may see no gap
            for key, value in ((name, estimate), (f"{name}_interval", bounds))
        }

    @torch.no_grad()
    def sample(
        self, refiner: Refiner | None, guidance_scale: float = 1.0, strength: float = 1.0
    ) -> dict[str, np.ndarray]:
        """Return the latents "x0", (n, C, h, w), and whether the judge sees the object, (n,)."""
        size = self.base.target_batch_size
        latents, correct = [], []
        for start in range(0, self.args.n, size):
            prompts = self.prompts[start : start + size]
            x_T = draw_noise(self.pipe, FIRST_EVALUATION_SEED + start, len(prompts))
            embeds = encode_prompt(self.pipe, prompts)
            noise = refiner.refine(x_T, embeds, strength) if refiner else x_T.to(self.device)
            x0, images = sample_both(self.pipe, noise, embeds, STEPS, guidance_scale=guidance_scale)
            latents.append(x0.float().cpu().numpy())
            correct.append(self.judge.measure(images, prompts)["correct"][:, 0])
        return {"x0": np.concatenate(latents), "correct": np.concatenate(correct)}


def _device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}"


_STUDY: Study  # of a process of the pool


def _start(*setup: Any) -> None:
    """Load the model into a process of the pool."""
    global _STUDY  # noqa: PLW0603
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // setup[0].jobs))
    _STUDY = Study(*setup)


def _measure(recipes: list[Recipe]) -> dict[str, dict[str, Any]]:
    return _STUDY.measure(recipes)


@contextlib.contextmanager
def processes(setup: tuple[argparse.Namespace, Options, int]) -> Iterator[Pool | None]:
    """Yield as many processes as --jobs asks for, None where one is enough: this one."""
    jobs = setup[0].jobs
    if jobs <= 1:
        yield None
        return
    pool = Pool(jobs, multiprocessing.get_context("spawn"), _start, setup)
    for _ in range(jobs):
        pool.submit(int)  # starts a process, which loads while this one prepares
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def measure_all(
    recipes: list[Recipe], study: Study, pool: Pool | None
) -> Iterator[dict[str, dict[str, Any]]]:
    """Yield the figures of the recipes of one training after another, as they are done."""
    trainings: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        trainings.setdefault(recipe.training, []).append(recipe)
    if pool is None:
        yield from map(study.measure, trainings.values())
        return
    for future in as_completed(pool.submit(_measure, group) for group in trainings.values()):
        yield future.result()


def main(arguments: list[str] | None = None) -> None:
    """Train and measure the recipes without figures yet; write, plot and print all."""
    args, base = parse_all(arguments)
    chosen = recipes(base, args.factors)
    largest = max(recipe.options.num_targets for recipe in chosen if shares_targets(recipe, base))
    if args.dry_run:
        print(cost_table(chosen, base, largest, args.n))
        return
    result: dict[str, Any] = {"settings": None, "arms": {}, "recipes": {}}
    partial = args.output.with_suffix(".partial.json")
    for path in (args.output, partial):  # the latter has more, where both exist
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
    missing = [recipe for recipe in chosen if recipe.name not in result["recipes"]]
    args.jobs = min(args.jobs, len(missing))
    setup = (args, base, largest)
    with processes(setup) as pool:
        study = Study(*setup)
        settings = study.settings()
        if result["settings"] not in (None, settings):
            raise ValueError(f"{args.output} holds a study of other settings: name another file.")
        check_recorded(args.work_dir / "settings.json", settings)
        write_json(args.work_dir / "settings.json", settings)
        if missing:
            result |= {"settings": settings, "arms": study.prepare(missing)}
        for figures in measure_all(missing, study, pool):
            result["recipes"] |= figures
            write_json(partial, result)
            for folder in map(args.work_dir.joinpath, figures.keys() - {BASE}):
                if folder.exists():  # other strengths have none, and may ask for the base's later
                    shutil.rmtree(folder)
    write_json(args.output, result)
    partial.unlink(missing_ok=True)
    plot({base.preset: result}, args.output.with_suffix(".png"))
    print(table(result))


def cost_table(chosen: list[Recipe], base: Options, largest: int, n: int) -> str:
    """Return the recipes with their steps and evaluations, and the evaluations of all."""
    rows, total = [], plan(replace(base, num_targets=largest))[1]["targets"]
    for recipe in chosen:
        steps, evaluations = plan(recipe.options)
        if recipe.factor == "strength":
            steps, evaluations = 0, dict.fromkeys(evaluations, 0)
        if shares_targets(recipe, base):
            evaluations["targets"] = 0
        measuring = n * (STEPS + 1)
        total += sum(evaluations.values()) + measuring
        rows.append([recipe.name, steps, *evaluations.values(), measuring])
    guided = n * STEPS * len(("unguided", "prompt", "empty prompt"))
    titles = ["recipe", "steps", "its own targets", "training", "measuring"]
    lines = [[name, *(f"{count:,}" for count in counts)] for name, *counts in rows]
    return (
        f"{markdown_table(titles, lines)}\n\nNetwork evaluations: {total + guided:,} with "
        f"{largest:,} shared targets and the unguided and guided images."
    )


def points(result: dict[str, Any], factor: str) -> list[tuple[Any, dict[str, Any]]]:
    """Return a factor's values and their figures, in order, the base recipe's among them."""
    found = [(row["value"], row) for row in result["recipes"].values() if row["factor"] == factor]
    if not found:
        return []
    found.append((base_value(result["settings"], factor), result["recipes"][BASE]))
    return sorted(found, key=lambda point: _place(point[0]))


def _place(value: Any) -> tuple:
    """Return what sorts a factor's values: numbers by size, names with the base's first."""
    names = ["all", "cfg", *FACTORS["layers"], *FACTORS["teacher"]]
    return (names.index(value), 0) if isinstance(value, str) else (0, value)


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot what each factor does, a colour for each model.

    Solid: the percent of the way. Dashed: the percent of the accuracy gap. Filled: the base recipe.
    """
    drawn = [factor for factor in FACTORS if any(points(r, factor) for r in results.values())]
    if not drawn:
        return
    columns = min(PANELS, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    size = (3.2 * columns, 2.6 * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for axes, factor in itertools.zip_longest(panels, drawn):
        if factor is None:
            axes.set_axis_off()
            continue
        found = {model: points(result, factor) for model, result in results.items()}
        values = sorted({v for line in found.values() for v, _ in line}, key=_place)
        for (model, line), colour in zip(found.items(), COLOURS, strict=False):
            for key, style in (("percent_of_the_way", "o-"), ("gap_closed", "s--")):
                shown = [(values.index(v), row) for v, row in line if key in row]
                if not shown:
                    continue
                x, y = [place for place, _ in shown], [row[key] for _, row in shown]
                label = model if style == "o-" else None
                axes.plot(x, y, style, color=colour, markerfacecolor="white", label=label)
                low, high = zip(*(row[f"{key}_interval"] for _, row in shown), strict=True)
                axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
                base = [(place, row[key]) for place, row in shown if row["factor"] == BASE]
                axes.plot(*zip(*base, strict=True), style[0], color=colour)
        labels = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        axes.set_xticks(range(len(values)), labels, rotation=45 if len(values) > PANELS else 0)
        axes.set_title(TITLES[factor], fontsize="medium")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.supylabel("percent: of the way (solid), of the accuracy gap (dashed)", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def table(result: dict[str, Any]) -> str:
    """Return the arms' accuracies, and a Markdown table of the recipes."""

    def cell(row: dict[str, Any], key: str, digits: int = 0) -> str:
        return with_interval(row[key], row[f"{key}_interval"], digits) if key in row else ""

    arms = [f"{name} {cell(arm, 'object_accuracy', 3)}" for name, arm in result["arms"].items()]
    titles = ["factor", "value", "steps", "evaluations", "MB", "seconds"]
    titles += ["percent of the way", "object accuracy ↑", "gap closed, %"]
    rows = [("the preset", "", result["recipes"][BASE])]
    for factor in FACTORS:
        rows += [
            (TITLES[factor], value, row)
            for value, row in points(result, factor)
            if row["factor"] != BASE
        ]
    lines = [
        [
            title,
            value,
            row["optimizer_steps"],
            f"{sum(row['evaluations'].values()):,}",
            f"{row['megabytes']:.1f}",
            f"{row['seconds_of_steps']:.0f}",
            cell(row, "percent_of_the_way"),
            cell(row, "object_accuracy", 3),
            cell(row, "gap_closed"),
        ]
        for title, value, row in rows
    ]
    head = f"n = {result['settings']['n']} images an arm. Object accuracy: {', '.join(arms)}."
    return f"{head}\n\n{markdown_table(titles, lines)}"


if __name__ == "__main__":
    run_script(main)
