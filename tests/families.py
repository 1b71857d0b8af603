"""Text-to-image pipelines of many families with tiny random weights, built without the hub.

The configurations follow those of diffusers' own tests; text is read as bytes, so that every
prompt differs from every other.  A new version of diffusers that breaks a family shows here
first.
"""

import functools
import hashlib
from collections.abc import Callable

import diffusers as d
import torch
import transformers as t
from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from noiserefine.denoiser import denoiser
from noiserefine.models.sit import SiTPipeline
from train.tools.architectures import SD_NOISE

VOCABULARY = 300  # bytes and special tokens, with room
SMALL = {"height": 64, "width": 64}  # of pipelines whose call has 1024 for its default
FAMILIES: dict[str, Callable[[], d.DiffusionPipeline]] = {}


def family(build):
    FAMILIES[build.__name__] = build
    return build


@functools.cache
@torch.no_grad()
def pipeline(name: str) -> d.DiffusionPipeline:
    """The family's pipeline, one for all tests. Weights that start at zero are random too, so
    that nothing is trivially zero.
    """
    torch.manual_seed(0)
    pipe = FAMILIES[name]()
    for parameter in denoiser(pipe).requires_grad_(False).parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    pipe.set_progress_bar_config(disable=True)
    pipe.register_to_config(_name_or_path=name)
    return pipe


# Parts


@functools.cache
def bytes_tokenizer(length: int = 77, side: str = "right") -> t.PreTrainedTokenizerFast:
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    made = t.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=length,
        padding_side=side,
    )
    made.chat_template = (
        "{% for m in messages %}{{ m['content'] if m['content'] is string else "
        "m['content'][0]['text'] }}{% endfor %}"
    )
    return made


def clip(kind=t.CLIPTextModel, length=77):
    config = t.CLIPTextConfig(
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        vocab_size=VOCABULARY,
        projection_dim=32,
        max_position_embeddings=length,
    )
    return kind(config).eval()


def t5(kind=t.T5EncoderModel, config=t.T5Config):
    return kind(
        config(
            d_model=32,
            d_kv=8,
            d_ff=37,
            num_layers=2,
            num_heads=4,
            vocab_size=VOCABULARY,
            relative_attention_num_buckets=8,
        )
    ).eval()


def language_model(kind, config, width=16, **kwargs):
    return kind(
        config(
            **dict(
                hidden_size=width,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
                vocab_size=VOCABULARY,
            )
            | kwargs
        )
    ).eval()


def gemma2():
    return language_model(t.Gemma2Model, t.Gemma2Config, attn_implementation="eager")


def kl(channels=4, **kwargs):
    return d.AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=1,
        sample_size=32,
        **kwargs,
    ).eval()


def flow_vae(channels=4):
    return kl(channels, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)


def deep_compression_vae():
    blocks = ("ResBlock", "EfficientViTBlock")
    return d.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    ).eval()


def qwen_vae():
    return d.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def flow(**kwargs):
    return d.FlowMatchEulerDiscreteScheduler(**kwargs)


def ddim(**kwargs):
    return d.DDIMScheduler(**SD_NOISE, clip_sample=False, set_alpha_to_one=False, **kwargs)


def unet(**kwargs):
    return d.UNet2DConditionModel(
        **dict(
            block_out_channels=(16, 32),
            layers_per_block=1,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            cross_attention_dim=32,
        )
        | kwargs
    ).eval()


def unet_xl(width, **kwargs):
    return unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        cross_attention_dim=width,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )


def small(pipe):
    """Of a pipeline whose native size no network's config tells."""
    pipe.default_sample_size = 8
    return pipe


def always(pipe, **arguments):
    """A pipeline with other defaults, those of a tiny model."""
    kind = type(pipe)

    @functools.wraps(kind.__call__)
    def call(self, *args, **kwargs):
        return kind.__call__(self, *args, **arguments | kwargs)

    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    return pipe


