"""The views of the page, one function each: what it shows, its controls, its cost and its needs.

To add a view, write a function with the decorator `view`. The page gives it a tab if it has a
title, the API an endpoint of its name, and ZeroGPU the seconds that its cost asks for.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from noiserefine.models.catalogue import BACKBONES
from noiserefine.page.blind import in_random_order
from noiserefine.page.events import Arm, Columns, Compared, Figure, NoArm, Noise, Note, Pair
from noiserefine.page.lazy import Lazy
from noiserefine.page.settings import MAX_TEXT, REFINERS, Settings, number, text, whole
from noiserefine.sampler_names import SAMPLERS

if TYPE_CHECKING:
    from noiserefine.page.jobs import Job

attentions: Any = Lazy("noiserefine.analysis.attention")
explore: Any = Lazy("noiserefine.analysis.explore")
figures: Any = Lazy("noiserefine.analysis.figures")
noise: Any = Lazy("noiserefine.noise")
recipes: Any = Lazy("noiserefine.analysis.recipe")
safetensors: Any = Lazy("safetensors.torch")
samplers_of_diffusers: Any = Lazy("noiserefine.samplers")
spectrum: Any = Lazy("noiserefine.analysis.spectrum")
torch: Any = Lazy("torch")
trajectories: Any = Lazy("noiserefine.analysis.trajectory")

MOST_IMAGES = 96  # of one view
GPU_SECONDS = 10  # for everything but forwards, generously
ARMS = {
    "gaussian": ("Gaussian noise", "no guidance"),
    "guided": ("Gaussian noise", "guided (CFG)"),
    "refined": ("Refined noise", "no guidance"),
}


# What a view can need: each returns the sentence that says what is missing, or "".


def refiner(job: "Job") -> str:
    """Return why a view that needs a refiner cannot work."""
    if job.loaded.refiner is not None:
        return ""
    return (
        "This view needs a refiner, and none exists for this model yet. The first comparison "
        "shows the command that trains one."
    )


def strength_above_0(job: "Job") -> str:
    """Return why a view that shows what refining does cannot work."""
    if job.recipe.strength > 0:
        return ""
    return (
        "The refinement strength is 0, and this view shows what refining does: set it above 0, "
        "to 1 for instance."
    )


def guidance(job: "Job") -> str:
    """Return why a view about guidance cannot work."""
    if job.takes_guidance:
        return ""
    return "This view is about guidance, and this model is distilled to be sampled without it."


def refiner_with_scale(job: "Job") -> str:
    """Return why a view that varies the refiner's guidance scale cannot work."""
    if job.loaded.refiner and job.loaded.refiner.takes_guidance_scale:
        return ""
    titles = " or ".join(f"“{title}”" for title, _ in REFINERS.values())
    return (
        f"This refiner takes no guidance scale. For the embedded model choose {titles} under "
        "Settings, Refiner; for others train one with train/train_refiner.py "
        "--guidance_scale_range."
    )


# What a view costs: a function of its settings and controls that returns forwards.


def images(count: int) -> Callable[[Settings, Mapping], float]:
    """Return the cost of `count` images, of which a guided one counts two."""
    return lambda settings, controls: count * (_steps(settings) + 1)


def _steps(settings: Settings) -> float:
    """Return the steps, or 1 where they are refused later."""
    steps = settings.steps
    return steps if isinstance(steps, (int, float)) and 1 <= steps <= recipes.MAX_STEPS else 1


def _samplers_cost(settings: Settings, controls: Mapping) -> float:
    """Return the cost of every sampler and number of steps, from two noises."""
    return sum(
        2 * (samplers_of_diffusers.forwards(sampler, steps) + 1)
        for sampler in SAMPLERS
        for steps in explore.STEPS
    )


def _many_cost(settings: Settings, controls: Mapping) -> float:
    """Return the cost of all arms of every prompt and seed, at most of those that are made."""
    prompts, count = controls["prompts"], controls["count"]
    lines = len(prompts.splitlines()) if isinstance(prompts, str) else 0
    wanted = max(1, lines) * (count if isinstance(count, (int, float)) and count >= 1 else 1)
    return images(1)(settings, controls) * min(4 * wanted, 4 * MOST_IMAGES / len(ARMS))


