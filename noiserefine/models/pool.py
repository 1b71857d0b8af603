"""The models in memory, loaded when they are first asked for."""

import functools
import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image

from noiserefine.checkpoint import read_config, resolve, revision
from noiserefine.denoiser import denoiser
from noiserefine.latents import fit_preview
from noiserefine.models.catalogue import OFFLOADS, Model, Usage
from noiserefine.models.devices import default_device
from noiserefine.models.loading import fetch_source, load_pipeline, read_source
from noiserefine.models.offload import offload
from noiserefine.models.refiners import refiner_for, training_command
from noiserefine.models.usage import usage_of
from noiserefine.models.user_lora import (
    add_lora,
    find_lora,
    read_lora,
    remove_lora,
    set_lora_weight,
)
from noiserefine.refiner import Refiner

EMBEDDED = Model("emoji")


@dataclass
class Loaded:
    """A model that is ready to make images."""

    pipe: DiffusionPipeline
    scheduler: SchedulerMixin  # the backbone's; a few-step LoRA replaces the pipeline's
    refiner: Refiner | None
    usage: Usage
    lora_note: str  # what to say of the LoRA, in sentences
    note: str  # what to say of the refiner
    revision: str | None  # commit of the hub repository

    @property
    def notes(self) -> str:
        """Return the notes on LoRA and refiner as one text."""
        return " ".join(note for note in (self.lora_note, self.note) if note)

    @functools.cached_property
    def preview(self) -> Callable[[torch.Tensor], Image.Image]:
        """Return the function from latents to a rough picture."""
        return fit_preview(self.pipe)


