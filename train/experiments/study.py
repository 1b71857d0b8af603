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
all in the base recipe's precision, the guided ones at the preset's scale whatever the recipe's
teacher. "Percent of the way" is that of their latents (see latent_distance.py), the gap closed that
of the judge's accuracy. Intervals are 95 % bootstrap intervals over images. Seconds depend on what
else the device does, e.g. by --jobs.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor as Pool
from concurrent.futures import as_completed
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from noiserefine import Refiner, draw_noise
from noiserefine.checkpoint import CONFIG_NAME, signature
from noiserefine.denoiser import denoiser
from noiserefine.guidance import sample_both
from noiserefine.models.loading import load_pipeline
from noiserefine.noise import encode_prompt
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
    write_json,
)
from train.experiments.latent_distance import (
    megabytes,
    percent_of_the_way,
    squared_distances,
)
from train.experiments.study_figures import plot, table
from train.experiments.study_recipes import BASE, FACTORS, Recipe, recipes, shares_targets
from train.measurement import autocast_to
from train.metrics import load_metrics
from train.options import TARGET_OPTIONS, TRAINING_OPTIONS, Options, parse, plan

STEPS = 20  # of the measured images
# The options that all figures depend on.
BOUND = (*TARGET_OPTIONS, *TRAINING_OPTIONS, "batch_size", "gradient_accumulation_steps")


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
    add("--output", type=Path, default=Path("study.json"), help="JSON file; beside it a plot")
    add("--work_dir", type=Path, help="folder to continue from; the name of --output if not given")
    add("--dry_run", action="store_true", help="print the recipes and their cost, and stop")
    args, others = parser.parse_known_args(arguments)
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
    tried = FACTORS[name].values
    try:
        return name, [type(tried[0])(value) for value in values.split(",")] if given else [*tried]
    except ValueError as error:
        shown = ",".join(map(str, tried[:2]))
        raise ValueError(f"--factors {text} is no list like {name}={shown}.") from error


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
            self.arms_file.parent.mkdir(parents=True, exist_ok=True)
            with atomic(self.arms_file) as part, part.open("wb") as file:
                np.savez(
                    file,
                    guided=guided["x0"],
                    distance=squared_distances(gaussian["x0"], guided["x0"]),
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
        if not (folder / CONFIG_NAME).exists():
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
        distance = squared_distances(refined["x0"], arms["guided"])
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
        autocast = autocast_to(self.base.mixed_precision, self.device)
        latents, correct = [], []
        for start in range(0, self.args.n, size):
            prompts = self.prompts[start : start + size]
            x_T = draw_noise(self.pipe, FIRST_EVALUATION_SEED + start, len(prompts))
            embeds = encode_prompt(self.pipe, prompts)
            with autocast:
                noise = x_T.to(self.device)
                if refiner:
                    scale = refiner.scale_input(self.base.guidance_scale)
                    noise = refiner.refine(x_T, embeds, strength, scale)
                x0, images = sample_both(
                    self.pipe, noise, embeds, STEPS, guidance_scale=guidance_scale
                )
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
    """Yield as many processes as --jobs asks for, None where one is enough: this one.

    SIGTERM, which reaches this process alone, ends them too. Ctrl-C reaches all of them by itself.
    """
    jobs = setup[0].jobs
    if jobs <= 1:
        yield None
        return

    def end_all(*_) -> None:
        for process in multiprocessing.active_children():
            process.kill()  # the last checkpoint stays
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end_all)
    pool = Pool(jobs, multiprocessing.get_context("spawn"), _start, setup)
    try:
        for _ in range(jobs):
            pool.submit(int)  # starts a process, which loads while this one prepares
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, before)


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


if __name__ == "__main__":
    run_script(main)
