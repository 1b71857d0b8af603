"""Latents with captions, and the training that the denoisers of this folder share."""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedModel

from train.common import argument_parser
from train.emoji.autoencoder import LATENT_CHANNELS
from train.emoji.captions import caption_tokens
from train.emoji.fit import Settings, add_options, fit
from train.emoji.render import SIZE

CAPTIONS = 24  # of each picture


class Examples:
    """Hold latents (N, C, h, w) of pictures, and the pictures' objects and backgrounds (N, 2)."""

    SHAPE = (LATENT_CHANNELS, SIZE // 4, SIZE // 4)

    def __init__(self, latents: torch.Tensor, pairs: torch.Tensor, device: torch.device):
        self.latents, self.pairs = latents.to(device), pairs.long().to(device)

    @classmethod
    def read(cls, latents: Path, classes: Path, device: torch.device) -> "Examples":
        """Read the latents of autoencoder.py and the classes of render.py."""
        return cls(torch.from_numpy(np.load(latents)), torch.from_numpy(np.load(classes)), device)

    @classmethod
    def blank(cls, device: torch.device) -> "Examples":
        """Return a single example of zeros, to try a loss with."""
        return cls(torch.zeros(1, *cls.SHAPE).half(), torch.zeros(1, 2), device)

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return random latents (count, C, h, w), float32, and their pairs (count, 2)."""
        device = self.latents.device
        chosen = torch.randint(len(self.latents), (count,), generator=generator, device=device)
        return self.latents[chosen].float(), self.pairs[chosen]


class Captions:
    """Hold captions of all pairs as tokens, and the frozen text encoder that reads them."""

    def __init__(self, work_dir: Path, device: torch.device):
        self.text_encoder = read_text_encoder(CLIPTextModel, work_dir / "text_encoder").to(device)
        self.text_encoder.eval().requires_grad_(False)
        tokenizer = CLIPTokenizer.from_pretrained(work_dir / "tokenizer")
        self.tokens = caption_tokens(tokenizer, CAPTIONS).to(device)

    def draw(self, pairs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return tokens (N, length) of a random caption of each pair (N, 2)."""
        chosen = torch.randint(CAPTIONS, (len(pairs),), generator=generator, device=pairs.device)
        return self.tokens[pairs[:, 0], pairs[:, 1], chosen]


def read_text_encoder(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """Return the CLIP text model of a folder as `kind`, in float32.

    A text projection that the file lacks is the identity. Raises RuntimeError for a file that lacks
    another tensor, for which from_pretrained would draw random values.
    """
    model = kind(CLIPTextConfig.from_pretrained(folder))
    found = load_file(folder / "model.safetensors")
    if "text_projection.weight" in model.state_dict():
        found.setdefault("text_projection.weight", torch.eye(model.config.hidden_size))
    nested = any(name.startswith("text_model.") for name in model.state_dict())
    names = {name: name.removeprefix("text_model.") for name in found}
    if nested:
        names = {
            name: short if short.startswith("text_projection") else f"text_model.{short}"
            for name, short in names.items()
        }
    model.load_state_dict({names[name]: tensor for name, tensor in found.items()})
    return model.float()


def wait_for(path: Path) -> None:
    """Wait until a file exists: another process may still be making the latents."""
    while not path.exists():
        time.sleep(0.2)


def parse_options(description: str | None, *, steps: int, lr: float) -> argparse.Namespace:
    """Return the command line's options of a denoiser's training."""
    parser = argument_parser(description)
    add = parser.add_argument
    add("--work_dir", type=Path, required=True, help="pictures, latents, and the frozen parts")
    add("--output_dir", type=Path, required=True, help="where the pipeline is written")
    add("--compile", action="store_true", help="torch.compile the denoiser")
    add_options(parser, steps=steps, lr=lr, batch_size=64)
    return parser.parse_args()


def train(
    network: nn.Module,
    loss: Callable[[Examples, torch.Generator], torch.Tensor],
    checkpoint: Path,
    args: argparse.Namespace,
) -> None:
    """Minimise loss(examples, generator) over the pictures of args.work_dir, as the options say."""
    if args.compile:  # while another process may still be making the latents
        generator = torch.Generator(args.device)
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.device.type == "cuda"):
            value = loss(Examples.blank(args.device), generator)
        value.backward()
        network.zero_grad()
        print(f"{checkpoint.stem}: compiled", flush=True)
    wait_for(args.work_dir / "latents.npy")
    examples = Examples.read(
        args.work_dir / "latents.npy",
        args.work_dir / "pictures" / "train_classes.npy",
        args.device,
    )
    settings = Settings(lr=args.lr, steps=args.steps, until=args.until)
    fit(network, partial(loss, examples), checkpoint, settings)