@dataclass(frozen=True)
class View:
    """A way to look at a prompt and seed."""

    function: Callable[..., None]  # takes the Job and the controls by name, and reports events
    title: str  # of its tab; empty for a view without one of the usual kind
    text: str  # what it shows, on the page and in the API
    cost: Callable[[Settings, Mapping], float]  # in forwards, at most
    columns: int = 4  # of its gallery
    needs: tuple[Callable[["Job"], str], ...] = ()
    controls: dict[str, Callable[[], gr.components.Component]] = field(default_factory=dict)
    outputs: dict[str, Callable[[], gr.components.Component]] = field(default_factory=dict)

    def unmet(self, job: "Job") -> str:
        """Return the first need of the view that is not met, as a sentence, or ""."""
        return next((reason for need in self.needs if (reason := need(job))), "")

    def gpu_seconds(self, settings: Settings, controls: Mapping) -> int:
        """Return the seconds of a ZeroGPU card to ask for."""
        backbone = BACKBONES.get(str(settings.backbone))
        small = backbone is not None and backbone.memory < 1
        return int(GPU_SECONDS + self.cost(settings, controls) * (0.03 if small else 0.1))


VIEWS: dict[str, View] = {}


def view(title: str, text: str, **options: Any) -> Callable:
    """Register the decorated function as a view; options are fields of View."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        VIEWS[function.__name__] = View(function, title, text, **options)
        return function

    return register


def picture(label: str) -> gr.Image:
    """Return an image that is shown in full and saved as PNG."""
    return gr.Image(
        label=label,
        alt_text=label,
        show_label=False,
        interactive=False,
        format="png",
        elem_classes="picture",
        buttons=["download", "fullscreen"],
    )


@view(
    "",
    "One prompt and seed, three images: Gaussian noise unguided, Gaussian noise with "
    "classifier-free guidance, refined noise unguided.",
    cost=images(4),
)
def compare(job: "Job") -> None:
    """Report the three arms, and what the refiner changed in the noise."""
    _ = job.loaded.preview  # fitted before the clock runs
    if not job.takes_guidance:
        job.report(
            NoArm(
                "guided",
                "**Not applicable**: this model is distilled to be sampled without guidance.",
            )
        )
    samples = {}
    for arm, recipe in job.arms().items():
        samples[arm] = job.previewed(arm, recipe)
        job.report(Arm(arm, samples[arm]))
    job.report(Compared(samples))
    job.report(Note(job.loaded.says))
    if "refined" in samples:
        _report_change_of_noise(job, samples)


def _report_change_of_noise(job: "Job", samples: dict) -> None:
    if job.recipe.strength == 0:
        job.report(
            Note(
                "The refinement strength is 0: the third column starts from the Gaussian noise "
                f"as it is. {job.loaded.says}"
            )
        )
        return
    x_T, x_hat = (torch.from_numpy(samples[arm].latents) for arm in ("gaussian", "refined"))
    share, cutoff = spectrum.energy_below(x_hat - x_T), spectrum.LOW_FREQUENCY
    difference = spectrum.low_frequency_difference(x_T, x_hat)
    job.report(Figure("heat", spectrum.heat_map(difference, samples["refined"].image.size)))
    job.report(Figure("layout", samples["refined"]))
    job.report(
        Note(
            "**What the refiner changed.** The heat map is the part of the change in x_T below "
            f"{cutoff} of the frequency radius: {share:.0%} of its energy. It is bright where the "
            "refiner changed the noise most; beside it is the image that grew from the refined "
            f"noise. {job.loaded.says}"
        )
    )


@view(
    "",
    "The initial noise of a seed and the noise refined for the prompt, as tensors x_T and refined "
    "in a safetensors file.",
    cost=images(1),
    needs=(refiner,),
)
def refine(job: "Job") -> None:
    """Report x_T and the refined noise."""
    tensors = {"x_T": job.latents(job.recipe.gaussian), "refined": job.latents(job.recipe.refined)}
    job.report(Noise(safetensors.save(tensors)))


@view(
    "Strength",
    "The refined image as the correction of the noise grows from nothing to one and a half times "
    "what was trained, and the guided image to compare with.",
    cost=images(10),
    needs=(refiner,),
)
def strength(job: "Job") -> None:
    """Show the refined image over the strength."""
    job.show(explore.strengths(job.make, job.recipe))


@view(
    "Guidance scale",
    "Refined images over the guidance scale that the refiner is told, above guided images at the "
    "same scales. For a refiner that takes the scale: the embedded model has one, under Settings.",
    columns=5,
    cost=images(15),
    needs=(refiner, strength_above_0, guidance, refiner_with_scale),
)
def guidance_scale(job: "Job") -> None:
    """Show refined and guided images over the guidance scale."""
    job.show(explore.guidance_scales(job.make, job.recipe))


@view(
    "Samplers and steps",
    "The same two noises through every sampler with few and with many steps.",
    columns=6,
    cost=_samplers_cost,
    needs=(refiner, strength_above_0),
)
def samplers(job: "Job") -> None:
    """Show both noises through every sampler."""
    job.show(explore.samplers_and_steps(job.make, job.recipe))


@view(
    "Frequencies",
    "The correction is small and lives in the low frequencies. The images show what the "
    "frequencies below the cutoff do alone.",
    cost=images(8),
    needs=(refiner, strength_above_0),
    controls={
        "cutoff": lambda: gr.Slider(
            0, 1, 0.3, step=0.05, label="Cutoff", info="of the largest radial frequency"
        )
    },
    outputs={
        "histogram": lambda: gr.Plot(label="How far the entries of x_T moved", show_label=False),
        "spectrum": lambda: gr.Plot(label="Where the correction's energy is", show_label=False),
        "overlay": lambda: picture("Change of the noise below the cutoff, over the refined image"),
    },
)
def frequencies(job: "Job", cutoff: float) -> None:
    """Show where the correction is in frequency, and what its bands do alone."""
    if not 0 <= number(cutoff, "The cutoff") <= 1:
        raise ValueError(
            f"The cutoff is a share of the largest frequency, from 0 to 1; got {cutoff}."
        )
    sample, x_T = job.make(job.recipe.refined), job.latents(job.recipe.gaussian)
    x_hat = torch.from_numpy(sample.latents)
    next_seed = (job.recipe.seed + 1) % (noise.MAX_SEED + 1)
    other = job.make.draw(replace(job.recipe, seed=next_seed))
    difference = spectrum.low_frequency_difference(x_T, x_hat, cutoff)
    heat = spectrum.heat_map(difference, sample.image.size)
    job.report(Figure("histogram", figures.difference_histogram(x_T, x_hat, other)))
    job.report(Figure("spectrum", figures.radial_spectrum(x_T, x_hat)))
    job.report(Figure("overlay", Image.blend(sample.image, heat, 0.6)))
    job.show(explore.bands(job.make, job.recipe, cutoff))


@view(
    "Trajectory",
    "What the model expects the finished image to be, step by step: refined noise shows its "
    "layout at once.",
    columns=7,
    cost=images(5),
)
def trajectory(job: "Job") -> None:
    """Show the predicted x0 of every arm on its way."""
    job.report(Columns(_frames(job)))
    for arm, recipe in job.arms().items():
        caption = f"{arm.capitalize()}, forward {{}}"
        trajectories.trajectory(
            job.make,
            recipe,
            lambda i, image, caption=caption: job.show([(caption.format(i), image)]),
        )


def _frames(job: "Job") -> int:
    """Return how many frames a film of the recipe's sampling has."""
    forwards = samplers_of_diffusers.forwards(job.recipe.sampler, job.recipe.steps)
    return min(trajectories.FRAMES, forwards)


