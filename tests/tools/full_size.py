"""Check the refiner in half precision on the big models' whole architectures, with random weights.

    python -m tests.tools.full_size           # every architecture, on a card if there is one; 15 GB
    python -m tests.tools.full_size --small   # at a hundredth of the width, in float32

Prints a line for each check. The exit status is 1 if one fails.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params

from noiserefine import Refiner, draw_noise
from noiserefine.denoiser import denoiser, precision
from noiserefine.guidance import sample_latents
from noiserefine.latents import decode
from noiserefine.models.devices import default_device
from noiserefine.models.offload import offload
from noiserefine.msd import msd_loss, sampler_gain
from noiserefine.noise import encode_prompt
from train.tools.architectures import UNETS, random_pipeline

STEPS = 4


class Check(NamedTuple):
    """Something that should hold, and for some checks a figure."""

    name: str
    holds: bool
    figure: float | None = None


def main() -> None:
    """Run the checks on the chosen architectures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(UNETS),
        default=list(UNETS),
        help="architectures; all if not given",
    )
    parser.add_argument("--small", action="store_true", help="a hundredth of the width, in float32")
    args = parser.parse_args()
    device = default_device()
    half = torch.bfloat16 if device.type == "cpu" else torch.float16
    dtype = torch.float32 if args.small else half
    failed = 0
    for name in args.only:
        torch.manual_seed(0)
        pipe = random_pipeline(name, device, dtype, args.small)
        for check in checks(pipe):
            failed += not check.holds
            verdict = "passed" if check.holds else "FAILED"
            figure = "" if check.figure is None else f" ({check.figure:.2g})"
            print(f"{verdict} {name}: {check.name}{figure}", flush=True)
    sys.exit(bool(failed))


class _Sampling:
    """A pipeline with fixed noise and prompt, and what it makes of them."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe, self.network = pipe, denoiser(pipe)
        self.dtype = precision(self.network)
        self.embeds = encode_prompt(pipe, "a red apple", guided=False)
        self.x_T = draw_noise(pipe, 0).to(pipe.device)
        self.rounding = 16 * torch.finfo(self.dtype).eps  # of numbers up to 4

    def x0(self, latents: torch.Tensor, **guidance: float) -> torch.Tensor:
        """Return the latents after four steps."""
        return sample_latents(self.pipe, latents.to(self.dtype), self.embeds, STEPS, **guidance)


def checks(pipe: DiffusionPipeline) -> Iterator[Check]:
    """Yield every check; the pipeline ends offloaded."""
    sampling = _Sampling(pipe)
    before = sampling.x0(sampling.x_T)
    images = decode(pipe, before)
    is_image = bool(before.isfinite().all()) and all(image.getextrema() for image in images)
    yield Check("an image is made", is_image)
    refiner = Refiner.create(pipe, rank=16)
    yield from _untrained(sampling, refiner)
    yield from _gradient(sampling, refiner)
    refined, loaded = yield from _saved(sampling, refiner)
    sampling.x0(sampling.x_T, pag_scale=3.0)
    equal = torch.equal(sampling.x0(sampling.x_T), before)
    yield Check("after all this, the pipeline makes the same bits", equal)
    yield from _offloaded(sampling, loaded, refined)


def _untrained(sampling: _Sampling, refiner: Refiner) -> Iterator[Check]:
    x_T = sampling.x_T.to(sampling.dtype)
    x_hat = refiner.refine(sampling.x_T, sampling.embeds)
    identity = torch.allclose(x_hat, x_T, rtol=0, atol=sampling.rounding)
    yield Check("an untrained refiner is the identity", identity)
    unrefined = refiner.refine(sampling.x_T, sampling.embeds, strength=0)
    yield Check("strength 0 returns x_T", torch.equal(unrefined, x_T))


def _gradient(sampling: _Sampling, refiner: Refiner) -> Iterator[Check]:
    """Take the loss's gradient, as the trainer does, and change the LoRA."""
    # Only the frozen network is in half precision, in which AdamW's steps vanish.
    sampling.network.requires_grad_(False)
    cast_training_params(refiner.network)
    refiner.network.enable_gradient_checkpointing()
    trained = [parameter for parameter in refiner.network.parameters() if parameter.requires_grad]
    is_half = sampling.dtype != torch.float32
    with torch.autocast(sampling.x_T.device.type, sampling.dtype, enabled=is_half):
        x_hat = sampling.x_T + refiner.correction(sampling.x_T, sampling.embeds)
    x0 = sampling.x0(x_hat.detach()).float()
    gain = sampler_gain(sampling.pipe.scheduler, STEPS)
    msd_loss(x0, x_hat, torch.zeros_like(x_hat), gain).backward()
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    yield Check("the loss has a finite gradient", math.isfinite(norm) and norm > 0, norm)
    refiner.network.disable_gradient_checkpointing()
    for parameter in trained:
        parameter.data = (parameter + 0.02 * torch.randn_like(parameter)).to(sampling.dtype)


def _saved(
    sampling: _Sampling, refiner: Refiner
) -> Generator[Check, None, tuple[torch.Tensor, Refiner]]:
    """Save the trained refiner; return its refined noise, and the refiner loaded again."""
    refined = refiner.refine(sampling.x_T, sampling.embeds)
    change = (refined - sampling.x_T).std().item()
    yield Check("a trained one changes the noise", change > 0, change)
    with tempfile.TemporaryDirectory() as folder:
        refiner.save_pretrained(folder)
        del refiner
        loaded = Refiner.from_pretrained(folder, sampling.pipe, merge=False)
        merged = Refiner.from_pretrained(folder, sampling.pipe, merge=True)
    equal = torch.equal(loaded.refine(sampling.x_T, sampling.embeds), refined)
    yield Check("saved and loaded, it refines to the same bits", equal)
    x_hat = merged.refine(sampling.x_T, sampling.embeds)
    error = (x_hat.float() - refined.float()).abs().max().item()
    yield Check("merged, it differs by rounding", error <= sampling.rounding, error)
    return refined, loaded


def _offloaded(sampling: _Sampling, refiner: Refiner, refined: torch.Tensor) -> Iterator[Check]:
    """Offload the pipeline in every mode that the device offers."""
    pipe, device = sampling.pipe, sampling.x_T.device
    for mode in ("model",) if device.type == "cpu" else ("model", "sequential"):
        pipe.to("cpu")
        refiner.network.to("cpu")
        offload(pipe, refiner, mode, device)
        embeds = encode_prompt(pipe, "a red apple", guided=False)
        equal = torch.equal(refiner.refine(sampling.x_T, embeds).to(device), refined)
        yield Check(f"with offload “{mode}” it refines to the same bits", equal)
        pipe.remove_all_hooks()
        refiner.offload_hook = None


if __name__ == "__main__":
    main()
