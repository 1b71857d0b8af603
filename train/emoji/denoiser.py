"""Train the UNet of the embedded model in Stable Diffusion's format and write the pipeline.

    python -m train.emoji.denoiser --work_dir runs/emoji --output_dir assets/emoji

Latents and autoencoder come from autoencoder.py, the frozen text encoder from text_encoder.py. The
noise schedule is Stable Diffusion's, with v-prediction; a tenth of the captions is empty. The
pipeline is written in half precision (the text encoder in single), in shards below 10 MB.
"""

from collections.abc import Callable
from pathlib import Path

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

from train.emoji.examples import Captions, Examples, parse_options, read_text_encoder, train

SHARD = "9MB"


def build_unet(channels: int, sample_size: int, embedding: int) -> UNet2DConditionModel:
    """Return the UNet with random weights, for text embeddings of a width."""
    widths = (96, 128, 192)
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
        norm_num_groups=16,
        use_linear_projection=True,
    )


def build_scheduler() -> DDIMScheduler:
    """Return DDIM with Stable Diffusion's noise schedule and v-prediction."""
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
    denoise: Callable, scheduler: SchedulerMixin, captions: Captions, batch_size: int
) -> Callable[[Examples, torch.Generator], torch.Tensor]:
    """Return the loss: how well denoise(x_t, t, prompt_embeds) predicts v."""

    def loss(examples: Examples, generator: torch.Generator) -> torch.Tensor:
        x, pairs = examples.draw(batch_size, generator)
        with torch.no_grad():
            tokens = captions.draw(pairs, generator)
            prompt_embeds = captions.text_encoder(tokens).last_hidden_state.float()
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        # Shapes form at high noise, and the decoder tolerates what remains at low noise:
        # the density of t rises linearly.
        share = torch.rand(len(x), generator=generator, device=x.device).sqrt()
        t = (scheduler.config.num_train_timesteps * share).long()
        t = t.clamp(max=scheduler.config.num_train_timesteps - 1)  # the share may round to 1
        x_t = scheduler.add_noise(x, noise, t)
        prediction = denoise(x_t.contiguous(memory_format=torch.channels_last), t, prompt_embeds)
        return F.mse_loss(prediction.sample.float(), scheduler.get_velocity(x, noise, t))

    return loss


def write_pipeline(unet: UNet2DConditionModel, work_dir: Path, output_dir: Path) -> None:
    """Write the pipeline of a UNet with the work_dir's autoencoder and text encoder."""
    text_encoder = read_text_encoder(CLIPTextModel, work_dir / "text_encoder")
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work_dir / "vae"),
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(work_dir / "tokenizer"),
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=torch.float16)
    # transformers loads a model in the precision of its file, diffusers in float32.
    text_encoder.float()
    pipe.save_pretrained(output_dir, max_shard_size=SHARD)


def main() -> None:
    """Train the UNet and write the pipeline."""
    args = parse_options(__doc__, steps=15_000, lr=8e-4)
    captions = Captions(args.work_dir, args.device)
    torch.manual_seed(0)
    channels, side = Examples.SHAPE[0], Examples.SHAPE[1]
    unet = build_unet(channels, side, captions.text_encoder.config.hidden_size)
    unet.to(args.device, memory_format=torch.channels_last)
    denoise = torch.compile(unet) if args.compile else unet
    loss = denoising_loss(denoise, build_scheduler(), captions, args.batch_size)
    train(unet, loss, args.work_dir / "denoiser.pt", args)
    write_pipeline(unet.cpu(), args.work_dir, args.output_dir)


if __name__ == "__main__":
    main()