@view(
    "Two prompts",
    "Noise refined with the prompt above, denoised with another one: what stays is what the noise "
    "itself says.",
    columns=3,
    cost=images(8),
    needs=(refiner, strength_above_0),
    controls={
        "other": lambda: gr.Textbox(
            "a green frog on a yellow background", label="The other prompt", max_lines=2
        )
    },
)
def two_prompts(job: "Job", other: str) -> None:
    """Show noise refined with one prompt and denoised with another."""
    if not text(other, "The other prompt").strip():
        raise ValueError("The other prompt is empty: say what to denoise with.")
    job.make.check(replace(job.recipe, prompt=other))
    job.show(explore.two_prompts(job.make, job.recipe, other))


@view(
    "Interpolation",
    "From one seed to another along the sphere: above from Gaussian noise, below refined on the "
    "way.",
    columns=7,
    cost=images(14),
    needs=(refiner, strength_above_0),
    controls={"other_seed": lambda: gr.Number(8, label="The other seed")},
)
def interpolation(job: "Job", other_seed: float) -> None:
    """Show the way from one seed to another."""
    seed = whole(other_seed, "The other seed")
    job.show(explore.interpolation(job.make, job.recipe, seed))


@view(
    "Guided from refined",
    "Guidance and refining together: guided sampling from refined noise beside guided sampling "
    "from Gaussian noise.",
    cost=images(6),
    needs=(refiner, strength_above_0, guidance),
)
def guided_from_refined(job: "Job") -> None:
    """Show both noises without and with guidance."""
    job.show(explore.guided_from_refined(job.make, job.recipe))


