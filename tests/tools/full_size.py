"""Check the refiner in half precision on the big models' whole architectures, with random weights.

    python -m tests.tools.full_size           # every architecture, on a card if there is one; 15 GB
    python -m tests.tools.full_size --small   # at a hundredth of the width, in float32

Prints a line for each check. The exit status is 1 if one fails.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator

import torch
from diffusers.training_utils import cast_training_params

from noiserefine import Refiner, draw_noise
from noiserefine.guidance import sample
from noiserefine.latents import decode
from noiserefine.models.devices import default_device
from noiserefine.models.offload import offload
from noiserefine.msd import msd_loss, sampler_gain
from noiserefine.noise import encode_prompt
from train.tools.architectures import UNETS, random_pipeline


def main() -> None:
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
    dtype = (
        torch.float32 if args.small else torch.bfloat16 if device.type == "cpu" else torch.float16
    )  # which CPUs are slow in
    failed = 0
    for name in args.only:
        torch.manual_seed(0)
        pipe = random_pipeline(name, device, dtype, args.small)
        for check, holds, *figure in checks(pipe):
            failed += not holds
            print("passed" if holds else "FAILED", f"{name}: {check}", *figure, flush=True)
    sys.exit(bool(failed))


def checks(pipe) -> Iterator[tuple]:
    """What should hold, whether it does, and for some a figure; leaves the pipeline offloaded."""
    device, dtype = pipe.device, pipe.unet.dtype
    rounding = 16 * torch.finfo(dtype).eps  # of numbers up to 4
    embeds = encode_prompt(pipe, "a red apple", guided=False)
    x_T = draw_noise(pipe, 0).to(device)

    def output(latents: torch.Tensor, **guidance) -> torch.Tensor:
        return sample(
            pipe,
            latents=latents.to(dtype),
            num_inference_steps=4,
            output_type="latent",
            **embeds,
            **guidance,
        ).images

    before = output(x_T)
    yield (
        "an image is made",
        bool(before.isfinite().all()) and all(image.getextrema() for image in decode(pipe, before)),
    )
    refiner = Refiner.create(pipe, rank=16)
    yield (
        "an untrained refiner is the identity",
        torch.allclose(refiner(x_T, embeds), x_T.to(dtype), rtol=0, atol=rounding),
    )
    yield "strength 0 returns x_T", torch.equal(refiner(x_T, embeds, strength=0), x_T.to(dtype))

    # As in the trainer, only the frozen network is in half precision, where AdamW's steps vanish.
    pipe.unet.requires_grad_(False)
    cast_training_params(refiner.network)
    refiner.network.enable_gradient_checkpointing()
    trained = [parameter for parameter in refiner.network.parameters() if parameter.requires_grad]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        x_hat = x_T + refiner.correction(x_T, embeds)
    loss = msd_loss(
        output(x_hat.detach()).float(),
        x_hat,
        torch.zeros_like(x_hat),
        sampler_gain(pipe.scheduler, 4),
    )
    loss.backward()
    norm = torch.stack(
        [parameter.grad.norm() for parameter in trained if parameter.grad is not None]
    ).norm()
    yield "the loss has a finite gradient", bool(norm.isfinite() and norm > 0), f"({norm:.2g})"

    refiner.network.disable_gradient_checkpointing()
    for parameter in trained:
        parameter.data = (parameter + 0.02 * torch.randn_like(parameter)).to(dtype)
    refined = refiner(x_T, embeds)
    yield (
        "a trained one changes the noise",
        not torch.equal(refined, x_T.to(dtype)),
        f"(by {(refined - x_T).std():.2g})",
    )
    with tempfile.TemporaryDirectory() as folder:
        refiner.save_pretrained(folder)
        del refiner
        loaded, merged = (
            Refiner.from_pretrained(folder, pipe, merge=merge) for merge in (False, True)
        )
    yield "saved and loaded, it refines to the same bits", torch.equal(loaded(x_T, embeds), refined)
    difference = (merged(x_T, embeds).float() - refined.float()).abs().max().item()
    yield (
        "merged, it refines to the same up to rounding",
        difference <= rounding,
        f"(at most {difference:.2g} apart)",
    )
    del merged
    output(x_T, pag_scale=3.0)
    yield "after all this, the pipeline makes the same bits", torch.equal(output(x_T), before)

    for mode in (
        ("model",) if device.type == "cpu" else ("model", "sequential")
    ):  # which works on accelerators only
        pipe.to("cpu")
        loaded.network.to("cpu")
        offload(pipe, loaded, mode, device)
        embeds = encode_prompt(pipe, "a red apple", guided=False)
        yield (
            f"with offload “{mode}” it refines to the same bits",
            torch.equal(loaded(x_T, embeds).to(device), refined),
        )
        pipe.remove_all_hooks()
        loaded.offload_hook = None


if __name__ == "__main__":
    main()
