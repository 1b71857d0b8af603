"""Where a model computes, and in which precision, unless the user says otherwise."""

import re

import torch

from noiserefine.models.catalogue import FAMILIES


def default_device() -> torch.device:
    """Return CUDA, Apple's MPS or the CPU, the first of them that is there."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device, pipeline: str = "StableDiffusionPipeline") -> torch.dtype:
    """Return the precision for a pipeline class: its family's on CUDA, float32 elsewhere.

    Half precision is slow on most CPUs and incomplete on MPS.
    """
    if device.type != "cuda":
        return torch.float32
    return getattr(torch, FAMILIES[pipeline].precision if pipeline in FAMILIES else "bfloat16")


def memory_is_full(error: RuntimeError) -> bool:
    """Return whether an error says that a device's memory is not enough."""
    return isinstance(error, torch.OutOfMemoryError) or bool(
        re.search("out of memory|can't allocate|allocate memory|ALLOC_FAILED", str(error))
    )
