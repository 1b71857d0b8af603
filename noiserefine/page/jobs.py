"""The work behind a click: load the models, run the view, stream its events."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from noiserefine.analysis import attention
from noiserefine.analysis.compare import arms
from noiserefine.analysis.recipe import Maker, Recipe, Sample
from noiserefine.analysis.trajectory import FRAMES
from noiserefine.checkpoint import CONFIG_NAME, read_config
from noiserefine.denoiser import can_guide, guidance_kind
from noiserefine.latents import decode
from noiserefine.models.catalogue import BACKBONES, Model
from noiserefine.models.devices import memory_is_full
from noiserefine.models.downloads import listening
from noiserefine.models.pool import Loaded, Models
from noiserefine.page.events import Download, Event, Made, Picture, Progress, Source, Tick
from noiserefine.page.settings import REFINERS, ZERO_GPU, Settings, number, text, whole
from noiserefine.page.stream import Worker, stream
from noiserefine.page.training import shown
from noiserefine.page.views import ARMS, VIEWS, Abilities, View
from noiserefine.page.vocabulary import is_embedded
from noiserefine.samplers import forwards

# Why a model has no guided images.
DISTILLED = "this model is distilled to be sampled without guidance."
GUIDED_BY_INPUT = "this network takes the guidance scale as an input; plain is guided already."
PREVIEW_SECONDS = 0.15  # between two previews of an unfinished image
# One worker: a view that was left ends at its next step and owns the models until then.
MODELS, WORKER = Models(keep_all=ZERO_GPU), Worker()


@dataclass
class Job:
    """The models and the recipe a view works with, and its way to report events."""

    loaded: Loaded
    make: Maker
    recipe: Recipe
    backbone: str  # as the visitor named it
    abilities: Abilities
    report: Callable[[Event], None]

    def arms(self, **changes: Any) -> dict[str, Recipe]:
        """Return the recipes of the arms this model has, by name; `changes` are recipe fields."""
        recipe = replace(self.recipe, **changes)
        return arms(recipe, not self.abilities.no_guided_arm, self.loaded.refiner is not None)

    def show(self, images: Iterable[tuple[str, Sample | Image.Image]], total: int) -> None:
        """Report (caption, image) pairs of `total` images to the gallery as they come."""
        for caption, image in images:
            pixels = image.image if isinstance(image, Sample) else image
            black = self.has_checker and not pixels.getbbox()
            says = ", blacked out by the safety checker" if black else ""
            self.report(Picture(caption + says, image, total))

    @property
    def has_checker(self) -> bool:
        """Return whether the model has a safety checker, which makes images black."""
        return getattr(self.loaded.pipe, "safety_checker", None) is not None

    def frames(self) -> int:
        """Return how many frames a film of the recipe's sampling has."""
        return min(FRAMES, forwards(self.recipe.sampler, self.recipe.steps))

    def unusual_guidance(self) -> str:
        """Return a hint where the scale is the embedded model's, and another family's is usual."""
        usual, scale = self.loaded.usage.guidance_scale, self.recipe.guidance_scale
        default = Settings("").guidance_scale
        if self.abilities.no_guided_arm or not usual or is_embedded(self.backbone):
            return ""
        if scale != default or usual == default:
            return ""
        return (
            f"The guidance scale {default:g} suits the embedded model; {usual:g} is usual for "
            f"{self.loaded.usage.title}, and the guided column is weaker than it could be."
        )

    def screened(self, image: Image.Image) -> Image.Image:
        """Return an unfinished image as the model's safety checker lets it pass."""
        if not self.has_checker:
            return image
        pixels = np.asarray(image, np.float32)[None] / 255
        device, dtype = self.loaded.pipe._execution_device, self.loaded.pipe.dtype
        checked, _ = self.loaded.pipe.run_safety_checker(pixels, device, dtype)
        return Image.fromarray((checked[0] * 255).round().astype(np.uint8))

    def previewed(self, arm: str, recipe: Recipe) -> Sample:
        """Make the recipe, with a preview of the predicted x0 at every step."""
        guided, refined = recipe.guidance_scale > 1, recipe.strength > 0
        total = forwards(recipe.sampler, recipe.steps) * (1 + guided) + refined

        def on_x0(x0: torch.Tensor, count: int) -> None:
            preview = self.screened(self.loaded.preview(x0))
            self.report(Progress(arm, preview, x0.float().cpu().numpy(), count, total))

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
    view = VIEWS[view_name]
    asked, model = recipe_of(settings), model_of(settings, view)
    if not MODELS.find(model):
        on_load(f"Loading {model.title} …")

    def load_and_show(report: Callable[[Event], None]) -> None:
        with listening(lambda done, total: report(Download(done, total))):
            loaded = MODELS.get(model)
        job = _prepare(loaded, model, asked, known, report)
        refiner = loaded.refiner
        # Before any forward; a view of the refiner's own scales does not use the slider's.
        refines = refiner and not view.wants_scale_refiner
        job.make.check(job.recipe if refines else job.recipe.guided)
        used: tuple[str | None, str | None] = (None, None)
        if refiner and refiner.source:
            used = shown(Path(refiner.source)), refiner.weights_sha256
        report(Source(model.backbone, loaded.revision, *used))
        if reason := view.unmet(job.abilities):
            raise ValueError(reason)
        view.function(job, **controls)

    try:
        yield from stream(WORKER, load_and_show, PREVIEW_SECONDS)
    except RuntimeError as error:
        if not memory_is_full(error):
            raise
        MODELS.forget(lambda other: other.backbone == model.backbone)
        raise MemoryError(
            "The memory is full. A smaller size or backbone needs less of it, and so does the app "
            f"on a graphics card when it is started with {MODELS.smaller_mode()}."
        ) from error


