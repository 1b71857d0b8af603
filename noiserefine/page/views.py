"""What the page shows, made: every view's images, plots and sentences.

Each function works on a Job and reports updates by the names of the page's outputs.
"""

import itertools
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from PIL import Image
from safetensors.torch import save

from noiserefine.analysis import explore
from noiserefine.analysis.attention import attention, first_word
from noiserefine.analysis.compare import columns
from noiserefine.analysis.figures import difference_histogram, radial_spectrum
from noiserefine.analysis.recipe import MAX_STEPS, Maker, Recipe, Sample
from noiserefine.analysis.spectrum import (
    LOW_FREQUENCY,
    energy_below,
    heat_map,
    low_frequency_difference,
)
from noiserefine.analysis.trajectory import FRAMES, evenly, trajectory
from noiserefine.models.catalogue import Model
from noiserefine.models.pool import Loaded, Models
from noiserefine.noise import MAX_SEED
from noiserefine.page.blind import in_random_order
from noiserefine.page.settings import (
    MAX_TEXT,
    REFINERS,
    ZERO_GPU,
    Settings,
    number,
    text,
    whole,
)
from noiserefine.page.stream import Worker, stream
from noiserefine.samplers import unet_calls

MOST_IMAGES = 96  # of one view
PREVIEW_SECONDS = 0.15  # between two looks at an unfinished image
MODELS, WORKER = (
    Models(keep_all=ZERO_GPU),
    Worker(),
)  # a view that was left ends at its next step; until then the models are its own


@dataclass
class Job:
    """What a view works with: it reports updates of the page, by the names of its outputs."""

    loaded: Loaded
    make: Maker
    recipe: Recipe
    guided: bool
    report: Callable[[dict], None]

    def columns(self, **changes) -> dict[str, Recipe]:
        """The recipes of the columns that this model has, by name; changes: fields of the recipe."""
        return columns(
            replace(self.recipe, **changes), self.guided, self.loaded.refiner is not None
        )

    def show(
        self, images: Iterator[tuple[str, Sample | Image.Image]], columns: int | None = None
    ) -> None:
        """Reports images, (caption, Sample or picture), as they come; columns: how many are side by side, where the view's own number doesn't fit."""
        shown = []
        for image in images:
            shown.append(image)
            self.report({"images": list(shown), "columns": columns})

    def noise(self, recipe: Recipe) -> torch.Tensor:
        """What sampling starts from, (1, C, h, w) on the CPU in float32, rounded as the pipeline's precision rounds it."""
        return self.make.refine(recipe, self.make.draw(recipe)).float().cpu()

    def needs_refiner(self, strength: bool = True) -> None:
        """Raises ValueError where there is none, and where it is asked to do nothing."""
        if self.loaded.refiner is None:
            raise ValueError(
                "This view needs a refiner, and none exists for this model yet. The first comparison shows the command that trains one."
            )
        if strength and self.recipe.strength == 0:
            raise ValueError(
                "The refinement strength is 0, and this view shows what refining does: set it above 0, to 1 for instance."
            )

    def needs_guidance(self) -> None:
        """Raises ValueError for a model that is sampled without."""
        if not self.guided:
            raise ValueError(
                "This view is about guidance, and this model is distilled to be sampled without it."
            )


