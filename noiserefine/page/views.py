"""The views of the page, one function each: what it shows, its controls, its cost and its needs.

To add a view, write a function with the decorator `view`. The page gives it a tab if it has a
title, the API an endpoint of its name, and ZeroGPU the seconds that its cost asks for.
"""

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from noiserefine.limits import MAX_SEED, MAX_STEPS
from noiserefine.models.catalogue import BACKBONES
from noiserefine.page import texts
from noiserefine.page.blind import in_random_order
from noiserefine.page.events import Arm, Compared, Figure, NoArm, Noise, Note, Pair
from noiserefine.page.lazy import Lazy
from noiserefine.page.settings import MAX_TEXT, Settings, number, text, whole
from noiserefine.page.vocabulary import is_embedded, knows, random_prompt
from noiserefine.sampler_names import SAMPLERS

if TYPE_CHECKING:
    from noiserefine.page.jobs import Job

attentions: Any = Lazy("noiserefine.analysis.attention")
explore: Any = Lazy("noiserefine.analysis.explore")
figures: Any = Lazy("noiserefine.analysis.figures")
safetensors: Any = Lazy("safetensors.torch")
samplers_of_diffusers: Any = Lazy("noiserefine.samplers")
spectrum: Any = Lazy("noiserefine.analysis.spectrum")
torch: Any = Lazy("torch")
trajectories: Any = Lazy("noiserefine.analysis.trajectory")

MOST_IMAGES, MOST_SEEDS = 96, 16  # of one view
GPU_SECONDS = 10  # for everything but forwards, generously


@dataclass(frozen=True)
class ArmText:
    """The words for an arm on the page."""

    title: str
    text: str


ARMS = {
    "gaussian": ArmText("Plain", "the noise as drawn, no guidance"),
    "guided": ArmText("Guided", "the usual way, twice the cost"),
    "refined": ArmText("Refined", "this method: noise corrected"),
}
NO_GUIDANCE = "This view is about guidance, which does not apply: {}"
OPPONENTS = [("guided", "guided"), ("plain", "gaussian")]  # of the refined arm: label and arm


@dataclass(frozen=True)
class Abilities:
    """What a model and the settings offer to a view."""

    strength: float
    guidance_scale: float
    no_guidance: str  # why the model has no guided images, or ""
    refines: bool  # there is a refiner
    takes_scale: bool  # it takes the guidance scale
    no_attention: str = ""  # why the model's cross-attention cannot be shown

    @property
    def no_guided_arm(self) -> str:
        """Return why there is no guided arm, or ""."""
        if self.no_guidance or self.guidance_scale > 1:
            return self.no_guidance
        return "the guidance scale is 1, which is no guidance; set it above 1."


# What a view can need: each returns the sentence that says what is missing, or "".


def has_refiner(abilities: Abilities) -> str:
    """Return why there is no refiner, or "" if there is one."""
    if abilities.refines:
        return ""
    return (
        "This view needs a refiner, and none exists for this model yet. The first comparison "
        "shows the command that trains one."
    )


def has_strength(abilities: Abilities) -> str:
    """Return why nothing is refined, or "" if the strength is above 0."""
    if abilities.strength > 0:
        return ""
    return (
        "The refinement strength is 0, and this view shows what refining does: set it above 0, "
        "to 1 for instance."
    )


def has_guidance(abilities: Abilities) -> str:
    """Return why guidance does not apply to the model, or "" if it does."""
    return NO_GUIDANCE.format(abilities.no_guidance) if abilities.no_guidance else ""


def has_guided_arm(abilities: Abilities) -> str:
    """Return why there is no guided arm, or "" if there is one."""
    return NO_GUIDANCE.format(abilities.no_guided_arm) if abilities.no_guided_arm else ""


def has_scale_refiner(abilities: Abilities) -> str:
    """Return why no refiner takes the guidance scale, or "" if the model's does."""
    if abilities.takes_scale:
        return ""
    return (
        "This view needs a refiner that takes the guidance scale, and there is none for this "
        "model: train one with train/train_refiner.py --guidance_scale_range."
    )


def has_unet_attention(abilities: Abilities) -> str:
    """Return why cross-attention cannot be shown, or "" if it can."""
    return abilities.no_attention


# What a view costs: a function of its settings and controls that returns forwards.


