"""Train the embedded class-conditional SiT (Ma et al. 2024) and write the pipeline.

    python -m train.emoji.sit --work_dir runs/emoji --output_dir assets/emoji-sit

The classes are the objects; the background is arbitrary. SiT's linear path is x_t = t x + (1 - t)
noise; the network predicts x - noise, and t is drawn from a logit-normal density. A tenth of the
labels is "no class".
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import nn

from noiserefine.models.sit import SiTPipeline
from train.emoji.denoiser import SHARD
from train.emoji.examples import Examples, parse_options, train
from train.emoji.flow import TIME_MEAN
from train.emoji.render import objects

UNLABELLED = 0.1  # share of the labels that are dropped


def build_transformer(channels: int, sample_size: int) -> DiTTransformer2DModel:
    """Return the transformer with random weights."""
    heads, width = 6, 192
    transformer = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        num_layers=7,
        sample_size=sample_size,
        patch_size=2,
        num_embeds_ada_norm=len(objects()),
        norm_eps=1e-6,
    )
    # adaLN-zero: every block starts as the identity, the network as zero.
    modulations = [block.norm1.linear for block in transformer.transformer_blocks]
    for layer in (*modulations, transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    # SiT's frequencies; those of DiT in diffusers are spaced wider.
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    # In training mode each block would drop labels independently; the loss drops them.
    return transformer.eval()


def velocity_loss(
    denoise: Callable, batch_size: int
) -> Callable[[Examples, torch.Generator], torch.Tensor]:
    """Return the loss: how well denoise predicts x - noise."""

    def loss(examples: Examples, generator: torch.Generator) -> torch.Tensor:
        x, pairs = examples.draw(batch_size, generator)
        drawn: dict[str, Any] = {"generator": generator, "device": x.device}
        unlabelled = torch.rand(len(x), **drawn) < UNLABELLED
        labels = torch.where(unlabelled, len(objects()), pairs[:, 0])
        noise = torch.randn(x.shape, **drawn)
        t = (torch.randn(len(x), **drawn) - TIME_MEAN).sigmoid()
        x_t = torch.lerp(noise, x, t[:, None, None, None])
        prediction = denoise(x_t, timestep=t, class_labels=labels).sample
        return F.mse_loss(prediction.float(), x - noise)

    return loss


def write_pipeline(transformer: DiTTransformer2DModel, work_dir: Path, output_dir: Path) -> None:
    """Write the pipeline of a transformer with the work_dir's autoencoder, in half precision."""
    names = [", ".join((thing.name, *thing.synonyms)) for thing in objects()]
    labels = {str(i): name for i, name in enumerate(names)}
    pipe = SiTPipeline(
        transformer=transformer,
        vae=AutoencoderKL.from_pretrained(work_dir / "vae"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        id2label=labels,
    )
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(output_dir, max_shard_size=SHARD)


def main() -> None:
    """Train the transformer and write the pipeline."""
    args = parse_options(__doc__, steps=20_000, lr=1e-3)
    torch.manual_seed(0)
    transformer = build_transformer(Examples.SHAPE[0], Examples.SHAPE[1]).to(args.device)
    denoise = torch.compile(transformer) if args.compile else transformer
    loss = velocity_loss(denoise, args.batch_size)
    train(transformer, loss, args.work_dir / "sit.pt", args)
    write_pipeline(transformer.cpu(), args.work_dir, args.output_dir)


if __name__ == "__main__":
    main()