def show_columns(job: Job) -> None:
    """The three columns, the change of the noise, and files to keep."""
    preview, report, done = (
        job.loaded.preview,
        job.report,
        {},
    )  # the preview is fitted before the clock runs
    if not job.guided:
        job.report(
            {
                "guided_cost": "**Not applicable**: this model is distilled to be sampled without guidance."
            }
        )
    for name, recipe in job.columns().items():
        steps, of = itertools.count(1), unet_calls(recipe.sampler, recipe.steps)
        job.make.on_step = lambda _, x0, name=name, steps=steps, of=of: report(
            {name: preview(x0), f"{name}_cost": f"step {next(steps)} of {of}"}
        )
        done[name] = job.make(recipe)
        job.report(
            {name: done[name]}
            | {f"{each}_cost": cost(sample, done.get("guided")) for each, sample in done.items()}
        )
    job.report({"keep": done, "says": job.loaded.says})
    if job.loaded.refiner is None:
        return
    if job.recipe.strength == 0:
        job.report(
            {
                "says": f"The refinement strength is 0: the third column starts from the Gaussian noise as it is. {job.loaded.says}"
            }
        )
        return
    x_T, x_hat = (torch.from_numpy(done[name].x_T) for name in ("gaussian", "refined"))
    share = energy_below(x_hat - x_T)
    job.report(
        {
            "heat": heat_map(low_frequency_difference(x_T, x_hat), done["refined"].image.size),
            "layout": done["refined"],
            "says": f"**What the refiner changed.** The heat map is the part of the change in x_T below {LOW_FREQUENCY} of the frequency "
            f"radius: {share:.0%} of its energy. It is bright where the refiner changed the noise most; beside it is the image that "
            f"grew from the refined noise. {job.loaded.says}",
        }
    )


def cost(sample: Sample, guided: Sample | None) -> str:
    """Forwards and seconds of a column, and what they are of the guided one's."""
    lines = [
        f"**{sample.forwards}** UNet forward{'s' * (sample.forwards > 1)}",
        f"{sample.seconds:.2f} s",
    ]
    if guided and sample is not guided:
        lines[0] += f" · {sample.forwards / guided.forwards:.0%} of CFG"
        lines[1] += f" · {sample.seconds / guided.seconds:.0%} of CFG"
    return "  \n".join(lines)


def show_strengths(job: Job) -> None:
    job.needs_refiner(strength=False)
    job.show(explore.strengths(job.make, job.recipe))


def show_guidance_scales(job: Job) -> None:
    job.needs_refiner()
    job.needs_guidance()
    if job.loaded.refiner and not job.loaded.refiner.takes_guidance_scale:
        titles = " or ".join(f"“{title}”" for title, _ in REFINERS.values())
        raise ValueError(
            f"This refiner takes no guidance scale. For the embedded model choose {titles} under Settings, Refiner; "
            "for others train one with train/train_refiner.py --guidance_scale_range."
        )
    job.show(explore.guidance_scales(job.make, job.recipe))


def show_samplers(job: Job) -> None:
    job.needs_refiner()
    job.show(explore.samplers_and_steps(job.make, job.recipe))


def show_frequencies(job: Job, cutoff: float) -> None:
    job.needs_refiner()
    if not 0 <= number(cutoff, "The cutoff") <= 1:
        raise ValueError(
            f"The cutoff is a share of the largest frequency, from 0 to 1; got {cutoff}."
        )
    refined = job.make(job.recipe.refined)
    x_T, x_hat, image = job.noise(job.recipe.gaussian), torch.from_numpy(refined.x_T), refined.image
    other = job.make.draw(replace(job.recipe, seed=(job.recipe.seed + 1) % (MAX_SEED + 1)))
    heat = heat_map(low_frequency_difference(x_T, x_hat, cutoff), image.size)
    job.report(
        {
            "histogram": difference_histogram(x_T, x_hat, other),
            "spectrum": radial_spectrum(x_T, x_hat),
            "overlay": Image.blend(image, heat, 0.6),
        }
    )
    job.show(explore.bands(job.make, job.recipe, cutoff))


def show_trajectory(job: Job) -> None:
    shown = []
    for name, recipe in job.columns().items():

        def on_frame(forward: int, image: Image.Image, name: str = name) -> None:
            shown.append((f"{name.capitalize()}, forward {forward}", image))
            job.report(
                {
                    "images": list(shown),
                    "columns": min(FRAMES, unet_calls(job.recipe.sampler, job.recipe.steps)),
                }
            )

        trajectory(job.make, recipe, on_frame)


