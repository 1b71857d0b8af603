"""What the page shows before anything was made: a shipped comparison of the default model.

`tests/tools/opening.py` makes the files anew; a test compares them with the library's pixels.
"""

import json
from dataclasses import asdict, astuple, dataclass

from noiserefine.models.catalogue import ASSETS, BACKBONES
from noiserefine.page import texts
from noiserefine.page.record import read_png
from noiserefine.page.settings import Settings
from noiserefine.page.views import ARMS
from noiserefine.page.vocabulary import takes_classes

FOLDER = ASSETS / "opening"
EXAMPLES = [
    "a rocket on a black background",
    "a strawberry on a white background",
    "pancakes on a white background",
    "a frog on a blue background",
    "a panda on a pink background",
]


@dataclass(frozen=True)
class Opening:
    """Values of the comparison's outputs, and the examples' pictures."""

    arms: dict[str, str]  # files by arm
    costs: dict[str, str]
    caption: str
    made_from: str
    code: str
    thumbnails: dict[str, str]  # files by prompt


def default_settings() -> Settings:
    """Return the settings with which the page opens."""
    return Settings(EXAMPLES[0])


def example_for(backbone: str, prompt: str) -> str:
    """Return the prompt, of an example the object alone for a class-conditional model."""
    return texts.short(prompt) if prompt in EXAMPLES and takes_classes(backbone) else prompt


def opening() -> Opening | None:
    """Return the shipped comparison, or None where it is not one of the default settings."""
    settings = default_settings()
    arms = {arm: FOLDER / f"{arm}.png" for arm in ARMS}
    if not all(path.is_file() for path in arms.values()):
        return None
    records = {arm: read_png(path) for arm, path in arms.items()}
    if any(record["settings"] != asdict(settings) for record in records.values()):
        return None
    guided = records["guided"]["forwards"]
    return Opening(
        {arm: str(path) for arm, path in arms.items()},
        {
            arm: texts.cost(record["forwards"], None, guided, record.get("nearness"))
            for arm, record in records.items()
        },
        texts.caption(settings),
        json.dumps(astuple(settings)),
        texts.code(settings, BACKBONES[settings.backbone].refiner),
        {prompt: str(FOLDER / f"example-{i}.png") for i, prompt in enumerate(EXAMPLES)},
    )
