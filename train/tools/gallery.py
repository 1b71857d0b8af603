"""The picture of the three arms in the README, on held-out prompts.

python train/tools/gallery.py --output assets/pictures/arms.png
"""

import argparse
from pathlib import Path

from PIL import Image

from noiserefine import Refiner
from noiserefine.analysis.compare import compare
from noiserefine.analysis.recipe import Maker, Recipe
from noiserefine.models.catalogue import BACKBONES
from noiserefine.models.loading import load_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=Path, default=Path("assets/prompts/emoji_heldout.txt"))
    parser.add_argument(
        "--columns", type=int, default=10, help="prompts, evenly spaced in the file"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first column; the next ones count up"
    )
    parser.add_argument("--side", type=int, default=128, help="pixels of a shown image")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    backbone = BACKBONES["emoji"]
    pipe = load_pipeline(backbone.source)
    make = Maker(pipe, Refiner.from_pretrained(backbone.refiner, pipe))
    prompts = args.prompts.read_text(encoding="utf-8").splitlines()
    gap = args.side // 16
    sheet = Image.new(
        "RGB", (args.columns * (args.side + gap) - gap, 3 * (args.side + gap) - gap), "white"
    )
    for column in range(args.columns):
        prompt = prompts[column * len(prompts) // args.columns]
        recipe = Recipe(
            prompt,
            args.seed + column,
            steps=backbone.steps,
            guidance_scale=backbone.guidance_scale or 1.0,
            strength=1.0,
        )
        for row, (_, arm) in enumerate(compare(make, recipe)):
            image = arm.image.resize((args.side, args.side), Image.Resampling.BICUBIC)
            sheet.paste(image, (column * (args.side + gap), row * (args.side + gap)))
        print(prompt)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output)


if __name__ == "__main__":
    main()
