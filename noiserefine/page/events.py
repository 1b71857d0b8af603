"""The events that a view reports while it works; `noiserefine.page.screen` shows each of them."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

from noiserefine.models.catalogue import Model


@dataclass(frozen=True)
class Source:
    """The models that this run makes images with, for the record in each file.

    It comes when they are loaded and the settings are checked, after Download and before all else.
    """

    backbone: str
    revision: str | None
    refiner: str | None  # its folder, from the repository if it is in it, or hub id
    refiner_sha256: str | None


@dataclass(frozen=True)
class Tick:
    """One sampling step; reporting it lets an abandoned run stop."""


@dataclass(frozen=True)
class Download:
    """How many bytes of a model are downloaded, of those in the files begun so far."""

    done: int
    total: int


@dataclass(frozen=True)
class Made:
    """A new sample, which the visitor's session keeps so that it is not made again."""

    model: Model
    sample: Any  # Sample; its module takes seconds to import


@dataclass(frozen=True)
class Progress:
    """An unfinished arm: the predicted x0 of a step, and a rough preview of it."""

    arm: str
    preview: Image.Image
    x0: Any  # (1, C, h, w), float32 NumPy
    forwards: int  # so far
    total: int


@dataclass(frozen=True)
class Arm:
    """A finished arm of the comparison."""

    arm: str
    sample: Any
    nearness: float | None = None  # how much nearer to the guided image than plain, in latents


@dataclass(frozen=True)
class NoArm:
    """An arm that this model does not have, and why."""

    arm: str
    reason: str


@dataclass(frozen=True)
class Compared:
    """The comparison is complete: its arms become files to keep."""


@dataclass(frozen=True)
class Picture:
    """The next image of the view's gallery."""

    caption: str
    image: Any  # a Sample or a PIL image
    total: int  # images that the view will show


@dataclass(frozen=True)
class Figure:
    """A picture, sample or plot for the output of that name."""

    output: str
    figure: Any


@dataclass(frozen=True)
class Note:
    """Sentences under the images."""

    text: str


@dataclass(frozen=True)
class Pair:
    """Two images of a blind test and what they are."""

    left: Any
    right: Any
    prompt: str
    seed: int
    arms: tuple[str, str]


@dataclass(frozen=True)
class Noise:
    """Tensors as the bytes of a safetensors file."""

    data: bytes


Event = (
    Source
    | Tick
    | Download
    | Made
    | Progress
    | Arm
    | NoArm
    | Compared
    | Picture
    | Figure
    | Note
    | Pair
    | Noise
)
