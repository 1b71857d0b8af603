"""Draw the README's picture of the three arms, on held-out prompts.

python train/tools/gallery.py --output assets/pictures/arms.png
"""

from pathlib import Path

from PIL import Image

from noiserefine import Refiner
from noiserefine.analysis.compare import compare
from noiserefine.analysis.recipe import Maker, Recipe
from noiserefine.models.catalogue import BACKBONES
from noiserefine.models.loading import load_pipeline
from train.captions import HELD_OUT, read_prompts
from train.common import argument_parser, run_script

ARMS = 3
GAP = 16  # an image is this many times wider than the gap between two


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture that the command line asks for."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--prompts", default=HELD_OUT)
    add("--columns", type=int, default=10, help="prompts, evenly spaced in the file")
    add("--seed", type=int, default=0, help="of the first column; the next ones count up")
    add("--side", type=int, default=128, help="pixels of a shown image")
    add("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    backbone = BACKBONES["emoji"]
    pipe = load_pipeline(backbone.source)
    make = Maker(pipe, Refiner.from_pretrained(backbone.refiner, pipe))
    prompts = read_prompts(args.prompts, pipe)
    pitch = args.side + args.side // GAP
    gap = pitch - args.side
    sheet = Image.new("RGB", (args.columns * pitch - gap, ARMS * pitch - gap), "white")
    for column in range(args.columns):
        recipe = Recipe(
            prompts[column * len(prompts) // args.columns],
            args.seed + column,
            steps=backbone.steps,
            guidance_scale=backbone.guidance_scale or 1.0,
            strength=1.0,
        )
        for row, (_, arm) in enumerate(compare(make, recipe)):
            image = arm.image.resize((args.side, args.side), Image.Resampling.BICUBIC)
            sheet.paste(image, (column * pitch, row * pitch))
        print(recipe.prompt)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output)


if __name__ == "__main__":
    run_script(main)
