"""Training that is killed at random moments, and training on a full disk."""

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.tools.stress.figure import Count, Figure, equality

COMMAND = [
    *(sys.executable, "train/train_refiner.py", "--preset", "emoji", "--num_targets", "48"),
    *("--target_batch_size", "8", "--target_steps", "2", "--steps", "2", "--batch_size", "8"),
    *("--epochs", "2", "--validate_every", "1000", "--num_validation", "4", "--save_every", "1"),
]
WEIGHTS = "pytorch_lora_weights.safetensors"


def training(count: Count) -> Iterator[Figure]:
    """Kill runs at random moments; resumed, each must end with an undisturbed run's LoRA."""
    with tempfile.TemporaryDirectory() as folder:
        _, seconds = _train(Path(folder) / "whole")
        expected = load_file(Path(folder) / "whole" / WEIGHTS)
        moments, wanted = random.Random(0), count(20)
        kills, runs, equal = 0, 0, 0
        while kills < wanted:
            run = Path(folder) / f"run{runs}"
            for _ in range(min(5, wanted - kills)):
                ended, _ = _train(run, moments.uniform(0, seconds / 3))
                if ended:
                    break
                kills += 1
            _train(run)
            runs += 1
            equal += _equal(load_file(run / WEIGHTS), expected)
        yield Figure("kills at random moments", kills, str(wanted), kills == wanted)
        yield Figure("runs with an undisturbed run's LoRA", equal, str(runs), equal == runs)
        yield from _full_disk(Path(folder) / "disk", expected)


def _train(folder: Path, kill_after: float | None = None) -> tuple[bool, float]:
    """Run the trainer, killed after so many seconds of work; return whether it ended, and seconds.

    Its work begins when it writes its configuration.
    """
    process = subprocess.Popen(
        [*COMMAND, "--output_dir", str(folder)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    config = folder / "config.json"
    stamp = config.stat().st_mtime_ns if config.exists() else None
    began = None
    while process.poll() is None:
        time.sleep(0.01)
        if began is None and config.exists() and config.stat().st_mtime_ns != stamp:
            began = time.perf_counter()
        if kill_after is not None and began and time.perf_counter() - began > kill_after:
            process.kill()
    errors = process.communicate()[1]
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(errors)
    return process.returncode == 0, time.perf_counter() - (began or time.perf_counter())


def _full_disk(disk: Path, expected: dict[str, torch.Tensor]) -> Iterator[Figure]:
    """Train on a disk that holds one checkpoint but no second; only root may mount one."""
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        print("    no right to mount a small disk: left out", file=sys.stderr)
        return
    try:
        command = [*COMMAND, "--output_dir", str(disk)]
        full = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
        explained = "can't be written" in full.stderr and "Traceback" not in full.stderr
        yield equality("stops with a sentence on a full disk", full.returncode == 1 and explained)
        step = torch.load(disk / "checkpoint.pt", weights_only=True)["step"]
        yield Figure("step of the last checkpoint, which is whole", step, "at least 1", step >= 1)
        subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)
        _train(disk)
        equal = _equal(load_file(disk / WEIGHTS), expected)
        yield equality("ends with the same LoRA when there is space again", equal)
    finally:
        # Lazily: the tensors read last are still mapped to their file.
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _equal(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Return whether two LoRAs have the same tensors; files may order them differently."""
    return state.keys() == expected.keys() and all(
        torch.equal(state[name], expected[name]) for name in state
    )
