"""Convert SiT's published checkpoint into a diffusers folder in safetensors.

    python train/tools/convert_sit.py SiT-XL-2-256x256.pt --vae sd-vae-ft-ema --output_dir sit-xl

A DiT checkpoint, which predicts eps, has the same names and shapes: the file does not tell.
"""

import argparse
import math
import pickle
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file

from noiserefine.models.sit import SiTPipeline
from train.common import ROOT, argument_parser, run_script

State = dict[str, torch.Tensor]
IMAGENET_CLASSES = ROOT / "assets" / "imagenet_classes.txt"
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width: SiT-S, B, L, XL
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NAMES = (  # of the published code -> of diffusers
    (r"^x_embedder\.proj\.", "pos_embed.proj."),
    (r"^final_layer\.adaLN_modulation\.1\.", "proj_out_1."),
    (r"^final_layer\.linear\.", "proj_out_2."),
    (r"^blocks\.(\d+)\.", r"transformer_blocks.\1."),
    (r"\.attn\.proj\.", ".attn1.to_out.0."),
    (r"\.mlp\.fc1\.", ".ff.net.0.proj."),
    (r"\.mlp\.fc2\.", ".ff.net.2."),
    (r"\.adaLN_modulation\.1\.", ".norm1.linear."),
)
EMBEDDERS = (  # shared by all blocks in the published code, a copy for every block in diffusers
    ("t_embedder.mlp.0.", "timestep_embedder.linear_1."),
    ("t_embedder.mlp.2.", "timestep_embedder.linear_2."),
    ("y_embedder.", "class_embedder."),
)


def read_checkpoint(path: Path) -> State:
    """Return a .pt or .safetensors file's state dict, the averaged one of a training checkpoint.

    No code of a .pt file is run.
    Raises FileNotFoundError without a file and ValueError for one with anything but tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the training's settings
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged or holds more than tensors: {reason}") from error
    state = checkpoint
    if isinstance(checkpoint, dict):
        state = checkpoint.get("ema", checkpoint.get("model", checkpoint))
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"{path} holds no state dict of tensors, alone or as “ema” or “model”.")
    return state


def architecture(state: State, num_attention_heads: int | None = None) -> dict[str, int | float]:
    """Return DiTTransformer2DModel's configuration, read from the shapes of a published state dict.

    Raises ValueError for a state dict of another model, and where the number of heads, which no
    shape tells, is neither given nor known for the width.
    """
    needed = (
        "pos_embed",
        "x_embedder.proj.weight",
        "y_embedder.embedding_table.weight",
        "t_embedder.mlp.0.weight",
        "blocks.0.attn.qkv.weight",
        "final_layer.linear.weight",
    )
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"The checkpoint is not SiT's: it lacks {', '.join(missing)}.")
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    heads = num_attention_heads or HEADS.get(width)
    if not heads or width % heads:
        raise ValueError(
            f"The network is {width} wide; its number of attention heads, a divisor of it, is not "
            "known: give --num_attention_heads."
        )
    return dict(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=len(state["final_layer.linear.weight"]) // patch**2,
        num_layers=1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks.")),
        sample_size=patch * math.isqrt(state["pos_embed"].shape[-2]),
        patch_size=patch,
        num_embeds_ada_norm=len(state["y_embedder.embedding_table.weight"]) - 1,
        norm_eps=1e-6,
    )


def rename(state: State) -> State:
    """Return a published state dict under DiTTransformer2DModel's names."""
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    renamed: State = {}
    for name, tensor in state.items():
        shared = [(old, new) for old, new in EMBEDDERS if name.startswith(old)]
        if name == "pos_embed":  # constant; diffusers computes it
            continue
        if shared:
            ((old, new),) = shared
            for i in range(depth):
                renamed[f"transformer_blocks.{i}.norm1.emb.{new}{name.removeprefix(old)}"] = tensor
            continue
        new_name = name
        for pattern, replacement in NAMES:
            new_name = re.sub(pattern, replacement, new_name)
        if ".attn.qkv." in new_name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[new_name.replace(".attn.qkv.", f".attn1.to_{part}.")] = rows
        else:
            renamed[new_name] = tensor
    return renamed


def build_transformer(
    state: State, num_attention_heads: int | None = None
) -> DiTTransformer2DModel:
    """Return the network of a published state dict. Raises ValueError where they do not fit."""
    transformer = DiTTransformer2DModel(**architecture(state, num_attention_heads)).eval()
    positions = transformer.pos_embed.pos_embed
    if not torch.allclose(state["pos_embed"].float().view_as(positions), positions, atol=1e-5):
        raise ValueError("The checkpoint is not SiT's: its positions are not sines and cosines.")
    try:
        transformer.load_state_dict(rename(state))
    except RuntimeError as error:
        raise ValueError(f"The checkpoint is not SiT's. {error}") from error
    return transformer


def read_classes(path: Path, count: int) -> dict[str, str]:
    """Return class number -> names from a file with a class a line.

    Raises ValueError where it has another number of classes than the network.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) != count:
        raise ValueError(
            f"{path} names {len(lines)} classes, but the network has {count}: give its names with "
            "--classes."
        )
    return {str(number): names for number, names in enumerate(lines)}


def convert(  # noqa: PLR0913
    checkpoint: Path,
    vae: str,
    output_dir: Path,
    *,
    classes: Path = IMAGENET_CLASSES,
    dtype: torch.dtype = torch.float32,
    guided_channels: int | None = 3,
    num_attention_heads: int | None = None,
) -> None:
    """Write a published checkpoint and an autoencoder's folder as a SiTPipeline's folder.

    Raises FileNotFoundError for a missing file and ValueError for one that does not fit.
    """
    if not (Path(vae) / "config.json").is_file():
        raise FileNotFoundError(f"{vae} is no folder of an autoencoder: it holds no config.json.")
    transformer = build_transformer(read_checkpoint(checkpoint), num_attention_heads)
    id2label = read_classes(classes, transformer.config.num_embeds_ada_norm)
    autoencoder = AutoencoderKL.from_pretrained(vae, use_safetensors=True)
    if autoencoder.config.latent_channels != transformer.config.in_channels:
        raise ValueError(
            f"The autoencoder in {vae} makes {autoencoder.config.latent_channels} channels, but "
            f"the network takes {transformer.config.in_channels}."
        )
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = SiTPipeline(transformer, autoencoder, scheduler, id2label, guided_channels)
    pipe.to(dtype).save_pretrained(output_dir)


def main(arguments: list[str] | None = None) -> None:
    """Convert what the command line names."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="the published .pt, or its .safetensors")
    add("--vae", required=True, help="folder of the autoencoder, sd-vae-ft-ema")
    add("--output_dir", type=Path, required=True)
    add("--dtype", choices=DTYPES, default="float32")
    add("--classes", type=Path, default=IMAGENET_CLASSES, help="names, one line each")
    add(
        "--guided_channels", type=int, default=3, help="guidance changes so many, 3 in the original"
    )
    add("--num_attention_heads", type=int, help="for a width that is not SiT's")
    options = vars(parser.parse_args(arguments))
    convert(**options | {"dtype": DTYPES[options["dtype"]]})


if __name__ == "__main__":
    run_script(main)
