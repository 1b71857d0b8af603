"""Where training a backbone starts from: the trainer's presets, and what one forward costs.

The paper trained "sd21", "sdxl" and "sit" (appendix D). Nobody has trained the other big models:
their presets are the paper's recipe with the guidance scale and steps of the model's own card.
"""

from dataclasses import dataclass
from typing import Any

import torch


def _quick_precision() -> str:
    """Return "bf16" where only a processor computes, and multiplies in it, else "no"."""
    if torch.accelerator.is_available():
        return "no"
    # Older versions of PyTorch do not tell.
    abilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if abilities.get("avx512_bf16") or abilities.get("amx_bf16") else "no"


GENERAL_PROMPTS = dict(
    prompts="assets/prompts/general.txt",
    validation_prompts="assets/prompts/general_heldout.txt",
)
EMBEDDED = dict(  # trained on a CPU in minutes
    backbone="assets/emoji",
    prompts="assets/prompts/emoji.txt",
    validation_prompts="assets/prompts/emoji_heldout.txt",
    num_targets=2944,
    guidance_scale=2.0,
    pag_scale=0.0,
    target_steps=10,
    steps=6,
    target_batch_size=32,
    rank=32,
    epochs=2.0,
    batch_size=32,
    gradient_accumulation_steps=1,
    lr=1e-3,
    lr_schedule="cosine",
    warmup_steps=5,
    mixed_precision=_quick_precision(),  # bf16 takes little more than half the time of "no"
    save_every=50,
    validate_every=50,
    num_validation=32,
)
EMBEDDED_FLOW = EMBEDDED | dict(backbone="assets/emoji-flow", guidance_scale=3.0)
# Flow transformers leave float16's range; at 1024 pixels two targets fit into one forward.
FLOW = GENERAL_PROMPTS | dict(
    pag_scale=0.0,
    target_steps=28,
    batch_size=2,
    gradient_accumulation_steps=8,
    gradient_checkpointing=True,
    mixed_precision="bf16",
)
PRESETS: dict[str, dict[str, Any]] = {
    "sd21": GENERAL_PROMPTS,
    "sd15": GENERAL_PROMPTS | dict(backbone="stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "sdxl": GENERAL_PROMPTS
    | dict(
        backbone="stabilityai/stable-diffusion-xl-base-1.0",
        num_targets=181_000,
        rank=256,
        batch_size=2,
        gradient_accumulation_steps=8,
        gradient_checkpointing=True,
    ),
    "sit": dict(
        backbone="runs/sit-xl-2",
        prompts="assets/prompts/imagenet100.txt",
        validation_prompts="assets/prompts/imagenet100.txt",
        num_targets=100_000,
        guidance_scale=4.0,
        pag_scale=0.0,
        epochs=8.0,
        batch_size=16,
        gradient_accumulation_steps=1,
        target_batch_size=32,
        mixed_precision="bf16",
    ),
    "pixart-sigma": FLOW
    | dict(
        backbone="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        guidance_scale=4.5,
        pag_scale=3.0,
        target_steps=20,
    ),
    "sana": FLOW
    | dict(
        backbone="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        guidance_scale=4.5,
        target_steps=20,
    ),
    "sd35-medium": FLOW
    | dict(backbone="stabilityai/stable-diffusion-3.5-medium", guidance_scale=4.5, pag_scale=3.0),
    "klein": FLOW | dict(backbone="black-forest-labs/FLUX.2-klein-base-4B", guidance_scale=4.0),
    "z-image": FLOW | dict(backbone="Tongyi-MAI/Z-Image", guidance_scale=5.0),
    "emoji": EMBEDDED
    | dict(  # with DDIM's own timesteps, "leading", few steps err as much as guidance changes
        num_targets=7168,
        sampler="DDIM (trailing)",
        target_steps=8,
        steps=4,
        batch_size=16,
        lr=7e-4,
        validate_every=128,
    ),
    "emoji-flow": EMBEDDED_FLOW,
    "emoji-sit": EMBEDDED_FLOW
    | dict(  # the classes are the same for training and validation, the noise is not
        backbone="assets/emoji-sit",
        num_targets=3072,
        guidance_scale=4.0,
        steps=4,
        prompts="assets/prompts/emoji_objects.txt",
        validation_prompts="assets/prompts/emoji_objects.txt",
    ),
}
# `--quick`: the first refiner of a model within an evening. On the embedded models about 1000
# targets are enough, each seen once or twice, and few steps in the loss do as well as many ("The
# training recipe" in assets/results/README.md). None of this has been tried on the big models.
QUICK = dict(
    num_targets=880,
    target_steps=15,
    steps=6,
    rank=32,
    epochs=2.5,
    lr=5e-4,
    lr_schedule="cosine",
    warmup_steps=10,
    save_every=64,
    validate_every=32,
)
QUICK_EMBEDDED = dict(num_targets=1024)


@dataclass(frozen=True)
class Forward:
    """One image's forward at the native size, and the LoRA; train/tools/cost.py counts them."""

    teraflop: float  # 10^12 operations
    weights: float  # GiB in 16 bits, of the denoiser alone
    lora: float  # million parameters, for each rank
    latents: tuple[int, int, int]  # (C, h, w)
    prompt: float  # MB of an encoded prompt, without its negative


FORWARDS = {
    "sd15": Forward(teraflop=0.8, weights=1.6, lora=0.956, latents=(4, 64, 64), prompt=0.12),
    "sd21": Forward(teraflop=2.15, weights=1.6, lora=0.964, latents=(4, 96, 96), prompt=0.16),
    "sdxl": Forward(teraflop=6.76, weights=4.8, lora=2.998, latents=(4, 128, 128), prompt=0.32),
    "sit": Forward(teraflop=0.24, weights=1.4, lora=0.583, latents=(4, 32, 32), prompt=0.0),
    "pixart-sigma": Forward(
        teraflop=6.63, weights=1.1, lora=0.849, latents=(4, 128, 128), prompt=2.46
    ),
    "sana": Forward(teraflop=2.97, weights=3.0, lora=1.156, latents=(32, 32, 32), prompt=1.38),
    "sd35-medium": Forward(
        teraflop=11.25, weights=4.2, lora=1.477, latents=(16, 128, 128), prompt=2.73
    ),
    "klein": Forward(teraflop=34.82, weights=7.2, lora=1.522, latents=(128, 64, 64), prompt=7.86),
    "z-image": Forward(
        teraflop=56.58, weights=11.5, lora=2.485, latents=(16, 128, 128), prompt=0.66
    ),
}
