"""Train the autoencoder of the embedded models and encode all pictures with it.

    python -m train.emoji.autoencoder --pictures runs/emoji/pictures --output_dir runs/emoji

AutoencoderKL, 4x down: 128 x 128 pixels become 32 x 32 latents of 6 channels. It trains on crops
of 64 pixels and, at the end, on whole pictures. The loss is L1 on pixels and on their differences,
plus a small KL term. The decoder learns on latents with noise, so that it tolerates the small
errors of a denoiser. The script prints the PSNR on held-out renders.

With --start_from only the decoder is trained, on whole pictures: the latents do not change.
"""

import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from train.common import argument_parser
from train.emoji.fit import Settings, add_options, fit
from train.emoji.render import SIZE

LATENT_CHANNELS = 6
LATENT_NOISE = 0.15  # of the latents' standard deviation, channel by channel
CROP = 64
CROPS = 0.7  # of the training; the rest is on whole pictures


def read_pictures(path: Path, device: torch.device) -> torch.Tensor:
    """Return a file of render.py as uint8 (N, H, W, 3) on the device, memory-mapped on the CPU."""
    return torch.from_numpy(np.load(path, mmap_mode="c")).to(device)


def pixels(pictures: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Return uint8 (N, H, W, 3) as float (N, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def build() -> AutoencoderKL:
    """Return the autoencoder with random weights."""
    widths = (32, 64, 128)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def differences(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the differences of neighbouring pixels of (N, C, H, W), horizontal and vertical."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def crop(pictures: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random square of each of the pictures (N, H, W, 3)."""
    device, room = pictures.device, pictures.shape[1] - size + 1
    corners = torch.randint(room, (2, len(pictures), 1), generator=generator, device=device)
    y, x = corners + torch.arange(size, device=device)
    index = torch.arange(len(pictures), device=device)
    return pictures[index[:, None, None], y[..., None], x[:, None]]


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Return the latents' means (N, LATENT_CHANNELS, h, w) in half precision, on the CPU."""
    parts = []
    for part in pictures.split(batch_size):
        with torch.autocast(part.device.type, torch.bfloat16, enabled=part.is_cuda):
            x = pixels(part).contiguous(memory_format=torch.channels_last)
            parts.append(vae.encode(x).latent_dist.mean.half().cpu())
    return torch.cat(parts)


@torch.no_grad()
def normalize(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold (z - mean) / std, channel by channel, into the convolutions next to the latents.

    Stable Diffusion's pipelines scale all channels by one number and do not shift them.
    """
    inward, outward = vae.quant_conv, vae.post_quant_conv
    inward.weight[:LATENT_CHANNELS] /= std[:, None, None, None]
    inward.bias[:LATENT_CHANNELS] = (inward.bias[:LATENT_CHANNELS] - mean) / std
    inward.bias[LATENT_CHANNELS:] -= 2 * std.log()  # the log-variance
    outward.bias += outward.weight.flatten(1) @ mean
    outward.weight *= std[:, None, None]


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Return the mean over pictures of the PSNR in dB, on 8-bit pixel values."""
    values = []
    for part in pictures.split(64):
        x = pixels(part)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        error = ((x - y) * 127.5).pow(2).mean((1, 2, 3))
        values.append(10 * torch.log10(255**2 / error))
    return torch.cat(values).mean().item()


def main() -> None:
    """Train the autoencoder, or only its decoder, and write it with the pictures' latents."""
    parser = argument_parser(__doc__)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--start_from", type=Path, help="autoencoder whose decoder to train")
    add_options(parser, steps=12_000, lr=1e-3, batch_size=16)
    args = parser.parse_args()
    pictures = read_pictures(args.pictures / "train_pictures.npy", args.device)
    torch.manual_seed(0)
    if args.start_from:
        vae = AutoencoderKL.from_pretrained(args.start_from)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    else:
        vae = build()
    vae.to(args.device, memory_format=torch.channels_last)

    def loss(size: int, generator: torch.Generator) -> torch.Tensor:
        count = args.batch_size * (SIZE // size) ** 2
        chosen = torch.randint(len(pictures), (count,), generator=generator, device=args.device)
        x = pixels(crop(pictures[chosen], size, generator))
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = DiagonalGaussianDistribution(vae.encode(x).latent_dist.parameters.float())
        z = posterior.sample(generator)
        noise = torch.randn(z.shape, generator=generator, device=args.device)
        z = z + LATENT_NOISE * z.detach().std((0, 2, 3), keepdim=True) * noise
        y = vae.decode(z).sample.float()
        pairs = zip(differences(x), differences(y), strict=True)
        edges = torch.stack([(a - b).abs().mean() for a, b in pairs]).sum()
        return (x - y).abs().mean() + edges + 1e-4 * posterior.kl().mean() / x[0].numel()

    # A phase: its name, its pictures' size, its share of the steps, its learning rate, its end.
    began = time.time()
    phases = [
        ("autoencoder", CROP, CROPS, args.lr, CROPS),
        ("autoencoder-whole", SIZE, 1 - CROPS, args.lr / 4, 1),
    ]
    if args.start_from:
        phases = [("decoder", SIZE, 1, args.lr, 1)]
    for name, size, share, lr, end in phases:
        until = args.until and began + end * (args.until - began)
        settings = Settings(lr=lr, steps=round(share * args.steps), until=until)
        fit(vae, partial(loss, size), args.output_dir / f"{name}.pt", settings)

    # The pictures' latents, and the figure
    if not args.start_from:
        latents = encode(vae, pictures).float()
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        normalize(vae, mean.to(args.device), std.to(args.device))
        latents = ((latents - mean[:, None, None]) / std[:, None, None]).half()
        np.save(args.output_dir / "latents.part.npy", latents.numpy())
        os.replace(args.output_dir / "latents.part.npy", args.output_dir / "latents.npy")
    held_out = read_pictures(args.pictures / "heldout_pictures.npy", args.device)[::7]
    print(f"held-out PSNR {psnr(vae, held_out):.2f} dB on {len(held_out)} pictures")
    vae.half().save_pretrained(args.output_dir / "vae")


if __name__ == "__main__":
    main()
