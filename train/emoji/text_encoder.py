"""Train the text encoder of the embedded models on captions alone.

    python -m train.emoji.text_encoder --work_dir runs/emoji

A CLIP text model learns to classify, at every position from the end of the caption on, which object
and which background the caption names, or that it names none. As in Stable Diffusion, the denoiser
is then trained on the frozen text encoder.
"""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from train.common import argument_parser
from train.emoji.captions import MAX_TOKENS, build_tokenizer, caption
from train.emoji.fit import Settings, add_options, fit
from train.emoji.render import BACKGROUNDS, held_out_pairs, objects

EMBEDDING = 192


def build(vocabulary: int, eos_token_id: int) -> CLIPTextModel:
    """Return the text encoder with random weights."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=EMBEDDING,
            intermediate_size=4 * EMBEDDING,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=EMBEDDING,
            bos_token_id=eos_token_id - 1,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
        )
    )


def main() -> None:
    """Train the text encoder and write it with its tokenizer."""
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--work_dir",
        type=Path,
        required=True,
        help="where text_encoder/ and tokenizer/ are written",
    )
    add_options(parser, steps=800, lr=1e-3, batch_size=64)
    args = parser.parse_args()
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(args.work_dir / "tokenizer")
    pairs = np.argwhere(~held_out_pairs()).tolist()
    torch.manual_seed(0)
    text_encoder = build(len(tokenizer), tokenizer.eos_token_id).to(args.device)
    heads = nn.ModuleList(
        nn.Linear(EMBEDDING, count + 1) for count in (len(objects()), len(BACKGROUNDS))
    ).to(args.device)  # the last class: none

    def errors(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cross-entropy after the words, and which captions are understood there."""
        rng = random.Random(generator.initial_seed())
        chosen = (rng.choice(pairs) for _ in range(args.batch_size))
        drawn = [caption(thing, colour, rng) for thing, colour in chosen]
        captions, classes = zip(*drawn, strict=True)
        tokens = tokenizer(
            list(captions), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.to(args.device)
        hidden, ended = text_encoder(tokens).last_hidden_state, tokens == tokenizer.eos_token_id
        first = hidden[range(len(tokens)), ended.int().argmax(1)]
        losses, correct = [], []
        for head, truth in zip(heads, torch.tensor(classes, device=args.device).T, strict=True):
            expected = truth[:, None].expand(tokens.shape)[ended]
            losses.append(F.cross_entropy(head(hidden[ended]), expected))
            correct.append(head(first).argmax(1) == truth)
        return torch.stack(losses).sum(), torch.stack(correct).all(0)

    settings = Settings(lr=args.lr, steps=args.steps, until=args.until, ema=0.99)
    model = nn.ModuleList([text_encoder, heads])
    fit(model, lambda generator: errors(generator)[0], args.work_dir / "text_encoder.pt", settings)
    with torch.inference_mode():
        understood = torch.cat(
            [errors(torch.Generator().manual_seed(2**40 + i))[1] for i in range(16)]
        )
    print(f"captions understood: {understood.float().mean():.4f}, n={len(understood)}")
    text_encoder.save_pretrained(args.work_dir / "text_encoder")


if __name__ == "__main__":
    main()
