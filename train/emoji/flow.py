"""Train the embedded flow transformer in Stable Diffusion 3's format and write the pipeline.

    python -m train.emoji.flow --work_dir runs/emoji --output_dir assets/emoji-flow

SD3Transformer2DModel on the latents of autoencoder.py, with the text encoder of text_encoder.py as
both CLIPs and no T5. Rectified flow: x_t = (1 - t) x + t noise, the network predicts noise - x, and
t is drawn from a logit-normal density (Esser et al. 2024). A tenth of the captions is empty.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from train.emoji.denoiser import SHARD
from train.emoji.examples import Captions, Examples, parse_options, read_text_encoder, train

NO_T5 = 256  # tokens of zeros that the pipeline puts in T5's place
TIME_MEAN = 0.3  # of the logit of t: somewhat more noise than data, where shapes form


class RepeatedToken:
    """Attend as SD3's blocks do, with the last context token in place of NO_T5 equal ones.

    Equal tokens stay equal from block to block: one of them is computed and counts NO_T5 times as
    a key.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the attention's output for image tokens (N, L, D) and context (N, M, D)."""

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        def repeated(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x[:, :, -1:].expand(-1, -1, NO_T5 - 1, -1)], 2)

        x, context = hidden_states, encoder_hidden_states
        query, added_query = heads(attn.to_q(x)), heads(attn.add_q_proj(context))
        query = torch.cat([attn.norm_q(query), attn.norm_added_q(added_query)], 2)
        key, added_key = heads(attn.to_k(x)), heads(attn.add_k_proj(context))
        key = torch.cat([attn.norm_k(key), attn.norm_added_k(added_key)], 2)
        value = torch.cat([heads(attn.to_v(x)), heads(attn.add_v_proj(context))], 2)
        key, value = repeated(key), repeated(value)
        mixed = F.scaled_dot_product_attention(query.to(value), key.to(value), value)
        mixed = mixed.transpose(1, 2).flatten(2)
        x, context = mixed[:, : x.shape[1]], mixed[:, x.shape[1] :]
        if not attn.context_pre_only:
            context = attn.to_add_out(context)
        return attn.to_out[0](x), context


def build_transformer(channels: int, sample_size: int, embedding: int) -> SD3Transformer2DModel:
    """Return the transformer, for text embeddings of a width, with random weights."""
    heads, width = 6, 192
    transformer = SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=6,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=2 * embedding,
        caption_projection_dim=width,
        pooled_projection_dim=2 * embedding,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
    )
    # adaLN-zero: every block starts as the identity, the network as zero.
    modulations = [
        norm.linear
        for block in transformer.transformer_blocks
        for norm in (block.norm1, block.norm1_context)
    ]
    for layer in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def flow_loss(
    denoise: Callable, captions: Captions, batch_size: int
) -> Callable[[Examples, torch.Generator], torch.Tensor]:
    """Return the loss: how well denoise predicts noise - x."""

    def loss(examples: Examples, generator: torch.Generator) -> torch.Tensor:
        x, pairs = examples.draw(batch_size, generator)
        with torch.no_grad():
            output = captions.text_encoder(
                captions.draw(pairs, generator), output_hidden_states=True
            )
            hidden, pooled = output.hidden_states[-2].float(), output.pooler_output.float()
        prompt_embeds = F.pad(torch.cat([hidden, hidden], 2), (0, 0, 0, 1))  # a token of zeros
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        logit = torch.randn(len(x), generator=generator, device=x.device) + TIME_MEAN
        t = logit.sigmoid()
        x_t = torch.lerp(x, noise, t[:, None, None, None])
        prediction = denoise(x_t, prompt_embeds, torch.cat([pooled, pooled], 1), 1000 * t)
        return F.mse_loss(prediction.sample.float(), noise - x)

    return loss


def write_pipeline(transformer: SD3Transformer2DModel, work_dir: Path, output_dir: Path) -> None:
    """Write the pipeline of a transformer, with the work_dir's other parts, in half precision."""
    text_encoder = read_text_encoder(CLIPTextModelWithProjection, work_dir / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(work_dir / "tokenizer")
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL.from_pretrained(work_dir / "vae"),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(output_dir, max_shard_size=SHARD)


def main() -> None:
    """Train the transformer and write the pipeline."""
    args = parse_options(__doc__, steps=20_000, lr=1e-3)
    captions = Captions(args.work_dir, args.device)
    torch.manual_seed(0)
    channels, side = Examples.SHAPE[0], Examples.SHAPE[1]
    transformer = build_transformer(channels, side, captions.text_encoder.config.hidden_size)
    transformer.to(args.device)
    processors = transformer.attn_processors
    transformer.set_attn_processor(RepeatedToken())
    denoise = torch.compile(transformer) if args.compile else transformer
    loss = flow_loss(denoise, captions, args.batch_size)
    train(transformer, loss, args.work_dir / "flow.pt", args)
    transformer.set_attn_processor(processors)
    write_pipeline(transformer.cpu(), args.work_dir, args.output_dir)


if __name__ == "__main__":
    main()
