"""What training a refiner at the paper's settings costs, counted without a GPU and without weights.

    python train/tools/cost.py --tflops 200

Floating-point operations of one UNet forward and bytes that its backward pass keeps are counted on tensors
without data, at the model's native size in float16; network evaluations are those of appendix A.7.  Hours follow from
--tflops, the operations a second that your card sustains in such a UNet; measure it with train/tools/benchmark.py.
"""

import argparse
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from noiserefine.lora import UNET_TARGETS, with_lora
from train.tools.architectures import build_denoiser
from train.train_refiner import parse, plan

MAX_SIDE = 128  # of a feature map; what is square and larger is queries by keys


def forward(unet: UNet2DConditionModel, batch_size: int) -> torch.Tensor:
    config = unet.config
    like: dict[str, Any] = {"device": "meta", "dtype": torch.float16}
    x = torch.empty(batch_size, config.in_channels, config.sample_size, config.sample_size, **like)
    text = torch.empty(batch_size, 77, config.cross_attention_dim, **like)
    added = (
        {
            "text_embeds": torch.empty(batch_size, 1280, **like),
            "time_ids": torch.empty(batch_size, 6, **like),
        }
        if config.addition_embed_type
        else None
    )
    return unet(x, torch.tensor(999, device="meta"), text, added_cond_kwargs=added).sample


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=200.0,
        help="10^12 operations a second that the card sustains",
    )
    args = parser.parse_args()
    print("| | sd21 | sdxl |\n|---|---|---|")
    columns = []
    for preset in ("sd21", "sdxl"):
        options = parse(["--preset", preset, "--prompts", "x", "--output_dir", "x"])
        with torch.device("meta"):
            unet = build_denoiser(preset).half().requires_grad_(False)
            refining = with_lora(
                unet, options.rank, options.rank, UNET_TARGETS, "conv_out"
            ).half()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward(unet, 1)
        kept: dict[int, tuple[torch.Tensor, int]] = {}
        weights = {id(p.untyped_storage()) for p in refining.parameters()}

        def keep(tensor: torch.Tensor, kept=kept, weights=weights) -> torch.Tensor:
            attention_map = (
                tensor.ndim >= 3 and tensor.shape[-1] == tensor.shape[-2] > MAX_SIDE
            )  # a fused kernel keeps none
            if id(tensor.untyped_storage()) not in weights and not attention_map:
                kept[id(tensor.untyped_storage())] = (
                    tensor,
                    tensor.untyped_storage().nbytes(),
                )  # held, so that no id comes twice
            return tensor

        if options.gradient_checkpointing:
            refining.enable_gradient_checkpointing()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward(refining.train(), options.batch_size)
        lora = sum(p.numel() for name, p in refining.named_parameters() if "lora_" in name)
        flops, (steps, cost) = counter.get_total_flops(), plan(options, 1)
        evaluations = cost["targets"] + cost["training"]
        columns.append(
            [
                f"{flops / 1e12:.2f}",
                f"{options.num_targets:,}",
                f"{options.epochs:g}",
                f"{steps:,}",
                f"{cost['targets'] / 1e6:.1f}",
                f"{cost['training'] / 1e6:.1f}",
                f"{evaluations * flops / args.tflops / 1e12 / 3600:.0f}",
                f"{sum(p.numel() for p in unet.parameters()) * 2 / 2**30:.1f}",
                f"{lora * 16 / 2**30:.1f}",
                f"{sum(size for _, size in kept.values()) / 2**30:.1f}",
            ]
        )
    names = [
        "10¹² operations a forward",
        "targets M",
        "epochs E",
        "optimiser steps",
        "million evaluations for the targets",
        "million evaluations for training",
        f"hours at {args.tflops:g} TFLOP/s",
        "GiB of the UNet's weights, float16",
        "GiB of LoRA, gradient and AdamW, float32",
        "GiB kept for the backward pass",
    ]
    for name, *values in zip(names, *columns):
        print(f"| {name} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()
