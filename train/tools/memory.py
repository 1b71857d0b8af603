"""Peak memory: of the device on CUDA, of the whole process on a CPU under Linux."""

from pathlib import Path

import torch

PROCESS = Path("/proc/self")


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
