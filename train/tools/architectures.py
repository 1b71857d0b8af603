"""Pipelines with the architectures of the big models and random weights.

Time, memory and shapes do not depend on weights, so benchmarks and tests run on these without a download.
The small version keeps the kinds and order of blocks, prediction types, schedulers and conditioning, at a
hundredth of the width and with at most two transformer layers a block.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENIZER = (
    Path(__file__).resolve().parents[2] / "assets" / "emoji" / "tokenizer"
)  # any will do for random weights
SD2: dict[str, Any] = dict(
    in_channels=4,
    out_channels=4,
    layers_per_block=2,
    norm_num_groups=32,
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=(
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
)
SDXL: dict[str, Any] = dict(
    in_channels=4,
    out_channels=4,
    layers_per_block=2,
    norm_num_groups=32,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
UNETS = {
    "sd21": SD2 | dict(sample_size=96, upcast_attention=True),
    "sd21-base": SD2 | dict(sample_size=64),
    "sd-turbo": SD2 | dict(sample_size=64),
    "sdxl": SDXL | dict(sample_size=128),
}


def build_unet(name: str, small: bool = False) -> UNet2DConditionModel:
    config = UNETS[name]
    if small:
        levels = len(config["block_out_channels"])
        config = config | dict(
            sample_size=16,
            block_out_channels=(16, 32, 32, 32)[:levels],
            attention_head_dim=(1, 2, 2, 2)[:levels],
            norm_num_groups=8,
            cross_attention_dim=48 if name == "sdxl" else 32,
        )
        if name == "sdxl":
            config |= dict(
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 16,
                transformer_layers_per_block=(1, 2, 2),
            )
    return UNet2DConditionModel(**config).eval()


def build_scheduler(name: str) -> SchedulerMixin:
    schedule = dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    if name in ("sdxl", "sd-turbo"):
        return EulerDiscreteScheduler(
            **schedule, timestep_spacing="trailing" if name == "sd-turbo" else "leading"
        )
    return DDIMScheduler(
        **schedule,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction" if name == "sd21" else "epsilon",
    )


def build_text_encoder(
    kind: type, tokenizer: CLIPTokenizer, width: int, layers: int, heads: int, projection: int
) -> torch.nn.Module:
    return kind(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=projection,
            max_position_embeddings=77,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()


def random_pipeline(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    small: bool = False,
) -> DiffusionPipeline:
    """The pipeline of UNETS[name] with random weights, drawn on the device from its default generator.

    Raises ValueError for another name.
    """
    if name not in UNETS:
        raise ValueError(f"There is no architecture {name!r}; choose one of {', '.join(UNETS)}.")
    device, before = torch.device(device), torch.get_default_dtype()
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    torch.set_default_dtype(dtype)  # so that no full-size model ever exists in single precision
    try:
        with device:
            unet = build_unet(name, small)
            widths = (16, 16, 16, 16) if small else (128, 256, 512, 512)
            vae = AutoencoderKL(
                block_out_channels=widths,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                latent_channels=4,
                layers_per_block=1 if small else 2,
                norm_num_groups=8 if small else 32,
                sample_size=8 * unet.config.sample_size,
                scaling_factor=0.13025 if name == "sdxl" else 0.18215,
            ).eval()
            if name == "sdxl":
                text_encoder = build_text_encoder(
                    CLIPTextModel, tokenizer, *((32, 2, 2, 32) if small else (768, 12, 12, 768))
                )
                text_encoder_2 = build_text_encoder(
                    CLIPTextModelWithProjection,
                    tokenizer,
                    *((16, 2, 1, 16) if small else (1280, 32, 20, 1280)),
                )
            else:
                text_encoder = build_text_encoder(
                    CLIPTextModel, tokenizer, *((32, 2, 2, 32) if small else (1024, 23, 16, 512))
                )
    finally:
        torch.set_default_dtype(before)
    if name == "sdxl":
        pipe = StableDiffusionXLPipeline(
            vae,
            text_encoder,
            text_encoder_2,
            tokenizer,
            tokenizer,
            unet,
            build_scheduler(name),
            add_watermarker=False,
        )
    else:
        pipe = StableDiffusionPipeline(
            vae,
            text_encoder,
            tokenizer,
            unet,
            build_scheduler(name),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.register_to_config(_name_or_path=f"{name} with random weights")
    pipe.set_progress_bar_config(disable=True)
    return pipe
