"""Count what training a refiner costs, without a GPU and without weights.

    python train/tools/cost.py --tflops 200
    python train/tools/cost.py --models sd21 sd35-medium --memory

Floating-point operations of one forward and bytes that its backward pass keeps are counted on
tensors without data, at the model's native size; network evaluations are those of appendix A.7.
Hours follow from --tflops, the operations a second that your card sustains in such a network;
measure it with train/tools/benchmark.py. train/presets.py holds the counts for `--dry_run`.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from noiserefine.lora import UNET_TARGETS, with_lora
from train.common import argument_parser, markdown_table, run_script
from train.options import GIB, default_options, hours, plan
from train.presets import FORWARDS, Forward
from train.tools.architectures import UNETS, build_denoiser

MAX_SIDE = 128  # of a feature map; what is square and larger is queries by keys
MATRIX, TOKENS = 2, 3  # dimensions
COUNTED_RANK = 128
TRAINED_BYTES = 16  # of a LoRA's parameter: itself, its gradient, and AdamW's two moments
TRAINED_BYTES_8BIT = 10  # with 8-bit moments
TERA, MILLION = 1e12, 1e6


def inputs(name: str, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a denoiser's call for a batch of images, on the meta device."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(batch, *shape, device="meta", dtype=torch.float16)

    t, x = torch.empty(batch, device="meta", dtype=torch.float16), empty(*FORWARDS[name].latents)
    if name in UNETS:
        config, added = UNETS[name], None
        if "addition_embed_type" in config:
            added = {"text_embeds": empty(1280), "time_ids": empty(6)}
        return (x, t, empty(77, config["cross_attention_dim"])), {"added_cond_kwargs": added}
    conditions: dict[str, dict[str, Any]] = {
        "sit": {"class_labels": torch.empty(batch, device="meta", dtype=torch.long)},
        "pixart-sigma": {
            "encoder_hidden_states": empty(300, 4096),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        "sana": {"encoder_hidden_states": empty(300, 2304)},
        "sd35-medium": {
            "encoder_hidden_states": empty(333, 4096),
            "pooled_projections": empty(2048),
        },
        "klein": {
            "hidden_states": empty(4096, 128),  # as tokens
            "encoder_hidden_states": empty(512, 7680),
            "txt_ids": empty(512, 4),
            "img_ids": empty(4096, 4),
        },
    }
    if name in conditions:
        return (), {"hidden_states": x, "timestep": t} | conditions[name]
    images = [torch.empty(16, 1, 128, 128, device="meta", dtype=torch.float16)] * batch
    texts = [torch.empty(128, 2560, device="meta", dtype=torch.float16)] * batch
    return (images, t, texts), {}  # Z-Image takes lists


def count(name: str) -> Forward:
    """Return the cost of a forward of an architecture."""
    network = meta_denoiser(name)
    args, kwargs = inputs(name, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*args, **kwargs)
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    lora = sum(p.numel() for p in lora_parameters(meta_lora(name, network, COUNTED_RANK)))
    return Forward(
        round(counter.get_total_flops() / TERA, 2),
        round(weights / GIB, 1),
        round(lora / MILLION / COUNTED_RANK, 3),
        FORWARDS[name].latents,
    )


def meta_denoiser(name: str) -> nn.Module:
    """Return an architecture without data, in 16 bits."""
    with torch.device("meta"):
        return build_denoiser(name).half().requires_grad_(False)


def meta_lora(name: str, network: nn.Module, rank: int) -> nn.Module:
    """Return the refining network of a rank, without data."""
    called = called_layers(name, network)
    targets = UNET_TARGETS
    if name not in UNETS:
        targets = [
            layer
            for layer, dimensions in called.items()
            if dimensions >= TOKENS and getattr(network.get_submodule(layer), "groups", 1) == 1
        ]
    with torch.device("meta"):
        return with_lora(network, rank, rank, targets, list(called)[-1])


def lora_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that training changes."""
    return [p for name, p in network.named_parameters() if "lora_" in name]


