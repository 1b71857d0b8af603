"""The time and peak memory of work on a device.

Memory is the device's on CUDA, and the whole process's on a CPU under Linux.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROCESS = Path("/proc/self")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds that a call takes on the device, and what it returns."""
    synchronize(device)
    began = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - began, result


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif PROCESS.exists():
        (PROCESS / "clear_refs").write_text("5")  # sets VmHWM back to what is in use


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak since `reset_peak`, weights included; None if the system doesn't report it.

    It is read from VmHWM and not ru_maxrss, which a child process inherits from its parent.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not PROCESS.exists():
        return None
    return int((PROCESS / "status").read_text().split("VmHWM:")[1].split()[0]) * 1024
