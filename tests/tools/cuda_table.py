"""Print the measurements on graphics cards as Markdown tables for the README.

    python tests/tools/cuda_table.py assets/results/cuda-*.json

The files are those that tests/tools/cuda.sh writes.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.common import markdown_table

ARMS_HEADER = [
    "Model and mode",
    "unguided s",
    "guided s",
    "refined s",
    "refined / unguided",
    "refined / guided",
    "peak GiB, refined",
]
TRAINING_HEADER = [
    "Preset",
    "rank",
    "M parameters",
    "batch",
    "s a batch",
    "batches a step",
    "s a step",
    "batch / parts",
    "peak GiB",
]


def results(measured: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return all results of a file by their names, whichever part made them."""
    return {
        name: figures
        for part in measured["parts"].values()
        for name, figures in part.get("results", {}).items()
    }


def arms_rows(found: dict[str, dict[str, Any]]) -> Iterator[list[Any]]:
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


def suite_rows(found: dict[str, dict[str, Any]]) -> Iterator[list[Any]]:
    for name, figures in found.items():
        if "outcome" in figures:
            yield [name, figures["outcome"], figures["seconds"]]


TABLES = (
    (ARMS_HEADER, arms_rows),
    (TRAINING_HEADER, training_rows),
    (["Test", "outcome", "s"], suite_rows),
)


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        measured = json.loads(path.read_text(encoding="utf-8"))
        found = results(measured)
        card, versions = found.get("card", {}), found.get("versions", {})
        print(
            f"{card.get('name', path.stem)}, driver {card.get('driver')}; "
            f"torch {versions.get('torch')}, diffusers {versions.get('diffusers')}, "
            f"transformers {versions.get('transformers')}\n"
        )
        for header, rows_of in TABLES:
            if rows := list(rows_of(found)):
                print(markdown_table(header, rows) + "\n")
        for name, part in measured["parts"].items():
            if part["status"] != "done":
                print(f"{name}: {part['status']}")


if __name__ == "__main__":
    main()
