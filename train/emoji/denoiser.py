"""Trains the UNet of the embedded backbone and writes the whole pipeline.

    python -m train.emoji.denoiser --work_dir runs/emoji --output_dir assets/emoji

Latents and autoencoder come from autoencoder.py, the text encoder from text_encoder.py and is frozen.
Stable Diffusion's noise schedule, v-prediction, a tenth of the captions empty.  The pipeline is written in half precision (the text encoder in
single), in shards below 10 MB.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from train.emoji.captions import caption
from train.emoji.fit import fit


def build_unet(channels: int, sample_size: int, embedding: int) -> UNet2DConditionModel:
    widths = (32, 64, 160)
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=embedding,
        attention_head_dim=tuple(width // 32 for width in widths),  # the number of heads
        norm_num_groups=8,
        use_linear_projection=True,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="leading",
    )


def denoising_loss(
    denoise: Callable,
    scheduler: SchedulerMixin,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    latents: torch.Tensor,
    classes: np.ndarray,
    batch_size: int,
    scaling_factor: float,
) -> Callable[[torch.Generator], torch.Tensor]:
    """The loss of `fit`: how well denoise(x_t, t, prompt_embeds) predicts v of latents (N, C, h, w) whose objects and backgrounds are classes (N, 2)."""

    def loss(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(latents), (batch_size,), generator=generator)
        rng = random.Random(generator.initial_seed())
        captions = [caption(thing, colour, rng)[0] for thing, colour in classes[chosen.tolist()]]
        tokens = tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            prompt_embeds = text_encoder(tokens).last_hidden_state
        x = latents[chosen].float() * scaling_factor
        noise = torch.randn(x.shape, generator=generator)
        # Shapes form at high noise, and the decoder forgives what is left at low noise: the density of t rises linearly.
        t = (
            scheduler.config.num_train_timesteps * torch.rand(len(x), generator=generator).sqrt()
        ).long()
        return F.mse_loss(
            denoise(scheduler.add_noise(x, noise, t), t, prompt_embeds).sample,
            scheduler.get_velocity(x, noise, t),
        )

    return loss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work_dir",
        type=Path,
        required=True,
        help="pictures, latents, autoencoder and checkpoints",
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="where the pipeline is written"
    )
    parser.add_argument(
        "--start_from",
        type=Path,
        help="the folder of a pipeline whose UNet to begin with, where there is no checkpoint to go on from",
    )
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the UNet: three minutes first, then 1.5 times as fast",
    )
    args = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(args.work_dir / "vae")
    latents = torch.from_numpy(np.load(args.work_dir / "latents.npy"))
    classes = np.load(args.work_dir / "pictures" / "train_classes.npy")
    scheduler = build_scheduler()
    tokenizer = CLIPTokenizer.from_pretrained(args.work_dir / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(args.work_dir / "text_encoder").eval()
    torch.manual_seed(0)
    unet = build_unet(latents.shape[1], latents.shape[2], text_encoder.config.hidden_size).to(
        memory_format=torch.channels_last
    )
    if args.start_from:
        unet.load_state_dict(
            UNet2DConditionModel.from_pretrained(
                args.start_from, subfolder="unet", dtype=torch.float32
            ).state_dict()
        )
    denoise = torch.compile(unet) if args.compile else unet

    loss = denoising_loss(
        denoise,
        scheduler,
        tokenizer,
        text_encoder,
        latents,
        classes,
        args.batch_size,
        vae.config.scaling_factor,
    )
    fit(unet, loss, args.work_dir / "denoiser.pt", steps=args.steps, lr=args.lr)
    tokenizer = CLIPTokenizer.from_pretrained(
        args.work_dir / "tokenizer"
    )  # the other one keeps the padding of its last call
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=torch.float16)
    text_encoder.float()  # transformers loads a model in the precision it was stored in, diffusers in float32
    pipe.save_pretrained(args.output_dir, max_shard_size="9MB")


if __name__ == "__main__":
    main()
