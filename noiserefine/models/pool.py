"""The models in memory, loaded when they are first asked for."""

import functools
import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from noiserefine.latents import fit_preview
from noiserefine.models.catalogue import BACKBONES, OFFLOADS, Model
from noiserefine.models.loading import (
    add_lora,
    default_device,
    default_dtype,
    load_pipeline,
    refiner_for,
    training_command,
)
from noiserefine.models.offload import offload
from noiserefine.refiner import Refiner, revision


@dataclass
class Loaded:
    """A model that is ready to make images."""

    pipe: DiffusionPipeline
    refiner: Refiner | None
    says: str  # what to say of both, in sentences
    revision: str | None  # commit of the hub repository

    @functools.cached_property
    def preview(self) -> Callable[[torch.Tensor], Image.Image]:
        return fit_preview(self.pipe)


class Models:
    """The embedded model and the last other one, or with keep_all every one.  One loads at a time."""

    def __init__(self, keep_all: bool = False) -> None:
        self.offload, self.compiled, self.keep_all, self.lock = (
            "none",
            False,
            keep_all,
            threading.Lock(),
        )
        self.loaded: dict[Model, Loaded] = {}

    def has(self, model: Model) -> bool:
        return replace(model, lora_weight=1.0) in self.loaded

    def get(self, model: Model) -> Loaded:
        """The model with its LoRA at its weight.

        Raises what load_pipeline, add_lora and Refiner.from_pretrained raise, and ValueError where the card is too small.
        """
        files = replace(model, lora_weight=1.0)
        with self.lock:
            loaded = self.loaded.get(files)
            if loaded is None:
                self.forget(lambda other: other != Model("emoji"))
                loaded = self.loaded[files] = self.load(files)
            if model.lora:
                loaded.pipe.set_adapters(["style"], [model.lora_weight])
            return loaded

    def forget(self, which: Callable[[Model], bool]) -> None:
        """Frees the memory of some models, where not every one is kept."""
        if self.keep_all:
            return
        self.loaded = {model: value for model, value in self.loaded.items() if not which(model)}
        gc.collect()  # offloaded networks and their hooks hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def load(self, model: Model) -> Loaded:
        backbone, device = BACKBONES.get(model.backbone), default_device()
        by_way_of_cpu = (
            self.keep_all or self.offload != "none"
        )  # where the card is not there yet, or too small
        if device.type == "cuda" and not by_way_of_cpu and backbone:
            there = torch.cuda.get_device_properties(device).total_memory / 2**30
            if there < backbone.memory:
                raise ValueError(
                    f"{backbone.title} needs about {backbone.memory:g} GiB of GPU memory and this card has {there:.0f}: start the app "
                    f"with {self.smaller_mode()}."
                )
        pipe = load_pipeline(
            model.backbone, "cpu" if by_way_of_cpu else device, default_dtype(device)
        )
        notes = [add_lora(pipe, model.lora)] if model.lora else []
        folder = model.refiner or refiner_for(pipe, backbone)
        refiner = (
            Refiner.from_pretrained(folder, pipe, merge=True if self.keep_all else None)
            if folder
            else None
        )
        if by_way_of_cpu:
            offload(pipe, refiner, self.offload, device)
        if self.compiled:
            pipe.unet.compile_repeated_blocks()  # in place: hooks on the UNet and its weights stay as they are
        if refiner is None:
            notes.append(
                "**No refiner exists for this model yet**, so there is no third column. This trains one:\n\n"
                f"`{training_command(pipe, model.backbone, backbone)}`"
            )
        else:
            scales = "takes no guidance scale" + (
                ": the slider drives the guided column only." if model.takes_guidance else "."
            )
            if refiner.config.guidance_scale_range is not None:
                low, high = refiner.config.guidance_scale_range
                scales = f"takes the guidance scale, from {low:g} to {high:g}: the slider drives the guided and the refined column."
            known = backbone and not model.refiner  # to be a fine-tune of the refiner's base
            notes += ["" if known else refiner.note, f"This refiner {scales}"]
        return Loaded(pipe, refiner, " ".join(note for note in notes if note), revision(pipe))

    def smaller_mode(self) -> str:
        """The flag of the next offload mode that needs less memory."""
        modes = list(OFFLOADS)
        return f"--offload {modes[min(modes.index(self.offload) + 1, len(modes) - 1)]}"