def cost_of_images(count: int) -> Callable[[Settings, Mapping], float]:
    """Return the cost of `count` images, of which a guided one counts two."""
    return lambda settings, controls: count * (_forwards(settings) + 1)


def _steps(settings: Settings) -> float:
    """Return the steps, or 1 where they are refused later."""
    steps = settings.steps
    return steps if isinstance(steps, (int, float)) and 1 <= steps <= MAX_STEPS else 1


def _forwards(settings: Settings) -> int:
    """Return the forwards of an unguided image."""
    return samplers_of_diffusers.forwards(str(settings.sampler), int(_steps(settings)))


def _samplers_cost(settings: Settings, controls: Mapping) -> float:
    """Return the cost of every sampler and number of steps, from two noises."""
    return sum(
        2 * (samplers_of_diffusers.forwards(sampler, steps) + 1)
        for sampler in SAMPLERS
        for steps in explore.STEPS
    )


def _count(controls: Mapping, name: str) -> float:
    """Return the value of a control that counts, or 1 where it is refused later."""
    count = controls.get(name)
    return count if isinstance(count, (int, float)) and count >= 1 else 1


def _many_cost(settings: Settings, controls: Mapping) -> float:
    """Return the cost of all arms of every prompt and seed, at most of those that are made."""
    prompts = controls.get("prompts")
    lines = len(prompts.splitlines()) if isinstance(prompts, str) else 0
    wanted = max(1, lines) * _count(controls, "count")
    return cost_of_images(1)(settings, controls) * min(4 * wanted, 4 * MOST_IMAGES / len(ARMS))


def _frames_per_row(settings: Settings, controls: Mapping, arms: int) -> int:
    """Return the columns in which an arm's frames fill whole rows."""
    return min(trajectories.FRAMES, _forwards(settings))


@dataclass(frozen=True)
class View:
    """A way to look at a prompt and seed."""

    function: Callable[..., None]  # takes the Job and the controls by name, and reports events
    title: str  # of its tab; empty for a view without one
    text: str  # what it shows, on the page and in the API
    cost: Callable[[Settings, Mapping], float]  # in forwards, at most
    button: str = "Show"
    columns: int = 4  # of its gallery; 0 for none
    # Columns where they depend on the settings, the controls or the number of arms.
    per_row: Callable[[Settings, Mapping, int], int] | None = None
    needs: tuple[Callable[[Abilities], str], ...] = ()
    flip: bool = False  # add a slider that moves through the gallery
    # Use the model's refiner that takes the guidance scale, at the scales it was trained for.
    wants_scale_refiner: bool = False
    controls: dict[str, Callable[[], gr.components.Component]] = field(default_factory=dict)
    outputs: dict[str, Callable[[], gr.components.Component]] = field(default_factory=dict)

    def unmet(self, abilities: Abilities) -> str:
        """Return the first need of the view that is not met, as a sentence, or ""."""
        return next((reason for need in self.needs if (reason := need(abilities))), "")

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


def picture(
    alt: str, value: str | None = None, label: str | None = None, show_label: bool = False
) -> gr.Image:
    """Return an image that is shown in full and saved as PNG; `label` names it in the API."""
    return gr.Image(
        value,
        label=label or alt,
        alt_text=alt,
        show_label=show_label,
        interactive=False,
        format="png",
        type="filepath",
        elem_classes="picture",
        buttons=["download", "fullscreen"],
    )


def note() -> gr.Markdown:
    """Return the output for sentences on a view's images."""
    return gr.Markdown("", show_label=False, label="note")


@view(
    "",
    "One prompt and seed, three images: random noise without guidance, random noise with "
    "classifier-free guidance, refined noise without guidance.",
    cost=cost_of_images(4),
)
def compare(job: "Job") -> None:
    """Report the three arms, and what is to be said of them."""
    _ = job.loaded.preview  # fitted before the clock runs
    if reason := job.abilities.no_guided_arm:
        job.report(NoArm("guided", f"**Not applicable**: {reason}"))
    if job.loaded.refiner is None:
        job.report(NoArm("refined", job.loaded.notes))
    samples: dict[str, Any] = {}
    for arm, recipe in job.arms().items():
        samples[arm] = job.previewed(arm, recipe)
        nearness = explore.nearness(samples) if arm == "refined" else None
        job.report(Arm(arm, samples[arm], nearness))
    job.report(Compared())
    notes = [job.loaded.notes] if job.loaded.refiner else []
    if job.loaded.refiner and job.recipe.strength == 0:
        notes.append("The strength is 0: the third column starts from the noise as drawn.")
    if any(sample.blocked for sample in samples.values()):
        notes.append(
            "**A black image was blacked out by the model's safety checker**, which took its "
            "content for unsafe. Another seed or prompt may pass."
        )
    notes += [job.unusual_guidance(), *prompt_notes(job.recipe.prompt, job.backbone)]
    job.report(Note(" ".join(note for note in notes if note)))


