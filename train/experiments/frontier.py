"""Measure quality by network forwards: refined noise beside all else that they could be spent on.

    python train/experiments/frontier.py --refiner assets/refiners/emoji \\
        --output runs/frontier-emoji.json
    python train/experiments/frontier.py --refiner assets/refiners/emoji --dry_run

train/experiments/methods.py says which methods there are. Guidance and refined noise are tried with
every sampler, the others with the model's own. What a method can be set to (guidance scale,
interval, strength, sharpening) is chosen for each figure on --tuning_prompts, which the evaluation
does not use, with --tuning_budget forwards. Where --prompts is the same file, as the classes of a
class-conditional model are, every fourth prompt is for the tuning and the others for the
evaluation. All methods have the same prompts and seeds; intervals are 95 % bootstrap intervals over
prompts. The winner of a budget is chosen on the evaluation itself, so the best of many like methods
looks a little better than it is; a judge that chose the images flatters them.

Beside --output: a plot (.png), and a folder that keeps what was measured, so that the same command
continues, also with more budgets or samplers.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure as Plot

from noiserefine.samplers import samplers_of
from train.captions import chosen_prompts, read_prompts, repeat_to
from train.common import (
    argument_parser,
    interval,
    markdown_table,
    run_script,
    with_interval,
    write_json,
)
from train.experiments.bench import Bench, Images, add_options, open_bench
from train.experiments.methods import Family, Setting, families
from train.measurement import Batch, Measurement, all_figures, summary

BUDGETS = (4, 8, 12, 20, 40, 80)  # forwards
RANDOM_SAMPLERS = ("DPM++ SDE",)  # what they add at their steps replaces the refined noise
TUNING_SHARE = 4  # every fourth class is for the tuning


class Arm(NamedTuple):
    """A method with its setting and steps."""

    family: str
    setting: Setting
    steps: int
    unit: str  # of the steps

    @property
    def name(self) -> str:
        """Return the name of its files."""
        values = [f"{key} {value:g}" for key, value in self.setting.items()]
        return ", ".join([self.family, *values, f"{self.steps} {self.unit}"]).replace("+", "p")


class Measured:
    """The figures and costs of arms."""

    def __init__(self, bench: Bench, measurement: Measurement, prompts: list[str]):
        self.figures = all_figures(bench.metrics)
        self.estimates = measurement.estimates(prompts, bench.metrics)
        self.costs = {name: measurement.cost(name) for name in self.estimates}

    def best(self, arms: list[Arm], key: str) -> Arm:
        """Return the arm with the best value of a figure; of equal ones the cheapest."""
        sign = 1 if "↑" in self.figures[key].title else -1

        def merit(arm: Arm) -> tuple[float, float]:
            return sign * self.estimates[arm.name][key][0], -self.costs[arm.name]["forwards"]

        return max(arms, key=merit)

    def value(self, arm: Arm, key: str, minus: Arm | None = None) -> dict[str, Any]:
        """Return a figure of an arm, or its difference to another's, with the interval."""
        values = self.estimates[arm.name][key]
        if minus is not None:
            values = values - self.estimates[minus.name][key]
        bounds = interval(values, self.figures[key].biased)
        return {"value": float(values[0]), "interval": bounds}

    def summaries(self) -> dict[str, dict[str, Any]]:
        """Return every arm's cost and figures."""
        return {
            name: self.costs[name] | summary(values, self.figures)
            for name, values in self.estimates.items()
        }


