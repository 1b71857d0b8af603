"""Trains the autoencoder of the embedded backbone and encodes all pictures with it.

    python -m train.emoji.autoencoder --pictures runs/emoji/pictures --output_dir runs/emoji

AutoencoderKL, 4x down: 64 x 64 pixels become 16 x 16 latents of 8 channels.  Trained on crops of 32
pixels and, in the last fifth, on whole pictures; the loss is L1 on pixels and on their differences,
plus a small KL term.  The decoder learns on latents with noise, so that it forgives the
small errors of a denoiser.  Prints the PSNR on held-out renders.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from train.emoji.fit import fit
from train.emoji.render import SIZE

LATENT_CHANNELS = 8
LATENT_NOISE = 0.25  # of the latents' standard deviation, channel by channel
CROP = 32


def pixels(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def build() -> AutoencoderKL:
    widths = (32, 64, 96)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=SIZE,
    )


def differences(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray) -> torch.Tensor:
    """The latents' means: (N, LATENT_CHANNELS, SIZE / 4, SIZE / 4) in half precision."""
    parts = [
        vae.encode(pixels(part)).latent_dist.mean.half()
        for part in tqdm(
            np.array_split(pictures, len(pictures) // 64), desc="encode", mininterval=10
        )
    ]
    return torch.cat(parts)


@torch.no_grad()
def normalize(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Folds (z - mean) / std, a value for each channel, into the 1 x 1 convolutions on both sides of the latents.

    Stable Diffusion's pipelines scale latents by one number and shift them not at all.
    """
    inward, outward = vae.quant_conv, vae.post_quant_conv
    inward.weight[:LATENT_CHANNELS] /= std[:, None, None, None]
    inward.bias[:LATENT_CHANNELS] = (inward.bias[:LATENT_CHANNELS] - mean) / std
    inward.bias[LATENT_CHANNELS:] -= 2 * std.log()  # the log-variance
    outward.bias += outward.weight.flatten(1) @ mean
    outward.weight *= std[:, None, None]
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: np.ndarray) -> float:
    """Mean over pictures of the PSNR in dB, on 8-bit pixel values."""
    x = pixels(pictures)
    y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    error = ((x - y) * 127.5).pow(2).mean((1, 2, 3))
    return (10 * torch.log10(255**2 / error)).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--start_from",
        type=Path,
        help="the folder of an autoencoder to begin with, where there is no checkpoint to go on from",
    )
    args = parser.parse_args()
    pictures = np.load(args.pictures / "train_pictures.npy", mmap_mode="r")
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(args.start_from) if args.start_from else build()
    vae = vae.to(memory_format=torch.channels_last)
    step_of_whole_pictures = int(0.8 * args.steps)

    def loss(generator: torch.Generator) -> torch.Tensor:
        whole = generator.initial_seed() >= step_of_whole_pictures
        chosen = torch.randint(len(pictures), (8 if whole else 32,), generator=generator)
        x = pixels(pictures[chosen.sort().values.numpy()])
        if not whole:
            corners = torch.randint(SIZE - CROP + 1, (len(x), 2), generator=generator).tolist()
            x = torch.stack(
                [image[:, i : i + CROP, j : j + CROP] for image, (i, j) in zip(x, corners)]
            )
        posterior = vae.encode(x).latent_dist
        z = posterior.sample(generator)
        z = z + LATENT_NOISE * z.detach().std((0, 2, 3), keepdim=True) * torch.randn(
            z.shape, generator=generator
        )
        y = vae.decode(z).sample
        edges = sum((a - b).abs().mean() for a, b in zip(differences(x), differences(y)))
        return (x - y).abs().mean() + edges + 1e-4 * posterior.kl().mean() / x[0].numel()

    fit(vae, loss, args.output_dir / "autoencoder.pt", steps=args.steps, lr=args.lr)
    latents = encode(vae, pictures).float()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    normalize(vae, mean, std)
    vae.save_pretrained(args.output_dir / "vae")
    np.save(
        args.output_dir / "latents.npy",
        ((latents - mean[:, None, None]) / std[:, None, None]).half().numpy(),
    )
    held_out = np.load(args.pictures / "heldout_pictures.npy")[::7]
    print(f"held-out PSNR {psnr(vae, held_out):.2f} dB on {len(held_out)} pictures")


if __name__ == "__main__":
    main()