def called_layers(name: str, network: nn.Module) -> dict[str, int]:
    """Return the linear layers and convolutions that a forward calls, and their inputs' dimensions.

    They are in the order of their last calls.
    """
    called: dict[str, int] = {}

    def record(layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            called.pop(layer, None)
            called[layer] = next(iter((*args, *kwargs.values()))).ndim

        return hook

    handles = [
        module.register_forward_pre_hook(record(layer), with_kwargs=True)
        for layer, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    args, kwargs = inputs(name, 1)
    with torch.no_grad():
        network(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return called


@contextlib.contextmanager
def stored_bytes(network: nn.Module) -> Iterator[list[int]]:
    """Count the bytes that forwards store for their backward pass while this is open."""
    stored: dict[int, torch.Tensor] = {}  # held, so that no id comes twice
    weights = {id(p.untyped_storage()) for p in network.parameters()}
    total = [0]

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Fused attention keeps no map of queries by keys.
        square = tensor.shape[-1:] == tensor.shape[-2:-1]
        attention_map = square and tensor.shape[-1] > MAX_SIDE and tensor.ndim != MATRIX
        if id(storage) not in weights and id(storage) not in stored and not attention_map:
            stored[id(storage)] = tensor
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        yield total


def activations(name: str, batch: int, rank: int, checkpointing: bool) -> float:
    """Return the GiB that a forward stores for its backward pass."""
    network = meta_lora(name, meta_denoiser(name), rank).half().train()
    if checkpointing:
        network.enable_gradient_checkpointing()  # type: ignore[operator]
    args, kwargs = inputs(name, batch)
    with stored_bytes(network) as total:
        network(*args, **kwargs)
    return total[0] / GIB


def cost(name: str, tflops: float) -> list[str]:
    """Return a row of the table: the cost of a preset, and of its quick variant."""
    forward, options = FORWARDS[name], replace(default_options(name), tflops=tflops)
    steps, evaluations = plan(options)
    total = sum(evaluations.values())
    quick = sum(plan(default_options(name, quick=True))[1].values())

    return [
        name,
        f"{forward.teraflop:.2f}",
        f"{forward.weights:.1f}",
        f"{forward.lora * options.rank:.0f}",
        f"{options.num_targets:,}",
        f"{steps:,}",
        f"{total / MILLION:.2f}",
        f"{hours(options, total):,.1f}",
        f"{quick:,}",
        f"{hours(options, quick):,.1f}",
    ]


def memory(name: str) -> list[list[str]]:
    """Return rows of a model's memory while it trains, for the flags that save some."""
    forward, rows = FORWARDS[name], []
    for rank, batch, checkpointing in ((128, 4, False), (128, 1, True), (32, 1, True)):
        trained = forward.lora * MILLION * rank / GIB
        stored = activations(name, batch, rank, checkpointing)
        for flag, size in (("", TRAINED_BYTES), (" --optimizer adamw8bit", TRAINED_BYTES_8BIT)):
            total = forward.weights + trained * size + stored
            flags = f"--rank {rank} --batch_size {batch}"
            flags += " --gradient_checkpointing" * checkpointing
            flags += flag
            parts = [forward.weights, trained * size, stored, total]
            rows.append([name, f"`{flags}`", *(f"{part:.1f}" for part in parts)])
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, or count the forwards anew."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=FORWARDS, default=list(FORWARDS))
    add("--tflops", type=float, default=200.0, help="10^12 operations a second of the card")
    add("--memory", action="store_true", help="GPU memory of the training step instead")
    add("--count", action="store_true", help="print FORWARDS of train/presets.py, counted anew")
    args = parser.parse_args(arguments)
    if args.count:
        for name in args.models:
            print(f'    "{name}": {count(name)},')
    elif args.memory:
        header = ["model", "flags", "weights, GiB", "LoRA and AdamW", "activations", "sum"]
        print(markdown_table(header, [row for name in args.models for row in memory(name)]))
    else:
        header = [
            *("model", "10¹² operations a forward", "GiB of weights, 16 bits", "LoRA, M"),
            *("targets M", "optimiser steps", "million evaluations"),
            *(f"hours at {args.tflops:g} TFLOP/s", "evaluations of --quick", "its hours"),
        ]
        print(markdown_table(header, [cost(name, args.tflops) for name in args.models]))


if __name__ == "__main__":
    run_script(main)