def main(arguments: list[str] | None = None) -> None:
    """Tune, measure, compare and plot, or print what that costs."""
    args = parse(arguments)
    bench = open_bench(args, args.distilled, args.few_step)
    samplers = args.samplers or [x for x in samplers_of(bench.pipe) if x not in RANDOM_SAMPLERS]
    found = families(bench, samplers)
    if unknown := set(args.methods or ()) - found.keys():
        raise ValueError(f"There is no method {min(unknown)!r}; choose from {', '.join(found)}.")
    found = {name: found[name] for name in args.methods or found}
    keys = [key for key, figure in all_figures(bench.metrics).items() if figure.in_gap]
    trials = list(_trials(found, args.tuning_budget))
    if args.dry_run:
        print(_cost(found, trials, args, len(keys)))
        return
    evaluation, tuning = split_prompts(args, bench)
    folder = args.output.with_suffix("")

    def measure(arms: list[Arm], name: str, prompts: list[str]) -> Measurement:
        makers = {arm.name: partial(_images, found[arm.family], arm) for arm in arms}
        return bench.measure(folder / name, makers, prompts, args)

    # Choose each method's setting for each figure, then measure it at every budget.
    tried = Measured(bench, measure(trials, "tuning", tuning), tuning)
    settings = {key: choose(found, trials, tried, key) for key in keys}
    arms = {key: list(_arms(found, settings[key], args.budgets)) for key in keys}
    different = {arm.name: arm for key in keys for arm in arms[key]}
    measurement = measure(list(different.values()), "evaluation", evaluation)
    if not bench.process.is_main_process:
        return

    measured = Measured(bench, measurement, evaluation)
    result = measurement.head(evaluation) | {
        "tuning": {"n": len(tuning), "prompts": len(set(tuning)), "budget": args.tuning_budget},
        "titles": {name: family.title for name, family in found.items()},
        "arms": measured.summaries(),
        "figures": {
            key: {
                "title": measured.figures[key].title,
                "settings": settings[key],
                "curves": curves(arms[key], measured, key),
                "winners": winners(arms[key], measured, key, args.budgets),
            }
            for key in keys
        },
    }
    write_json(args.output, result)
    plot(result, args.output.with_suffix(".png"))
    print(table(result))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argument_parser(__doc__)
    add_options(parser, n=1000)
    add = parser.add_argument
    add("--distilled", help="LoRA of guidance distillation (train/experiments/denoiser_lora.py)")
    add("--few_step", help="few-step LoRA")
    add("--tuning_prompts", default="assets/prompts/emoji.txt", help="file of training prompts")
    add("--tuning_n", type=int, default=200, help="images of each setting that is tried")
    add("--tuning_budget", type=int, default=20, help="forwards of an image while tuning")
    add("--budgets", type=int, nargs="+", default=list(BUDGETS), help="forwards of an image")
    add("--samplers", nargs="+", help="all that add no noise of their own, by default")
    add("--methods", nargs="+", help="those to compare; all by default")
    add("--dry_run", action="store_true", help="print how many forwards it takes, and stop")
    return parser.parse_args(arguments)


def split_prompts(args: argparse.Namespace, bench: Bench) -> tuple[list[str], list[str]]:
    """Return the prompts of the evaluation and those of the tuning, none of which is in both.

    Raise ValueError if the evaluation leaves none for the tuning.
    """
    training = read_prompts(args.tuning_prompts, bench.pipe)
    if args.prompts == args.tuning_prompts:
        others = [text for i, text in enumerate(training) if i % TUNING_SHARE]
        return repeat_to(others, args.n), repeat_to(training[::TUNING_SHARE], args.tuning_n)
    evaluation = chosen_prompts(args.prompts, args.n, bench.pipe)
    fresh = [text for text in training if text not in set(evaluation)]
    if not fresh:
        raise ValueError(
            f"All of {args.tuning_prompts} are prompts of the evaluation too: tune on others."
        )
    return evaluation, repeat_to(fresh, args.tuning_n)


def choose(
    found: dict[str, Family], trials: list[Arm], tried: Measured, key: str
) -> dict[str, Setting]:
    """Return each family's setting with the best value of a figure."""
    chosen = {name: family.settings[0] for name, family in found.items()}
    for name in chosen:
        if arms := [arm for arm in trials if arm.family == name]:
            chosen[name] = tried.best(arms, key).setting
    return chosen


def curves(arms: list[Arm], measured: Measured, key: str) -> dict[str, list[dict[str, Any]]]:
    """Return each family's forwards and values of a figure, with rising forwards."""
    points: dict[str, list[dict[str, Any]]] = {}
    for arm in arms:
        point = {"arm": arm.name, "forwards": measured.costs[arm.name]["forwards"]}
        points.setdefault(arm.family, []).append(point | measured.value(arm, key))
    return points