def show_two_prompts(job: Job, other: str) -> None:
    job.needs_refiner()
    if not text(other, "The other prompt").strip():
        raise ValueError("The other prompt is empty: say what to denoise with.")
    job.make.check(replace(job.recipe, prompt=other))
    job.show(explore.two_prompts(job.make, job.recipe, other))


def show_interpolation(job: Job, seed: float) -> None:
    job.needs_refiner()
    job.show(explore.interpolation(job.make, job.recipe, whole(seed, "The other seed")))


def show_guided_from_refined(job: Job) -> None:
    job.needs_refiner()
    job.needs_guidance()
    job.show(explore.guided_from_refined(job.make, job.recipe))


def show_attention(job: Job, word: str) -> None:
    word = text(word, "The word").strip() or first_word(job.recipe.prompt)

    def images() -> Iterator[tuple[str, Image.Image]]:
        for name, recipe in job.columns().items():
            maps, sample = attention(job.make, recipe, word)
            for i in evenly(len(maps), FRAMES):
                heat = heat_map(maps[i].numpy(), sample.image.size)
                yield (
                    f"{name.capitalize()}, “{word}” in forward {i + 1}",
                    Image.blend(sample.image, heat, 0.6),
                )

    job.show(images(), min(FRAMES, unet_calls(job.recipe.sampler, job.recipe.steps)))


def show_blind(job: Job, opponent: str) -> None:
    """Two arms of a new seed, in random order."""
    job.needs_refiner()
    seed = secrets.randbelow(MAX_SEED + 1)
    recipes = job.columns(seed=seed)
    if opponent not in recipes or opponent == "refined":
        raise ValueError(f"There is no {opponent!r} image of this model to compare with.")
    left, right = in_random_order("refined", opponent)
    images = {
        arm: job.make(recipes[arm]).image for arm in ("refined", opponent)
    }  # always in one order: the time it takes says nothing
    job.report(
        {
            "left": images[left],
            "right": images[right],
            "pair": (job.recipe.prompt, seed, left, right),
        }
    )


def show_many(job: Job, prompts: str, count: float) -> None:
    lines = [
        line.strip()
        for line in text(prompts, "The list of prompts", 2 * MAX_TEXT).splitlines()
        if line.strip()
    ] or [job.recipe.prompt]
    count = whole(count, "The number of images a prompt")
    recipes = {
        (prompt, seed): job.columns(prompt=prompt, seed=seed)
        for prompt in lines
        for seed in range(job.recipe.seed, job.recipe.seed + count)
    }
    total = sum(len(arms) for arms in recipes.values())
    if not 1 <= total <= MOST_IMAGES:
        raise ValueError(
            f"{len(lines)} prompts with {count} images each are {total} images in all columns; from 1 to {MOST_IMAGES} can be made in one go."
        )
    for arms in recipes.values():
        for recipe in arms.values():
            job.make.check(recipe)
    job.show(
        (
            (f"{prompt} · seed {seed} · {name}", job.make(recipe))
            for (prompt, seed), arms in recipes.items()
            for name, recipe in arms.items()
        ),
        len(job.columns()),
    )


def make_noise(job: Job) -> None:
    """x_T and the refined noise, as the bytes of a safetensors file."""
    job.needs_refiner(strength=False)
    job.report(
        {
            "noise": save(
                {"x_T": job.noise(job.recipe.gaussian), "refined": job.noise(job.recipe.refined)}
            )
        }
    )


VIEWS: dict[str, Callable[..., None]] = {
    "compare": show_columns,
    "refine": make_noise,
    "strength": show_strengths,
    "guidance_scale": show_guidance_scales,
    "samplers": show_samplers,
    "frequencies": show_frequencies,
    "trajectory": show_trajectory,
    "two_prompts": show_two_prompts,
    "interpolation": show_interpolation,
    "guided_from_refined": show_guided_from_refined,
    "attention": show_attention,
    "blind": show_blind,
    "many": show_many,
}
IMAGES = {  # of a view, a guided one counting as two
    "compare": 4,
    "refine": 1,
    "strength": 10,
    "guidance_scale": 15,
    "frequencies": 8,
    "trajectory": 5,
    "two_prompts": 8,
    "interpolation": 14,
    "guided_from_refined": 6,
    "attention": 8,
    "blind": 3,
}


