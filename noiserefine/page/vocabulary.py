"""The objects and backgrounds that the embedded models were trained on."""

import functools
import re

from noiserefine.models.catalogue import ASSETS, BACKBONES

PROMPTS = ASSETS / "prompts" / "emoji.txt"
PATTERN = re.compile(r"(?P<object>.+) on an? (?P<background>.+) background")


@functools.cache
def vocabulary() -> dict[str, list[str]]:
    """Return the objects with their article, the backgrounds, and the models that know them."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    found = [match for line in lines if (match := PATTERN.fullmatch(line.strip()))]
    embedded = [each.title for name, each in BACKBONES.items() if is_embedded(name)]
    return {
        "objects": list(dict.fromkeys(match["object"] for match in found)),
        "backgrounds": list(dict.fromkeys(match["background"] for match in found)),
        "models": embedded,
    }


def is_embedded(backbone: str) -> bool:
    """Return whether the repository holds this model of the catalogue."""
    return backbone in BACKBONES and not BACKBONES[backbone].download


def knows(prompt: str) -> bool:
    """Return whether a word of the prompt names an object of the embedded models."""
    names = {re.sub("^an? ", "", name) for name in vocabulary()["objects"]}
    known = {word for name in names for word in name.lower().split()}
    return bool(known & set(re.findall(r"\w+", prompt.lower())))
