"""Whether images are copies of training pictures: their distance to the nearest one (paper, figure 12).

    python train/experiments/novelty.py --pictures runs/emoji/pictures --measured results --output novelty.json

Distances are those of the judge's features.  --measured is the folder that evaluate.py keeps beside its --output; held-out renders,
which are new by construction, and training pictures' distances among themselves say what to compare with.  Intervals are over images.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from train.emoji.classifier import Judge
from train.train_refiner import atomic


def nearest(features: np.ndarray, known: torch.Tensor, skip: int = 0) -> np.ndarray:
    """The distance of each row of features (N, D) to its nearest row of known (M, D), or to the next one after `skip` nearer ones."""
    parts = [
        torch.cdist(part, known).topk(skip + 1, largest=False).values[:, skip]
        for part in torch.from_numpy(features).float().split(256)
    ]
    return torch.cat(parts).numpy()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pictures", type=Path, required=True, help="folder that train/emoji/render.py wrote"
    )
    parser.add_argument(
        "--measured",
        type=Path,
        required=True,
        help="folder that train/evaluate.py keeps beside its --output",
    )
    parser.add_argument("--judge", type=Path, default=Path("train/emoji/classifier.safetensors"))
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    args = parser.parse_args(arguments)
    judge, rng = Judge.from_pretrained(args.judge), np.random.default_rng(0)

    def features_of(name: str, every: int = 1) -> np.ndarray:
        pictures = np.load(args.pictures / f"{name}_pictures.npy", mmap_mode="r")[::every]
        return np.concatenate(
            [
                judge.judge([Image.fromarray(picture) for picture in pictures[i : i + 512]])[2]
                for i in range(0, len(pictures), 512)
            ]
        )

    training = features_of("train")
    known = torch.from_numpy(training).float()
    distances = {
        "training pictures, to another one": nearest(training[::55], known, skip=1),
        "held-out renders": nearest(features_of("heldout", 3), known),
    }
    for arm in sorted({path.stem.rsplit("-", 1)[0] for path in args.measured.glob("*.npz")}):
        files = sorted(args.measured.glob(f"{arm}-[0-9]*.npz"))
        distances[arm] = nearest(
            np.concatenate([np.load(path)["features"] for path in files]), known
        )
    result = {}
    for name, values in distances.items():
        means = [rng.choice(values, len(values)).mean() for _ in range(1000)]
        result[name] = {
            "n": len(values),
            "distance": float(values.mean()),
            "distance_interval": np.percentile(means, (2.5, 97.5)).tolist(),
            "fifth_percentile": float(np.percentile(values, 5)),
        }
    with atomic(args.output) as part:
        part.write_text(json.dumps(result, indent=2) + "\n")
    print(
        "| images | n | mean distance to the nearest training picture | 5th percentile |\n|---|---|---|---|"
    )
    for name, row in result.items():
        print(
            "| {} | {} | {:.2f} [{:.2f}, {:.2f}] | {:.2f} |".format(
                name, row["n"], row["distance"], *row["distance_interval"], row["fifth_percentile"]
            )
        )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
