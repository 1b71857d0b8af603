"""Train the judge of the embedded models' images.

    python -m train.emoji.classifier --pictures runs/emoji/pictures \\
        --output train/emoji/classifier.safetensors

A small convolutional network on 128 x 128 pixels recognises the object and the background. It is
trained on real renders only, of all pairs, with some noise. Its 128 pooled features serve for the
Frechet distance; their mean and covariance over the held-out renders are stored beside the weights.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from train.common import argument_parser
from train.emoji.autoencoder import pixels, read_pictures
from train.emoji.fit import Settings, add_options, fit
from train.emoji.render import BACKGROUNDS, SIZE, objects
from train.metrics import Moments

FEATURES = 128
NOISE = 0.1  # at most, in pixels from -1 to 1: a generated picture is not as clean as a render


class Judge(nn.Module):
    """Classify object and background of pixels (N, 3, 128, 128) in [-1, 1]."""

    real_mean: torch.Tensor  # of the features of held-out renders
    real_covariance: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        widths, strides = (3, 32, 64, 64, 96, 128, FEATURES), (2, 2, 1, 2, 1, 2)
        layers: list[nn.Module] = []
        for (a, b), stride in zip(pairwise(widths), strides, strict=True):
            layers += [
                nn.Conv2d(a, b, 3, stride=stride, padding=1),
                nn.GroupNorm(8, b),
                nn.SiLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.object = nn.Linear(FEATURES, len(objects()))
        self.background = nn.Linear(FEATURES, len(BACKGROUNDS))
        self.register_buffer("real_mean", torch.zeros(FEATURES))
        self.register_buffer("real_covariance", torch.zeros(FEATURES, FEATURES))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits of objects (N, 184) and of backgrounds (N, 12), and features (N, 128)."""
        features = self.body(x).mean((2, 3))
        return self.object(features), self.background(features), features

    @classmethod
    def from_pretrained(cls, path: Path) -> "Judge":
        """Read a judge in float32, ready to measure."""
        judge = cls()
        judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        return judge.eval()

    def real_moments(self) -> Moments:
        """Return the moments of held-out renders' features."""
        return Moments(
            self.real_mean.double().cpu().numpy(), self.real_covariance.double().cpu().numpy()
        )

    @torch.inference_mode()
    def judge(self, images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return object index (N,), background index (N,) and features (N, 128) of images."""
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
    """Train the judge, measure it on held-out renders and write it."""
    parser = argument_parser(__doc__)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/emoji/classifier.pt"))
    parser.add_argument(
        "--start_from",
        type=Path,
        help="judge to start from; --steps 0 only measures it on the held-out renders",
    )
    add_options(parser, steps=2500, lr=2e-3, batch_size=64)
    args = parser.parse_args()
    files = [args.pictures / name for name in ("train", "judge")]
    pictures = torch.cat(
        [read_pictures(Path(f"{file}_pictures.npy"), args.device) for file in files]
    )
    classes = np.concatenate([np.load(f"{file}_classes.npy") for file in files])
    truth = torch.from_numpy(classes).long().to(args.device)
    torch.manual_seed(1)
    model = Judge.from_pretrained(args.start_from) if args.start_from else Judge()
    model.to(args.device)

    def loss(generator: torch.Generator) -> torch.Tensor:
        drawn: dict[str, Any] = {"generator": generator, "device": args.device}
        chosen = torch.randint(len(pictures), (args.batch_size,), **drawn)
        x = pixels(pictures[chosen])
        strength = NOISE * torch.rand((len(x), 1, 1, 1), **drawn)
        thing, colour, _ = model(x + strength * torch.randn(x.shape, **drawn))
        things, colours = truth[chosen].T
        return F.cross_entropy(thing, things) + F.cross_entropy(colour, colours)

    settings = Settings(lr=args.lr, steps=args.steps, until=args.until, seed=1, ema=0.99)
    fit(model, loss, args.checkpoint, settings)

    # The figures of real renders are those of the weights as they are stored, in half precision.
    model.half().float()
    held_out = np.load(args.pictures / "heldout_pictures.npy")
    held_out_classes = np.load(args.pictures / "heldout_classes.npy")
    thing, colour, features = model.judge([Image.fromarray(picture) for picture in held_out])
    model.real_mean.copy_(torch.from_numpy(features.mean(0)))
    model.real_covariance.copy_(torch.from_numpy(np.cov(features, rowvar=False)))
    weights = {
        name: tensor if name.startswith("real") else tensor.half()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, args.output)
    print(
        f"held-out renders, n={len(held_out)}: "
        f"object accuracy {np.mean(thing == held_out_classes[:, 0]):.4f}, "
        f"background accuracy {np.mean(colour == held_out_classes[:, 1]):.4f}"
    )


if __name__ == "__main__":
    main()
