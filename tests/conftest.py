import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; the scripts that tests start inherit it

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from noiserefine import Refiner
from noiserefine.backbones import load_pipeline

ROOT = Path(__file__).resolve().parent.parent
EMOJI, EMOJI_REFINER = str(ROOT / "assets" / "emoji"), str(ROOT / "assets" / "refiners" / "emoji")


@pytest.fixture(scope="session")
def pipe():
    return load_pipeline(EMOJI, "cpu")


@pytest.fixture(scope="session")
def refiner(pipe):
    return Refiner.from_pretrained(EMOJI_REFINER, pipe)


@pytest.fixture(scope="session")
def sdxl():
    """SDXL's conditioning at a hundredth of its size: two text encoders, pooled embeddings, time ids; random weights."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI, subfolder="tokenizer")

    def text(model, width):
        return model(CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=3, projection_dim=32,
                                    num_attention_heads=2, max_position_embeddings=32, eos_token_id=tokenizer.eos_token_id)).eval()

    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), cross_attention_dim=80, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80)
    vae = AutoencoderKL(block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=32)
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading")
    pipe = StableDiffusionXLPipeline(vae.eval(), text(CLIPTextModel, 32), text(CLIPTextModelWithProjection, 48), tokenizer, tokenizer,
                                     unet.eval(), scheduler, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def output(pipe, **kwargs) -> torch.Tensor:
    """Unguided latents of a fixed prompt and seed: what must never change."""
    latents = torch.randn(1, pipe.unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(5))
    return pipe("a red apple", latents=latents, num_inference_steps=2, guidance_scale=1.0, output_type="latent", **kwargs).images


@contextlib.contextmanager
def script(*arguments, **kwargs):
    """A script of the repository as a process of its own, run from the root."""
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
