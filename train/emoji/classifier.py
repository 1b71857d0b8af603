"""Trains the judge of the embedded backbone's images and keeps what a measurement needs of real renders.

    python -m train.emoji.classifier --pictures runs/emoji/pictures --output train/emoji/classifier.safetensors

A small convolutional network on 64 x 64 pixels, trained on real renders only, of all pairs,
tells the object and the background.  Its 128 pooled features serve for the Frechet distance; their mean and covariance
over the held-out renders are stored beside the weights.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from train.emoji.autoencoder import pixels
from train.emoji.fit import fit
from train.emoji.render import BACKGROUNDS, SIZE, objects

FEATURES = 128


class Judge(nn.Module):
    """(N, 3, 64, 64) pixels in [-1, 1] -> object logits (N, objects), background logits (N, 12), features (N, 128)."""

    real_mean: torch.Tensor  # of the features of held-out renders
    real_covariance: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        widths, layers = (3, 32, 48, 64, 96, 96, FEATURES), []
        for i, (a, b) in enumerate(zip(widths, widths[1:])):
            layers += [
                nn.Conv2d(a, b, 3, stride=2 - i % 2, padding=1),
                nn.GroupNorm(8, b),
                nn.SiLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.object, self.background = (
            nn.Linear(FEATURES, len(objects())),
            nn.Linear(FEATURES, len(BACKGROUNDS)),
        )
        self.register_buffer("real_mean", torch.zeros(FEATURES))
        self.register_buffer("real_covariance", torch.zeros(FEATURES, FEATURES))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        features = self.body(x).mean((2, 3))
        return self.object(features), self.background(features), features

    @classmethod
    def from_pretrained(cls, path: Path) -> "Judge":
        judge = cls()
        judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        return judge.eval()

    @torch.inference_mode()
    def judge(self, images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Object index (N,), background index (N,) and features (N, 128) of images of any size."""
        arrays = [
            np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))
            for image in images
        ]
        parts = [self(pixels(np.stack(arrays[i : i + 256]))) for i in range(0, len(arrays), 256)]
        object_logits, background_logits, features = (torch.cat(part) for part in zip(*parts))
        return (
            object_logits.argmax(1).numpy(),
            background_logits.argmax(1).numpy(),
            features.double().numpy(),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/emoji/classifier.pt"))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--start_from",
        type=Path,
        help="a judge to begin with; with --steps 0 only its figures of real renders are made anew",
    )
    args = parser.parse_args()
    pictures = np.concatenate(
        [np.load(args.pictures / f"{name}_pictures.npy") for name in ("train", "judge")]
    )
    classes = torch.from_numpy(
        np.concatenate(
            [np.load(args.pictures / f"{name}_classes.npy") for name in ("train", "judge")]
        )
    ).long()
    torch.manual_seed(1)
    model = Judge.from_pretrained(args.start_from) if args.start_from else Judge()

    def loss(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(pictures), (64,), generator=generator).sort().values
        thing, colour, _ = model(pixels(pictures[chosen.numpy()]))
        return F.cross_entropy(thing, classes[chosen, 0]) + F.cross_entropy(
            colour, classes[chosen, 1]
        )

    fit(model, loss, args.checkpoint, steps=args.steps, lr=args.lr, seed=1, ema=0.99)
    held_out = np.load(args.pictures / "heldout_pictures.npy")
    truth = np.load(args.pictures / "heldout_classes.npy")
    thing, colour, features = model.judge([Image.fromarray(picture) for picture in held_out])
    model.real_mean.copy_(torch.from_numpy(features.mean(0)))
    model.real_covariance.copy_(torch.from_numpy(np.cov(features, rowvar=False)))
    save_file(model.state_dict(), args.output)
    print(
        f"held-out renders, n={len(truth)}: object accuracy {np.mean(thing == truth[:, 0]):.4f}, "
        f"background accuracy {np.mean(colour == truth[:, 1]):.4f}"
    )


if __name__ == "__main__":
    main()