def prompt_notes(prompt: str, backbone: str) -> list[str]:
    """Return hints on a prompt that does not mean what its author may expect."""
    notes = []
    if re.search(r"\([^()]*:\s*[\d.]+\)|<lora:[^>]*>", prompt):
        notes.append(
            "Weights such as (red:1.3) and tags such as `<lora:…>` are read as plain text here; a "
            "LoRA has its own field under Settings."
        )
    if is_embedded(backbone) and not knows(prompt):
        notes.append(
            "This small model knows no object of the prompt: it was trained on emoji, some of "
            "which are suggested while you type."
        )
    return notes


@view(
    "",
    "The initial noise of a seed and the noise refined for the prompt, as tensors x_T and refined "
    "in a safetensors file.",
    cost=cost_of_images(1),
    needs=(has_refiner,),
)
def refine(job: "Job") -> None:
    """Report x_T and the refined noise."""
    tensors = {"x_T": job.latents(job.recipe.gaussian), "refined": job.latents(job.recipe.refined)}
    job.report(Noise(safetensors.save(tensors)))


def _counting_up(seed: int, count: int) -> range:
    """Return `count` seeds from this one on. Raises ValueError for more than there are."""
    if seed + count - 1 > MAX_SEED:
        raise ValueError(
            f"{count} seeds from {seed} on go past {MAX_SEED}, the largest: start at "
            f"{MAX_SEED - count + 1} or below."
        )
    return range(seed, seed + count)


@view(
    "Seeds",
    "One prompt, many seeds: a row for each arm. How much the images of different seeds differ "
    "stands above them.",
    columns=8,
    per_row=lambda settings, controls, arms: min(int(_count(controls, "count")), MOST_SEEDS),
    cost=lambda settings, controls: cost_of_images(4)(settings, {}) * _count(controls, "count"),
    controls={"count": lambda: gr.Slider(2, 16, 8, step=1, label="Seeds", info="counting up")},
    outputs={"note": note},
)
def seeds(job: "Job", count: float) -> None:
    """Show several seeds of every arm, and how different their images are."""
    count = whole(count, "The number of seeds")
    if not 2 <= count <= MOST_SEEDS:  # noqa: PLR2004 (one seed has no variety)
        raise ValueError(f"The number of seeds is from 2 to {MOST_SEEDS}; got {count}.")
    arms, rows = job.arms(), dict[str, list]()
    for arm, recipe in arms.items():
        rows[arm] = []
        for seed in _counting_up(job.recipe.seed, count):
            rows[arm].append(job.make(replace(recipe, seed=seed)))
            job.show([(f"{ARMS[arm].title}, seed {seed}", rows[arm][-1])], len(arms) * count)
    distances = {ARMS[arm].title.lower(): explore.variety(rows[arm]) for arm in arms}
    job.report(Note(texts.variety(distances)))


@view(
    "Strength",
    "The refined image as the correction of the noise grows from nothing to one and a half times "
    "what was trained, and the guided image to compare with. Move the slider to see it change.",
    cost=cost_of_images(10),
    needs=(has_refiner,),
    flip=True,
)
def strength(job: "Job") -> None:
    """Show the refined image over the strength."""
    total = len(explore.STRENGTHS) + (job.recipe.guidance_scale > 1)
    job.show(explore.strengths(job.make, job.recipe), total)


