"""Count what training a refiner costs, without a GPU and without weights.

    python train/tools/cost.py --tflops 200

Floating-point operations of one forward and bytes that its backward pass keeps are counted on
tensors without data, at the model's native size in float16; network evaluations are those of
appendix A.7. Hours follow from --tflops, the operations a second that your card sustains in such a
network; measure it with train/tools/benchmark.py.
"""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from noiserefine.lora import UNET_TARGETS, with_lora
from train.common import argument_parser, markdown_table, run_script
from train.options import PRESETS, Options, plan
from train.tools.architectures import build_denoiser

MAX_SIDE = 128  # of a feature map; what is square and larger is queries by keys
MODELS = ("sd21", "sdxl")
TRAINED_BYTES = 16  # of a LoRA's parameter: itself, its gradient, and AdamW's two moments
MATRIX = 2  # dimensions
GIB, TERA, MILLION = 2**30, 1e12, 1e6


def forward(unet: UNet2DConditionModel, batch_size: int) -> torch.Tensor:
    """Call the network on tensors without data."""
    config = unet.config
    like: dict[str, Any] = {"device": "meta", "dtype": torch.float16}
    x = torch.empty(batch_size, config.in_channels, config.sample_size, config.sample_size, **like)
    text = torch.empty(batch_size, 77, config.cross_attention_dim, **like)
    added = None
    if config.addition_embed_type:
        added = {
            "text_embeds": torch.empty(batch_size, 1280, **like),
            "time_ids": torch.empty(batch_size, 6, **like),
        }
    return unet(x, torch.tensor(999, device="meta"), text, added_cond_kwargs=added).sample


def stored_bytes(network: UNet2DConditionModel, batch_size: int) -> int:
    """Return the bytes that a forward stores for its backward pass."""
    stored: dict[int, tuple[torch.Tensor, int]] = {}  # held, so that no id comes twice
    weights = {id(p.untyped_storage()) for p in network.parameters()}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        # Fused attention keeps no map of queries by keys.
        square = tensor.shape[-1:] == tensor.shape[-2:-1]
        attention_map = square and tensor.shape[-1] > MAX_SIDE and tensor.ndim != MATRIX
        if id(tensor.untyped_storage()) not in weights and not attention_map:
            storage = tensor.untyped_storage()
            stored[id(storage)] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        forward(network.train(), batch_size)
    return sum(size for _, size in stored.values())


def cost(name: str, tflops: float) -> dict[str, str]:
    """Return the cost of a preset, title -> figure."""
    options = Options(**PRESETS[name])
    with torch.device("meta"):
        unet = build_denoiser(name).half().requires_grad_(False)
        refining = with_lora(unet, options.rank, options.rank, UNET_TARGETS, "conv_out").half()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(unet, 1)
    if options.gradient_checkpointing:
        refining.enable_gradient_checkpointing()
    lora = sum(p.numel() for name, p in refining.named_parameters() if "lora_" in name)
    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    flops, (steps, evaluations) = counter.get_total_flops(), plan(options)
    hours = sum(evaluations.values()) * flops / tflops / TERA / 3600
    return {
        "10¹² operations a forward": f"{flops / TERA:.2f}",
        "targets M": f"{options.num_targets:,}",
        "epochs E": f"{options.epochs:g}",
        "optimiser steps": f"{steps:,}",
        "million evaluations for the targets": f"{evaluations['targets'] / MILLION:.1f}",
        "million evaluations for training": f"{evaluations['training'] / MILLION:.1f}",
        f"hours at {tflops:g} TFLOP/s": f"{hours:.0f}",
        "GiB of the network's weights, float16": f"{weights / GIB:.1f}",
        "GiB of LoRA, gradient and AdamW, float32": f"{lora * TRAINED_BYTES / GIB:.1f}",
        "GiB stored for the backward pass": (
            f"{stored_bytes(refining, options.batch_size) / GIB:.1f}"
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--tflops", type=float, default=200.0, help="that the card sustains")
    args = parser.parse_args(arguments)
    costs = {name: cost(name, args.tflops) for name in MODELS}
    titles = list(costs[MODELS[0]])
    print(markdown_table(["", *MODELS], [[t, *(costs[n][t] for n in MODELS)] for t in titles]))


if __name__ == "__main__":
    run_script(main)
