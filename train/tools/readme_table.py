"""Write the tables of README.md and assets/results/README.md from the figures in assets/.

    python train/tools/readme_table.py

A table stands between two comments, `<!-- begin NAME -->` and `<!-- end NAME -->`. NAME is a key of
TABLES, whose function reads JSON files that the measuring scripts wrote.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from noiserefine.models import catalogue
from noiserefine.models.catalogue import ASSETS, BACKBONES
from train.common import markdown_table, with_interval
from train.emoji.judge import EmojiJudge
from train.experiments import frontier, latent_distance, study_figures, variety
from train.measurement import arms_table
from train.tools import cost, cuda_table

RESULTS = ASSETS / "results"
PAGES = (ASSETS.parent / "README.md", RESULTS / "README.md")
BLOCK = re.compile(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", re.DOTALL)
ARMS = {
    "gaussian": "Gaussian noise",
    "guided": "Gaussian noise, guided",
    "refined": "refined noise",
}


def _evaluations() -> dict[str, dict]:
    """Return the results of train/evaluate.py by their model's name, in the catalogue's order."""
    found = {name: RESULTS / f"{name}.json" for name in BACKBONES}
    return {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}


def _number(figures: dict, name: str, digits: int = 2, factor: float = 1) -> str:
    bounds = [factor * bound for bound in figures[f"{name}_interval"]]
    return with_interval(factor * figures[name], bounds, digits)


def models() -> str:
    """Return the catalogue's models by what they have run with in this project."""
    groups: dict[str, list[str]] = {}
    for backbone in BACKBONES.values():
        title = re.sub(r",? \d+ px", "", backbone.title)
        groups.setdefault(backbone.tried, []).append(title)
    rows = [[tried, "; ".join(titles)] for tried, titles in groups.items()]
    return markdown_table(["runs here with", "models"], rows)


def summary() -> str:
    """Return one row for each embedded model: accuracy of the arms, share of the gap closed."""
    header = ["model", *ARMS.values(), "gap closed: accuracy, %", "Fréchet distance, %"]
    rows = []
    for name, result in _evaluations().items():
        accuracy = [f"{result['arms'][arm]['object_accuracy']:.3f}" for arm in ARMS]
        closed = result["gap_closed"]
        metrics = ("object_accuracy", "frechet_distance")
        shares = [
            _number(closed, metric, digits=0, factor=100)
            if float(np.ptp(closed[f"{metric}_interval"])) < 1
            else "gap too small"  # for a share of it
            for metric in metrics
        ]
        rows.append([BACKBONES[name].title, *accuracy, *shares])
    return markdown_table(header, rows)


def arms() -> str:
    """Return all figures of every embedded model's three arms."""
    found = _evaluations().items()
    return "\n\n".join(_arms(BACKBONES[name].title, result) for name, result in found)


def few_steps() -> str:
    """Return the three arms in fewer steps."""
    results = [json.loads(path.read_text()) for path in RESULTS.glob("steps-*.json")]
    results.sort(
        key=lambda result: (result["settings"]["sampler"], int(result["settings"]["steps"]))
    )
    titles = (BACKBONES[Path(result["settings"]["backbone"]).name].title for result in results)
    return "\n\n".join(map(_arms, titles, results))


def _arms(title: str, result: dict) -> str:
    """Return the table of an evaluation's arms under a line that says how it was made."""
    rows = [(arm_title, result["arms"][arm]) for arm, arm_title in ARMS.items()]
    run = result["settings"]
    return (
        f"**{title}**: n = {result['n']} images of {result['prompts']} prompts an arm, seeds from "
        f"{result['first_seed']}, {run['steps']} steps of {run['sampler']}, guidance scale "
        f"{run['guidance_scale']}.\n\n" + arms_table(rows, EmojiJudge.figures)
    )


def training() -> str:
    """Return how each embedded refiner was trained, and how long it took."""
    header = ["refiner", "rank", "targets", "N'", "N", "steps", "seconds", "MB"]
    header.append("latent distance to guided: before, after")
    rows = []
    for path in sorted((ASSETS / "refiners").glob("*/refiner.json")):
        config = json.loads(path.read_text())
        run, results = config["training"], config["results"]
        size = sum(file.stat().st_size for file in path.parent.glob("*.safetensors")) / 1e6
        rows.append(
            [
                path.parent.name,
                *(str(value) for value in (config["rank"], run["num_targets"])),
                *(str(run[name]) for name in ("target_steps", "steps", "optimizer_steps")),
                f"{results['seconds_of_targets'] + results['seconds_of_steps']:.0f}",
                f"{size:.1f}",
                f"{results['validation_gaussian']:.3f}, {results['validation_refined']:.3f}",
            ]
        )
    return markdown_table(header, rows)


