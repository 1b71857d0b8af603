"""The objects and backgrounds that the embedded models were trained on."""

import functools
import re
import secrets

from noiserefine.models.catalogue import ASSETS, BACKBONES

PROMPTS = ASSETS / "prompts" / "emoji.txt"
PATTERN = re.compile(r"(?P<object>.+) on an? (?P<background>.+) background")


@functools.cache
def vocabulary() -> dict[str, list[str]]:
    """Return the objects with their article, the backgrounds, and the models that know them.

    "class_models" are all models whose prompts name an object only, embedded or not.
    """
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    found = [match for line in lines if (match := PATTERN.fullmatch(line.strip()))]
    embedded = [each.title for name, each in BACKBONES.items() if is_embedded(name)]
    by_class = [each.title for name, each in BACKBONES.items() if takes_classes(name)]
    return {
        "objects": list(dict.fromkeys(match["object"] for match in found)),
        "backgrounds": list(dict.fromkeys(match["background"] for match in found)),
        "models": embedded,
        "class_models": by_class,
    }


def is_embedded(backbone: str) -> bool:
    """Return whether the repository holds this model of the catalogue."""
    return backbone in BACKBONES and not BACKBONES[backbone].download


def takes_classes(backbone: str) -> bool:
    """Return whether a prompt of this model of the catalogue is the name of a class."""
    return backbone in BACKBONES and BACKBONES[backbone].pipeline == "SiTPipeline"


def random_prompt(backbone: str) -> str:
    """Return a prompt of things that an embedded model knows."""
    words = vocabulary()
    name, background = secrets.choice(words["objects"]), secrets.choice(words["backgrounds"])
    if takes_classes(backbone):
        return name
    article = "an" if background[0] in "aeiou" else "a"
    return f"{name} on {article} {background} background"


def knows(prompt: str) -> bool:
    """Return whether a word of the prompt names an object of the embedded models."""
    names = {re.sub("^an? ", "", name) for name in vocabulary()["objects"]}
    known = {word for name in names for word in name.lower().split()}
    return bool(known & set(re.findall(r"\w+", prompt.lower())))
