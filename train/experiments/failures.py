"""Show where refining fails, in pictures of an embedded model.

    python train/experiments/failures.py --refiner assets/refiners/emoji \\
        --output runs/failures.json --page assets/results/failures.md

The page gives a line and a table to each failure; beside it lies a contact sheet of each (.webp),
whose rows are the arms in the table's order and whose columns are prompts. Column i has seed
10**6 + i in every row.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image

from noiserefine import Refiner, draw_noise
from noiserefine.guidance import sample_latents
from noiserefine.latents import decode
from noiserefine.models.loading import load_pipeline
from noiserefine.models.usage import usual_guidance_scale
from noiserefine.noise import encode_prompt
from noiserefine.samplers import with_sampler
from train.captions import HELD_OUT, read_prompts, repeat_to
from train.common import (
    FIRST_EVALUATION_SEED,
    argument_parser,
    atomic,
    markdown_table,
    run_script,
    write_json,
)
from train.experiments.latent_distance import squared_distances
from train.metrics import load_metrics

Images = list[Image.Image]
SIDE = 96  # pixels of an image in a sheet
HEAD = """# Where refining fails

Pictures of the embedded model by `train/experiments/failures.py`: n = {n} a row, seeds from
{first_seed}, guidance scale {guidance_scale:g}. They show kinds of failure, and are too few to tell
how frequent each is. Rows are in the order of the tables. "Object right" is what a classifier says.
The distance is the mean squared one to the guided latents of the same noise; the table has its
median over the images.
"""


class Arm(NamedTuple):
    """How a row's images are made."""

    title: str
    strength: float = 0.0  # of the refinement; 0 is Gaussian noise
    guided: bool = False
    sampler: str = "DDIM"
    steps: int = 20


UNGUIDED, GUIDED, REFINED = Arm("unguided"), Arm("guided", guided=True), Arm("refined", 1.0)


class Failure(NamedTuple):
    """A way to fail: what to look for, and the rows that show it."""

    title: str
    text: str
    arms: tuple[Arm, ...]
    prompts: tuple[str, ...] = ()  # which the judge does not know; empty for held-out ones
    right_unguided: bool = False  # show only columns whose object is right without refining


FAILURES = {
    "right-already": Failure(
        "Noise that needed no refining",
        "Of these images the object is right without refining. The refiner cannot know, and "
        "changes them too: colours gain, but faces and outlines move, and the classifier no longer "
        "recognises all of them.",
        (UNGUIDED, REFINED, GUIDED),
        right_unguided=True,
    ),
    "several-objects": Failure(
        "Several objects",
        "The model was trained on single objects. Guidance does not make a second one, and "
        "refined noise, which learnt from guidance, makes the same single or merged object.",
        (UNGUIDED, REFINED, GUIDED),
        (
            "a red apple and a green apple on a blue background",
            "a cat and a dog on a yellow background",
            "two red apples on a white background",
            "a fish beside a tree on a pink background",
            "a car, a house and a tree on a green background",
            "three balloons on a purple background",
        ),
    ),
    "strength": Failure(
        "Strengths above 1",
        "The correction is trained for strength 1; more of it is no stronger guidance: contrast "
        "grows, details are lost, and the images end further from the guided ones.",
        (REFINED, Arm("strength 1.5", 1.5), Arm("strength 2", 2.0), GUIDED),
    ),
    "noisy-sampler": Failure(
        "A sampler with noise of its own",
        "DPM++ SDE adds new noise at every step, which no refiner has seen: refined noise makes a "
        "few more objects right, and hardly brings the images nearer to the guided ones.",
        (
            Arm("unguided, SDE", sampler="DPM++ SDE"),
            Arm("refined, SDE", 1.0, sampler="DPM++ SDE"),
            REFINED,
            GUIDED,
        ),
    ),
    "few-steps": Failure(
        "Few steps",
        "With 2 steps most colours are wrong, refined or not. With 4, refined noise is better than "
        "Gaussian noise, and colours are still pale.",
        (
            Arm("unguided, 2 steps", steps=2),
            Arm("refined, 2 steps", 1.0, steps=2),
            Arm("unguided, 4 steps", steps=4),
            Arm("refined, 4 steps", 1.0, steps=4),
            REFINED,
            GUIDED,
        ),
    ),
}