def by_model(script: str, table: Callable[[dict], str]) -> str:
    """Return an experiment's table of each model it was made with: SCRIPT-MODEL.json."""
    found = {
        backbone.title: RESULTS / f"{script}-{name}.json" for name, backbone in BACKBONES.items()
    }
    return "\n\n".join(
        f"**{title}**: {table(json.loads(path.read_text()))}"
        for title, path in found.items()
        if path.exists()
    )


def benchmark() -> str:
    """Return the seconds of the whole pipeline in each arm; some models have no guided one."""
    arms = ("unguided", "guided", "refined")
    header = ["model", "device, precision", "images a call", *arms]
    header += ["refined / unguided", "refined / guided"]
    rows = []
    for path in sorted(RESULTS.glob("benchmark*.json")):
        run = json.loads(path.read_text())
        weights = " (random weights)" if run["random_weights"] else ""
        timed = run["arms"]
        rows.append(
            [
                f"{Path(run['backbone']).name}{weights}",
                f"{run['device']}, {run['dtype'].removeprefix('torch.')}",
                str(run["batch_size"]),
                *(f"{timed[arm]['seconds']:.2f} s" if arm in timed else "–" for arm in arms),
                *(
                    f"{run[f'refined_over_{arm}']:.3f}" if arm in timed else "–"
                    for arm in ("unguided", "guided")
                ),
            ]
        )
    return markdown_table(header, rows)


def guidance_scales() -> str:
    """Return how refined images follow the guidance scale that the refiner is given."""
    result = json.loads((RESULTS / "guidance_scales.json").read_text())
    scales = result["scales"]
    rows = [
        [f"{scale:g}", _number(guided, "object_accuracy"), _number(refined, "object_accuracy")]
        + [f"{distance:.3f}" for distance in distances]
        for scale, guided, refined, distances in zip(
            scales,
            result["guided"],
            result["refined"],
            result["distance_of_refined_to_guided"],
            strict=True,
        )
    ]
    header = ["g", "guided", "refined", *(f"to {scale:g}" for scale in scales)]
    return f"n = {result['n']}, seeds from {result['first_seed']}.\n\n" + markdown_table(
        header, rows
    )


def msd() -> str:
    """Return the time and memory of a training step."""
    run = json.loads((RESULTS / "msd.json").read_text())
    memory = ", ".join(
        f"{peak / 1e6:.0f} MB for N = {steps}" for steps, peak in run["peak_bytes"].items()
    )
    return (
        f"A step takes {run['step_over_parts']:.2f} times its forwards and its backward timed "
        f"alone (rank {run['rank']}, batch {run['batch_size']}, median of {run['rounds']} rounds). "
        f"Peak memory: {memory}."
    )


def tiers() -> str:
    """Return the options that fit into a card, for models and sizes of cards."""
    found = json.loads((RESULTS / "tiers.json").read_text())
    return markdown_table(cost.MEMORY_HEADER, cost.memory(found))


def card() -> str:
    """Return what was measured on graphics cards."""
    paths = sorted(RESULTS.glob("cuda-*.json"))
    return "\n\n".join(cuda_table.tables(json.loads(path.read_text())) for path in paths)


TABLES: dict[str, Callable[[], str]] = {
    "models": models,
    "catalogue": catalogue.table,
    "summary": summary,
    "arms": arms,
    "few_steps": few_steps,
    "training": training,
    "distances": partial(by_model, "distances", latent_distance.table),
    "studies": partial(by_model, "study", study_figures.table),
    "frontiers": partial(by_model, "frontier", frontier.table),
    "varieties": partial(by_model, "variety", variety.table),
    "benchmark": benchmark,
    "guidance_scales": guidance_scales,
    "msd": msd,
    "tiers": tiers,
    "card": card,
}


def filled(page: str) -> str:
    """Return the page with its tables made anew."""
    return BLOCK.sub(
        lambda found: (
            f"<!-- begin {found[1]} -->\n\n{TABLES[found[1]]()}\n\n<!-- end {found[1]} -->"
        ),
        page,
    )


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
