"""The work behind a click: load the models, run the view, stream its events."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from noiserefine.analysis.compare import arms
from noiserefine.analysis.recipe import Maker, Recipe, Sample
from noiserefine.models.catalogue import Model
from noiserefine.models.pool import Loaded, Models
from noiserefine.page.events import Event, Made, Picture, Progress, Source, Tick
from noiserefine.page.settings import ZERO_GPU, Settings, number, text, whole
from noiserefine.page.stream import Worker, stream
from noiserefine.page.views import VIEWS
from noiserefine.samplers import forwards

PREVIEW_SECONDS = 0.15  # between two previews of an unfinished image
# One worker: a view that was left ends at its next step and owns the models until then.
MODELS, WORKER = Models(keep_all=ZERO_GPU), Worker()


@dataclass
class Job:
    """The models and the recipe a view works with, and its way to report events."""

    loaded: Loaded
    make: Maker
    recipe: Recipe
    takes_guidance: bool
    report: Callable[[Event], None]

    def arms(self, **changes: Any) -> dict[str, Recipe]:
        """Return the recipes of the arms this model has, by name; `changes` are recipe fields."""
        recipe = replace(self.recipe, **changes)
        return arms(recipe, self.takes_guidance, self.loaded.refiner is not None)

    def show(self, images: Iterable[tuple[str, Sample | Image.Image]]) -> None:
        """Report (caption, image) pairs to the view's gallery as they come."""
        for caption, image in images:
            self.report(Picture(caption, image))

    def previewed(self, arm: str, recipe: Recipe) -> Sample:
        """Make the recipe, with a preview of the predicted x0 at every step."""
        step, steps = 0, forwards(recipe.sampler, recipe.steps)

        def on_x0(x0: torch.Tensor) -> None:
            nonlocal step
            step += 1
            self.report(Progress(arm, self.loaded.preview(x0), step, steps))

        return self.make(recipe, on_x0=on_x0)

    def latents(self, recipe: Recipe) -> torch.Tensor:
        """Return the noise that sampling starts from, (1, C, h, w), on the CPU in float32."""
        return self.make.refine(recipe, self.make.draw(recipe)).float().cpu()


def recipe_of(settings: Settings) -> Recipe:
    """Return the settings as a recipe. Raises ValueError for what no model can make."""
    width, height = (
        None if side in (0, None) else whole(side, f"The {name}")
        for name, side in (("width", settings.width), ("height", settings.height))
    )
    recipe = Recipe(
        text(settings.prompt, "The prompt"),
        whole(settings.seed, "The seed"),
        whole(settings.steps, "The number of steps"),
        text(settings.sampler, "The sampler"),
        number(settings.guidance_scale, "The guidance scale"),
        number(settings.strength, "The refinement strength"),
        negative_prompt=text(settings.negative_prompt, "The negative prompt"),
        width=width,
        height=height,
    )
    recipe.check()
    return recipe


def work(
    view_name: str,
    settings: Settings,
    controls: Mapping[str, Any],
    known: Mapping[tuple[Model, Recipe], Sample],
    on_load: Callable[[str], None],
) -> Iterator[list[Event]]:
    """Run a view and yield its events; closed early, the view stops at its next step.

    controls: values of the view's own controls, by name.
    known: the visitor's samples so far, none of which is made again.
    on_load: called with a sentence before a model is loaded.
    Raises ValueError or OSError for what cannot be made, MemoryError where the memory is full.
    """
    asked, model = recipe_of(settings), settings.model
    if not MODELS.has(model):
        on_load(f"Loading {model.title} …")

    def run(report: Callable[[Event], None]) -> None:
        job = _prepare(asked, model, known, report)
        view = VIEWS[view_name]
        if reason := view.unmet(job):
            raise ValueError(reason)
        view.function(job, **controls)

    try:
        yield from stream(WORKER, run, PREVIEW_SECONDS)
    except RuntimeError as error:
        if not _memory_is_full(error):
            raise
        MODELS.forget(lambda other: other.backbone == model.backbone)
        raise MemoryError(
            "The memory is full. A smaller size or backbone needs less of it, and so does the app "
            f"on a graphics card when it is started with {MODELS.smaller_mode()}."
        ) from error


def _prepare(
    recipe: Recipe,
    model: Model,
    known: Mapping[tuple[Model, Recipe], Sample],
    report: Callable[[Event], None],
) -> Job:
    """Load the model and check the recipe against it, before any forward."""
    loaded = MODELS.get(model)
    scale, sha256 = None, None
    if loaded.refiner:
        scale = loaded.refiner.scale_input(recipe.guidance_scale)
        sha256 = loaded.refiner.weights_sha256
    takes_guidance = loaded.usage.guidance_scale is not None
    guidance_scale = recipe.guidance_scale if takes_guidance else 1.0
    recipe = replace(recipe, refiner_scale=scale, guidance_scale=guidance_scale)
    make = Maker(
        loaded.pipe,
        loaded.refiner,
        {made: sample for (by, made), sample in known.items() if by == _part_used(model, made)},
        on_made=lambda sample: report(Made(_part_used(model, sample.recipe), sample)),
        on_step=lambda: report(Tick()),
    )
    make.check(recipe if loaded.refiner else recipe.guided)
    report(Source(model.backbone, loaded.revision, sha256))
    return Job(loaded, make, recipe, takes_guidance, report)


def _part_used(model: Model, recipe: Recipe) -> Model:
    """Return the model without a refiner that the recipe does not use."""
    return model if recipe.strength else replace(model, refiner="")


def _memory_is_full(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or bool(
        re.search("out of memory|can't allocate|ALLOC_FAILED", str(error))
    )