@view(
    "Many",
    "The arms for several prompts and seeds, with how much nearer the refined images are to the "
    "guided ones.",
    columns=3,
    per_row=lambda settings, controls, arms: arms,
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
    outputs={"note": note},
)
def many(job: "Job", prompts: str, count: float) -> None:
    """Show the arms of several prompts and seeds."""
    lines = text(prompts, "The list of prompts", 2 * MAX_TEXT).splitlines()
    lines = [line.strip() for line in lines if line.strip()] or [job.recipe.prompt]
    lines = list(dict.fromkeys(lines))  # each once
    count = whole(count, "The number of images a prompt")
    total = len(lines) * count * len(job.arms())
    if not 1 <= total <= MOST_IMAGES:
        raise ValueError(
            f"{texts.counted(len(lines), 'prompt')} with {texts.counted(count, 'image')} each are "
            f"{texts.counted(total, 'image')} in all columns; "
            f"from 1 to {MOST_IMAGES} can be made in one go."
        )
    batch = {
        (prompt, seed): job.arms(prompt=prompt, seed=seed)
        for prompt in lines
        for seed in _counting_up(job.recipe.seed, count)
    }
    for arms in batch.values():
        for recipe in arms.values():
            job.make.check(recipe)
    nearness = []
    for (prompt, seed), arms in batch.items():
        samples = {}
        for arm, recipe in arms.items():
            samples[arm] = job.make(recipe)
            job.show([(f"{prompt} · seed {seed} · {ARMS[arm].title}", samples[arm])], total)
        nearness.append(explore.nearness(samples))
    if None not in nearness:
        job.report(Note(texts.nearness(nearness)))


@view(
    "Trajectory",
    "What the model expects the finished image to be, step by step, in every arm; the film plays "
    "the three side by side.",
    columns=7,
    per_row=_frames_per_row,
    cost=cost_of_images(5),
    outputs={"film": lambda: picture("The three arms as a film", label="film")},
)
def trajectory(job: "Job") -> None:
    """Show the predicted x0 of every arm on its way, and as a film."""
    arms, frames = job.arms(), job.frames()
    films: dict[str, list[Image.Image]] = {arm: [] for arm in arms}
    for arm, recipe in arms.items():

        def show(count: int, image: Image.Image, arm: str = arm) -> None:
            films[arm].append(image)  # decoded by the pipeline, which screens it
            caption = f"{ARMS[arm].title}, forward {count}"
            job.show([(caption, films[arm][-1])], len(arms) * frames)

        trajectories.trajectory(job.make, recipe, show)
    job.report(Figure("film", trajectories.film(list(films.values()))))


@view(
    "Blind test",
    "Two images of one seed and prompt in random order, one from refined noise. Which is better, "
    "which follows the prompt? Answer with the buttons or the keys ←, 0 and →. The tally stays in "
    "this session.",
    button="New pair",
    columns=0,
    cost=cost_of_images(3),
    needs=(has_refiner, has_strength),
    controls={
        "opponent": lambda: gr.Radio(OPPONENTS, value="guided", label="Refined against"),
        "prompts": lambda: gr.Radio(
            [("prompts the model knows", "known"), ("the prompt above", "current")],
            value="known",
            label="Pairs of",
        ),
    },
    outputs={
        "left": lambda: picture("Left", show_label=True),
        "right": lambda: picture("Right", show_label=True),
    },
)
def blind(job: "Job", opponent: str, prompts: str) -> None:
    """Report two arms of a new seed, in random order."""
    prompt = job.recipe.prompt
    if prompts == "known" and is_embedded(job.backbone):
        prompt = random_prompt(job.backbone)
    seed = secrets.randbelow(MAX_SEED + 1)
    arms = job.arms(seed=seed, prompt=prompt)
    if opponent not in arms or opponent == "refined":
        reason = f": {job.abilities.no_guided_arm}" if opponent == "guided" else "."
        raise ValueError(f"There is no {opponent!r} image to compare with{reason}")
    # The arms are always made in one order, so that the time it takes says nothing.
    samples = {arm: job.make(arms[arm]) for arm in ("refined", opponent)}
    if any(sample.blocked for sample in samples.values()):
        raise ValueError(
            "The model's safety checker blacked out an image of this pair, which would give it "
            "away: press “New pair” for another one."
        )
    left, right = in_random_order("refined", opponent)
    images = samples[left].image, samples[right].image
    job.report(Pair(*images, prompt, seed, (left, right)))


@view(
    "Samplers",
    "The same two noises through every sampler with few and with many steps.",
    columns=6,
    cost=_samplers_cost,
    needs=(has_refiner, has_strength),
)
def samplers(job: "Job") -> None:
    """Show both noises through every sampler."""
    total = 2 * len(explore.STEPS) * len(samplers_of_diffusers.samplers_of(job.loaded.pipe))
    job.show(explore.samplers_and_steps(job.make, job.recipe), total)


