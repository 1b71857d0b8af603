"""Count what training a refiner costs, without a GPU and without weights.

    python train/tools/cost.py --tflops 200
    python train/tools/cost.py --models sd21 sdxl sd35-medium --memory

Floating-point operations of one forward are counted on tensors without data, at the model's native
size; network evaluations are those of appendix A.7.  Hours follow from --tflops, the operations a
second that your card sustains in such a network; measure it with train/tools/benchmark.py.
train/presets.py holds the counts for `--dry_run`.  --memory says which options fit into a card.
"""

import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from train.common import argument_parser, markdown_table, run_script
from train.options import GIB, default_options, hours, plan
from train.presets import FORWARDS, Forward
from train.tools.meta import inputs, lora_parameters, meta_denoiser, meta_lora
from train.tools.tiers import CARDS, fitting

COUNTED_RANK = 128
PROMPT_ARGUMENTS = ("encoder_hidden_states", "pooled_projections", "added_cond_kwargs")
TERA, MILLION = 1e12, 1e6
MEMORY_HEADER = [
    "model and card",
    "options",
    "GiB to encode prompts",
    "to sample targets",
    "to train",
]


def count(name: str) -> Forward:
    """Return the cost of a forward of an architecture."""
    network = meta_denoiser(name)
    args, kwargs = inputs(name, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*args, **kwargs)
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    lora = sum(p.numel() for p in lora_parameters(meta_lora(name, network, COUNTED_RANK)))
    prompt = (*args[2:], *(kwargs.get(argument) for argument in PROMPT_ARGUMENTS))
    encoded = filter(torch.is_tensor, tree_leaves(prompt))
    return Forward(
        round(counter.get_total_flops() / TERA, 2),
        round(weights / GIB, 1),
        round(lora / MILLION / COUNTED_RANK, 3),
        FORWARDS[name].latents,
        round(sum(tensor.nbytes for tensor in encoded) / MILLION, 2),
    )


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


def memory(found: list[dict[str, Any]]) -> list[list[str]]:
    """Return the options that fit into cards and what they take: a row for the cards that agree."""
    rows = []

    def advice(row: dict[str, Any]) -> tuple:
        return row["preset"], row["options"], row["peaks"] is None

    for (preset, options, nothing_fits), agreeing in groupby(found, advice):
        same = list(agreeing)
        cards = f"{same[0]['card']} GB"
        if len(same) > 1:
            cards = f"{same[0]['card']} to {same[-1]['card']} GB"
        command, peaks = "does not fit", ["–"] * 3
        if not nothing_fits:
            flags = [f"--{name} {value}" for name, value in options.items()]
            command = f"`{' '.join(['--preset', preset, *flags])}`"
            peaks = [f"{peak:.1f}" for peak in same[0]["peaks"].values()]
        rows.append([f"{preset}, {cards}", command, *peaks])
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, or count the forwards anew."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=FORWARDS, default=list(FORWARDS))
    add("--tflops", type=float, default=200.0, help="10^12 operations a second of the card")
    add("--memory", action="store_true", help="options for cards of 8 to 24 GB instead")
    add("--output", type=Path, help="of --memory: a file for the table as JSON")
    add("--count", action="store_true", help="print FORWARDS of train/presets.py, counted anew")
    args = parser.parse_args(arguments)
    if args.count:
        for name in args.models:
            print(f'    "{name}": {count(name)},')
    elif args.memory:
        found = [fitting(name, card) for name in args.models for card in CARDS]
        if args.output:
            args.output.write_text(json.dumps(found, indent=1) + "\n")
        print(markdown_table(MEMORY_HEADER, memory(found)))
    else:
        header = [
            *("model", "10¹² operations a forward", "GiB of weights, 16 bits", "LoRA, M"),
            *("targets M", "optimiser steps", "million evaluations"),
            *(f"hours at {args.tflops:g} TFLOP/s", "evaluations of --quick", "its hours"),
        ]
        print(markdown_table(header, [cost(name, args.tflops) for name in args.models]))


if __name__ == "__main__":
    run_script(main)
