"""The settings of a visitor, as they come from the page, an API call, a link or a PNG."""

import os
import urllib.parse
from dataclasses import dataclass, fields

from noiserefine.models.catalogue import ASSETS, BACKBONES, Model

try:
    from spaces.config import Config

    ZERO_GPU = Config.zero_gpu
except ImportError:  # only Hugging Face's ZeroGPU needs it
    ZERO_GPU = False

DEFAULT = "emoji"
MAX_TEXT = 2000  # characters
MAX_NUMBER = 1e15  # below it floats hold every whole number


def any_model_allowed() -> bool:
    """Return whether users may name models, refiners and LoRAs of their own.

    At home they may; on a Space only if its owner sets NOISEREFINE_ANY_MODEL=1.
    """
    return os.environ.get("NOISEREFINE_ANY_MODEL", "0" if "SPACE_ID" in os.environ else "1") == "1"


# On ZeroGPU a download would run in a visitor's seconds of GPU; a model has to be placed before
# the first visitor comes, and every one slows the start.
FREE_CHOICE = any_model_allowed() and not ZERO_GPU
SERVED = ["emoji", "sd21"] if ZERO_GPU else list(BACKBONES)
REFINERS = {
    "emoji-scales": ("Emoji, told the guidance scale", str(ASSETS / "refiners" / "emoji-scales"))
}  # in addition to the backbones' defaults: title, folder


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

    @property
    def model(self) -> Model:
        """Return the model. Raises ValueError for names that visitors may not give."""
        name = text(self.backbone, "The backbone").strip()
        name = next((key for key, listed in BACKBONES.items() if listed.source == name), name)
        lora = text(self.lora, "The LoRA").strip()
        refiner = text(self.refiner, "The refiner").strip()
        _, folder = REFINERS.get(refiner, ("", refiner))
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


def link(settings: Settings) -> str:
    """Return a query string of the settings that differ from the defaults."""
    return "?" + urllib.parse.urlencode(
        {
            field.name: getattr(settings, field.name)
            for field in fields(Settings)
            if getattr(settings, field.name) not in (field.default, None, "")
        }
    )


def restored(values: dict) -> list:
    """Return the settings stored in a link or PNG, in field order.

    Missing settings get their default, a missing prompt None. Raises ValueError for a value of
    another kind than the setting's; whether it can be used is checked when it is.
    """
    updates = []
    for field in fields(Settings):
        value, default = values.get(field.name), "" if field.name == "prompt" else field.default
        if value is None:
            updates.append(None if field.name == "prompt" else default)
        elif isinstance(default, str):
            updates.append(text(value, field.name))
        else:
            try:
                plain = float(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f"{field.name} is a number; the file or link holds {str(value)[:40]!r}."
                ) from error
            updates.append(int(plain) if number(plain, field.name) == int(plain) else plain)
    return updates
