"""Make a refiner smaller: the best approximation of its LoRA by one of a lower rank.

    python train/tools/compress.py runs/refiner-sd21 --rank 16 --output_dir runs/refiner-sd21-r16

Each layer's update B A is replaced by its truncated singular value decomposition. The last layer
keeps the rank that cancelling it takes. The file has 16 bits a weight. Prints the share of the
updates' energy that is left, and the file's size; measure what became of the images with
train/evaluate.py.
"""

from dataclasses import replace
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer

from noiserefine import Refiner
from noiserefine.checkpoint import WEIGHTS_NAME, read_config, resolve
from noiserefine.denoiser import denoiser
from noiserefine.lora import ADAPTER, adapted
from noiserefine.models.loading import load_pipeline
from noiserefine.refiner import build
from train.common import argument_parser, run_script

MEGABYTE = 1e6


@torch.no_grad()
def compress(refiner: Refiner, rank: int) -> tuple[Refiner, float]:
    """Return a refiner of a lower rank, and the share of the updates' energy that it has.

    Raise ValueError for a rank that is not lower.
    """
    if not 1 <= rank < refiner.config.rank:
        raise ValueError(
            f"This refiner has rank {refiner.config.rank}: choose a --rank from 1 to "
            f"{refiner.config.rank - 1}."
        )
    # What was measured of the larger one is left out.
    config = replace(refiner.config, rank=rank, alpha=rank, results={})
    small = Refiner(refiner.pipe, config, build(denoiser(refiner.pipe), config))
    energies = []
    for (_, layer), (_, small_layer) in zip(
        adapted(refiner.network), adapted(small.network), strict=True
    ):
        energies.append(_truncate(layer, small_layer))
    if small.takes_guidance_scale:
        small.network.scale_input.load_state_dict(refiner.network.scale_input.state_dict())
    left, whole = torch.tensor(energies, dtype=torch.float64).sum(0).tolist()
    return small, left / whole


def _truncate(layer: LoraLayer, small: LoraLayer) -> tuple[float, float]:
    """Fill a layer's smaller LoRA; return the energy of its update and of the whole one."""
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    # B A = Q_b (R_b R_a^T) Q_a^T, whose middle is small.
    q_up, r_up = torch.linalg.qr(up.double().flatten(1))
    q_down, r_down = torch.linalg.qr(down.double().flatten(1).T)
    u, s, vh = torch.linalg.svd(layer.scaling[ADAPTER] * r_up @ r_down.T)
    rank = min(small.r[ADAPTER], len(s))
    root = s[:rank].sqrt()
    small_down, small_up = small.lora_A[ADAPTER].weight, small.lora_B[ADAPTER].weight
    small_down.zero_()
    small_up.zero_()
    small_down.flatten(1)[:rank] = (root[:, None] * (vh[:rank] @ q_down.T)).to(small_down.dtype)
    left = q_up @ u[:, :rank] * root / small.scaling[ADAPTER]
    small_up.flatten(1)[:, :rank] = left.to(small_up.dtype)
    return s[:rank].square().sum().item(), s.square().sum().item()


def load_refiner(
    name_or_path: str, backbone: str | None = None, dtype: torch.dtype = torch.float32
) -> Refiner:
    """Return a refiner, unmerged, on its base or another backbone in the given precision."""
    source = backbone or read_config(resolve(name_or_path)).base_model
    pipe = load_pipeline(source, "cpu", dtype)
    return Refiner.from_pretrained(name_or_path, pipe, merge=False)


def main(arguments: list[str] | None = None) -> None:
    """Write the smaller refiner."""
    parser = argument_parser(__doc__)
    parser.add_argument("refiner", help="folder or hub id of the refiner")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--backbone", help="folder or hub id; by default the refiner's base")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(arguments)
    refiner = load_refiner(args.refiner, args.backbone)
    small, share = compress(refiner, args.rank)
    small.save_pretrained(args.output_dir, torch.float16)
    size = (args.output_dir / WEIGHTS_NAME).stat().st_size / MEGABYTE
    print(f"{args.output_dir}: rank {args.rank}, {size:.1f} MB, {100 * share:.1f} % of the energy.")


if __name__ == "__main__":
    run_script(main)