class Models:
    """The embedded model and the last other one, or with keep_all every one."""

    def __init__(self, keep_all: bool = False) -> None:
        self.offload = "none"
        self.compiled = False
        self.keep_all = keep_all
        self.lock = threading.Lock()
        self.loaded: dict[Model, Loaded] = {}

    def find(self, model: Model) -> Loaded | None:
        """Return the model if it is in memory, its LoRA at the weight that was last asked for."""
        return self.loaded.get(replace(model, lora_weight=1.0))

    def get(self, model: Model) -> Loaded:
        """Return the model with its LoRA at its weight.

        Files are downloaded and checked first, so that a wrong name or a stopped download costs no
        model that is in memory; another refiner or LoRA of a backbone in memory is exchanged on it.
        Raises what load_pipeline, add_lora and Refiner.from_pretrained raise, and ValueError where
        the card is too small.
        """
        files = replace(model, lora_weight=1.0)
        with self.lock:
            if files not in self.loaded:
                self._fetch(files)
                like = self._exchangeable(files)
                self.forget(lambda other: other not in (EMBEDDED, like))
                if like:
                    self._exchange(like, files)
                else:
                    self.loaded[files] = self.load(files)
            loaded = self.loaded[files]
            if model.lora:
                set_lora_weight(loaded.pipe, model.lora_weight)
            return loaded

    def _fetch(self, model: Model) -> None:
        """Download what is not there; raise what loading raises, as far as files tell."""
        if model.lora:
            read_lora(find_lora(model.lora)[0], model.lora)
        if model.refiner:
            read_config(resolve(model.refiner))
        if not any(other.backbone == model.backbone for other in self.loaded):
            fetch_source(model.backbone)

    def _exchangeable(self, model: Model) -> Model | None:
        """Return the model in memory whose LoRA and refiner may be exchanged, if any.

        The embedded model stays as it is.  Offloaded and compiled networks cannot change their
        layers.
        """
        if self.keep_all or self.compiled or self.offload != "none":
            return None
        same = (other for other in self.loaded if other.backbone == model.backbone)
        return next((other for other in same if other != EMBEDDED), None)

    def _exchange(self, old: Model, new: Model) -> None:
        """Give the backbone of a model in memory another model's LoRA and refiner."""
        loaded = self.loaded.pop(old)
        if new.lora != old.lora:
            remove_lora(loaded.pipe)
            loaded.pipe.scheduler, loaded.lora_note = loaded.scheduler, ""
            old = replace(old, lora="")
        try:
            if new.lora != old.lora:
                loaded.lora_note = add_lora(loaded.pipe, new.lora)
                old = replace(old, lora=new.lora)
            if new.refiner != old.refiner:
                guided = loaded.usage.guidance_scale is not None
                loaded.refiner, loaded.note = self._refiner(new, loaded.pipe, guided)
                old = new
        finally:
            self.loaded[old] = loaded  # what it is, also where LoRA or refiner turn out not to fit

    def forget(self, which: Callable[[Model], bool]) -> None:
        """Free the memory of some models, where not every one is kept."""
        if self.keep_all:
            return
        self.loaded = {model: value for model, value in self.loaded.items() if not which(model)}
        gc.collect()  # offloaded networks and their hooks hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def load(self, model: Model) -> Loaded:
        """Load the model; raise ValueError where the card is too small."""
        (_, _, backbone), device = read_source(model.backbone), default_device()
        # Where the card is not there yet, or too small, the networks reach it later.
        by_way_of_cpu = self.keep_all or self.offload != "none"
        if device.type == "cuda" and not by_way_of_cpu and backbone:
            memory = torch.cuda.get_device_properties(device).total_memory / 2**30
            if memory < backbone.memory:
                raise ValueError(
                    f"{backbone.title} needs about {backbone.memory:g} GiB of GPU memory and this "
                    f"card has {memory:.0f}: start the app with {self.smaller_mode()}."
                )
        place = None if by_way_of_cpu else DiffusionPipeline.to
        pipe = load_pipeline(model.backbone, device, place=place)
        scheduler = pipe.scheduler
        lora_note = add_lora(pipe, model.lora) if model.lora else ""
        usage = usage_of(pipe, backbone)
        refiner, note = self._refiner(model, pipe, usage.guidance_scale is not None)
        if by_way_of_cpu:
            offload(pipe, refiner, self.offload, device)
        if self.compiled:
            # In place: hooks on the denoiser and its weights stay as they are.
            denoiser(pipe).compile_repeated_blocks()
        return Loaded(pipe, scheduler, refiner, usage, lora_note, note, revision(pipe))

    def _refiner(
        self, model: Model, pipe: DiffusionPipeline, guided: bool
    ) -> tuple[Refiner | None, str]:
        """Return the model's refiner on the pipeline, and what to say of it."""
        _, _, backbone = read_source(model.backbone)
        folder = model.refiner or refiner_for(pipe, backbone)
        if folder is None:
            command = training_command(pipe, model.backbone, backbone)
            return None, (
                "**No refiner exists for this model yet**, so there is no third column. This "
                f"trains one:\n\n```\n{command}\n```\n\n"
                "With `--dry_run` the command prints an estimate of what it costs. The Train tab, "
                "if there is one, runs it here. The refiner is used from the app's next start, or "
                "once it is named under Settings, Refiner."
            )
        refiner = Refiner.from_pretrained(folder, pipe, merge=True if self.keep_all else None)
        scales = "takes no guidance scale" + (
            ": the slider drives the guided column only." if guided else "."
        )
        if refiner.config.guidance_scale_range is not None:
            low, high = refiner.config.guidance_scale_range
            scales = (
                f"takes the guidance scale, from {low:g} to {high:g}: the slider drives the guided "
                "and the refined column."
            )
        known = backbone and not model.refiner  # to be a fine-tune of the refiner's base
        notes = ["" if known else refiner.note, f"This refiner {scales}"]
        return refiner, " ".join(note for note in notes if note)

    def smaller_mode(self) -> str:
        """Return the flag of the next offload mode that needs less memory."""
        modes = list(OFFLOADS)
        return f"--offload {modes[min(modes.index(self.offload) + 1, len(modes) - 1)]}"