def _prepare(
    loaded: Loaded,
    model: Model,
    recipe: Recipe,
    known: Mapping[tuple[Model, Recipe], Sample],
    report: Callable[[Event], None],
) -> Job:
    """Return the job of a recipe."""
    refiner, abilities = loaded.refiner, _abilities_of(loaded, recipe)
    scale = recipe.guidance_scale if abilities.takes_scale else None
    guidance_scale = 1.0 if abilities.no_guidance else recipe.guidance_scale
    recipe = replace(recipe, refiner_scale=scale, guidance_scale=guidance_scale)
    make = Maker(
        loaded.pipe,
        refiner,
        {made: sample for (by, made), sample in known.items() if by == _part_used(model, made)},
        on_made=lambda sample: report(Made(_part_used(model, sample.recipe), sample)),
        on_step=lambda: report(Tick()),
    )
    return Job(loaded, make, recipe, model.backbone, abilities, report)


def _abilities_of(loaded: Loaded, recipe: Recipe) -> Abilities:
    """Return what a model in memory and a recipe offer to a view."""
    refiner, no_guidance = loaded.refiner, ""
    if loaded.usage.guidance_scale is None:
        embedded = not can_guide(loaded.pipe) and guidance_kind(loaded.pipe) == "embedded"
        no_guidance = GUIDED_BY_INPUT if embedded else DISTILLED
    return Abilities(
        recipe.strength,
        recipe.guidance_scale,
        no_guidance,
        refines=refiner is not None,
        takes_scale=refiner is not None and refiner.takes_guidance_scale,
        no_attention=attention.hindrance(loaded.pipe),
    )


def _listed_abilities(model: Model, recipe: Recipe) -> Abilities | None:
    """Return what the catalogue and files on this machine say before a model is loaded.

    None for a model that is not listed.
    """
    listed = BACKBONES.get(model.backbone)
    if listed is None:
        return None
    folder = Path(model.refiner or listed.refiner)
    config = read_config(folder) if (folder / CONFIG_NAME).is_file() else None
    return Abilities(
        recipe.strength,
        recipe.guidance_scale,
        "" if listed.guidance_scale else DISTILLED,
        refines=config is not None or bool(model.refiner),
        # A refiner that is not here yet may take it.
        takes_scale=bool(config.guidance_scale_range) if config else bool(model.refiner),
    )


def _known_abilities(settings: Settings, view: View) -> Abilities | None:
    """Return what can be said of a model without loading it, or None.

    A picture may be sampled with it right now, whose LoRA has a weight and whose tokenizers and
    text encoders no second thread may use: the model is asked nothing but what it is.
    """
    try:
        recipe, model = recipe_of(settings), model_of(settings, view)
        loaded = MODELS.find(model)
        return _abilities_of(loaded, recipe) if loaded else _listed_abilities(model, recipe)
    except (ValueError, OSError):  # said when something is made
        return None


def model_of(settings: Settings, view: View) -> Model:
    """Return the model, for views of the guidance scale with a refiner that takes it."""
    model = settings.model
    if not view.wants_scale_refiner or model.refiner:
        return model
    found = (entry for entry in REFINERS.values() if entry.backbone == model.backbone)
    return next((replace(model, refiner=entry.folder) for entry in found), model)


def number_of_arms(settings: Settings) -> int:
    """Return how many arms a comparison has, as far as can be said without loading its model."""
    abilities = _known_abilities(settings, VIEWS["compare"])
    return 1 + (not abilities.no_guided_arm) + abilities.refines if abilities else len(ARMS)


def hindrances(settings: Settings, views: Iterable[str]) -> dict[str, str]:
    """Return for views that cannot work with the settings why not, without loading a model."""
    reasons = {}
    for name in views:
        abilities = _known_abilities(settings, VIEWS[name])
        if abilities and (reason := VIEWS[name].unmet(abilities)):
            reasons[name] = reason
    return reasons


def decoded(model: Model, x0: np.ndarray) -> Image.Image | None:
    """Return the picture of an x0, (1, C, h, w); None on ZeroGPU, whose card is gone by then."""
    loaded = MODELS.find(model)
    if ZERO_GPU or not loaded:
        return None
    [pictures] = stream(WORKER, lambda report: report(*decode(loaded.pipe, torch.from_numpy(x0))))
    return pictures[0]


def _part_used(model: Model, recipe: Recipe) -> Model:
    """Return the model without a refiner that the recipe does not use."""
    return model if recipe.strength else replace(model, refiner="")
