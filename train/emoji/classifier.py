"""Trains the judge of the embedded backbone's images and keeps what a measurement needs of real renders.

    python -m train.emoji.classifier --pictures runs/emoji/pictures --output train/emoji/classifier.safetensors

A small convolutional network on 128 x 128 pixels, trained on real renders only, of all pairs, with some
noise, tells the object and the background.  Its 128 pooled features serve for the Frechet distance; their mean and covariance
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

from train.emoji.autoencoder import pixels, read_pictures
from train.emoji.fit import add_options, fit
from train.emoji.render import BACKGROUNDS, SIZE, objects

FEATURES = 128
NOISE = 0.1  # at most, in pixels from -1 to 1: a generated picture is not as clean as a render


class Judge(nn.Module):
    """(N, 3, 128, 128) pixels in [-1, 1] -> object logits (N, objects), background logits (N, 12), features (N, 128)."""

    real_mean: torch.Tensor  # of the features of held-out renders
    real_covariance: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        widths, strides, layers = (3, 32, 64, 64, 96, 128, FEATURES), (2, 2, 1, 2, 1, 2), []
        for a, b, stride in zip(widths, widths[1:], strides, strict=False):
            layers += [
                nn.Conv2d(a, b, 3, stride=stride, padding=1),
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
        device = self.real_mean.device
        parts = [
            self(pixels(np.stack(arrays[i : i + 256])).to(device))
            for i in range(0, len(arrays), 256)
        ]
        object_logits, background_logits, features = (
            torch.cat(part).cpu() for part in zip(*parts, strict=True)
        )
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
    parser.add_argument(
        "--start_from",
        type=Path,
        help="a judge to begin with; with --steps 0 only its figures of real renders are made anew",
    )
    add_options(parser, steps=2500, lr=2e-3, batch_size=64)
    args = parser.parse_args()
    pictures, classes = zip(
        *(
            (
                read_pictures(args.pictures / f"{name}_pictures.npy", args.device),
                torch.from_numpy(np.load(args.pictures / f"{name}_classes.npy")).to(args.device),
            )
            for name in ("train", "judge")
        ),
        strict=True,
    )
    pictures, classes = torch.cat(pictures), torch.cat(classes).long()
    torch.manual_seed(1)
    model = Judge.from_pretrained(args.start_from) if args.start_from else Judge()
    model.to(args.device)

    def loss(generator: torch.Generator) -> torch.Tensor:
        drawn = {"generator": generator, "device": args.device}
        chosen = torch.randint(len(pictures), (args.batch_size,), **drawn)
        x = pixels(pictures[chosen])
        strength = NOISE * torch.rand((len(x), 1, 1, 1), **drawn)
        thing, colour, _ = model(x + strength * torch.randn(x.shape, **drawn))
        return F.cross_entropy(thing, classes[chosen, 0]) + F.cross_entropy(
            colour, classes[chosen, 1]
        )

    fit(
        model,
        loss,
        args.checkpoint,
        steps=args.steps,
        until=args.until,
        lr=args.lr,
        seed=1,
        ema=0.99,
        device=args.device,
    )
    # The figures of real renders are those of the weights as they are stored, in half precision.
    model.half().float()
    held_out = np.load(args.pictures / "heldout_pictures.npy")
    truth = np.load(args.pictures / "heldout_classes.npy")
    thing, colour, features = model.judge([Image.fromarray(picture) for picture in held_out])
    model.real_mean.copy_(torch.from_numpy(features.mean(0)))
    model.real_covariance.copy_(torch.from_numpy(np.cov(features, rowvar=False)))
    weights = {
        name: tensor if name.startswith("real") else tensor.half()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, args.output)
    print(
        f"held-out renders, n={len(truth)}: object accuracy {np.mean(thing == truth[:, 0]):.4f}, "
        f"background accuracy {np.mean(colour == truth[:, 1]):.4f}"
    )


if __name__ == "__main__":
    main()
