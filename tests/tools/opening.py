"""Make the comparison and the example pictures with which the page opens, and its icon, anew.

python tests/tools/opening.py          (after the default model or its refiner has changed)
"""

from dataclasses import asdict, replace

from PIL import Image, ImageDraw

from noiserefine.analysis.compare import arms
from noiserefine.analysis.explore import nearness
from noiserefine.analysis.recipe import Maker, Sample
from noiserefine.analysis.versions import package_versions
from noiserefine.models.catalogue import Model
from noiserefine.models.pool import Models
from noiserefine.page.jobs import recipe_of
from noiserefine.page.layout import FAVICON
from noiserefine.page.opening import EXAMPLES, FOLDER, default_settings
from noiserefine.page.record import save_png

THUMBNAIL = 96


def make_arms() -> dict[str, Sample]:
    """Return the default comparison, made by the library."""
    settings = default_settings()
    loaded = Models().get(Model(settings.backbone))
    make, recipe = Maker(loaded.pipe, loaded.refiner), recipe_of(settings)
    return {arm: make(each) for arm, each in arms(recipe).items()}


def make_thumbnails() -> dict[str, Image.Image]:
    """Return the refined image of every example."""
    loaded = Models().get(Model(default_settings().backbone))
    make = Maker(loaded.pipe, loaded.refiner)
    settings = [replace(default_settings(), prompt=prompt) for prompt in EXAMPLES]
    return {shown.prompt: make(recipe_of(shown).refined).image for shown in settings}


def icon(noise: Image.Image, image: Image.Image) -> Image.Image:
    """Return noise that turns into an image, in a rounded square."""
    picture = Image.new("RGBA", (64, 64))
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 63, 63), 14, fill=255)
    both = image.resize(picture.size).convert("RGB")
    both.paste(noise.resize(picture.size).crop((0, 0, 24, 64)), (0, 0))
    picture.paste(both, mask=mask)
    return picture


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    settings, samples = asdict(default_settings()), make_arms()
    for arm, sample in samples.items():
        record = {
            "settings": settings,
            "view": "compare",
            "arm": arm,
            "versions": package_versions(),
        }
        record |= {"forwards": sample.forwards, "recipe": asdict(sample.recipe)}
        if arm == "refined":
            record["nearness"] = nearness(samples)
        save_png(sample.image, FOLDER / f"{arm}.png", record)
    thumbnails = make_thumbnails()
    for i, image in enumerate(thumbnails.values()):
        image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC).save(
            FOLDER / f"example-{i}.png", optimize=True
        )
    noise = Image.effect_noise((64, 64), 120).convert("RGB")
    icon(noise, thumbnails[EXAMPLES[1]]).save(FAVICON, optimize=True)


if __name__ == "__main__":
    main()
