import os

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # read when huggingface_hub is imported; the scripts that tests start inherit it
)

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from noiserefine import Refiner
from noiserefine.models.loading import load_pipeline
from train.tools.architectures import random_pipeline

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
    return random_pipeline("sdxl", small=True)


def perturbed(pipe, rank=16, **kwargs) -> Refiner:
    """A refiner that does something, without training."""
    torch.manual_seed(1)
    refiner = Refiner.create(pipe, rank, **kwargs)
    for name, parameter in refiner.unet.named_parameters():
        if "lora_B.refiner" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return refiner


def output(pipe, **kwargs) -> torch.Tensor:
    """Unguided latents of a fixed prompt and seed: what must never change."""
    latents = torch.randn(
        1, pipe.unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(5)
    )
    return pipe(
        "a red apple",
        latents=latents,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="latent",
        **kwargs,
    ).images


@contextlib.contextmanager
def script(*arguments, **kwargs):
    """A script of the repository as a process of its own, run from the root."""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