def winners(
    arms: list[Arm], measured: Measured, key: str, budgets: list[int]
) -> list[dict[str, Any]]:
    """Return the best arm within each budget, and how far the best refined one is from it."""
    rows = []
    for budget in budgets:
        within = [arm for arm in arms if measured.costs[arm.name]["forwards"] <= budget]
        if not within:
            continue
        winner = measured.best(within, key)
        row = {"budget": budget, "winner": winner.name} | measured.value(winner, key)
        if refined := [arm for arm in within if arm.family.startswith("refined")]:
            arm = measured.best(refined, key)
            row["refined"] = {"arm": arm.name} | measured.value(arm, key)
            row["refined_minus_winner"] = measured.value(arm, key, minus=winner)
        rows.append(row)
    return rows


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw each figure by forwards, a curve for each method; refined noise is drawn thicker."""
    drawn = Plot(figsize=(13, 5.5 * len(result["figures"])), layout="constrained", dpi=110)
    every_axes = np.atleast_1d(drawn.subplots(len(result["figures"]), 1))
    for axes, figure in zip(every_axes, result["figures"].values(), strict=True):
        for i, (family, points) in enumerate(figure["curves"].items()):
            forwards = [point["forwards"] for point in points]
            thick = 2.6 if family.startswith("refined") else 1.2
            style: dict[str, Any] = {"color": f"C{i % 10}", "linewidth": thick}
            line = "--" if i // 10 else "-"
            values = [point["value"] for point in points]
            axes.plot(forwards, values, f"o{line}", label=result["titles"][family], **style)
            lows, highs = zip(*(point["interval"] for point in points), strict=True)
            axes.fill_between(forwards, lows, highs, color=style["color"], alpha=0.07, linewidth=0)
        axes.set(xscale="log", xlabel="network forwards", title=figure["title"])
        budgets = [row["budget"] for row in figure["winners"]]
        axes.set_xticks(budgets, budgets)
        axes.minorticks_off()
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    drawn.savefig(path)


def table(result: dict[str, Any]) -> str:
    """Return the winner of every budget and the best refined arm within it, as Markdown."""

    def cell(value: dict[str, Any] | None) -> str:
        return with_interval(value["value"], value["interval"], 3) if value else ""

    tuning = result["tuning"]
    parts = [
        f"n = {result['n']} images of {result['prompts']} prompts an arm; settings chosen on "
        f"{tuning['n']} images of {tuning['prompts']} other prompts in {tuning['budget']} forwards."
    ]
    for figure in result["figures"].values():
        rows = [
            [
                row["budget"],
                row["winner"],
                cell(row),
                row.get("refined", {}).get("arm", ""),
                cell(row.get("refined")),
                cell(row.get("refined_minus_winner")),
            ]
            for row in figure["winners"]
        ]
        header = ["forwards", "winner", figure["title"], "best refined", "its value"]
        parts.append(markdown_table([*header, "refined minus winner"], rows))
    return "\n\n".join(parts)


def _images(family: Family, arm: Arm, batch: Batch) -> Images:
    return family.images(batch, arm.steps, arm.setting)


def _trials(found: dict[str, Family], budget: int) -> Iterator[Arm]:
    """Yield the settings to try of each method that has several."""
    for name, family in found.items():
        for setting in family.settings if len(family.settings) > 1 else ():
            if steps := family.steps_within(budget, setting):
                yield Arm(name, setting, steps, family.unit)


def _arms(
    found: dict[str, Family], chosen: dict[str, Setting], budgets: list[int]
) -> Iterator[Arm]:
    """Yield each method with the steps that each budget is enough for, once."""
    for name, family in found.items():
        all_steps = {family.steps_within(budget, chosen[name]) for budget in budgets}
        for steps in sorted(all_steps - {0}):
            yield Arm(name, chosen[name], steps, family.unit)


def _cost(
    found: dict[str, Family], trials: list[Arm], args: argparse.Namespace, figures: int
) -> str:
    """Return the forwards of the tuning and of the evaluation, in words."""

    def forwards(arms: list[Arm]) -> int:
        return sum(found[arm.family].forwards(arm.steps, arm.setting) for arm in arms)

    usual = {name: family.settings[0] for name, family in found.items()}
    arms = list(_arms(found, usual, args.budgets))
    tuned = [arm for arm in arms if len(found[arm.family].settings) > 1]
    least, more = forwards(arms) * args.n, forwards(tuned) * args.n * (figures - 1)
    return (
        f"{len(found)} methods, {len(arms)} arms. Forwards: {forwards(trials) * args.tuning_n:,} "
        f"for the tuning ({len(trials)} settings); {least:,} for the evaluation, up to "
        f"{least + more:,} where the figures choose different settings."
    )


if __name__ == "__main__":
    run_script(main)
