"""Build pipelines with the architectures of the big models and random weights.

Time, memory and shapes do not depend on weights, so benchmarks and tests run on these without a
download.  All text encoders read the embedded model's tokenizer.  The small version, of Stable
Diffusion's models only, keeps the kinds and order of blocks, prediction types, schedulers and
conditioning, at a hundredth of the width and with at most two transformer layers a block.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    ModelMixin,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from noiserefine.models.sit import SiTPipeline
from train.common import ROOT
from train.tools.convert_sit import IMAGENET_CLASSES, read_classes

Config = dict[str, Any]
BACKBONE_HELP = "folder or hub id of the pipeline; with --random_weights an architecture's name"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PROMPT = "7"  # a class of class-conditional models, too
TOKENIZER = ROOT / "assets" / "emoji" / "tokenizer"
# The prompt alone, as if the user had sent it to a language model without a template of its own.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

# Denoisers

SD: Config = dict(
    in_channels=4,
    out_channels=4,
    layers_per_block=2,
    norm_num_groups=32,
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
)
SD2: Config = SD | dict(
    attention_head_dim=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
)
SDXL: Config = SD | dict(
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
UNETS: dict[str, Config] = {
    "sd15": SD | dict(sample_size=64, attention_head_dim=8, cross_attention_dim=768),
    "sd21": SD2 | dict(sample_size=96, upcast_attention=True),
    "sd21-base": SD2 | dict(sample_size=64),
    "sd-turbo": SD2 | dict(sample_size=64),
    "sdxl": SDXL | dict(sample_size=128),
}
TRANSFORMERS: dict[str, tuple[type[ModelMixin], Config]] = {
    "sit": (
        DiTTransformer2DModel,
        dict(num_attention_heads=16, attention_head_dim=72, out_channels=8, norm_eps=1e-6),
    ),
    "pixart-sigma": (
        PixArtTransformer2DModel,
        dict(
            sample_size=128,
            cross_attention_dim=1152,
            caption_channels=4096,
            use_additional_conditions=False,
            interpolation_scale=2,
        ),
    ),
    "sd35-medium": (
        SD3Transformer2DModel,
        dict(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
    ),
    "sana": (SanaTransformer2DModel, {}),
    "klein": (
        Flux2Transformer2DModel,
        dict(
            num_layers=5,
            num_single_layers=20,
            num_attention_heads=24,
            joint_attention_dim=3 * 2560,
            guidance_embeds=False,
        ),
    ),
    "z-image": (ZImageTransformer2DModel, {}),
}
NAMES = (*UNETS, *TRANSFORMERS)


def build_denoiser(name: str, small: bool = False) -> ModelMixin:
    """Return the UNet or transformer of a name of NAMES, with random weights.

    Raises ValueError for the small version of a transformer.
    """
    if name in UNETS:
        return UNet2DConditionModel(**UNETS[name] | (_small(name) if small else {})).eval()
    if small:
        raise ValueError(f"There is no small {name}; choose one of {', '.join(UNETS)}.")
    kind, config = TRANSFORMERS[name]
    transformer = kind(**config).eval()
    for parameter_name, parameter in transformer.named_parameters():
        if "pad_token" in parameter_name:  # Z-Image's, which its class leaves as memory has them
            torch.nn.init.normal_(parameter, std=0.02)
    return transformer


def _small(name: str) -> Config:
    config = UNETS[name]
    levels = len(config["block_out_channels"])
    small: Config = dict(
        sample_size=16,
        block_out_channels=(16, 32, 32, 32)[:levels],
        attention_head_dim=(1, 2, 2, 2)[:levels],
        norm_num_groups=8,
        cross_attention_dim=48 if name == "sdxl" else 32,
    )
    if name == "sdxl":
        small |= dict(
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
            transformer_layers_per_block=(1, 2, 2),
        )
    return small


# Schedulers, as published

SD_NOISE: Config = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
)
DDIM: Config = SD_NOISE | dict(clip_sample=False, set_alpha_to_one=False)
SCHEDULERS: dict[str, tuple[type[SchedulerMixin], Config]] = {
    "sd15": (PNDMScheduler, SD_NOISE | dict(skip_prk_steps=True)),
    "sd21": (DDIMScheduler, DDIM | dict(prediction_type="v_prediction")),
    "sd21-base": (DDIMScheduler, DDIM | dict(prediction_type="epsilon")),
    "sd-turbo": (EulerDiscreteScheduler, SD_NOISE | dict(timestep_spacing="trailing")),
    "sdxl": (EulerDiscreteScheduler, SD_NOISE | dict(timestep_spacing="leading")),
    "sit": (FlowMatchEulerDiscreteScheduler, {}),
    "pixart-sigma": (DPMSolverMultistepScheduler, {}),
    "sd35-medium": (FlowMatchEulerDiscreteScheduler, dict(shift=3.0)),
    "sana": (
        DPMSolverMultistepScheduler,
        dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ),
    "klein": (FlowMatchEulerDiscreteScheduler, dict(shift=3.0, use_dynamic_shifting=True)),
    "z-image": (FlowMatchEulerDiscreteScheduler, dict(shift=3.0)),
}


def build_scheduler(name: str) -> SchedulerMixin:
    """Return the published model's scheduler."""
    kind, config = SCHEDULERS[name]
    return kind(**config)