@view(
    "Attention",
    "Where the model looks for a word of the prompt while it denoises, over the finished image.",
    columns=7,
    cost=images(8),
    controls={
        "word": lambda: gr.Textbox(
            "",
            label="A word of the prompt",
            info="empty for the first after the article",
            max_lines=1,
        )
    },
)
def attention(job: "Job", word: str) -> None:
    """Show the cross-attention to a word over the finished image of every arm."""
    word = text(word, "The word").strip() or attentions.first_word(job.recipe.prompt)
    job.report(Columns(_frames(job)))
    for arm, recipe in job.arms().items():
        maps, sample = attentions.attention(job.make, recipe, word)
        for i in trajectories.evenly(len(maps), trajectories.FRAMES):
            heat = spectrum.heat_map(maps[i].numpy(), sample.image.size)
            caption = f"{arm.capitalize()}, “{word}” in forward {i + 1}"
            job.show([(caption, Image.blend(sample.image, heat, 0.6))])


@view(
    "",
    "Two images of one new seed for the prompt above, in random order: one from refined noise, "
    "one from Gaussian noise. Say which is better and which follows the prompt; then you learn "
    "which was which. The tally stays in this session and goes nowhere else.",
    cost=images(3),
    needs=(refiner, strength_above_0),
    controls={
        "opponent": lambda: gr.Radio(
            [("guided", "guided"), ("unguided", "gaussian")],
            value="guided",
            label="Refined against",
        )
    },
)
def blind(job: "Job", opponent: str) -> None:
    """Report two arms of a new seed, in random order."""
    seed = secrets.randbelow(noise.MAX_SEED + 1)
    arms = job.arms(seed=seed)
    if opponent not in arms or opponent == "refined":
        raise ValueError(f"There is no {opponent!r} image of this model to compare with.")
    # The arms are always made in one order, so that the time it takes says nothing.
    samples = {arm: job.make(arms[arm]).image for arm in ("refined", opponent)}
    left, right = in_random_order("refined", opponent)
    job.report(Pair(samples[left], samples[right], job.recipe.prompt, seed, (left, right)))


@view(
    "Many at once",
    "The three columns for several prompts and seeds.",
    columns=3,
    cost=_many_cost,
    controls={
        "prompts": lambda: gr.Textbox(
            "",
            label="Prompts",
            info="one a line; empty for the prompt above",
            lines=3,
            max_lines=12,
        ),
        "count": lambda: gr.Slider(
            1, 16, 4, step=1, label="Images a prompt", info="their seeds count up"
        ),
    },
)
def many(job: "Job", prompts: str, count: float) -> None:
    """Show the arms of several prompts and seeds."""
    lines = text(prompts, "The list of prompts", 2 * MAX_TEXT).splitlines()
    lines = [line.strip() for line in lines if line.strip()] or [job.recipe.prompt]
    count = whole(count, "The number of images a prompt")
    batch = {
        (prompt, seed): job.arms(prompt=prompt, seed=seed)
        for prompt in lines
        for seed in range(job.recipe.seed, job.recipe.seed + count)
    }
    total = sum(len(arms) for arms in batch.values())
    if not 1 <= total <= MOST_IMAGES:
        raise ValueError(
            f"{len(lines)} prompts with {count} images each are {total} images in all columns; "
            f"from 1 to {MOST_IMAGES} can be made in one go."
        )
    for arms in batch.values():
        for recipe in arms.values():
            job.make.check(recipe)
    job.report(Columns(len(job.arms())))

    def images_of_batch() -> Iterator[tuple[str, Any]]:
        for (prompt, seed), arms in batch.items():
            for arm, recipe in arms.items():
                yield f"{prompt} · seed {seed} · {arm}", job.make(recipe)

    job.show(images_of_batch())
