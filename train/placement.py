"""Where a pipeline's parts are: on the device while they are in use, and else on the CPU."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator

import torch
from diffusers import DiffusionPipeline
from torch import nn

from noiserefine.denoiser import denoiser, denoiser_name

DECODING = ("vae", "safety_checker")
CPU = torch.device("cpu")


def decoding_parts(pipe: DiffusionPipeline) -> list[nn.Module]:
    """Return the networks that make a picture of latents."""
    return [part for name, part in _parts(pipe) if name in DECODING]


def encoding_parts(pipe: DiffusionPipeline) -> list[nn.Module]:
    """Return the networks that read the prompt."""
    return [part for name, part in _parts(pipe) if name not in (*DECODING, denoiser_name(pipe))]


def _parts(pipe: DiffusionPipeline) -> list[tuple[str, nn.Module]]:
    return [item for item in pipe.components.items() if isinstance(item[1], nn.Module)]


def taking_turns(pipe: DiffusionPipeline, device: torch.device) -> DiffusionPipeline:
    """Return the same pipeline, its denoiser on a device and the other parts on the CPU.

    Whenever it encodes a prompt, its text encoders are on the device instead of the denoiser.  A
    pipeline without `encode_prompt` reads prompts while it samples: its encoders stay there, too.
    """
    move(encoding_parts(pipe) + decoding_parts(pipe), CPU)
    move([denoiser(pipe)], device)
    if not hasattr(pipe, "encode_prompt"):
        move(encoding_parts(pipe), device)
        return pipe
    twin, signature = copy.copy(pipe), inspect.signature(pipe.encode_prompt)

    @functools.wraps(pipe.encode_prompt)
    def encode_prompt(*args, **kwargs):
        if signature.bind(*args, **kwargs).arguments.get("prompt") is None:  # it is encoded already
            return pipe.encode_prompt(*args, **kwargs)
        with encoding(pipe, device):
            return pipe.encode_prompt(*args, **kwargs)

    vars(twin)["encode_prompt"] = encode_prompt
    return twin


@contextlib.contextmanager
def encoding(pipe: DiffusionPipeline, device: torch.device) -> Iterator[None]:
    """While open, text encoders are on the device and the denoiser is not; after it, the reverse.

    Nothing moves where the text encoders are on the device already: inside another such context,
    on a CPU, and where they stay for training.
    """
    encoders, network = encoding_parts(pipe), denoiser(pipe)
    if all(_is_on(encoder, device) for encoder in encoders):
        yield
        return
    move([network], CPU)
    try:
        with on_device(encoders, device):
            yield
    finally:
        move([network], device)


@contextlib.contextmanager
def on_device(parts: list[nn.Module], device: torch.device) -> Iterator[None]:
    """While open, networks are on the device; after it, on the CPU."""
    try:
        move(parts, device)
        yield
    finally:
        move(parts, CPU)


def move(parts: list[nn.Module], device: torch.device) -> None:
    """Move networks to a device."""
    for part in parts:
        part.to(device)


def _is_on(part: nn.Module, device: torch.device) -> bool:
    return next(part.parameters()).device.type == device.type