@view(
    "Two prompts",
    "Noise refined with the prompt above, denoised with another one: what stays is what the noise "
    "itself says.",
    columns=3,
    cost=cost_of_images(8),
    needs=(has_refiner, has_strength),
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
    total = 6 if job.recipe.guidance_scale > 1 else 4
    job.show(explore.two_prompts(job.make, job.recipe, other), total)


@view(
    "Interpolation",
    "From one seed to another along the sphere: above plain, below with the noise refined on the "
    "way.",
    columns=7,
    cost=cost_of_images(14),
    needs=(has_refiner, has_strength),
    controls={"other_seed": lambda: gr.Number(8, label="The other seed")},
)
def interpolation(job: "Job", other_seed: float) -> None:
    """Show the way from one seed to another."""
    seed = whole(other_seed, "The other seed")
    total = 2 * explore.INTERPOLATIONS
    job.show(explore.interpolation(job.make, job.recipe, seed), total)


@view(
    "Frequencies",
    "Where in frequency the correction is, and what the frequencies below and above the cutoff do "
    "alone.",
    cost=cost_of_images(8),
    needs=(has_refiner, has_strength),
    controls={
        "cutoff": lambda: gr.Slider(
            0, 1, 0.3, step=0.05, label="Cutoff", info="of the largest radial frequency"
        )
    },
    outputs={
        "histogram": lambda: picture("How far the entries of x_T moved", label="histogram"),
        "spectrum": lambda: picture("Energy of the correction over frequency", label="spectrum"),
        "overlay": lambda: picture(
            "Change of the noise below the cutoff, over the refined image", label="overlay"
        ),
        "note": note,
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
    difference = spectrum.low_frequency_difference(x_T, x_hat, cutoff)
    other = explore.draw_next(job.make, job.recipe)
    histogram = figures.difference_histogram(x_T, x_hat, other)
    job.report(Figure("histogram", figures.as_picture(histogram)))
    energies = figures.radial_spectrum(x_T, x_hat, cutoff)
    job.report(Figure("spectrum", figures.as_picture(energies)))
    job.report(Figure("overlay", spectrum.overlaid(sample.image, difference)))
    job.report(Note(texts.change_of_noise(cutoff, *spectrum.density_ratio(x_hat - x_T, cutoff))))
    job.show(explore.bands(job.make, job.recipe, cutoff), explore.BANDS)


@view(
    "Scales",
    "Refined images over the guidance scale that the refiner is given, above guided images at the "
    "same scales. It takes the refiner that was trained for it, where the model has one.",
    columns=5,
    cost=cost_of_images(15),
    needs=(has_refiner, has_strength, has_guidance, has_scale_refiner),
    wants_scale_refiner=True,
)
def guidance_scale(job: "Job") -> None:
    """Show refined and guided images over the guidance scale."""
    job.show(explore.guidance_scales(job.make, job.recipe), 2 * explore.SCALES)


@view(
    "Both",
    "Guidance and refining together: guided sampling from refined noise, beside the three arms of "
    "the comparison.",
    cost=cost_of_images(6),
    needs=(has_refiner, has_strength, has_guided_arm),
)
def guided_from_refined(job: "Job") -> None:
    """Show both noises without and with guidance."""
    job.show(explore.guided_from_refined(job.make, job.recipe), 4)


@view(
    "Attention",
    "Where the model looks for a word of the prompt while it denoises, over the finished image.",
    columns=7,
    per_row=_frames_per_row,
    cost=cost_of_images(8),
    needs=(has_unet_attention,),
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
    arms, frames = job.arms(), job.frames()
    for arm, recipe in arms.items():
        maps, sample = attentions.attention(job.make, recipe, word)
        per_map = 2 if recipe.guidance_scale > 1 else 1  # the second of which reads the prompt
        refining = sample.forwards - per_map * len(maps)
        for i in trajectories.evenly(len(maps), trajectories.FRAMES):
            forward = refining + per_map * (i + 1)
            caption = f"{ARMS[arm].title}, “{word}” in forward {forward}"
            overlaid = spectrum.overlaid(sample.image, maps[i].numpy())
            image = sample.image if sample.blocked else overlaid
            job.show([(caption, image)], len(arms) * frames)
