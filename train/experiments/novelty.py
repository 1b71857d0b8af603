"""Measure whether images are copies of training pictures (figure 12).

    python train/experiments/novelty.py --pictures runs/emoji/pictures --measured results \\
        --output novelty.json

Reports the distance of each image to the nearest training picture, in the judge's features.
--measured is the folder that evaluate.py keeps beside its --output. Compare with held-out renders,
which are new by construction, and with training pictures' distances to each other. Intervals are
over images.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from train.common import (
    argument_parser,
    markdown_table,
    mean_and_interval,
    run_script,
    with_interval,
    write_json,
)
from train.emoji.classifier import Judge

TRAINING_STRIDE, HELD_OUT_STRIDE = 55, 3  # every how many pictures are compared
BATCH, ROWS = 512, 256  # pictures judged, and rows compared, at once
LOW_PERCENTILE = 5


def nearest(features: np.ndarray, known: torch.Tensor, skip: int = 0) -> np.ndarray:
    """Return the distance of each row of features (N, D) to its nearest row of known (M, D).

    skip: how many nearer rows to leave out; 1 if the rows themselves are among the known.
    """
    parts = [
        torch.cdist(part, known).topk(skip + 1, largest=False).values[:, skip]
        for part in torch.from_numpy(features).float().split(ROWS)
    ]
    return torch.cat(parts).numpy()


def main(arguments: list[str] | None = None) -> None:
    """Compare the images' features and write the figures."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--pictures", type=Path, required=True, help="folder that train/emoji/render.py wrote")
    add("--measured", type=Path, required=True, help="folder that evaluate.py keeps")
    add("--judge", type=Path, default=Path("train/emoji/classifier.safetensors"))
    add("--output", type=Path, required=True, help="JSON file of the results")
    args = parser.parse_args(arguments)
    if not any(args.measured.glob("*.npz")):
        raise FileNotFoundError(
            f"{args.measured} holds no measurements: it is the folder that evaluate.py writes "
            "beside its --output."
        )
    judge = Judge.from_pretrained(args.judge)

    def features_of(name: str, stride: int = 1) -> np.ndarray:
        pictures = np.load(args.pictures / f"{name}_pictures.npy", mmap_mode="r")[::stride]
        batches = [pictures[i : i + BATCH] for i in range(0, len(pictures), BATCH)]
        return np.concatenate([judge.judge([*map(Image.fromarray, batch)])[2] for batch in batches])

    training = features_of("train")
    known = torch.from_numpy(training).float()
    held_out = features_of("heldout", HELD_OUT_STRIDE)
    distances = {
        "training pictures, to another one": nearest(training[::TRAINING_STRIDE], known, skip=1),
        "held-out renders": nearest(held_out, known),
    }
    for arm in sorted({path.stem.rsplit("-", 1)[0] for path in args.measured.glob("*.npz")}):
        files = sorted(args.measured.glob(f"{arm}-[0-9]*.npz"))
        features = np.concatenate([np.load(path)["features"] for path in files])
        distances[arm] = nearest(features, known)

    result = {}
    for name, values in distances.items():
        mean, bounds = mean_and_interval(values)
        low = float(np.percentile(values, LOW_PERCENTILE))
        result[name] = {
            "n": len(values),
            "distance": mean,
            "distance_interval": bounds,
            "fifth_percentile": low,
        }
    write_json(args.output, result)
    print(table(result))


def table(result: dict) -> str:
    """Return the figures as a Markdown table, a row for each set of images."""
    return markdown_table(
        ["images", "n", "mean distance to the nearest training picture", "5th percentile"],
        [
            [
                name,
                row["n"],
                with_interval(row["distance"], row["distance_interval"]),
                f"{row['fifth_percentile']:.2f}",
            ]
            for name, row in result.items()
        ],
    )


if __name__ == "__main__":
    run_script(main)
