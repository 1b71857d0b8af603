"""Helpers that several scripts of this folder need."""

import argparse
import contextlib
import importlib
import json
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError

from noiserefine.models.devices import memory_is_full

ROOT = Path(__file__).resolve().parents[1]
FIRST_EVALUATION_SEED = 10**6  # image i of every evaluation has this seed + i
TWO_SIDED_95 = (2.5, 97.5)  # percentiles
WAIT = timedelta(days=7)  # for slower processes; by default NCCL ends all after ten minutes
UNFINISHED = ".part"  # how the name of a file ends that is being written


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows a script's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run_script(main: Callable[[], Any]) -> None:
    """Run a script's main; end the process with one sentence for errors a user can mend."""
    try:
        main()
    except (ValueError, OSError, ArithmeticError, MemoryError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again to continue.", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def memory_advice(doing: str, advice: str) -> Iterator[None]:
    """Turn running out of memory into a MemoryError that says what needs less.

    doing: what the memory is not enough for, as in "to train"; advice: sentences.
    """
    try:
        yield
    except RuntimeError as error:
        if not memory_is_full(error):
            raise
        raise MemoryError(
            f"The memory is not enough {doing} ({str(error).splitlines()[0]}). {advice}"
        ) from error


def computes_on_cpu() -> bool:
    """Return whether to compute on the CPU: ACCELERATE_USE_CPU says so, or there is nothing else.

    Without cpu=True, accelerate lets each process that torchrun starts on a CPU run alone.
    """
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def load_named(option: str, name: str) -> Any:
    """Return the object that `module:Name` names. Raise ValueError if it cannot be imported."""
    try:
        module, attribute = name.split(":")
        return getattr(importlib.import_module(module), attribute)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(
            f"--{option} takes module:Name, something Python can import; got {name!r} ({error})."
        ) from error


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path and rename it to `path` at the end, so no reader sees half a file.

    It is this writer's alone: runs that share targets may write the same file at once.
    Raise OSError if the file cannot be written (a full disk); the old content then stays.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        yield part
        os.replace(part, path)
    except (OSError, SafetensorError, RuntimeError) as error:  # Python, safetensors, torch.save
        raise OSError(
            f"{path} can't be written: {error}. The previous file is intact; free some disk "
            "space and run the same command again to continue."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def check_recorded(path: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError if a folder's settings file has other ones than these."""
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise ValueError(
            f"{path.parent} holds results of other settings: give the same options, or another "
            "folder for the output, or remove this one."
        )


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C or SIGTERM sets; a second Ctrl-C ends the process."""
    stop = threading.Event()

    def request_stop(*_) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {
        number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interval(estimates: np.ndarray, biased: bool = False) -> list[float]:
    """Return a 95 % bootstrap interval. estimates[0] is the estimate, the rest its resamples.

    Resamples repeat images. That biases some estimates (a Frechet distance upwards, an inception
    score downwards) by more than they vary: for those, `biased`, the interval is that of the
    resamples' deviations from their own mean, moved to the estimate.
    """
    resamples = (without_bias(estimates) if biased else estimates)[1:]
    return np.percentile(resamples, TWO_SIDED_95).tolist()


def without_bias(estimates: np.ndarray) -> np.ndarray:
    """Return the estimate and its resamples, these moved so that their mean is the estimate."""
    resamples = estimates[1:]
    return np.append(estimates[:1], resamples + (estimates[0] - resamples.mean()))


def mean_and_interval(
    values: Sequence[float] | np.ndarray, resamples: int = 1000
) -> tuple[float, list[float]]:
    """Return the mean of independent values and its 95 % bootstrap interval."""
    values, rng = np.asarray(values, float), np.random.default_rng(0)
    means = [values.mean()] + [rng.choice(values, len(values)).mean() for _ in range(resamples)]
    return float(means[0]), interval(np.array(means))


def with_interval(value: float, bounds: Sequence[float], digits: int = 2) -> str:
    """Return "0.84 [0.81, 0.87]"."""
    low, high = bounds
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table of the header's titles and the rows' cells."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
