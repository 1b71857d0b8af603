"""Draw a contact sheet of an embedded model and print the judge's figures by guidance scale.

    python -m train.emoji.sheet --pictures runs/emoji/pictures --model assets/emoji \\
        --output sheet.webp
    python -m train.emoji.sheet ... --refiner assets/refiners/emoji --scale 2.5

The columns are 24 held-out (object, background) pairs. The rows are a real render, and the same
noise unguided, guided and, with a refiner, refined. The figures are those of the held-out prompts,
each with the same --n noises at every scale.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image

from noiserefine import Refiner
from noiserefine.models.sit import SiTPipeline
from train.common import argument_parser
from train.emoji.classifier import Judge
from train.emoji.render import SIZE, held_out_pairs, objects, prompt
from train.metrics import frechet_distance

CLASSES = {
    kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusion3Pipeline, SiTPipeline)
}
COLUMNS, STEPS = 24, 20
UNGUIDED = 1.0


def load(folder: Path, device: torch.device) -> DiffusionPipeline:
    """Return the pipeline of a folder, in half precision on a GPU."""
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None} if "3" in name else {}
    pipe = CLASSES[name].from_pretrained(folder, dtype=dtype, **without_t5).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts_for(pipe: DiffusionPipeline, pairs: np.ndarray) -> list[str]:
    """Return what the pipeline takes for pairs (N, 2): captions, or class names."""
    if isinstance(pipe, SiTPipeline):
        return [objects()[thing].name for thing, _ in pairs]
    return [prompt(thing, colour) for thing, colour in pairs]


def draw(pipe: DiffusionPipeline, count: int, seed: int = 0) -> torch.Tensor:
    """Return count x_T, (count, C, h, w)."""
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    side = network.config.sample_size
    shape = (count, network.config.in_channels, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(
    pipe: DiffusionPipeline, noise: torch.Tensor, prompts: list[str], guidance_scale: float
) -> list[Image.Image]:
    """Return the images of x_T (N, C, h, w) and N prompts."""
    images: list[Image.Image] = []
    size = 256 if pipe.device.type == "cuda" else 16
    for i in range(0, len(prompts), size):
        images += pipe(
            prompts[i : i + size],
            latents=noise[i : i + size].to(pipe.device, pipe.vae.dtype),
            guidance_scale=guidance_scale,
            num_inference_steps=STEPS,
        ).images
    return images


def figures(judge: Judge, images: list[Image.Image], pairs: np.ndarray) -> dict[str, float]:
    """Return the judge's accuracies and the Frechet distance to real renders."""
    thing, colour, features = judge.judge(images)
    return {
        "object": float(np.mean(thing == pairs[:, 0])),
        "background": float(np.mean(colour == pairs[:, 1])),
        "frechet": frechet_distance(features, judge.real_moments()),
    }


def tile(rows: list[list[Image.Image]], per_line: int = 12) -> Image.Image:
    """Return the rows as one picture, broken into lines of per_line columns."""
    count = len(rows[0])
    lines = -(-count // per_line)
    gap = SIZE // 8
    sheet = Image.new("RGB", (per_line * SIZE, lines * (len(rows) * SIZE + gap) - gap), "white")
    for j, row in enumerate(rows):
        for i, image in enumerate(row):
            line, column = divmod(i, per_line)
            sheet.paste(image, (column * SIZE, line * (len(rows) * SIZE + gap) + j * SIZE))
    return sheet


def main() -> None:
    """Write the sheet and print the figures."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a pipeline")
    parser.add_argument("--pictures", type=Path, required=True, help="folder of render.py")
    parser.add_argument("--judge", type=Path, default=Path("train/emoji/classifier.safetensors"))
    parser.add_argument("--refiner", type=Path)
    parser.add_argument("--scale", type=float, default=3.0, help="CFG scale of the guided row")
    parser.add_argument(
        "--scales", type=float, nargs="*", default=[], help="CFG scales to give figures of"
    )
    parser.add_argument("--n", type=int, default=2, help="images of each held-out prompt")
    parser.add_argument("--output", type=Path, required=True, help="the sheet, .webp or .png")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    pipe, judge = load(args.model, args.device), Judge.from_pretrained(args.judge)
    judge.to(args.device)

    # The sheet
    truth = np.load(args.pictures / "heldout_classes.npy")
    renders = np.load(args.pictures / "heldout_pictures.npy", mmap_mode="r")
    held_out = np.argwhere(held_out_pairs())
    chosen = held_out[np.linspace(0, len(held_out) - 1, COLUMNS).round().astype(int)]
    prompts, noise = prompts_for(pipe, chosen), draw(pipe, COLUMNS)
    first = [np.flatnonzero((truth == pair).all(1))[0] for pair in chosen]
    rows = [[Image.fromarray(renders[i]) for i in first]]
    rows += [sample(pipe, noise, prompts, scale) for scale in (UNGUIDED, args.scale)]
    if args.refiner:
        refiner = Refiner.from_pretrained(args.refiner, pipe)
        noises = zip(noise, prompts, strict=True)
        refined = torch.cat([refiner(x_T[None], text) for x_T, text in noises])
        rows.append(sample(pipe, refined, prompts, UNGUIDED))
    tile(rows).save(args.output, quality=90)

    # The figures
    pairs = held_out.repeat(args.n, 0)
    prompts, noise = prompts_for(pipe, pairs), draw(pipe, len(pairs), seed=1)
    for scale in args.scales:
        measured = figures(judge, sample(pipe, noise, prompts, scale), pairs)
        line = "  ".join(f"{name} {value:.4f}" for name, value in measured.items())
        print(f"{args.model.name}  g {scale:4.1f}  n {len(pairs)}  {line}", flush=True)


if __name__ == "__main__":
    main()
