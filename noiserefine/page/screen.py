"""What a visitor sees of a run: every event becomes values of the page's outputs."""

import functools
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from noiserefine.page.events import (
    Arm,
    Columns,
    Compared,
    Event,
    Figure,
    NoArm,
    Noise,
    Note,
    Pair,
    Picture,
    Progress,
    Source,
)
from noiserefine.page.record import contact_sheet, save_png
from noiserefine.page.views import ARMS


class Screen:
    """The outputs of one view during one run.

    Pictures are written to files, which Gradio copies once; it would encode an image anew at
    every update. Each file holds what it was made from.

    values   of the outputs by name
    record   what goes into every file
    """

    def __init__(
        self, outputs: Mapping[str, gr.components.Component], record: dict, folder: Path, link: str
    ) -> None:
        self.values: dict[str, Any] = {
            name: "" if isinstance(output, gr.Markdown) else None
            for name, output in outputs.items()
        }
        self.record, self.folder, self.link = dict(record), folder, link
        self.samples: dict[str, Any] = {}  # of the arms
        self.gallery: list[tuple[str, str]] = []
        self.columns: int | None = None

    @functools.singledispatchmethod
    def show(self, event: Event) -> bool:
        """Take an event up; return whether there is something new to see."""
        return False

    @show.register
    def _(self, event: Source) -> bool:
        self.record |= asdict(event)
        return False

    @show.register
    def _(self, event: Progress) -> bool:
        self.values[event.arm] = self._file(event.arm, event.preview, arm=event.arm)
        self.values[f"{event.arm}_cost"] = f"step {event.step} of {event.steps}"
        return True

    @show.register
    def _(self, event: Arm) -> bool:
        self.samples[event.arm] = event.sample
        self.values[event.arm] = self._file(event.arm, event.sample, arm=event.arm)
        for arm, sample in self.samples.items():
            self.values[f"{arm}_cost"] = cost(sample, self.samples.get("guided"))
        return True

    @show.register
    def _(self, event: NoArm) -> bool:
        self.values[f"{event.arm}_cost"] = event.reason
        return True

    @show.register
    def _(self, event: Compared) -> bool:
        self.values["keep"] = self._files_to_keep(event.samples)
        self.values["link"] = f"[Link to these settings]({self.link})"
        return True

    @show.register
    def _(self, event: Picture) -> bool:
        file = self._file(f"{len(self.gallery):02}", event.image, caption=event.caption)
        self.gallery.append((file, event.caption))
        images = list(self.gallery)
        self.values["images"] = gr.Gallery(images, columns=self.columns) if self.columns else images
        return True

    @show.register
    def _(self, event: Columns) -> bool:
        self.columns = event.count
        return False

    @show.register
    def _(self, event: Figure) -> bool:
        self.values[event.output] = self._file(event.output, event.figure, arm=event.output)
        return True

    @show.register
    def _(self, event: Note) -> bool:
        self.values["says"] = event.text
        return True

    @show.register
    def _(self, event: Pair) -> bool:
        self.values["left"] = self._file("left", event.left, arm="left")
        self.values["right"] = self._file("right", event.right, arm="right")
        self.values["pair"] = (event.prompt, event.seed, *event.arms)
        return True

    @show.register
    def _(self, event: Noise) -> bool:
        path = self.folder / "noise.safetensors"
        path.write_bytes(event.data)
        self.values["noise"] = str(path)
        return True

    def _file(self, name: str, image: Any, **about: str) -> Any:
        """Return the path of a picture or sample written as PNG, and anything else as it is."""
        path = self.folder / f"{name}.png"
        if isinstance(image, Image.Image):
            save_png(image, path, self.record | about)
        elif hasattr(image, "recipe"):
            save_png(image.image, path, made_from(self.record, image) | about)
        else:
            return image
        return str(path)

    def _files_to_keep(self, samples: Mapping[str, Any]) -> list[str]:
        """Return the contact sheet and the arms, as files."""
        captioned = [
            (f"{', '.join(ARMS[arm])}, {sample.forwards} forwards", sample.image)
            for arm, sample in samples.items()
        ]
        sheet = contact_sheet(captioned, self.record["settings"]["prompt"])
        arms = [self._file(arm, sample, arm=arm) for arm, sample in samples.items()]
        return [self._file("contact-sheet", sheet), *arms]


def cost(sample: Any, guided: Any | None) -> str:
    """Return forwards and seconds of an arm, and their share of the guided arm's."""
    lines = [
        f"**{sample.forwards}** UNet forward{'s' * (sample.forwards > 1)}",
        f"{sample.seconds:.2f} s",
    ]
    if guided and sample is not guided:
        lines[0] += f" · {sample.forwards / guided.forwards:.0%} of CFG"
        lines[1] += f" · {sample.seconds / guided.seconds:.0%} of CFG"
    return "  \n".join(lines)


def made_from(record: dict, sample: Any) -> dict:
    """Return the record with the sample's recipe, and with settings whose arms hold its image."""
    recipe = sample.recipe
    own = {"seed": recipe.seed, "steps": recipe.steps, "sampler": recipe.sampler}
    if recipe.prompt:
        own["prompt"] = recipe.prompt
    if recipe.strength:
        own["strength"] = recipe.strength
    if scale := recipe.refiner_scale or (recipe.guidance_scale > 1 and recipe.guidance_scale):
        own["guidance_scale"] = scale
    return record | {
        "settings": record["settings"] | own,
        "recipe": asdict(recipe),
        "forwards": sample.forwards,
    }
