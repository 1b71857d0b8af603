"""Read and write PNGs with their settings; draw contact sheets."""

import json
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from noiserefine.page import a1111

KEY = "noiserefine"  # of the text chunk
MAX_PIXELS, MAX_TEXT = 16_000_000, 100_000  # of a file that is read back


def save_png(image: Image.Image, path: str | Path, record: dict) -> None:
    """Write the image with the record, as JSON, in a text chunk."""
    chunks = PngInfo()
    chunks.add_itxt(KEY, json.dumps(record, ensure_ascii=False))
    if "arm" in record and "settings" in record:  # for other programs
        chunks.add_itxt(a1111.KEY, a1111.write(record["settings"], record["arm"]))
    image.save(path, "PNG", pnginfo=chunks)


def read_png(path: str | Path) -> dict:
    """Return the record of a PNG: ours, or the settings that another program wrote.

    Raises ValueError for a file without settings that this page can read.
    """
    chunks = _text_chunks(path)
    if KEY not in chunks and a1111.KEY in chunks:
        return {"settings": a1111.read(chunks[a1111.KEY][:MAX_TEXT]), "program": "A1111"}
    if KEY not in chunks and {"workflow", "prompt"} & chunks.keys():
        raise ValueError(
            "This PNG was made by ComfyUI. Its workflow is a graph of nodes that this page cannot "
            "read: type in the prompt and the seed."
        )
    if KEY not in chunks:
        raise ValueError(
            "This PNG holds no settings: it was not downloaded from this page, or another program "
            "wrote it anew."
        )
    try:
        if len(chunks[KEY]) > MAX_TEXT:
            raise ValueError
        record = json.loads(chunks[KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError("The settings in this PNG are damaged.") from error
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise ValueError("The settings in this PNG are not those of this page.")
    return record


def _text_chunks(path: str | Path) -> dict[str, str]:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            size, info = image.size, image.info
    except (Image.DecompressionBombError, SyntaxError, ValueError, OSError) as error:
        raise ValueError(
            f"This is no PNG file that can be read ({type(error).__name__}); drop one that was "
            "downloaded from this page."
        ) from error
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(
            f"This PNG has {size[0]} x {size[1]} pixels; images of this page have at most "
            f"{MAX_PIXELS:,}."
        )
    return {str(key): value for key, value in info.items() if isinstance(value, str)}


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """Return the image scaled up by a whole number to at least `side` pixels of width."""
    factor = -(-side // image.width)
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.BICUBIC)


def contact_sheet(
    images: list[tuple[str, Image.Image]], title: str, side: int = 384
) -> Image.Image:
    """Return the captioned images in a row under a title, each at least `side` pixels wide."""
    width = max(side, images[0][1].width)
    height = round(width * images[0][1].height / images[0][1].width)
    gap, line = width // 24, width // 12
    font, small = ImageFont.load_default(line * 0.7), ImageFont.load_default(line * 0.6)
    title = textwrap.fill(title, 30 * len(images))
    top = 2 * gap + line * (title.count("\n") + 1)
    sheet = Image.new(
        "RGB", (len(images) * (width + gap) + gap, top + height + gap + line), "white"
    )
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((gap, gap), title, "black", font)
    for i, (caption, image) in enumerate(images):
        left = gap + i * (width + gap)
        sheet.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
        draw.text((left, top + height + gap // 2), caption, "#555555", small)
    return sheet