def embedding(prompts, *shape):
    """Random embeddings of prompts, for a text encoder that is too large or does not run."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    seeds = [int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16) for prompt in prompts]
    generators = map(torch.Generator().manual_seed, seeds)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


# UNets


def stable_diffusion(kind, network, scheduler):
    return kind(
        kl(),
        clip(),
        bytes_tokenizer(),
        network,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )


@family
def sd15():
    scheduler = d.PNDMScheduler(**SD_NOISE, skip_prk_steps=True)
    return stable_diffusion(d.StableDiffusionPipeline, unet(), scheduler)


@family
def sd2_v():
    network = unet(use_linear_projection=True)
    return stable_diffusion(
        d.StableDiffusionPipeline, network, ddim(prediction_type="v_prediction")
    )


@family
def lcm():
    scheduler = d.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    network = unet(time_cond_proj_dim=16)
    return stable_diffusion(d.LatentConsistencyModelPipeline, network, scheduler)


@family
def sdxl():
    return d.StableDiffusionXLPipeline(
        kl(),
        clip(),
        clip(t.CLIPTextModelWithProjection),
        bytes_tokenizer(),
        bytes_tokenizer(),
        unet_xl(64),
        d.EulerDiscreteScheduler(**SD_NOISE, timestep_spacing="leading"),
        add_watermarker=False,
    )


class Kolors(KolorsPipeline):
    """Without ChatGLM, which does not run with transformers 5."""

    def encode_prompt(self, prompt, negative_prompt=None, num_images_per_prompt=1, **kwargs):
        made = [kwargs.get("prompt_embeds"), kwargs.get("negative_prompt_embeds")]
        made += [kwargs.get("pooled_prompt_embeds"), kwargs.get("negative_pooled_prompt_embeds")]
        if made[0] is None:
            prompt = [prompt] if isinstance(prompt, str) else prompt
            prompts = [prompt, negative_prompt or [""] * len(prompt)]
            made = [embedding(value, 12, 32) for value in prompts]
            made += [embedding(value, 32) for value in prompts]
            made = [value.to(self.unet.dtype) for value in made]
        return tuple(
            value if value is None else value.repeat_interleave(num_images_per_prompt, 0)
            for value in made
        )


@family
def kolors():
    scheduler = d.EulerDiscreteScheduler(**SD_NOISE, timestep_spacing="leading")
    return Kolors(kl(), None, None, unet_xl(32), scheduler)


@family
def cascade_prior():
    blocks = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    prior = d.StableCascadeUNet(
        conditioning_dim=16,
        block_out_channels=(8, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        clip_text_in_channels=32,
        clip_text_pooled_in_channels=32,
        clip_image_in_channels=32,
        switch_level=(False,),
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        timestep_conditioning_type=("sca", "crp"),
        clip_seq=4,
        block_types_per_layer=(blocks,) * 2,
        patch_size=1,
        self_attn=(True, True),
        kernel_size=3,
        dropout=(0.0, 0.0),
    )
    return d.StableCascadePriorPipeline(
        bytes_tokenizer(),
        clip(t.CLIPTextModelWithProjection),
        prior.eval(),
        d.DDPMWuerstchenScheduler(),
        resolution_multiple=128.0,
    )


# Transformers with a beta schedule


@family
def pixart_sigma():
    transformer = d.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        norm_type="ada_norm_single",
    )
    scheduler = d.DPMSolverMultistepScheduler()
    return d.PixArtSigmaPipeline(bytes_tokenizer(), t5(), kl(), transformer.eval(), scheduler)


@family
def hunyuan_dit():
    transformer = d.HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        hidden_size=24,
        activation_fn="gelu-approximate",
        text_len=77,
        text_len_t5=256,
    )
    bert = t.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        vocab_size=VOCABULARY,
    )
    scheduler = d.DDPMScheduler(
        **SD_NOISE | {"beta_end": 0.02}, clip_sample=False, prediction_type="v_prediction"
    )
    return d.HunyuanDiTPipeline(
        kl(),
        t.BertModel(bert).eval(),
        bytes_tokenizer(),
        transformer.eval(),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
        text_encoder_2=t5(),
        tokenizer_2=bytes_tokenizer(256),
    )


@family
def cogview3():
    transformer = d.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    scheduler = d.CogVideoXDDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    return d.CogView3PlusPipeline(bytes_tokenizer(), t5(), kl(), transformer.eval(), scheduler)


# Flow matching


@family
def sit():
    transformer = d.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    )
    classes = {"0": "tench", "1": "a red apple", "2": "two cats on a roof"}
    return SiTPipeline(transformer.eval(), kl(), flow(), classes, guided_channels=3)


@family
def sd3():
    transformer = d.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        dual_attention_layers=(0,),  # SD3.5-medium's kinds of blocks
        qk_norm="rms_norm",
    )
    return d.StableDiffusion3Pipeline(
        transformer.eval(),
        flow(shift=3.0),
        flow_vae(),
        clip(t.CLIPTextModelWithProjection),
        bytes_tokenizer(),
        clip(t.CLIPTextModelWithProjection),
        bytes_tokenizer(),
        t5(),
        bytes_tokenizer(),
    )


def flux(guidance_embeds, scheduler):
    transformer = d.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=guidance_embeds,
    )
    return small(
        d.FluxPipeline(
            scheduler,
            flow_vae(),
            clip(),
            bytes_tokenizer(),
            t5(),
            bytes_tokenizer(),
            transformer.eval(),
        )
    )


@family
def flux_dev():
    return flux(True, flow(use_dynamic_shifting=True, shift=3.0))


@family
def flux_schnell():
    return flux(False, flow(shift=1.0))


def flux2_transformer(width, guidance_embeds):
    return d.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=width,
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=guidance_embeds,
    ).eval()


def flux2_vae():
    return d.AutoencoderKLFlux2(
        sample_size=32,
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


class Flux2(d.Flux2Pipeline):
    """Without its text encoder of 24 billion parameters."""

    def encode_prompt(self, prompt, prompt_embeds=None, num_images_per_prompt=1, **kwargs):
        if prompt_embeds is None:
            prompt_embeds = embedding(prompt, 12, 16).to(self.transformer.dtype)
        prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, 0)
        return prompt_embeds, self._prepare_text_ids(prompt_embeds)


@family
def flux2_dev():
    scheduler = flow(use_dynamic_shifting=True)
    return small(Flux2(scheduler, flux2_vae(), None, None, flux2_transformer(16, True)))


@family
def flux2_klein():
    text_encoder = language_model(t.Qwen3ForCausalLM, t.Qwen3Config, num_hidden_layers=3)
    pipe = d.Flux2KleinPipeline(
        flow(use_dynamic_shifting=True),
        flux2_vae(),
        text_encoder,
        bytes_tokenizer(512, side="left"),
        flux2_transformer(16, False),
        is_distilled=False,
    )
    return small(always(pipe, text_encoder_out_layers=(1,)))


@family
def chroma():
    transformer = d.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return small(d.ChromaPipeline(flow(), flow_vae(), t5(), bytes_tokenizer(), transformer.eval()))


def sana_transformer(**kwargs):
    return d.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=32,
        **kwargs,
    ).eval()


@family
def sana():
    scheduler = d.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    vae = deep_compression_vae()
    pipe = d.SanaPipeline(bytes_tokenizer(), gemma2(), vae, sana_transformer(), scheduler)
    return always(pipe, **SMALL)


@family
def sana_sprint():
    transformer = sana_transformer(qk_norm="rms_norm_across_heads", guidance_embeds=True)
    pipe = d.SanaSprintPipeline(
        bytes_tokenizer(), gemma2(), deep_compression_vae(), transformer, d.SCMScheduler()
    )
    return always(pipe, intermediate_timesteps=None, **SMALL)  # else it samples in two steps only


@family
def lumina_next():
    transformer = d.LuminaNextDiT2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        norm_eps=1e-5,
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=8,
        scaling_factor=1.0,
    )
    gemma = language_model(t.GemmaForCausalLM, t.GemmaConfig, width=8, head_dim=4)
    return d.LuminaPipeline(transformer.eval(), flow(), kl(), gemma, bytes_tokenizer(256))


@family
def lumina2():
    transformer = d.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=16,
    )
    tokenizer = bytes_tokenizer(512)
    return small(
        d.Lumina2Pipeline(transformer.eval(), flow(shift=6.0), flow_vae(), gemma2(), tokenizer)
    )


@family
def aura_flow():
    transformer = d.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=4096,
    )
    encoder = t5(t.UMT5EncoderModel, t.UMT5Config)
    pipe = d.AuraFlowPipeline(
        bytes_tokenizer(), encoder, kl(), transformer.eval(), flow(shift=1.73)
    )
    return always(pipe, **SMALL)


@family
def cogview4():
    transformer = d.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
    )
    glm = language_model(
        t.GlmModel,
        t.GlmConfig,
        width=32,
        num_attention_heads=4,
        pad_token_id=0,
    )
    scheduler = flow(
        base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
    )
    tokenizer = bytes_tokenizer(1024, side="left")
    return d.CogView4Pipeline(tokenizer, glm, kl(), transformer.eval(), scheduler)


VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}


@family
def qwen_image():
    transformer = d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    config = t.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "rope_scaling": {"mrope_section": [1, 1, 2], "type": "default"},
            "rope_theta": 1000000.0,
        },
        vision_config=VISION | {"out_hidden_size": 16},
        hidden_size=16,
        vocab_size=VOCABULARY,
        vision_start_token_id=11,
        vision_end_token_id=10,
        vision_token_id=12,
    )
    scheduler = flow(use_dynamic_shifting=True, shift=1.0, shift_terminal=0.02)
    return small(
        d.QwenImagePipeline(
            scheduler,
            qwen_vae(),
            t.Qwen2_5_VLForConditionalGeneration(config).eval(),
            bytes_tokenizer(1024),
            transformer.eval(),
        )
    )


@family
def z_image():
    transformer = d.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 512, 512],
    )
    for name, parameter in transformer.named_parameters():
        if "pad_token" in name:  # made without values
            parameter.data.fill_(1.0)
    qwen = language_model(t.Qwen3Model, t.Qwen3Config, num_hidden_layers=3)
    pipe = d.ZImagePipeline(
        flow(shift=3.0), kl(16, shift_factor=0.1159), qwen, bytes_tokenizer(512), transformer.eval()
    )
    return always(pipe, **SMALL)


@family
def krea2():
    transformer = d.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
        rope_theta=1000.0,
    )
    config = t.Qwen3VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": VOCABULARY,
        },
        vision_config=VISION | {"out_hidden_size": 16},
    )
    return always(
        d.Krea2Pipeline(
            scheduler=flow(use_dynamic_shifting=True),
            vae=qwen_vae(),
            text_encoder=t.Qwen3VLModel(config).eval(),
            tokenizer=bytes_tokenizer(1024),
            transformer=transformer.eval(),
            text_encoder_select_layers=(0, 1, 2),
        ),
        **SMALL,
    )


@family
def ovis():
    transformer = d.OvisImageTransformer2DModel(
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return small(
        d.OvisImagePipeline(
            scheduler=flow(use_dynamic_shifting=True),
            vae=flow_vae(),
            text_encoder=language_model(t.Qwen3Model, t.Qwen3Config, width=32),
            tokenizer=bytes_tokenizer(1024),
            transformer=transformer.eval(),
        )
    )


@family
def hidream():
    transformer = d.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    llama = language_model(t.LlamaForCausalLM, t.LlamaConfig, pad_token_id=0)
    tokenizer = bytes_tokenizer(128)
    encoders = [clip(t.CLIPTextModelWithProjection, length=128) for _ in range(2)]
    return small(
        d.HiDreamImagePipeline(
            flow(shift=3.0),
            kl(scaling_factor=0.3611, shift_factor=0.1159),
            encoders[0],
            tokenizer,
            encoders[1],
            tokenizer,
            t5(),
            tokenizer,
            llama,
            tokenizer,
            transformer.eval(),
        )
    )