def seconds_of_gpu(view: str, settings: Settings, extras: tuple) -> int:
    """What a view may take on ZeroGPU, generously; 18 s for the comparison at SD2.1's defaults."""
    steps = (
        settings.steps
        if isinstance(settings.steps, (int, float)) and 1 <= settings.steps <= MAX_STEPS
        else 1
    )  # others are refused
    images: float
    if view == "samplers":
        images, steps = (
            12,
            sum(explore.STEPS),
        )  # five samplers, one of which takes two forwards a step, from two noises
    elif view == "many":
        prompts, count = extras
        wanted = (
            4
            * max(1, len(prompts.splitlines()) if isinstance(prompts, str) else 1)
            * (count if isinstance(count, (int, float)) and count >= 1 else 1)
        )
        images = min(wanted, 4 * MOST_IMAGES / 3)
    else:
        images = IMAGES[view]
    return int(
        10 + images * (steps + 1) * (0.03 if str(settings.backbone).startswith("emoji") else 0.1)
    )


def recipe_of(settings: Settings) -> Recipe:
    """Raises ValueError for what no model can make an image from."""
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
    view: str,
    settings: Settings,
    extras: tuple,
    last: dict[tuple[Model, Recipe], Sample],
    on_load: Callable[[str], None],
) -> Iterator[dict]:
    """Works on a view and yields updates by the names of its outputs; closed early, it stops at the next step.

    extras: the values of the view's own controls.
    last: this visitor's images so far, by what made them and recipe; none of them is made again.  New ones are yielded as "made".
    on_load: called with a sentence before a model is loaded.
    Raises ValueError or OSError for what can't be made, and MemoryError where the memory is full.
    """
    asked, model = recipe_of(settings), settings.model
    if not MODELS.has(model):
        on_load(f"Loading {model.title} …")

    def show(report: Callable[[dict], None]) -> None:
        loaded = MODELS.get(model)
        scale = loaded.refiner.scale_input(asked.guidance_scale) if loaded.refiner else None
        recipe = replace(
            asked,
            refiner_scale=scale,
            guidance_scale=asked.guidance_scale if model.takes_guidance else 1.0,
        )
        make = Maker(
            loaded.pipe,
            loaded.refiner,
            {
                recipe: sample
                for (of, recipe), sample in last.items()
                if of == maker_of(model, recipe)
            },
            on_made=lambda sample: report(
                {"made": {(maker_of(model, sample.recipe), sample.recipe): sample}}
            ),
            on_step=lambda *_: report({}),
        )
        make.check(recipe if loaded.refiner else recipe.guided)
        report(
            {
                "about": {
                    "backbone": model.backbone,
                    "revision": loaded.revision,
                    "refiner_sha256": loaded.refiner and loaded.refiner.weights_sha256,
                }
            }
        )
        VIEWS[view](Job(loaded, make, recipe, model.takes_guidance, report), *extras)

    try:
        for updates in stream(WORKER, show, PREVIEW_SECONDS):
            made = {
                key: sample for update in updates for key, sample in update.get("made", {}).items()
            }
            yield {name: value for update in updates for name, value in update.items()} | {
                "made": made
            }
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not re.search(
            "out of memory|can't allocate|ALLOC_FAILED", str(error)
        ):
            raise
        MODELS.forget(lambda other: other.backbone == model.backbone)
        raise MemoryError(
            "The memory is full. A smaller size or backbone needs less of it, and so does the app on a graphics card when it is "
            f"started with {MODELS.smaller_mode()}."
        ) from error


def maker_of(model: Model, recipe: Recipe) -> Model:
    """What the recipe's image depends on of the model: not the refiner where it isn't used."""
    return model if recipe.strength else replace(model, refiner="")
