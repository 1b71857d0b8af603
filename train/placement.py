"""Where a pipeline's parts are: text encoders and VAE are on the device only while in use."""

import contextlib
from collections.abc import Iterator

import torch
from diffusers import DiffusionPipeline
from torch import nn

from noiserefine.denoiser import denoiser_name

DECODING = ("vae", "safety_checker")


def decoding_parts(pipe: DiffusionPipeline) -> list[nn.Module]:
    """Return the networks that make a picture of latents."""
    return [part for name, part in _parts(pipe) if name in DECODING]


def encoding_parts(pipe: DiffusionPipeline) -> list[nn.Module]:
    """Return the networks that read the prompt."""
    return [part for name, part in _parts(pipe) if name not in (*DECODING, denoiser_name(pipe))]


def _parts(pipe: DiffusionPipeline) -> list[tuple[str, nn.Module]]:
    return [item for item in pipe.components.items() if isinstance(item[1], nn.Module)]


@contextlib.contextmanager
def on_device(parts: list[nn.Module], device: torch.device) -> Iterator[None]:
    """While open, networks are on the device; after it, on the CPU."""
    try:
        for part in parts:
            part.to(device)
        yield
    finally:
        for part in parts:
            part.to("cpu")
