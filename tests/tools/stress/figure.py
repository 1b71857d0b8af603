"""What a check measures."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

# From the full number of repetitions to the one of this run.
Count = Callable[[int], int]


@dataclass
class Figure:
    """A figure with its goal in words, and whether it meets it."""

    name: str
    value: float | str
    goal: str
    holds: bool


def equality(name: str, equal: bool) -> Figure:
    """Return the figure of something that has to hold."""
    return Figure(name, int(equal), "1", bool(equal))


def print_errors(errors: list[str], most: int = 20) -> None:
    """Print the first of the errors to stderr."""
    for error in errors[:most]:
        print(f"    {error[:700]}", file=sys.stderr)
