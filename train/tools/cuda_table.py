"""Print the measurements on graphics cards, which tests/tools/cuda.sh writes, as Markdown tables.

python train/tools/cuda_table.py assets/results/cuda-*.json
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.common import markdown_table

ARMS_HEADER = [
    *("model and mode", "unguided, s", "guided, s", "refined, s"),
    *("refined / unguided", "refined / guided", "peak GiB, refined"),
]
TRAINING_HEADER = [
    *("preset", "rank", "M parameters", "batch", "s a batch", "batches a step", "s a step"),
    *("batch / its parts", "peak GiB"),
]
TIERS_HEADER = ["model and card", "GiB to encode prompts", "to sample targets", "to train"]
PHASES = ("encoding_gib", "sampling_gib", "training_gib")


def results(measured: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return all results of a file by their names, whichever part made them."""
    return {
        name: figures
        for part in measured["parts"].values()
        for name, figures in part.get("results", {}).items()
    }


def arms_rows(found: dict[str, dict[str, Any]]) -> Iterator[list[Any]]:
    """Yield a row for each model and mode whose arms were timed."""
    for name, figures in found.items():
        if "refined_over_guided" in figures:
            yield [
                name,
                *(f"{figures['seconds'][arm]:.3f}" for arm in ("unguided", "guided", "refined")),
                f"{figures['refined_over_unguided']:.3f}",
                f"{figures['refined_over_guided']:.3f}",
                figures["peak_gib"]["refined"],
            ]


def training_rows(found: dict[str, dict[str, Any]]) -> Iterator[list[Any]]:
    """Yield a row for each preset whose optimiser step was timed."""
    for name, figures in found.items():
        if "optimiser_step_seconds" in figures:
            yield [
                name,
                figures["rank"],
                f"{figures['parameters'] / 1e6:.1f}",
                figures["batch_size"],
                f"{figures['batch_seconds']:.3f}",
                figures["accumulated_batches"],
                f"{figures['optimiser_step_seconds']:.2f}",
                f"{figures['batch_over_parts']:.3f}",
                figures["peak_gib"],
            ]


def tiers_rows(found: dict[str, dict[str, Any]]) -> Iterator[list[Any]]:
    """Yield the measured peaks for each card of `cost.py --memory`; a processor has none."""
    for name, figures in found.items():
        if figures.get("training_gib"):
            yield [name, *(f"{figures[phase]:.1f}" for phase in PHASES)]


TABLES = (
    (ARMS_HEADER, arms_rows),
    (TRAINING_HEADER, training_rows),
    (TIERS_HEADER, tiers_rows),
)


def tables(measured: dict[str, Any]) -> str:
    """Return what was measured on a card."""
    found = results(measured)
    card, versions = found.get("card"), found["versions"]
    title = f"**{card['name']}**, driver {card['driver']}" if card else "**no graphics card**"
    outcomes = Counter(figures["outcome"] for figures in found.values() if "outcome" in figures)
    tests = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    parts = [
        f"{title}; torch {versions['torch']}, diffusers "
        f"{versions['diffusers']}, transformers {versions['transformers']}. "
        f"Tests on the card: {tests or 'not run'}."
    ]
    for header, rows_of in TABLES:
        if rows := list(rows_of(found)):
            parts.append(markdown_table(header, rows))
    if unfinished := [name for name, part in measured["parts"].items() if part["status"] != "done"]:
        parts.append(f"Cut off before their last row: {', '.join(unfinished)}.")
    return "\n\n".join(parts)


def main() -> None:
    """Print the tables of the named files."""
    for path in sys.argv[1:]:
        print(tables(json.loads(Path(path).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