# Text encoders and autoencoders


def build_tokenizer(max_length: int) -> CLIPTokenizer:
    """Return the embedded model's tokenizer, for prompts of that many tokens."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=max_length)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_clip(
    kind: type, width: int, layers: int, heads: int, projection: int
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Return a CLIP text encoder with random weights."""
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=projection,
            max_position_embeddings=77,
            eos_token_id=build_tokenizer(77).eos_token_id,
        )
    ).eval()


def build_t5() -> transformers.T5EncoderModel:
    """Return T5 v1.1 XXL's encoder."""
    return transformers.T5EncoderModel(
        transformers.T5Config(
            d_model=4096,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    ).eval()


def build_gemma() -> transformers.Gemma2Model:
    """Return Gemma 2 2B."""
    return transformers.Gemma2Model(transformers.Gemma2Config()).eval()


def build_qwen(kind: type) -> transformers.Qwen3PreTrainedModel:
    """Return Qwen3 4B as the given class."""
    return kind(
        transformers.Qwen3Config(
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        )
    ).eval()


def build_vae(small: bool = False, **config: Any) -> AutoencoderKL:
    """Return the autoencoder of Stable Diffusion, changed by the given configuration."""
    defaults: Config = dict(
        block_out_channels=(16, 16, 16, 16) if small else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1 if small else 2,
        norm_num_groups=8 if small else 32,
    )
    return AutoencoderKL(**defaults | config).eval()


def build_flow_vae(**config: Any) -> AutoencoderKL:
    """Return the autoencoder with 16 channels of Stable Diffusion 3 and FLUX.1."""
    return build_vae(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, **config)


# Pipelines


def _build_pipeline(name: str, small: bool, scheduler: SchedulerMixin) -> DiffusionPipeline:
    denoiser = build_denoiser(name, small)
    if name == "sdxl":
        return _stable_diffusion_xl(denoiser, scheduler, small)
    if name in UNETS:
        size = (768, 12, 12, 768) if name == "sd15" else (1024, 23, 16, 512)
        return _stable_diffusion(denoiser, scheduler, (32, 2, 2, 32) if small else size, small)
    return PIPELINES[name](denoiser, scheduler)


def _stable_diffusion(
    unet: ModelMixin, scheduler: SchedulerMixin, text_size: tuple[int, ...], small: bool
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        build_vae(small, sample_size=8 * unet.config.sample_size, scaling_factor=0.18215),
        build_clip(CLIPTextModel, *text_size),
        build_tokenizer(32 if small else 77),
        unet,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_xl(
    unet: ModelMixin, scheduler: SchedulerMixin, small: bool
) -> StableDiffusionXLPipeline:
    sizes = (
        [(32, 2, 2, 32), (16, 2, 1, 16)] if small else [(768, 12, 12, 768), (1280, 32, 20, 1280)]
    )
    return StableDiffusionXLPipeline(
        build_vae(small, sample_size=8 * unet.config.sample_size, scaling_factor=0.13025),
        build_clip(CLIPTextModel, *sizes[0]),
        build_clip(CLIPTextModelWithProjection, *sizes[1]),
        build_tokenizer(32 if small else 77),
        build_tokenizer(32 if small else 77),
        unet,
        scheduler,
        add_watermarker=False,
    )


def _sit(transformer: ModelMixin, scheduler: SchedulerMixin) -> SiTPipeline:
    id2label = read_classes(IMAGENET_CLASSES, transformer.config.num_embeds_ada_norm)
    return SiTPipeline(transformer, build_vae(), scheduler, id2label, guided_channels=3)


def _pixart_sigma(transformer: ModelMixin, scheduler: SchedulerMixin) -> PixArtSigmaPipeline:
    vae = build_vae(sample_size=1024, scaling_factor=0.13025)
    return PixArtSigmaPipeline(build_tokenizer(300), build_t5(), vae, transformer, scheduler)


def _sd35(transformer: ModelMixin, scheduler: SchedulerMixin) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer,
        scheduler,
        build_flow_vae(scaling_factor=1.5305, shift_factor=0.0609),
        build_clip(CLIPTextModelWithProjection, 768, 12, 12, 768),
        build_tokenizer(77),
        build_clip(CLIPTextModelWithProjection, 1280, 32, 20, 1280),
        build_tokenizer(77),
        build_t5(),
        build_tokenizer(256),
    )


def _sana(transformer: ModelMixin, scheduler: SchedulerMixin) -> SanaPipeline:
    blocks = (*["ResBlock"] * 3, *["EfficientViTBlock"] * 3)
    vae = AutoencoderDC(
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    ).eval()
    return SanaPipeline(build_tokenizer(300), build_gemma(), vae, transformer, scheduler)


def _klein(transformer: ModelMixin, scheduler: SchedulerMixin) -> Flux2KleinPipeline:
    text_encoder = build_qwen(transformers.Qwen3ForCausalLM)
    vae = AutoencoderKLFlux2().eval()
    return Flux2KleinPipeline(scheduler, vae, text_encoder, build_tokenizer(512), transformer)


def _z_image(transformer: ModelMixin, scheduler: SchedulerMixin) -> ZImagePipeline:
    vae = build_flow_vae(scaling_factor=0.3611, shift_factor=0.1159)
    text_encoder = build_qwen(transformers.Qwen3Model)
    return ZImagePipeline(scheduler, vae, text_encoder, build_tokenizer(512), transformer)


PIPELINES: dict[str, Callable[[ModelMixin, SchedulerMixin], DiffusionPipeline]] = {
    "sit": _sit,
    "pixart-sigma": _pixart_sigma,
    "sd35-medium": _sd35,
    "sana": _sana,
    "klein": _klein,
    "z-image": _z_image,
}


def random_pipeline(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    small: bool = False,
) -> DiffusionPipeline:
    """Return the pipeline of a name of NAMES with random weights, drawn on the device.

    Raises ValueError for another name, and for the small version of a transformer's pipeline.
    """
    if name not in NAMES:
        raise ValueError(f"There is no architecture {name!r}; choose one of {', '.join(NAMES)}.")
    scheduler = build_scheduler(name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # no full-size model ever exists in single precision
    try:
        with torch.device(device):
            pipe = _build_pipeline(name, small, scheduler)
    finally:
        torch.set_default_dtype(before)
    pipe.register_to_config(_name_or_path=f"{name} with random weights")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
