"""The options with which a run fits into a card: those that change least come first.

Memory is counted on tensors without data.  A run takes the most of it when it encodes prompts (the
text encoders and the LoRA are on the card), when it samples targets (the denoiser and the LoRA), or
when it trains and draws its sheets.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import nn

from noiserefine.denoiser import call_parameters
from noiserefine.lora import store_in_8_bits
from train.options import GIB, Options, default_options
from train.placement import decoding_parts, encoding_parts
from train.presets import FORWARDS
from train.tools.architectures import random_pipeline
from train.tools.meta import (
    LiveBytes,
    autocast_as_on_cuda,
    inputs,
    lora_parameters,
    meta_denoiser,
    meta_lora,
)

CARDS = (8, 12, 16, 24)  # GB
RESERVED = 1.0  # GiB for CUDA's context, the desktop and fragments
RANKS = (128, 64, 32)  # to try where the preset's needs too much
# Bytes of a LoRA's parameter: itself and its gradient in single precision; its copy in 16 bits
# under autocast; AdamW's two moments, and its temporary at a step.
WEIGHT, GRADIENT, AUTOCAST = 4, 4, 2
MOMENTS, TEMPORARY = {"adamw": 8, "adamw8bit": 2}, {"adamw": 4, "adamw8bit": 0}
LARGEST_PICTURE = 1024  # pixels a side


class Peaks(NamedTuple):
    """The most memory of a run's phases, in GiB."""

    encoding: float
    sampling: float
    training: float


def fitting(name: str, card: int) -> dict[str, Any]:
    """Return the first options that fit into a card of so many GB, and their peaks.

    "options" are those that differ from the preset's; "peaks" are None where nothing fits.
    """
    room, found = card - RESERVED, {"preset": name, "card": card}
    preset = asdict(default_options(name))
    for step in ladder(name):
        options = _with_fitting_calls(name, step, room)
        needed = peaks(name, options)
        if max(needed) <= room:
            changed = {key: value for key, value in asdict(options).items() if value != preset[key]}
            return found | {"options": changed, "peaks": needed._asdict()}
    return found | {"options": {}, "peaks": None}


def ladder(name: str) -> Iterator[Options]:
    """Yield a preset's options, then with one change more each time that saves memory."""
    options = default_options(name)
    together = options.batch_size * options.gradient_accumulation_steps
    changes: list[dict[str, Any]] = [{}, {"gradient_checkpointing": True}]
    changes += [{"batch_size": 1, "gradient_accumulation_steps": together}]
    changes += [{"rank": rank} for rank in RANKS if rank < options.rank]
    changes += [{"fp8": True}, {"optimizer": "adamw8bit"}]
    for change in changes:
        options = replace(options, **change)
        yield options


def _with_fitting_calls(name: str, options: Options, room: float) -> Options:
    """Return the options with fewer targets in a call where all do not fit: results stay equal."""
    while options.target_batch_size > 1:
        needed = peaks(name, options)
        if max(needed.encoding, needed.sampling) <= room:
            break
        options = replace(options, target_batch_size=options.target_batch_size // 2)
    return options


def peaks(name: str, options: Options) -> Peaks:
    """Return the peaks of a run's phases."""
    sizes, lora = part_sizes(name), lora_size(name, options.rank)
    frozen = frozen_size(name, options.fp8)
    state = frozen + lora * (WEIGHT + MOMENTS[options.optimizer])
    taking_the_loss = lora * (GRADIENT + AUTOCAST) + activations(
        name, options.batch_size, options.rank, options.gradient_checkpointing
    )
    step = lora * (GRADIENT + TEMPORARY[options.optimizer])
    sheet = sizes["decoding"] + decoding_activations(name)
    images = 1 + (options.guidance_scale > 1) + (options.pag_scale > 0)
    call = options.target_batch_size
    encoding = sizes["encoding"] + encoding_activations(name, call)
    sampling = sizes["denoiser"] + call * images * sampling_activations(name)
    return Peaks(
        round(encoding + lora * WEIGHT, 2),
        round(sampling + lora * WEIGHT, 2),
        round(state + max(taking_the_loss, step, sheet), 2),
    )


@functools.cache
def meta_pipeline(name: str) -> DiffusionPipeline:
    """Return the pipeline in 16 bits without data, but for its VAE where that overflows."""
    pipe = random_pipeline(name, "meta", torch.float16)
    if pipe.vae.config.get("force_upcast"):
        pipe.vae.float()
    return pipe


def part_sizes(name: str) -> dict[str, float]:
    """Return the GiB of the weights of the pipeline's parts."""
    pipe = meta_pipeline(name)
    return {
        "denoiser": frozen_size(name, False),
        "encoding": sum(map(_size, encoding_parts(pipe))),
        "decoding": sum(map(_size, decoding_parts(pipe))),
    }


@functools.cache
def frozen_size(name: str, fp8: bool) -> float:
    """Return the GiB of the denoiser's weights while it trains a LoRA."""
    network = meta_denoiser(name)
    if fp8:
        store_in_8_bits(network, meta_denoiser(name))
    return _size(network)


def lora_size(name: str, rank: int) -> float:
    """Return the parameters of a LoRA, in 2^30."""
    return FORWARDS[name].lora * 1e6 * rank / GIB


@functools.cache
def activations(name: str, batch: int, rank: int, checkpointing: bool) -> float:
    """Return the most GiB that a refining forward, the loss's sampling and a backward pass take."""
    network = autocast_as_on_cuda(meta_lora(name, meta_denoiser(name), rank).half()).train()
    for parameter in lora_parameters(network):
        parameter.grad = torch.empty_like(parameter)  # counted with the LoRA
    if checkpointing:
        network.enable_gradient_checkpointing()  # type: ignore[operator]
    args, kwargs = inputs(name, batch)
    with LiveBytes(network) as live:
        made = network(*args, **kwargs)[0]
        stored = live.now
        (sum(image.sum() for image in made) if isinstance(made, list) else made.sum()).backward()
    return max(live.peak / GIB, stored / GIB + batch * sampling_activations(name))


@functools.cache
@torch.no_grad()
def encoding_activations(name: str, prompts: int) -> float:
    """Return the most GiB that a text encoder's forward takes for some prompts."""
    pipe, most = meta_pipeline(name), 0
    limit = call_parameters(pipe).get("max_sequence_length")  # of T5 or a language model
    for encoder in encoding_parts(pipe):
        limits = [getattr(encoder.config, "max_position_embeddings", None), limit and limit.default]
        tokens = torch.empty(prompts, min(filter(None, limits)), dtype=torch.long, device="meta")
        with LiveBytes(encoder) as live:
            encoder(tokens)
        most = max(most, live.peak)
    return most / GIB


@functools.cache
@torch.no_grad()
def sampling_activations(name: str) -> float:
    """Return the most GiB that an image's forward takes without gradients."""
    network = meta_denoiser(name)
    args, kwargs = inputs(name, 1)
    with LiveBytes(network) as live:
        network(*args, **kwargs)
    return live.peak / GIB


@functools.cache
@torch.no_grad()
def decoding_activations(name: str) -> float:
    """Return the most GiB that decoding a picture takes."""
    vae = meta_pipeline(name).vae
    channels = vae.config.latent_channels
    side = math.isqrt(math.prod(FORWARDS[name].latents) // channels)
    latents = torch.empty(1, channels, side, side, device="meta", dtype=vae.dtype)
    with LiveBytes(vae, LARGEST_PICTURE) as live:
        vae.decode(latents)
    return live.peak / GIB


def _size(network: nn.Module) -> float:
    tensors = {*network.parameters(), *network.buffers()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / GIB
