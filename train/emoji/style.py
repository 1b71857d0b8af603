"""Fine-tunes the embedded model on pictures of another style and writes the LoRA.

    python -m train.emoji.style --pictures runs/clay/pictures --output_dir assets/loras/emoji-clay

Pictures come from render.py with --style; they are encoded with the embedded model's own autoencoder.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import cast_training_params

from noiserefine.checkpoint import WEIGHTS_NAME
from noiserefine.lora import save_lora
from noiserefine.models.loading import load_pipeline
from train.emoji.autoencoder import encode
from train.emoji.denoiser import denoising_loss
from train.emoji.fit import fit
from train.experiments.networks import Raw


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="where the LoRA is written")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args(arguments)
    pipe = load_pipeline("emoji", "cpu", torch.float32)
    latents_file = args.pictures / "latents.npy"
    if not latents_file.exists():
        np.save(
            latents_file, encode(pipe.vae, np.load(args.pictures / "train_pictures.npy")).numpy()
        )
    latents, classes = (
        torch.from_numpy(np.load(latents_file)),
        np.load(args.pictures / "train_classes.npy"),
    )
    torch.manual_seed(0)
    pipe.unet.requires_grad_(False)
    unet = Raw.create(pipe, args.rank).network
    cast_training_params(unet)
    loss = denoising_loss(
        unet,
        pipe.scheduler,
        pipe.tokenizer,
        pipe.text_encoder,
        latents,
        classes,
        args.batch_size,
        pipe.vae.config.scaling_factor,
    )
    fit(unet, loss, args.pictures / "style.pt", steps=args.steps, lr=args.lr)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    save_lora(pipe, unet.half(), args.output_dir / WEIGHTS_NAME)


if __name__ == "__main__":
    main()
