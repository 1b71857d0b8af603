"""Write a refiner's LoRA in the naming of kohya's scripts, which ComfyUI and others read.

    python train/tools/export.py runs/refiner-sd21 --output refiner-sd21.safetensors

The file holds every layer with its own alpha, and the bias that the last layer loses as `diff_b`.
A refiner that takes the guidance scale is exported for one --guidance_scale.
It is for the first, refining forward alone: applied while sampling, a refiner destroys images.
"""

from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from safetensors.torch import save_file

from noiserefine import Refiner
from noiserefine.checkpoint import WEIGHTS_NAME, about, read_tensors, resolve
from noiserefine.denoiser import denoiser, denoiser_name
from noiserefine.lora import ADAPTER, adapted, scale_embedding
from train.common import argument_parser, atomic, run_script
from train.tools.compress import load_refiner

# Whose layers ComfyUI finds by lora_unet_ or lora_transformer_ and their names in diffusers.
NAMED = (
    UNet2DConditionModel,
    SD3Transformer2DModel,
    FluxTransformer2DModel,
    Flux2Transformer2DModel,
)
# Pipeline, width of its text conditioning, prediction -> architecture in the metadata standard
ARCHITECTURES = {
    ("StableDiffusionPipeline", 768, "epsilon"): "stable-diffusion-v1",
    ("StableDiffusionPipeline", 1024, "epsilon"): "stable-diffusion-v2-512",
    ("StableDiffusionPipeline", 1024, "v_prediction"): "stable-diffusion-v2-768-v",
    ("StableDiffusionXLPipeline", 2048, "epsilon"): "stable-diffusion-xl-v1-base",
}


@torch.no_grad()
def kohya_state(refiner: Refiner, guidance_scale: float | None = None) -> dict[str, torch.Tensor]:
    """Return the LoRA's tensors by kohya's names: lora_unet_DOWN_BLOCKS_0....lora_down.weight.

    guidance_scale: for a refiner that takes it, the one g that the file is for. The refiner adds
    an embedding e(g) to the input of a linear layer W; the file adds W e(g) to the layer's bias.
    Raise ValueError for a scale that the refiner does not take.
    """
    refiner.check_guidance_scale(guidance_scale)
    prefix = f"lora_{denoiser_name(refiner.pipe)}_"
    state = {}
    for name, layer in adapted(refiner.network):
        key = prefix + name.replace(".", "_")
        down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        state[f"{key}.lora_down.weight"] = down.contiguous()
        state[f"{key}.lora_up.weight"] = up.contiguous()
        state[f"{key}.alpha"] = torch.tensor(float(layer.scaling[ADAPTER] * layer.r[ADAPTER]))
    biases = {}
    head, vector = refiner.config.head, refiner.config.vector
    bias = denoiser(refiner.pipe).get_submodule(head).bias
    if bias is not None:
        biases[head] = -bias
    if guidance_scale is not None and vector is not None:
        layer = refiner.network.get_submodule(vector)
        if layer.bias is None:
            raise ValueError(
                f"The guidance scale enters at {vector}, which has no bias that could hold it: "
                "train a refiner for one scale."
            )
        embedding = scale_embedding(torch.tensor([guidance_scale]))
        added = refiner.network.scale_input.weight.float() @ embedding[0]
        biases[vector] = (layer.weight.float() @ added).to(layer.weight.dtype)
    return state | {f"{prefix}{key.replace('.', '_')}.diff_b": b for key, b in biases.items()}


def check_named(pipe: DiffusionPipeline) -> None:
    """Raise ValueError for a denoiser whose layers no program finds by kohya's names."""
    kind = type(denoiser(pipe))
    if not issubclass(kind, NAMED):
        raise ValueError(
            f"Programs know no kohya names for the layers of {kind.__name__}: they would skip "
            f"them. Known are those of {', '.join(named.__name__ for named in NAMED)}."
        )


def metadata(refiner: Refiner) -> dict[str, str]:
    """Return what the file says of itself, by the Stability AI model metadata standard."""
    config, kind = refiner.config, type(refiner.pipe).__name__
    width = config.architecture.get("cross_attention_dim")
    architecture = ARCHITECTURES.get((kind, width, config.prediction_type), kind)
    return about(config) | {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.prediction_type": config.prediction_type.removesuffix("_prediction"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": str(config.alpha),
    }


def main(arguments: list[str] | None = None) -> None:
    """Write the file."""
    parser = argument_parser(__doc__)
    parser.add_argument("refiner", help="folder or hub id of the refiner")
    parser.add_argument("--backbone", help="folder or hub id; by default the refiner's base")
    parser.add_argument(
        "--guidance_scale", type=float, help="the one to export for, of a refiner that takes it"
    )
    parser.add_argument("--output", type=Path, required=True, help="safetensors file")
    args = parser.parse_args(arguments)
    weights = read_tensors(resolve(args.refiner) / WEIGHTS_NAME)
    dtype = next(iter(weights.values())).dtype  # no value changes
    refiner = load_refiner(args.refiner, args.backbone, dtype)
    check_named(refiner.pipe)
    state = kohya_state(refiner, args.guidance_scale)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic(args.output) as part:
        save_file(state, part, metadata(refiner))
    layers = sum(name.endswith("lora_up.weight") for name in state)
    print(f"{args.output}: {layers} layers.")


if __name__ == "__main__":
    run_script(main)
