"""What a visitor sees of a run: every event becomes values of the page's outputs."""

import functools
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from noiserefine.page import texts
from noiserefine.page.events import (
    Arm,
    Compared,
    Download,
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
from noiserefine.page.record import contact_sheet, enlarged, save_png
from noiserefine.page.settings import REFINERS, Settings, link
from noiserefine.page.training import shown
from noiserefine.page.views import ARMS

ENLARGED = 512  # pixels; smaller images are kept a second time, enlarged


class Status(NamedTuple):
    """How far a download or a series of images is."""

    done: int
    total: int
    unit: str
    text: str  # what is going on

    def __str__(self) -> str:
        """Return, for example, “2 of 5 images”."""
        return f"{self.done} of {self.total} {self.unit}"


class Screen:
    """The outputs of one view during one run.

    Pictures are written to files, which Gradio copies once; it would encode an image anew at
    every update. Each file holds what it was made from.

    values     of the outputs by name
    record     what goes into every file
    unfinished the last preview of the arm in progress
    status     how far a download or a series of images is, if there is one
    """

    def __init__(
        self,
        outputs: Mapping[str, gr.components.Component],
        settings: Settings,
        record: dict,
        folder: Path,
    ) -> None:
        self.values: dict[str, Any] = {
            name: "" if isinstance(output, (gr.Markdown, gr.Textbox, gr.Code)) else None
            for name, output in outputs.items()
        }
        self.settings, self.record, self.folder = settings, dict(record), folder
        self.unfinished: Progress | None = None
        self.status: Status | None = None
        self.samples: dict[str, Any] = {}  # of the arms
        self.nearness: dict[str, float | None] = {}
        self.gallery: list[tuple[str, str]] = []
        self.began = time.monotonic()

    @functools.singledispatchmethod
    def show(self, event: Event) -> bool:
        """Take an event up; return whether there is something new to see."""
        return False

    @show.register
    def _show_source(self, event: Source) -> bool:
        self.record |= asdict(event)
        self.status, self.began = None, time.monotonic()  # the model is loaded
        if "caption" in self.values:
            self.values["caption"] = texts.caption(self.settings)
            self.values["made_from"] = json.dumps(astuple(self.settings))
            self.values["link"] = link(self.settings)
        return False

    @show.register
    def _show_download(self, event: Download) -> bool:
        done, total = math.ceil(event.done / 1e6), math.ceil(event.total / 1e6)
        self.status = Status(done, total, "MB", "downloading")
        return False

    @show.register
    def _show_progress(self, event: Progress) -> bool:
        self.unfinished = event
        self.values[event.arm] = self._file(f"{event.arm}-preview", event.preview)
        self.values[f"{event.arm}_cost"] = f"forward {event.forwards} of {event.total}"
        return True

    @show.register
    def _show_arm(self, event: Arm) -> bool:
        self.unfinished = None
        self.samples[event.arm], self.nearness[event.arm] = event.sample, event.nearness
        about: dict[str, Any] = {"arm": event.arm}
        if event.nearness is not None:
            about["nearness"] = event.nearness
        self.values[event.arm] = self._file(self._name(event.arm), event.sample, **about)
        guided = self.samples.get("guided")
        # In all columns or in none: the first image alone can be slow, of what is done only once.
        timed = all(sample.seconds >= texts.SHOWN_SECONDS for sample in self.samples.values())
        for arm, sample in self.samples.items():
            self.values[f"{arm}_cost"] = texts.cost(
                sample.forwards,
                sample.seconds if timed else None,
                guided and guided.forwards,
                self.nearness[arm],
            )
        return True

    @show.register
    def _show_no_arm(self, event: NoArm) -> bool:
        self.values[f"{event.arm}_cost"] = event.reason
        return True

    @show.register
    def _show_compared(self, event: Compared) -> bool:
        self.values["keep"] = self._files_to_keep()
        refined = self.samples.get("refined")
        scale = refined and refined.recipe.refiner_scale
        self.values["code"] = texts.code(self.settings, self.record.get("refiner"), scale)
        return True

    @show.register
    def _show_picture(self, event: Picture) -> bool:
        name = self._name(f"{self.record['view']}-{len(self.gallery) + 1:02}")
        self.gallery.append((self._file(name, event.image, caption=event.caption), event.caption))
        self.values["images"] = list(self.gallery)
        done = len(self.gallery)
        remaining = texts.remaining(done, event.total, time.monotonic() - self.began)
        self.status = Status(done, event.total, "images", remaining)
        return True

    @show.register
    def _show_figure(self, event: Figure) -> bool:
        self.values[event.output] = self._file(self._name(event.output), event.figure)
        return True

    @show.register
    def _show_note(self, event: Note) -> bool:
        self.values["note"] = event.text
        return True

    @show.register
    def _show_pair(self, event: Pair) -> bool:
        self.values["left"] = self._file("left", event.left)
        self.values["right"] = self._file("right", event.right)
        settings = replace(self.settings, prompt=event.prompt, seed=event.seed)
        self.values["pair"] = (settings, *event.arms)
        return True

    @show.register
    def _show_noise(self, event: Noise) -> bool:
        path = self.folder / f"{self._name('noise')}.safetensors"
        path.write_bytes(event.data)
        self.values["noise"] = str(path)
        return True

    def stopped(self, picture: Image.Image | None) -> None:
        """Say that the run was stopped; picture: the decoded x0 of its last step."""
        if self.unfinished:
            arm, done = self.unfinished.arm, self.unfinished.forwards
            total = texts.counted(self.unfinished.total, "forward")
            shown = "the image it expected then" if picture else "a rough preview"
            self.values[f"{arm}_cost"] = f"**Stopped** after {done} of {total}: {shown}"
            if picture:
                self.values[arm] = self._file(self._name(f"{arm}-after-{done}-forwards"), picture)
        if self.status and "note" in self.values:
            self.values["note"] = f"**Stopped** after {self.status}."

    def _name(self, what: str) -> str:
        return texts.file_name(self.record["settings"], what)

    def _file(self, name: str, image: Any, **about: Any) -> str:
        """Return the path of a picture, a sample or the bytes of a PNG, written as a file."""
        path = self.folder / f"{name}.png"
        if isinstance(image, Image.Image):
            save_png(image, path, self.record | about)
        elif isinstance(image, bytes):
            path.write_bytes(image)
        else:
            save_png(image.image, path, made_from(self.record, image) | about)
        return str(path)

    def _files_to_keep(self) -> list[str]:
        """Return a contact sheet, the arms and, of small ones, enlarged copies, as files."""
        captioned = [
            (f"{ARMS[arm].title}, {texts.counted(sample.forwards, 'forward')}", sample.image)
            for arm, sample in self.samples.items()
        ]
        sheet = contact_sheet(captioned, self.record["settings"]["prompt"])
        files = [self._file(self._name("contact-sheet"), sheet)]
        files += [self.values[arm] for arm in self.samples]
        for arm, sample in self.samples.items():
            if sample.image.width < ENLARGED:
                large = enlarged(sample.image, ENLARGED)
                files.append(self._file(self._name(f"{arm}-enlarged"), large, arm=arm))
        return files


def made_from(record: dict, sample: Any) -> dict:
    """Return the record with the sample's recipe and what makes it again.

    Where an arm of a comparison is this image, that is the comparison with the settings returned;
    otherwise the record's view, with its settings and controls.
    """
    recipe = sample.recipe
    made = {"recipe": asdict(recipe), "forwards": sample.forwards}
    is_arm = recipe.noise is None and recipe.refining_prompt is None and recipe.prompt
    if not is_arm or (recipe.guidance_scale > 1 and recipe.strength):
        return record | made
    settings = {
        "prompt": recipe.prompt,
        "seed": recipe.seed,
        "steps": recipe.steps,
        "sampler": recipe.sampler,
    }
    if recipe.strength:
        settings["strength"] = recipe.strength
    if scale := recipe.refiner_scale or (recipe.guidance_scale > 1 and recipe.guidance_scale):
        settings["guidance_scale"] = scale
    if recipe.refiner_scale:  # the view may have taken the refiner by itself
        folders = {shown(Path(entry.folder)): name for name, entry in REFINERS.items()}
        if name := folders.get(record["refiner"]):
            settings["refiner"] = name
    settings = record["settings"] | settings
    return record | made | {"settings": settings, "view": "compare", "controls": {}}
