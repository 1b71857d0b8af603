"""How a part of the measurements reports, and how it times."""

import argparse
import gc
import json
import time
from collections.abc import Callable
from typing import Any

import torch

MARK = "RESULT "  # what follows it in a line of a part's output is read by run.py


def report(name: str, /, **figures: Any) -> None:
    """Print a result under its name, to be written at once."""
    print(MARK + json.dumps({name: figures}), flush=True)


def arguments(description: str, *names: str) -> argparse.Namespace:
    """Parse what run.py passes to a part: the given positional arguments, and --small."""
    parser = argparse.ArgumentParser(description=description)
    for name in names:
        parser.add_argument(name)
    parser.add_argument("--small", action="store_true", help="small architectures, on any device")
    return parser.parse_args()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call takes on the device, and what it returns."""
    synchronize()
    began = time.perf_counter()
    result = call()
    synchronize()
    return time.perf_counter() - began, result


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    """Return the most memory of the card that tensors took since reset_peak, weights included."""
    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def free_memory() -> None:
    """Return the memory of what was deleted to the card."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
