"""The plot and the table of studies of the training recipe."""

import itertools
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from train.common import markdown_table, with_interval
from train.experiments.study_recipes import BASE, FACTORS, base_value

PANELS = 4  # in a row of the plot
LOWEST = -50  # percent; the table alone has what is worse
COLOURS = ("tab:orange", "tab:blue", "tab:green")


def points(result: dict[str, Any], factor: str) -> list[tuple[Any, dict[str, Any]]]:
    """Return a factor's values and their figures, in order, the base recipe's among them."""
    found = [(row["value"], row) for row in result["recipes"].values() if row["factor"] == factor]
    if not found:
        return []
    found.append((base_value(result["settings"], factor), result["recipes"][BASE]))
    return sorted(found, key=lambda point: _place(point[0]))


def _place(value: Any) -> tuple:
    """Return what sorts a factor's values: numbers by size, names with the base's first."""
    names = ["all", "cfg", *FACTORS["layers"].values, *FACTORS["teacher"].values]
    if not isinstance(value, str):
        return 0, value
    return names.index(value) if value in names else -1, 0  # other layers of the base recipe


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
        axes.set_title(FACTORS[factor].title, fontsize="medium")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylim(bottom=max(LOWEST, figure.axes[0].get_ylim()[0]))  # of all panels
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
    rows = [("the base recipe", "", result["recipes"][BASE])]
    for factor in FACTORS:
        rows += [
            (FACTORS[factor].title, value, row)
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
    base = result["settings"]
    head = (
        f"n = {base['n']} images an arm. Object accuracy: {', '.join(arms)}. Base recipe: "
        f"{base['num_targets']:,} targets of {base['target_steps']} steps, N = {base['steps']}, "
        f"rank {base['rank']}, batch size {base['batch_size']}, epochs {base['epochs']:g}, "
        f"learning rate {base['lr']:g}."
    )
    return f"{head}\n\n{markdown_table(titles, lines)}"