class Studio:
    """Makes and judges the images, each once."""

    def __init__(self, pipe: DiffusionPipeline, refiner: Refiner, guidance_scale: float):
        self.pipe, self.refiner, self.guidance_scale = pipe, refiner, guidance_scale
        (self.judge,) = load_metrics(["judge"], None, pipe.device)
        self.made: dict[tuple[Arm, tuple[str, ...]], tuple[torch.Tensor, Images]] = {}

    def make(self, arm: Arm, prompts: tuple[str, ...]) -> tuple[torch.Tensor, Images]:
        """Return an arm's x0, (n, C, h, w), and its images."""
        if (arm, prompts) not in self.made:
            embeds = encode_prompt(self.pipe, list(prompts))
            x_T = draw_noise(self.pipe, FIRST_EVALUATION_SEED, len(prompts))
            scale = self.refiner.scale_input(self.guidance_scale)
            x0 = sample_latents(
                with_sampler(self.pipe, arm.sampler),
                self.refiner.refine(x_T, embeds, arm.strength, scale),
                embeds,
                arm.steps,
                guidance_scale=self.guidance_scale if arm.guided else 1.0,
            )
            self.made[arm, prompts] = x0, decode(self.pipe, x0)
        return self.made[arm, prompts]

    def right(self, arm: Arm, prompts: tuple[str, ...]) -> np.ndarray:
        """Return of which images the judge sees the prompt's object, (n,)."""
        _, images = self.make(arm, prompts)
        return self.judge.measure(images, list(prompts))["correct"][:, 0] == 1

    def distances(self, arm: Arm, prompts: tuple[str, ...]) -> np.ndarray:
        """Return the mean squared distances to the guided latents, (n,)."""
        return squared_distances(self.make(arm, prompts)[0], self.make(GUIDED, prompts)[0])


def section(
    studio: Studio, failure: Failure, prompts: tuple[str, ...], sheet: Path
) -> tuple[str, list[list[str]]]:
    """Write a failure's sheet; return its part of the page, and the rows of the table in it."""
    columns = np.arange(len(prompts))
    if failure.right_unguided:
        columns = np.flatnonzero(studio.right(UNGUIDED, prompts))
    header = ["row", "object right", "distance to guided"]
    rows: list[list[str]] = []
    images: Images = []
    for arm in failure.arms:
        _, made = studio.make(arm, prompts)
        images += [made[column] for column in columns]
        judged = "not judged"
        if not failure.prompts:
            judged = f"{studio.right(arm, prompts)[columns].sum()} of {len(columns)}"
        distance = np.median(studio.distances(arm, prompts)[columns]) if len(columns) else np.nan
        rows.append([arm.title, judged, f"{distance:.3f}"])
    parts = [f"## {failure.title}", failure.text, markdown_table(header, rows)]
    if images:
        grid = make_image_grid(images, len(failure.arms), len(columns), resize=SIDE)
        grid.save(sheet, quality=80)
        parts.insert(2, f"![{failure.title}]({sheet.name})")
    return "\n\n".join(parts) + "\n", rows


def main(arguments: list[str] | None = None) -> None:
    """Make the sheets and write the page."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--backbone", default="assets/emoji", help="folder of the embedded UNet or a fine-tune")
    add("--refiner", required=True, help="folder or hub id of its refiner")
    add("--guidance_scale", type=float, help="the model's usual one by default")
    add("--n", type=int, default=12, help="columns of a sheet")
    add("--output", type=Path, required=True, help="JSON file of the figures")
    add("--page", type=Path, required=True, help="Markdown file; the sheets lie beside it")
    args = parser.parse_args(arguments)
    pipe = load_pipeline(args.backbone)
    refiner = Refiner.from_pretrained(args.refiner, pipe)
    scale = args.guidance_scale or usual_guidance_scale(pipe, args.backbone)
    studio = Studio(pipe, refiner, scale)
    held_out = read_prompts(HELD_OUT, pipe)

    args.page.parent.mkdir(parents=True, exist_ok=True)
    about = {"n": args.n, "first_seed": FIRST_EVALUATION_SEED, "guidance_scale": scale}
    figures = {}
    parts = [HEAD.format(**about)]
    for name, failure in FAILURES.items():
        prompts = tuple(repeat_to(list(failure.prompts) or held_out, args.n))
        sheet = args.page.with_name(f"{args.page.stem}-{name}.webp")
        text, figures[name] = section(studio, failure, prompts, sheet)
        parts.append(text)
    with atomic(args.page) as part:
        part.write_text("\n".join(parts), encoding="utf-8")
    write_json(args.output, about | {"failures": figures})


if __name__ == "__main__":
    run_script(main)
