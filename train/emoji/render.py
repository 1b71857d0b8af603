"""Renders the pictures that the embedded backbone learns from: one emoji on a coloured background.

    python -m train.emoji.render --output_dir runs/emoji/pictures
    python -m train.emoji.render --style clay --artwork package/assets --per_object 60 --output_dir runs/clay/pictures    # for a fine-tune

A picture is a soft gradient of one of 12 named colours and one of the objects in objects.txt, at
65-90 % of the frame, anywhere that it fits, turned by up to 8 degrees, over a faint shadow.  One in ten (object, background) pairs is held out:
the model never sees it, and the heldout pictures measure it.  The judge pictures are other renders of the same pairs, for the
classifier, which would otherwise learn that these pairs do not exist.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

SIZE = 64  # pixels
SEED = 0
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
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


@dataclass(frozen=True)
class Object:
    emoji: str
    name: str
    synonyms: tuple[str, ...]


@cache
def objects() -> tuple[Object, ...]:
    """The objects of objects.txt, in its order: an object's index is its class."""
    found = []
    for line in Path(__file__).with_name("objects.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            emoji, name, synonyms = (part.strip() for part in line.split("|"))
            found.append(
                Object(emoji, name, tuple(s.strip() for s in synonyms.split(",") if s.strip()))
            )
    return tuple(found)


def held_out_pairs() -> np.ndarray:
    """Which (object, background) pairs no training sees: bool array (objects, backgrounds), a tenth of them."""
    shape = (len(objects()), len(BACKGROUNDS))
    chosen = np.random.default_rng(SEED).permutation(shape[0] * shape[1])[
        : shape[0] * shape[1] // 10
    ]
    mask = np.zeros(shape, bool)
    mask.flat[chosen] = True
    return mask


def prompt(object_index: int, background_index: int) -> str:
    """The canonical prompt of a pair, e.g. "a red apple on a blue background"."""
    return f"{article(objects()[object_index].name)} on {article(list(BACKGROUNDS)[background_index])} background"


def article(name: str) -> str:
    """name with its indefinite article; plurals and masses, which take none, are left alone."""
    plural = (
        name.endswith("s")
        and not name.endswith(("ss", "us", "rhinoceros"))
        or name
        in {
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
    )
    return name if plural else f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def sprite(emoji: str, artwork: Path | None = None) -> Image.Image:
    """The emoji as RGBA, cropped to its painted part.  The font's bitmaps exist at size 109 only."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text(
        (80, 80), emoji, font=ImageFont.truetype(FONT, 109), embedded_color=True, anchor="mm"
    )
    return canvas.crop(canvas.getbbox())


def clay(emoji: str, artwork: Path | None) -> Image.Image:
    """Fluent Emoji 3D's, from a folder of images named after code points, which look as if they were made of clay."""
    if artwork is None or not artwork.is_dir():
        raise FileNotFoundError(
            f"There is no folder {artwork}: --artwork takes assets/ of the npm package @lobehub/fluent-emoji-3d."
        )
    codes = [f"{ord(character):x}" for character in emoji]
    files = [
        artwork / f"{'-'.join(names)}.webp"
        for names in (codes, [code for code in codes if code != "fe0f"])
    ]
    found = next((path for path in files if path.exists()), None)
    if found is None:
        raise FileNotFoundError(f"{artwork} holds no {files[0].name}, {emoji}.")
    with Image.open(found) as image:
        picture = image.convert("RGBA")
    return picture.crop(picture.getchannel("A").getbbox())


def ink(emoji: str, artwork: Path | None = None) -> Image.Image:
    """The font's emoji redrawn in few flat colours with black outlines."""
    plain = sprite(emoji)
    alpha, grey = plain.getchannel("A"), plain.convert("L").filter(ImageFilter.SMOOTH)
    outline = ImageChops.lighter(
        grey.filter(ImageFilter.FIND_EDGES).point(lambda edge: 255 if edge > 40 else 0),
        ImageChops.subtract(alpha, alpha.filter(ImageFilter.MinFilter(9))),
    )
    flat = ImageOps.posterize(plain.convert("RGB"), 2).convert("RGBA")
    flat.paste((16, 16, 20), mask=outline)
    flat.putalpha(alpha)
    return flat


STYLES: dict[str, Callable[[str, Path | None], Image.Image]] = {
    "noto": sprite,
    "clay": clay,
    "ink": ink,
}


def picture(
    sprite: Image.Image, colour: tuple[int, int, int], rng: np.random.Generator
) -> np.ndarray:
    """One picture as uint8 (SIZE, SIZE, 3)."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1) - 0.5
    shade = 1 + rng.uniform(0.06, 0.16) * (np.cos(angle) * x + np.sin(angle) * y)
    base = Image.fromarray(
        (np.asarray(colour) * shade[..., None]).clip(0, 255).astype(np.uint8)
    ).convert("RGBA")

    sprite = sprite.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC, expand=True)
    scale = rng.uniform(0.65, 0.9) * SIZE / max(sprite.size)
    sprite = sprite.resize(
        [max(1, round(side * scale)) for side in sprite.size], Image.Resampling.LANCZOS
    )
    left, top = (int(rng.integers(0, SIZE - side + 1)) for side in sprite.size)

    layer = Image.new("RGBA", base.size)
    layer.paste(sprite, (left, top))
    alpha = layer.getchannel("A")
    shadow = Image.new("L", base.size)
    shadow.paste(alpha, (1, 2))
    shadow = shadow.filter(ImageFilter.GaussianBlur(1.5)).point(lambda a: a // 4)
    base.paste((0, 0, 0), mask=shadow)
    return np.asarray(Image.alpha_composite(base, layer).convert("RGB"))


def render_object(
    task: tuple[int, np.ndarray, int], style: str, artwork: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of one object on the given backgrounds: (N, SIZE, SIZE, 3) uint8 and (N, 2) class indices."""
    index, backgrounds, seed = task
    rng, image = (
        np.random.default_rng([SEED, seed, index]),
        STYLES[style](objects()[index].emoji, artwork),
    )
    colours = list(BACKGROUNDS.values())
    return (
        np.stack([picture(image, colours[b], rng) for b in backgrounds]),
        np.stack([np.full(len(backgrounds), index), backgrounds], 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    held_out = held_out_pairs()
    for name, seed, pairs, count in (
        ("train", 0, ~held_out, lambda n: args.per_object),
        ("heldout", 1, held_out, lambda n: args.held_out_per_pair * n),
        ("judge", 2, held_out, lambda n: args.per_object // len(BACKGROUNDS) * n),
    ):
        tasks = [
            (i, np.resize(np.flatnonzero(row), count(row.sum())), seed)
            for i, row in enumerate(pairs)
            if row.any()
        ]
        with Pool() as pool:
            pictures, classes = zip(
                *pool.map(
                    partial(render_object, style=args.style, artwork=args.artwork),
                    tasks,
                    chunksize=4,
                )
            )
        pictures, classes = np.concatenate(pictures), np.concatenate(classes)
        np.save(args.output_dir / f"{name}_pictures.npy", pictures)
        np.save(args.output_dir / f"{name}_classes.npy", classes)
        print(f"{name}: {len(pictures)} pictures of {pairs.sum()} pairs")


if __name__ == "__main__":
    main()
