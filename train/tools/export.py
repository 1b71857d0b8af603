"""Write a refiner's LoRA in the naming of kohya's scripts, which ComfyUI and others read.

    python train/tools/export.py runs/refiner-sd21 --output refiner-sd21.safetensors

The file holds every layer with its own alpha, and the bias that the last layer loses as `diff_b`.
It is for the first, refining forward alone: applied while sampling, a refiner destroys images.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from noiserefine import Refiner
from noiserefine.checkpoint import about
from noiserefine.denoiser import denoiser, denoiser_name
from noiserefine.lora import ADAPTER, adapted
from train.common import argument_parser, atomic, run_script
from train.tools.compress import load_refiner


def kohya_state(refiner: Refiner) -> dict[str, torch.Tensor]:
    """Return the LoRA's tensors by kohya's names: lora_unet_DOWN_BLOCKS_0....lora_down.weight."""
    prefix = f"lora_{denoiser_name(refiner.pipe)}_"
    state = {}
    for name, layer in adapted(refiner.network):
        key = prefix + name.replace(".", "_")
        down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        state[f"{key}.lora_down.weight"] = down.detach().contiguous()
        state[f"{key}.lora_up.weight"] = up.detach().contiguous()
        state[f"{key}.alpha"] = torch.tensor(float(layer.scaling[ADAPTER] * layer.r[ADAPTER]))
    head = refiner.config.head
    bias = denoiser(refiner.pipe).get_submodule(head).bias
    if bias is not None:
        state[f"{prefix}{head.replace('.', '_')}.diff_b"] = -bias.detach().clone()
    return state


def metadata(refiner: Refiner) -> dict[str, str]:
    """Return what the file says of itself, by the Stability AI model metadata standard."""
    config = refiner.config
    return about(config) | {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{type(refiner.pipe).__name__}/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.prediction_type": config.prediction_type,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": str(config.alpha),
    }


def main(arguments: list[str] | None = None) -> None:
    """Write the file."""
    parser = argument_parser(__doc__)
    parser.add_argument("refiner", help="folder or hub id of the refiner")
    parser.add_argument("--backbone", help="folder or hub id; by default the refiner's base")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file")
    args = parser.parse_args(arguments)
    refiner = load_refiner(args.refiner, args.backbone)
    state = kohya_state(refiner)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic(args.output) as part:
        save_file(state, part, metadata(refiner))
    layers = sum(name.endswith("lora_up.weight") for name in state)
    print(f"{args.output}: {layers} layers.")


if __name__ == "__main__":
    run_script(main)
