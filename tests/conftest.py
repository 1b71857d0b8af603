"""What the tests share: models, a browser, a free port, scripts as processes."""

import os

# Read when huggingface_hub and torch are imported; the scripts that tests start inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import contextlib
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from playwright.sync_api import sync_playwright

from noiserefine import Refiner
from noiserefine.models.loading import load_pipeline
from tests.chromium import NoBrowserError, launch
from train.tools.architectures import random_pipeline

ROOT = Path(__file__).resolve().parent.parent
EMOJI, EMOJI_REFINER = str(ROOT / "assets" / "emoji"), str(ROOT / "assets" / "refiners" / "emoji")

# Of the tests marked `cuda`; cpu tries their code without a card.
DEVICE = torch.device(os.environ.get("NOISEREFINE_TEST_DEVICE", "cuda"))


def pytest_collection_modifyitems(items):
    """Mark the tests that use a browser, and skip those for a card where there is none."""
    no_card = not torch.cuda.is_available()
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
        if item.get_closest_marker("cuda") and DEVICE.type == "cuda" and no_card:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(scope="session")
def pipe():
    """Return the embedded model."""
    return load_pipeline(EMOJI, "cpu")


@pytest.fixture(scope="session")
def refiner(pipe):
    """Return the embedded model's refiner."""
    return Refiner.from_pretrained(EMOJI_REFINER, pipe)


@pytest.fixture(scope="session")
def sdxl():
    """Return SDXL at a hundredth of its size, with random weights.

    It has SDXL's conditioning: two text encoders, pooled embeddings and time ids.
    """
    torch.manual_seed(0)
    return random_pipeline("sdxl", small=True)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Return the folder of a pipeline with random weights, a hundredth of SD2.1."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    random_pipeline("sd21", small=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_refiner(tiny_folder, tmp_path_factory):
    """Return the folder of a refiner of the pipeline with random weights; it takes a scale."""
    folder = tmp_path_factory.mktemp("tiny") / "refiner"
    pipe = load_pipeline(str(tiny_folder), "cpu")
    perturbed(pipe, rank=4, guidance_scale_range=[1, 4]).save_pretrained(folder)
    return folder


@pytest.fixture
def browser():
    """Return a headless Chromium.

    Where none can be had the test is skipped with the reason, in CI it fails.
    """
    with sync_playwright() as playwright:
        try:
            browser = launch(playwright)
        except NoBrowserError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(str(error))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def url():
    """Return the address of the running app, which all tests of a session share."""
    with running_app() as address:
        yield address


@contextlib.contextmanager
def running_app():
    """Start the app on a free port, yield its address, and end it."""
    port = free_port()
    with script("app.py", "--host", "127.0.0.1", "--port", port) as process:
        line = ""
        while "Running on local URL" not in line:
            line = process.stdout.readline()
            assert line, "the server ended"
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield f"http://127.0.0.1:{port}"


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def perturbed(pipe, rank=16, **kwargs) -> Refiner:
    """Return a refiner that changes the noise, without training it."""
    torch.manual_seed(1)
    refiner = Refiner.create(pipe, rank, **kwargs)
    for name, parameter in refiner.network.named_parameters():
        if "lora_B.refiner" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return refiner


def output(pipe, **kwargs) -> torch.Tensor:
    """Return the unguided latents of a fixed prompt and seed: what must never change."""
    shape = (1, pipe.unet.config.in_channels, 16, 16)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(5))
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
    """Start a script of the repository as a process of its own, from the root, and end it."""
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
