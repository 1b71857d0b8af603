"""The settings of a visitor, as they come from the page, an API call, a link or a PNG."""

import os
import urllib.parse
from dataclasses import dataclass, fields
from typing import Any

from noiserefine.limits import MAX_GUIDANCE_SCALE, MAX_SEED, MAX_STEPS, MAX_STRENGTH
from noiserefine.models.catalogue import ASSETS, BACKBONES, Model, backbone_of
from noiserefine.sampler_names import SAMPLER_NAMES

try:
    from spaces.config import Config

    ZERO_GPU = Config.zero_gpu
except ImportError:  # only Hugging Face's ZeroGPU needs it
    ZERO_GPU = False

ON_SPACE = "SPACE_ID" in os.environ
DEFAULT = "emoji"
MAX_TEXT = 2000  # characters
MAX_NUMBER = 1e15  # below it floats hold every whole number
# Of settings that come from a link or a PNG; which sizes are possible depends on the model.
RANGES = {
    "seed": (0, MAX_SEED),
    "steps": (1, MAX_STEPS),
    "guidance_scale": (1, MAX_GUIDANCE_SCALE),
    "strength": (0, MAX_STRENGTH),
}
WHOLE = ("seed", "steps", "width", "height")


def any_model_allowed() -> bool:
    """Return whether users may name models, refiners and LoRAs of their own.

    At home they may; on a Space only if its owner sets NOISEREFINE_ANY_MODEL=1.
    """
    return os.environ.get("NOISEREFINE_ANY_MODEL", "0" if "SPACE_ID" in os.environ else "1") == "1"


# On ZeroGPU a download would run in a visitor's seconds of GPU; a model has to be placed before
# the first visitor comes, and every one slows the start.
FREE_CHOICE = any_model_allowed() and not ZERO_GPU
SERVED = ["emoji", "sd21"] if ZERO_GPU else list(BACKBONES)


@dataclass(frozen=True)
class ScaleRefiner:
    """A shipped refiner that takes the guidance scale, beside the backbone's default."""

    title: str
    folder: str
    backbone: str


REFINERS = {
    "emoji-scales": ScaleRefiner(
        "Emoji, takes the guidance scale", str(ASSETS / "refiners" / "emoji-scales"), "emoji"
    )
}


OF_THE_MODEL = ("guidance_scale", "steps", "sampler")  # whose defaults depend on the model


@dataclass(frozen=True)
class Settings:
    """What a visitor asks for, unchecked."""

    prompt: str
    seed: float = 7
    backbone: str = DEFAULT
    steps: float = BACKBONES[DEFAULT].steps
    guidance_scale: float = BACKBONES[DEFAULT].guidance_scale or 1.0
    strength: float = 1.0
    sampler: str = BACKBONES[DEFAULT].sampler
    width: float | None = 0
    height: float | None = 0
    refiner: str = ""
    lora: str = ""
    lora_weight: float = 1.0
    negative_prompt: str = ""

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all settings, in the order of the page's inputs."""
        return [field.name for field in fields(cls)]

    @property
    def model(self) -> Model:
        """Return the model. Raises ValueError for names that visitors may not give."""
        name = text(self.backbone, "The backbone").strip()
        name = next((key for key, listed in BACKBONES.items() if listed.source == name), name)
        lora = text(self.lora, "The LoRA").strip()
        refiner = text(self.refiner, "The refiner").strip()
        folder = REFINERS[refiner].folder if refiner in REFINERS else refiner
        model = Model(
            name, folder, lora, number(self.lora_weight, "The LoRA's weight") if lora else 1.0
        )
        if not model.backbone:
            raise ValueError("No backbone is chosen.")
        served = ((model.backbone, BACKBONES), (refiner, ["", *REFINERS]), (model.lora, [""]))
        foreign = [name for name, names in served if name not in names]
        if foreign and not FREE_CHOICE:
            raise ValueError(
                f"This Space serves its own models only; {foreign[0]} is none of them. Duplicate "
                "the Space, or run the app on your machine, to use any model."
            )
        if model.backbone in BACKBONES and model.backbone not in SERVED:
            raise ValueError(
                f"{model.title} is not served here; choose one of {', '.join(SERVED)}, or run the "
                "app on your machine."
            )
        return model


def text(value: str | None, what: str, most: int = MAX_TEXT) -> str:
    """Return the text, "" for None. Raises ValueError for anything else and for a long one."""
    if value is None:
        return ""
    if (
        not isinstance(value, str)
        or len(value) > most
        or value.encode(errors="ignore").decode() != value  # halves of surrogate pairs
    ):
        raise ValueError(f"{what} is a text of at most {most} characters; got {ascii(value)[:40]}.")
    return value


def number(value: float | None, what: str) -> float:
    """Return the number. Raises ValueError for anything else."""
    if value is None:
        raise ValueError(f"{what} is missing: it is a number.")
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not abs(value) < MAX_NUMBER
    ):
        raise ValueError(f"{what} is a number; got {ascii(value)[:40]}.")
    return value


def whole(value: float | None, what: str) -> int:
    """Return the number as an int. Raises ValueError for anything but a whole number."""
    checked = number(value, what)
    if checked != int(checked):
        raise ValueError(f"{what} is a whole number; got {value!r}.")
    return int(checked)


def changed(settings: Settings) -> dict[str, Any]:
    """Return the settings that differ from the defaults, by name."""
    return {
        field.name: getattr(settings, field.name)
        for field in fields(Settings)
        if getattr(settings, field.name) not in (field.default, None, "")
    }


def link(settings: Settings) -> str:
    """Return a query string of the settings that differ from the defaults.

    Beside another model, those that it has defaults of its own for are always given.
    """
    query = changed(settings)
    if "backbone" in query:
        query |= {name: getattr(settings, name) for name in OF_THE_MODEL}
    return "?" + urllib.parse.urlencode(query)


def restored(values: dict) -> tuple[list, list[str]]:
    """Return the settings stored in a link or PNG in field order, and what is wrong with others.

    Missing and wrong settings get their default, a missing prompt None. Guidance scale, steps and
    sampler get that of the model, if the catalogue lists it. What else depends on the model is
    checked when an image is made.
    """
    updates, problems = [], []
    defaults = {field.name: field.default for field in fields(Settings)} | {"prompt": None}
    listed = backbone_of(str(values.get("backbone")))
    for name in OF_THE_MODEL:
        defaults[name] = (listed and getattr(listed, name)) or defaults[name]
    for name, default in defaults.items():
        try:
            updates.append(_setting(values.get(name), name, default))
        except ValueError as error:
            updates.append(default)
            problems.append(f"{error} The default is taken instead.")
    return updates, problems


def _setting(value: Any, name: str, default: Any) -> Any:
    if value is None:
        return default
    if default is None or isinstance(default, str):
        value = text(value, f"The setting “{name}”")
        if name == "sampler" and value not in SAMPLER_NAMES:
            names = ", ".join(SAMPLER_NAMES)
            raise ValueError(f"The setting “sampler” is one of {names}; got {ascii(value)[:40]}.")
        return value
    try:
        converted = number(float(value), f"The setting “{name}”")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"The setting “{name}” is a number; got {ascii(value)[:40]}.") from error
    low, high = RANGES.get(name, (-MAX_NUMBER, MAX_NUMBER))
    if not low <= converted <= high:
        raise ValueError(f"The setting “{name}” is from {low} to {high}; got {converted:g}.")
    if converted != int(converted):
        if name in WHOLE:
            raise ValueError(f"The setting “{name}” is a whole number; got {converted:g}.")
        return converted
    return int(converted)
