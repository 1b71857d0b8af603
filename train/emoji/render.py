"""Render the pictures that the embedded models learn from: one emoji on a coloured background.

    python -m train.emoji.render --output_dir runs/emoji/pictures
    python -m train.emoji.render --style clay --artwork package/assets --per_object 60 \\
        --output_dir runs/clay/pictures

A picture is a soft gradient of one of 12 named colours and one of the objects in objects.txt, at
65-90 % of the frame, anywhere that it fits, over a faint shadow. Sizes and places are multiples of
GRID pixels, the autoencoder's stride: moving an object only moves its latents. One in ten (object,
background) pairs is held out: no model sees it, and the heldout pictures measure it. The judge
pictures are other renders of the same pairs for the classifier, which would otherwise learn that
these pairs do not exist.

The second command renders the pictures of a fine-tune.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from train.common import argument_parser

SIZE = 128  # pixels
GRID = 4  # pixels
SIZES = range(84, 117, GRID)  # an object's longer side, in pixels
SEED = 0
FONT = os.environ.get("EMOJI_FONT", "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only size of the font's bitmaps
INK_EDGE = 40  # brightness, of 255, from which an edge is drawn in ink
BACKGROUNDS = {  # sRGB
    "red": (214, 48, 49),
    "orange": (243, 133, 36),
    "yellow": (250, 208, 60),
    "green": (56, 160, 82),
    "teal": (20, 148, 150),
    "blue": (45, 105, 215),
    "purple": (128, 72, 185),
    "pink": (246, 150, 190),
    "brown": (126, 82, 52),
    "gray": (134, 138, 146),
    "black": (30, 30, 36),
    "white": (244, 244, 242),
}
# Names without an article
MASSES = {
    "sushi",
    "bread",
    "corn",
    "broccoli",
    "cheese",
    "popcorn",
    "coffee",
    "tea",
    "beer",
    "wine",
    "soda",
    "honey",
    "chocolate",
    "ice cream",
    "earth",
    "fire",
}


@dataclass(frozen=True)
class Object:
    """An emoji with its name and other names for it."""

    emoji: str
    name: str
    synonyms: tuple[str, ...]


@cache
def objects() -> tuple[Object, ...]:
    """Return the objects of objects.txt, in its order: an object's index is its class."""
    found = []
    for line in Path(__file__).with_name("objects.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            emoji, name, names = (part.strip() for part in line.split("|"))
            synonyms = (synonym.strip() for synonym in names.split(","))
            found.append(Object(emoji, name, tuple(filter(None, synonyms))))
    return tuple(found)


def held_out_pairs() -> np.ndarray:
    """Return the mask (objects, backgrounds) of the tenth of the pairs that no training sees."""
    mask = np.zeros((len(objects()), len(BACKGROUNDS)), bool)
    order = np.random.default_rng(SEED).permutation(mask.size)
    mask.flat[order[: mask.size // 10]] = True
    return mask


def prompt(object_index: int, background_index: int) -> str:
    """Return the canonical prompt of a pair, e.g. "a red apple on a blue background"."""
    name, colour = objects()[object_index].name, list(BACKGROUNDS)[background_index]
    return f"{article(name)} on {article(colour)} background"


def article(name: str) -> str:
    """Return a name with its indefinite article; plurals and masses take none."""
    plural = name.endswith("s") and not name.endswith(("ss", "us", "rhinoceros"))
    if plural or name in MASSES:
        return name
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def sprite(emoji: str, artwork: Path | None = None) -> Image.Image:
    """Return the font's emoji as RGBA, cropped to its painted part."""
    canvas = Image.new("RGBA", (160, 160))
    font = ImageFont.truetype(FONT, FONT_SIZE)
    ImageDraw.Draw(canvas).text((80, 80), emoji, font=font, embedded_color=True, anchor="mm")
    return canvas.crop(canvas.getbbox())


def clay(emoji: str, artwork: Path | None) -> Image.Image:
    """Return Fluent Emoji 3D's emoji, from a folder of images named after code points."""
    if artwork is None or not artwork.is_dir():
        raise FileNotFoundError(
            f"There is no folder {artwork}: --artwork takes assets/ of the npm package "
            "@lobehub/fluent-emoji-3d."
        )
    codes = [f"{ord(character):x}" for character in emoji]
    plain = [code for code in codes if code != "fe0f"]  # without the variation selector
    files = [artwork / f"{'-'.join(names)}.webp" for names in (codes, plain)]
    found = next((path for path in files if path.exists()), None)
    if found is None:
        raise FileNotFoundError(f"{artwork} holds no {files[0].name}, {emoji}.")
    with Image.open(found) as image:
        picture = image.convert("RGBA")
    return picture.crop(picture.getchannel("A").getbbox())


def ink(emoji: str, artwork: Path | None = None) -> Image.Image:
    """Return the font's emoji redrawn in few flat colours with black outlines."""
    plain = sprite(emoji)
    alpha, grey = plain.getchannel("A"), plain.convert("L").filter(ImageFilter.SMOOTH)
    edges = grey.filter(ImageFilter.FIND_EDGES).point([255 * (i > INK_EDGE) for i in range(256)])
    rim = ImageChops.subtract(alpha, alpha.filter(ImageFilter.MinFilter(9)))
    outline = ImageChops.lighter(edges, rim)
    flat = ImageOps.posterize(plain.convert("RGB"), 2).convert("RGBA")
    flat.paste((16, 16, 20), mask=outline)
    flat.putalpha(alpha)
    return flat


STYLES: dict[str, Callable[[str, Path | None], Image.Image]] = {
    "noto": sprite,
    "clay": clay,
    "ink": ink,
}


def sized(image: Image.Image) -> np.ndarray:
    """Return a sprite at all SIZES, each in the upper left of a frame (SIZE, SIZE, 4), uint8."""
    frames = np.zeros((len(SIZES), SIZE, SIZE, 4), np.uint8)
    for frame, size in zip(frames, SIZES, strict=True):
        scale = size / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        frame[:height, :width] = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    return frames


def blur(alpha: torch.Tensor, deviation: float) -> torch.Tensor:
    """Return alpha (N, H, W) blurred by a Gaussian, with nothing beyond the frame."""
    radius = round(2.5 * deviation)
    kernel = torch.arange(-radius, radius + 1, device=alpha.device) / deviation
    kernel = (-0.5 * kernel.square()).softmax(0)
    alpha = F.conv2d(alpha[:, None], kernel.view(1, 1, 1, -1), padding=(0, radius))
    return F.conv2d(alpha, kernel.view(1, 1, -1, 1), padding=(radius, 0))[:, 0]


def pictures(
    frames: np.ndarray, backgrounds: np.ndarray, rng: np.random.Generator, device: torch.device
) -> np.ndarray:
    """Return pictures (N, SIZE, SIZE, 3) of one object on each of the backgrounds (N,).

    Args:
        frames: The object, from `sized`.
        backgrounds: Indices into BACKGROUNDS.
        rng: Source of sizes, places and gradients.
        device: The device that computes them; the result is a uint8 array.
    """
    # Sizes and places
    count, chosen = len(backgrounds), rng.integers(len(SIZES), size=len(backgrounds))
    painted = frames[..., 3] > 0
    sides = painted.any(2).sum(1)[chosen], painted.any(1).sum(1)[chosen]
    top, left = (GRID * rng.integers(1, (SIZE - side) // GRID) for side in sides)
    y, x = ((np.arange(SIZE) - start[:, None]) % SIZE for start in (top, left))
    index = (chosen[:, None, None], y[:, :, None], x[:, None, :])
    sprites = torch.from_numpy(frames).to(device)[
        tuple(torch.from_numpy(i).to(device) for i in index)
    ]
    colour, alpha = sprites[..., :3].float(), sprites[..., 3].float() / 255

    # Background, shadow, object
    angle, strength = rng.uniform(0, 2 * np.pi, count), rng.uniform(0.06, 0.16, count)
    slope = torch.from_numpy(strength * np.stack([np.sin(angle), np.cos(angle)])).float().to(device)
    ramp = torch.linspace(-0.5, 0.5, SIZE, device=device)
    shade = 1 + slope[0][:, None, None] * ramp[:, None] + slope[1][:, None, None] * ramp
    colours = torch.tensor(list(BACKGROUNDS.values()), device=device)
    base = colours[torch.from_numpy(backgrounds).to(device)]
    image = (base[:, None, None] * shade[..., None]).clamp(0, 255)
    shadow = F.pad(blur(alpha, 3), (2, -2, 4, -4)) / 4
    image = image * (1 - shadow[..., None])
    image = image + alpha[..., None] * (colour - image)
    return image.round().byte().cpu().numpy()


def main() -> None:
    """Render the pictures for training, for the figures and for the judge."""
    parser = argument_parser(__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--per_object", type=int, default=300, help="training pictures of each object"
    )
    parser.add_argument(
        "--style",
        choices=STYLES,
        default="noto",
        help="noto: what the model learns; the others: what its fine-tunes learn",
    )
    parser.add_argument(
        "--artwork",
        type=Path,
        help="for the style clay: assets/ of the npm package @lobehub/fluent-emoji-3d",
    )
    parser.add_argument(
        "--held_out_per_pair", type=int, default=16, help="pictures of each held-out pair"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    render = STYLES[args.style]
    with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter's lock while it resizes
        frames = list(pool.map(lambda thing: sized(render(thing.emoji, args.artwork)), objects()))
    held_out = held_out_pairs()
    for name, seed, pairs, count in (
        ("train", 0, ~held_out, lambda n: args.per_object),
        ("heldout", 1, held_out, lambda n: args.held_out_per_pair * n),
        ("judge", 2, held_out, lambda n: args.per_object // len(BACKGROUNDS) * n),
    ):
        parts, classes = [], []
        for i, row in enumerate(pairs):
            if row.any():
                backgrounds = np.resize(np.flatnonzero(row), count(row.sum()))
                rng = np.random.default_rng([SEED, seed, i])
                parts.append(pictures(frames[i], backgrounds, rng, args.device))
                classes.append(np.stack([np.full(len(backgrounds), i), backgrounds], 1))
        np.save(args.output_dir / f"{name}_pictures.npy", np.concatenate(parts))
        np.save(args.output_dir / f"{name}_classes.npy", np.concatenate(classes))
        print(f"{name}: {sum(map(len, parts))} pictures of {pairs.sum()} pairs")


if __name__ == "__main__":
    main()
