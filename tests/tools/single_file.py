"""A pipeline's weights under the names of the original Stable Diffusion code, as single-file checkpoints have them."""

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


def renamed(name: str, table: dict[str, str]) -> str:
    """With the table's words, which begin and end at dots, replaced."""
    for new, old in table.items():
        name = re.sub(rf"(^|(?<=\.)){re.escape(new)}(?=\.|$)", old, name)
    return name


def unet_name(name: str, layers: int) -> str:
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        side, block, kind, layer, rest = found.groups()
        place = (1 if side == "down" else 0) + int(block) * (layers + 1) + int(layer)
        return f"{'input' if side == 'down' else 'output'}_blocks.{place}." + (
            f"0.{renamed(rest, RESNET)}" if kind == "resnets" else f"1.{rest}"
        )
    if found := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{(int(found[1]) + 1) * (layers + 1)}.0.op.{found[2]}"
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        return (
            f"middle_block.{2 * int(found[2])}.{renamed(found[3], RESNET)}"
            if found[1] == "resnets"
            else f"middle_block.1.{found[3]}"
        )
    return renamed(name, UNET)


def single_file(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    state, layers = {}, pipe.unet.config.layers_per_block
    attends = [hasattr(block, "attentions") for block in pipe.unet.up_blocks]
    for name, value in pipe.unet.state_dict().items():
        if found := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.(.*)", name):
            block = int(found[1])
            name = f"output_blocks.{block * (layers + 1) + layers}.{2 if attends[block] else 1}.{found[2]}"
        state[f"model.diffusion_model.{unet_name(name, layers)}"] = value
    last = len(pipe.vae.config.block_out_channels) - 1
    for name, value in pipe.vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(
            r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{last - int(found[1])}.block", name
        )
        name = re.sub(
            r"down_blocks\.(\d+)",
            r"down.\1",
            re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", name),
        )
        name = re.sub(
            r"mid_block\.resnets\.(\d+)", lambda found: f"mid_block.block_{int(found[1]) + 1}", name
        )
        name = renamed(name, VAE)
        state[f"first_stage_model.{name}"] = (
            value[..., None, None] if ".attn_1." in name and value.ndim == 2 else value
        )
    if isinstance(pipe, StableDiffusionXLPipeline):
        clip = pipe.text_encoder.state_dict()
        state |= {
            f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}": value
            for name, value in clip.items()
        }
        return state | open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    if pipe.text_encoder.config.hidden_size == 768:  # Stable Diffusion 1, CLIP as transformers has it
        return state | {
            f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": value
            for name, value in pipe.text_encoder.state_dict().items()
        }
    return state | open_clip(pipe.text_encoder, "cond_stage_model.model.")


def open_clip(text_encoder: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """OpenCLIP's names; queries, keys and values are one matrix there."""
    state, theirs = (
        {
            name.removeprefix("text_model."): value
            for name, value in text_encoder.state_dict().items()
        },
        {},
    )
    for name, value in state.items():
        if name == "text_projection.weight":
            theirs["text_projection"] = value.T.contiguous()
        elif found := re.match(r"(.*\.self_attn\.)q_proj\.(weight|bias)", name):
            parts = [state[f"{found[1]}{part}_proj.{found[2]}"] for part in "qkv"]
            theirs[renamed(f"{found[1]}in_proj_{found[2]}", OPEN_CLIP)] = torch.cat(parts)
        elif not re.search(r"[kv]_proj\.", name):
            theirs[renamed(name, OPEN_CLIP)] = value
    return {f"{prefix}{name}": value for name, value in theirs.items()}
