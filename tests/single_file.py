"""A pipeline's weights under the names that single-file checkpoints have.

Those are the names of the original Stable Diffusion code, with CLIP's or OpenCLIP's.
"""

import re

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "mid_block": "mid",
    "attentions.0": "attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "final_layer_norm": "ln_final",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
}
CLIP_WIDTH = 768  # of Stable Diffusion 1, whose text encoder has transformers' names


def single_file(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """Return the state of a Stable Diffusion 2 or XL pipeline as its single file holds it."""
    state = unet_state(pipe.unet)
    state |= {f"first_stage_model.{name}": value for name, value in _vae(pipe.vae)}
    if isinstance(pipe, StableDiffusionXLPipeline):
        state |= _clip(pipe.text_encoder, "conditioner.embedders.0.transformer.text_model.")
        return state | _open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    if pipe.text_encoder.config.hidden_size == CLIP_WIDTH:
        return state | _clip(pipe.text_encoder, "cond_stage_model.transformer.text_model.")
    return state | _open_clip(pipe.text_encoder, "cond_stage_model.model.")


def _renamed(name: str, table: dict[str, str]) -> str:
    """Replace the table's words, which begin and end at dots."""
    for new, old in table.items():
        name = re.sub(rf"(^|(?<=\.)){re.escape(new)}(?=\.|$)", old, name)
    return name


def unet_state(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a UNet's state as the single file holds it."""
    layers = unet.config.layers_per_block
    attends = [hasattr(block, "attentions") for block in unet.up_blocks]
    return {
        f"model.diffusion_model.{unet_name(name, layers, attends)}": value
        for name, value in unet.state_dict().items()
    }


def unet_name(name: str, layers: int, attends: list[bool] | None = None) -> str:
    """Return the original name of a tensor.

    layers: layers a block.  attends: which up blocks attend, for the names of upsamplers.
    """
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        side, block, kind, layer, rest = found.groups()
        place = (side == "down") + int(block) * (layers + 1) + int(layer)
        part = f"0.{_renamed(rest, RESNET)}" if kind == "resnets" else f"1.{rest}"
        return f"{'input' if side == 'down' else 'output'}_blocks.{place}.{part}"
    if found := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{(int(found[1]) + 1) * (layers + 1)}.0.op.{found[2]}"
    if found := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.(.*)", name):
        block = int(found[1])
        part = 2 if attends and attends[block] else 1
        return f"output_blocks.{block * (layers + 1) + layers}.{part}.{found[2]}"
    if found := re.match(r"mid_block\.resnets\.(\d+)\.(.*)", name):
        return f"middle_block.{2 * int(found[1])}.{_renamed(found[2], RESNET)}"
    if found := re.match(r"mid_block\.attentions\.0\.(.*)", name):
        return f"middle_block.1.{found[1]}"
    return _renamed(name, UNET)


def _vae(vae: torch.nn.Module):
    last = len(vae.config.block_out_channels) - 1
    for name, value in vae.state_dict().items():
        old = _vae_name(name, last)
        is_matrix = ".attn_1." in old and value.ndim == 2
        yield old, value[..., None, None] if is_matrix else value


def _vae_name(name: str, last: int) -> str:
    """Return the original name; last: the number of the last block, from which up blocks count."""
    steps = [
        (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
        (r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{last - int(found[1])}.block"),
        (r"down_blocks\.(\d+)", r"down.\1"),
        (r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}"),
        (r"mid_block\.resnets\.(\d+)", lambda found: f"mid_block.block_{int(found[1]) + 1}"),
    ]
    for pattern, replacement in steps:
        name = re.sub(pattern, replacement, name)
    return _renamed(name, VAE)


def _clip(text_encoder: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """Return a text encoder's state by transformers' names."""
    state = text_encoder.state_dict()
    return {prefix + name.removeprefix("text_model."): value for name, value in state.items()}


def _open_clip(text_encoder: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """Return a text encoder's state by OpenCLIP's names, with q, k and v in one matrix."""
    state = {
        name.removeprefix("text_model."): value for name, value in text_encoder.state_dict().items()
    }
    original = {}
    for name, value in state.items():
        if name == "text_projection.weight":
            original["text_projection"] = value.T.contiguous()
        elif found := re.match(r"(.*\.self_attn\.)q_proj\.(weight|bias)", name):
            parts = [state[f"{found[1]}{part}_proj.{found[2]}"] for part in "qkv"]
            original[_renamed(f"{found[1]}in_proj_{found[2]}", OPEN_CLIP)] = torch.cat(parts)
        elif not re.search(r"[kv]_proj\.", name):
            original[_renamed(name, OPEN_CLIP)] = value
    return {f"{prefix}{name}": value for name, value in original.items()}
