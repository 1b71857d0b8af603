"""The NoiseRefine page: one prompt and seed, three images side by side, and views that show why it works.

    python app.py --host 127.0.0.1 --port 7860
"""

import argparse
import contextlib
import functools
import inspect
import json
import math
import re
import secrets
import tempfile
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

try:  # before anything that touches CUDA
    from spaces import GPU
    from spaces.config import Config
    ZERO_GPU = Config.zero_gpu
except ImportError:  # it matters on Hugging Face's ZeroGPU only
    ZERO_GPU = False

    def GPU(duration):
        return lambda function: function

import gradio as gr
import torch
from PIL import Image
from safetensors.torch import save_file

from noiserefine import explore
from noiserefine.attention import attention
from noiserefine.backbones import ASSETS, BACKBONES, any_model_allowed, default_device
from noiserefine.blind import LEFT, NEITHER, QUESTIONS, RIGHT, Vote, in_random_order, tally
from noiserefine.compare import columns
from noiserefine.figures import difference_histogram, radial_spectrum
from noiserefine.models import Loaded, Model, Models
from noiserefine.noise import MAX_SEED, draw_noise
from noiserefine.offload import OFFLOADS
from noiserefine.recipe import MAX_STEPS, Maker, Recipe, Sample
from noiserefine.record import contact_sheet, read_png, save_png, versions
from noiserefine.samplers import SAMPLERS
from noiserefine.spectrum import LOW_FREQUENCY, energy_below, heat_map, low_frequency_difference
from noiserefine.stream import stream
from noiserefine.trajectory import FRAMES, evenly, trajectory

DEFAULT = "emoji"
EXAMPLES = ["a red apple on a blue background", "a panda on a pink background", "a rocket on a black background", "an owl on a purple background", "a sailboat"]
ARMS = {
    "gaussian": ("Gaussian noise", "no guidance"),
    "guided": ("Gaussian noise", "guided (CFG)"),
    "refined": ("Refined noise", "no guidance"),
}
FREE_CHOICE = any_model_allowed() and not ZERO_GPU  # there, a download would run in a visitor's seconds of GPU
# On ZeroGPU a model has to be placed before the first visitor comes, and every one slows the start.
SERVED = ["emoji", "sd21"] if ZERO_GPU else list(BACKBONES)
REFINERS = [("the backbone's own", "")]
SECONDS_OF_A_FORWARD = {"emoji": 0.03, "sdxl": 0.2}  # on ZeroGPU's cards, generously; 0.1 for the others
MOST_IMAGES = 96  # of one view
KEPT_PIXELS = 8_000_000  # of a visitor's images that are not made again
PREVIEW_SECONDS = 0.15  # between two looks at an unfinished image

THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.orange, neutral_hue=gr.themes.colors.stone, radius_size=gr.themes.sizes.radius_lg,
    font=["ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
).set(button_primary_background_fill="*primary_500", button_primary_background_fill_hover="*primary_600",
      button_primary_text_color="white", body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950")
MODELS, WORK = Models(keep_all=ZERO_GPU), threading.Lock()


@dataclass(frozen=True)
class Settings:
    """What a visitor asks for, as it comes: from the page, an API call, a link or a PNG."""

    prompt: str
    seed: float = 7
    backbone: str = DEFAULT
    steps: float = BACKBONES[DEFAULT].steps
    guidance_scale: float = BACKBONES[DEFAULT].guidance_scale
    strength: float = 1.0
    sampler: str = BACKBONES[DEFAULT].sampler
    width: float | None = 0
    height: float | None = 0
    refiner: str = ""
    lora: str = ""
    lora_weight: float = 1.0
    negative_prompt: str = ""

    @property
    def model(self) -> Model:
        """Raises ValueError for names that visitors may not give here."""
        name = (self.backbone or "").strip()
        name = next((key for key, listed in BACKBONES.items() if listed.source == name), name)
        lora = (self.lora or "").strip()
        model = Model(name, (self.refiner or "").strip(), lora, number(self.lora_weight, "The LoRA's weight") if lora else 1.0)
        if not model.backbone:
            raise ValueError("No backbone is chosen.")
        ours = ((model.backbone, BACKBONES), (model.refiner, [folder for _, folder in REFINERS]), (model.lora, [""]))
        named = [name for name, known in ours if name not in known]
        if named and not FREE_CHOICE:
            raise ValueError(f"This Space serves its own models only; {named[0]} is none of them. Duplicate the Space, or run the app "
                             "on your machine, to use any model.")
        if model.backbone in BACKBONES and model.backbone not in SERVED:
            raise ValueError(f"{model.title} is not served here; choose one of {', '.join(SERVED)}, or run the app on your machine.")
        return model

    @property
    def recipe(self) -> Recipe:
        """Raises ValueError for what no model can make an image from."""
        size = {name: whole(side, f"The {name}") if side else None for name, side in (("width", self.width), ("height", self.height))}
        scale = number(self.guidance_scale, "The guidance scale")
        recipe = Recipe(self.prompt, whole(self.seed, "The seed"), whole(self.steps, "The number of steps"), self.sampler, scale,
                        number(self.strength, "The refinement strength"), negative_prompt=self.negative_prompt or "", **size)
        recipe.check()
        return recipe


def guided(model: Model) -> bool:
    """Whether guidance applies to the model."""
    return model.backbone not in BACKBONES or BACKBONES[model.backbone].guidance_scale is not None


def number(value: float | None, what: str) -> float:
    """The value itself. Raises ValueError where it is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{what} is a number; got {value!r}.")
    return value


def whole(value: float | None, what: str) -> int:
    """The number as an int. Raises ValueError where it is no whole number."""
    if number(value, what) != int(value):
        raise ValueError(f"{what} is a whole number; got {value!r}.")
    return int(value)


@dataclass
class Job:
    """What a view works with: it reports updates of the page, by the names of its outputs."""

    loaded: Loaded
    make: Maker
    recipe: Recipe
    guided: bool
    report: Callable[[dict], None]

    def show(self, images: explore.Images) -> None:
        """Reports images, (caption, Sample or picture), as they come."""
        shown = []
        for image in images:
            shown.append(image)
            self.report({"images": list(shown)})

    def noises(self) -> tuple[torch.Tensor, torch.Tensor]:
        """x_T and the refined noise, (1, C, h, w) on the CPU in float32."""
        x_T = draw_noise(self.make.pipe, self.recipe.seed, height=self.recipe.height, width=self.recipe.width)
        return x_T, torch.from_numpy(self.make(self.recipe.refined).x_T)

    def needs_refiner(self) -> None:
        """Raises ValueError where there is none."""
        if self.loaded.refiner is None:
            raise ValueError("This view needs a refiner, and none exists for this model yet. The first comparison shows the command that trains one.")

    def needs_guidance(self) -> None:
        """Raises ValueError for a model that is sampled without."""
        if not self.guided:
            raise ValueError("This view is about guidance, and this model is distilled to be sampled without it.")


def show_columns(job: Job) -> None:
    """The three columns, the change of the noise, and files to keep."""
    recipes, done = columns(job.recipe, job.guided, job.loaded.refiner is not None), {}
    for recipe in recipes.values():
        job.make.check(recipe)
    job.report({})  # the input is sound: the last results go
    if not job.guided:
        job.report({"guided_cost": "**Not applicable**: this model is distilled to be sampled without guidance."})
    for name, recipe in recipes.items():
        job.make.on_step = lambda _, x0, name=name: job.report({name: job.loaded.preview(x0)})
        done[name] = job.make(recipe)
        job.report({name: done[name]} | {f"{name}_cost": cost(sample, done.get("guided")) for name, sample in done.items()})
    job.report({"keep": done, "says": job.loaded.says})
    if job.loaded.refiner is None:
        return
    x_T, x_hat = job.noises()
    share = energy_below(x_hat - x_T)
    job.report({
        "heat": heat_map(low_frequency_difference(x_T, x_hat), done["refined"].image.size), "layout": done["refined"].image,
        "says": f"**What the refiner changed.** The heat map is the part of the change in x_T below {LOW_FREQUENCY} of the frequency "
                f"radius: {share:.0%} of its energy. Where it is bright, the noise already says that something will be there; "
                f"beside it is the image that grew from it. {job.loaded.says}"})


def cost(sample: Sample, guided: Sample | None) -> str:
    """Forwards and seconds of a column, and what they are of the guided one's."""
    lines = [f"**{sample.forwards}** UNet forwards", f"{sample.seconds:.2f} s"]
    if guided and sample is not guided:
        lines[0] += f" · {sample.forwards / guided.forwards:.0%} of CFG"
        lines[1] += f" · {sample.seconds / guided.seconds:.0%} of CFG"
    return "  \n".join(lines)


def show_strengths(job: Job) -> None:
    job.needs_refiner()
    job.show(explore.strengths(job.make, job.recipe))


def show_guidance_scales(job: Job) -> None:
    job.needs_refiner()
    job.needs_guidance()
    job.show(explore.guidance_scales(job.make, job.recipe))


def show_samplers(job: Job) -> None:
    job.needs_refiner()
    job.show(explore.samplers_and_steps(job.make, job.recipe))


def show_frequencies(job: Job, cutoff: float) -> None:
    job.needs_refiner()
    if not 0 <= number(cutoff, "The cutoff") <= 1:
        raise ValueError(f"The cutoff is a share of the largest frequency, from 0 to 1; got {cutoff}.")
    x_T, x_hat = job.noises()
    other = draw_noise(job.make.pipe, (job.recipe.seed + 1) % (MAX_SEED + 1), height=job.recipe.height, width=job.recipe.width)
    image = job.make(job.recipe.refined).image
    heat = heat_map(low_frequency_difference(x_T, x_hat, cutoff), image.size)
    job.report({"histogram": difference_histogram(x_T, x_hat, other), "spectrum": radial_spectrum(x_T, x_hat), "overlay": Image.blend(image, heat, 0.6)})
    job.show(explore.bands(job.make, job.recipe, cutoff))


def show_trajectory(job: Job) -> None:
    shown = []
    for name, recipe in columns(job.recipe, job.guided, job.loaded.refiner is not None).items():
        def on_frame(forward: int, image: Image.Image, name: str = name) -> None:
            shown.append((f"{name.capitalize()}, step {forward}", image))
            job.report({"images": list(shown)})

        trajectory(job.make, recipe, on_frame)


def show_two_prompts(job: Job, other: str) -> None:
    job.needs_refiner()
    if not (other or "").strip():
        raise ValueError("The other prompt is empty: say what to denoise with.")
    job.show(explore.two_prompts(job.make, job.recipe, other))


def show_interpolation(job: Job, seed: float) -> None:
    job.needs_refiner()
    job.show(explore.interpolation(job.make, job.recipe, whole(seed, "The other seed")))


def show_guided_from_refined(job: Job) -> None:
    job.needs_refiner()
    job.needs_guidance()
    job.show(explore.guided_from_refined(job.make, job.recipe))


def show_attention(job: Job, word: str) -> None:
    def images() -> explore.Images:
        for name, recipe in columns(job.recipe, job.guided, job.loaded.refiner is not None).items():
            maps, image = attention(job.make, recipe, word or ""), job.make(recipe).image
            for i in evenly(len(maps), FRAMES):
                yield f"{name.capitalize()}, step {i + 1}", Image.blend(image, heat_map(maps[i].numpy(), image.size), 0.6)

    job.show(images())


def show_blind(job: Job, opponent: str) -> None:
    """Two arms of a new seed, in random order."""
    job.needs_refiner()
    seed = secrets.randbelow(MAX_SEED + 1)
    recipes = columns(replace(job.recipe, seed=seed), job.guided)
    if opponent not in recipes or opponent == "refined":
        raise ValueError(f"There is no {opponent!r} image of this model to compare with.")
    left, right = in_random_order("refined", opponent)
    images = {arm: job.make(recipes[arm]).image for arm in ("refined", opponent)}  # always in one order: the time it takes says nothing
    job.report({"left": images[left], "right": images[right], "pair": (job.recipe.prompt, seed, left, right)})


def show_many(job: Job, prompts: str, count: float) -> None:
    lines = [line.strip() for line in (prompts or "").splitlines() if line.strip()] or [job.recipe.prompt]
    count = whole(count, "The number of images a prompt")
    recipes = {(prompt, seed): columns(replace(job.recipe, prompt=prompt, seed=seed), job.guided, job.loaded.refiner is not None)
               for prompt in lines for seed in range(job.recipe.seed, job.recipe.seed + count)}
    total = sum(len(arms) for arms in recipes.values())
    if not 1 <= total <= MOST_IMAGES:
        raise ValueError(f"{len(lines)} prompts with {count} images each are {total} images in all columns; from 1 to {MOST_IMAGES} can be made in one go.")
    for arms in recipes.values():
        for recipe in arms.values():
            job.make.check(recipe)
    job.show((f"{prompt} · seed {seed} · {name}", job.make(recipe))
             for (prompt, seed), arms in recipes.items() for name, recipe in arms.items())


def make_noise(job: Job) -> None:
    """x_T and the refined noise as a file."""
    job.needs_refiner()
    job.report({"noise": job.noises()})


@dataclass(frozen=True)
class View:
    """A way to look at a prompt and seed: its function, and how many forwards it takes for a number of steps."""

    show: Callable[..., None]
    forwards: Callable[[float], float]
    title: str = ""
    says: str = ""
    columns: int = 4  # of its gallery
    controls: Callable[[], dict[str, gr.components.Component]] = dict


VIEWS = {
    "compare": View(show_columns, lambda steps: 4 * steps + 1),
    "refine": View(make_noise, lambda steps: steps + 1),
    "strength": View(show_strengths, lambda steps: 10 * steps, "Strength",
                     "The refined image as the correction of the noise grows from nothing to one and a half times what was trained, and the guided "
                     "image to compare with.", 4),
    "guidance_scale": View(show_guidance_scales, lambda steps: 15 * steps + 5, "Guidance scale",
                           "Refined images over the guidance scale that the refiner is told, above guided images at the same scales. "
                           "For refiners that take the scale.", 5),
    "samplers": View(show_samplers, lambda steps: 12 * sum(explore.STEPS), "Samplers and steps",
                     "The same two noises through every sampler with few and with many steps.", 6),
    "frequencies": View(show_frequencies, lambda steps: 7 * steps, "Frequencies",
                        "The correction is small and lives in the low frequencies. The images show what the frequencies below the cutoff do alone.", 4,
                        lambda: {"cutoff": gr.Slider(0, 1, LOW_FREQUENCY, step=0.05, label="Cutoff", info="of the largest radial frequency")}),
    "trajectory": View(show_trajectory, lambda steps: 5 * steps, "Trajectory",
                       "What the model expects the finished image to be, step by step: refined noise shows its layout at once.", FRAMES),
    "two_prompts": View(show_two_prompts, lambda steps: 10 * steps, "Two prompts",
                        "Noise refined with the prompt above, denoised with another one: what stays is what the noise itself says.", 3,
                        lambda: {"other": gr.Textbox("a green frog on a yellow background", label="The other prompt", max_lines=2)}),
    "interpolation": View(show_interpolation, lambda steps: 2 * explore.INTERPOLATIONS * (steps + 1), "Interpolation",
                          "From one seed to another along the sphere: above from Gaussian noise, below refined on the way.", explore.INTERPOLATIONS,
                          lambda: {"other_seed": gr.Number(8, label="The other seed", precision=0)}),
    "guided_from_refined": View(show_guided_from_refined, lambda steps: 6 * steps + 2, "Guided from refined",
                                "Guidance and refining together: guided sampling from refined noise beside guided sampling from Gaussian noise.", 4),
    "attention": View(show_attention, lambda steps: 8 * steps, "Attention",
                      "Where the model looks for a word of the prompt while it denoises, over the finished image.", FRAMES,
                      lambda: {"word": gr.Textbox("apple", label="A word of the prompt", max_lines=1)}),
    "blind": View(show_blind, lambda steps: 3 * steps + 1),
    "many": View(show_many, lambda steps: 4 * MOST_IMAGES / 3 * steps, "Many at once",
                 "The three columns for several prompts and seeds.", 3,
                 lambda: {"prompts": gr.Textbox("", label="Prompts", info="one a line; empty for the prompt above", lines=3, max_lines=12),
                          "count": gr.Slider(1, 16, 4, step=1, label="Images a prompt", info="their seeds count up")}),
}


def seconds_of_gpu(view: str, settings: tuple, *_) -> int:
    """What a view may take on ZeroGPU; 18 s for the comparison at SD2.1's defaults."""
    settings = Settings(*settings)
    steps = settings.steps if isinstance(settings.steps, (int, float)) and 1 <= settings.steps <= MAX_STEPS else 1  # others are refused
    return int(10 + VIEWS[view].forwards(steps) * SECONDS_OF_A_FORWARD.get(settings.backbone, 0.1))


@GPU(duration=seconds_of_gpu)
def run(view: str, settings: tuple, extras: tuple, last: dict[tuple[Model, Recipe], Sample]) -> Iterator[dict]:
    """Works on a view and yields updates by the names of its outputs.

    settings: the values of Settings; extras: those of the view's own controls.
    last: this visitor's images so far; none of them is made again.  It is yielded anew, as "last", at the end.
    """
    settings = Settings(*settings)
    with sentences(settings):
        recipe, model = settings.recipe, settings.model
        if not MODELS.has(model):
            gr.Info(f"Loading {model.title} …")
        loaded = MODELS.get(model)
        if loaded.refiner and recipe.strength > 0:
            recipe = replace(recipe, refiner_scale=loaded.refiner.scale_input(recipe.guidance_scale))
        if not guided(model):
            recipe = replace(recipe, guidance_scale=1.0)
        known = {recipe: sample for (of, recipe), sample in last.items() if of == maker_of(model, recipe)}
        make = Maker(loaded.pipe, loaded.refiner, known)

        def work(report: Callable[[dict], None]) -> None:
            make.on_step = lambda *_: report({})  # where a Stop is noticed
            with WORK:
                VIEWS[view].show(Job(loaded, make, recipe, guided(model), report), *extras)

        yield {"about": {"backbone": model.backbone, "revision": loaded.revision, "refiner_sha256": loaded.refiner_sha256}}
        for updates in stream(work, PREVIEW_SECONDS):
            yield {name: value for update in updates for name, value in update.items()}
    yield {"last": within_limits(last | {(maker_of(model, recipe), recipe): sample for recipe, sample in make.known.items()})}


def maker_of(model: Model, recipe: Recipe) -> Model:
    """What the recipe's image depends on of the model: not the refiner where it isn't used."""
    return model if recipe.strength else replace(model, refiner="")


def within_limits(samples: dict[tuple[Model, Recipe], Sample]) -> dict[tuple[Model, Recipe], Sample]:
    """The newest of the samples, up to KEPT_PIXELS."""
    kept, pixels = {}, 0
    for key, sample in reversed(samples.items()):
        pixels += sample.image.width * sample.image.height
        if pixels > KEPT_PIXELS:
            break
        kept[key] = sample
    return dict(reversed(kept.items()))


@contextlib.contextmanager
def sentences(settings: Settings) -> Iterator[None]:
    """Turns the errors that a visitor can mend into messages on the page."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(str(error), print_exception=False) from error
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not re.search("out of memory|can't allocate|ALLOC_FAILED", str(error)):
            raise
        MODELS.forget(lambda other: other.backbone == settings.model.backbone and not ZERO_GPU)
        raise gr.Error("The memory is full. A smaller size or backbone needs less of it, and so does the app on a graphics card when it is started "
                       f"with {MODELS.smaller_mode()}.", print_exception=False) from error


def link(settings: Settings) -> str:
    """A query string with what differs from the defaults."""
    return "?" + urllib.parse.urlencode({field.name: getattr(settings, field.name) for field in fields(Settings)
                                         if getattr(settings, field.name) not in (field.default, None, "")})


def restored(values: dict) -> list:
    """The values of a link or PNG for the page's inputs; what it doesn't hold stays as it is.

    Raises ValueError where one is not of the setting's kind; whether it makes sense is checked when it is used.
    """
    updates = []
    for field in fields(Settings):
        value, default = values.get(field.name), "" if field.name == "prompt" else field.default
        if value is None:
            updates.append(gr.skip())
        elif isinstance(default, str):
            if not isinstance(value, str) or len(value) > 2000:
                raise ValueError(f"{field.name} is a text; the file or link holds something else.")
            updates.append(value)
        else:
            try:
                plain = float(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{field.name} is a number; the file or link holds {str(value)[:40]!r}.") from error
            updates.append(int(plain) if number(plain, field.name) == int(plain) else plain)
    return updates


def restore_png(path: str | None) -> list:
    if path is None:
        return [gr.skip() for _ in fields(Settings)]
    try:
        values = restored(read_png(path)["settings"])
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    gr.Info("The settings of this image are restored: press Generate.")
    return values


def restore_link(request: gr.Request) -> list:
    try:
        return restored(dict(request.query_params))
    except ValueError as error:
        gr.Warning(str(error))
        return [gr.skip() for _ in fields(Settings)]


def files_of(update: dict, folder: Path, record: dict, shown: dict) -> dict:
    """The update with pictures as files, which Gradio copies once; it would write an image anew at every yield, while the browser reads it.

    shown: what was made into files before, by name and place.
    """
    def file(name: str, picture: Sample | Image.Image, **about) -> str:
        path = folder / f"{name}.png"
        if shown.get(name) is not picture:
            shown[name] = picture
            if isinstance(picture, Sample):
                save_png(picture.image, path, record | about)
            else:
                picture.save(path)
        return str(path)

    made = {}
    for name, value in update.items():
        if name == "images":
            made[name] = [(file(f"{i:02}", picture, caption=caption), caption) for i, (caption, picture) in enumerate(value)]
        elif name == "keep":
            sheet = contact_sheet([(f"{', '.join(ARMS[arm])}, {sample.forwards} forwards", sample.image) for arm, sample in value.items()],
                                  record["settings"]["prompt"])
            made[name] = [file("contact-sheet", sheet)] + [file(arm, sample, arm=arm) for arm, sample in value.items()]
        elif name == "noise":
            save_file(dict(zip(("x_T", "refined"), value)), path := folder / "noise.safetensors")
            made[name] = str(path)
        elif isinstance(value, (Sample, Image.Image)):
            made[name] = file(name, value, arm=name)
        else:
            made[name] = value
    return made


def endpoint(view: str, outputs: dict[str, gr.components.Component], controls: dict[str, gr.components.Component], says: str) -> Callable:
    """The event handler of a view: takes Settings' values, those of the view's controls and the visitor's images; yields outputs and images."""
    empty = {name: "" if isinstance(output, gr.Markdown) else None for name, output in outputs.items()}

    def handler(*inputs):
        values, extras, last = inputs[:len(fields(Settings))], inputs[len(fields(Settings)):-1], inputs[-1] or {}
        record, state, shown = {"settings": asdict(Settings(*values)), "view": view, "versions": versions()}, dict(empty), {}
        with tempfile.TemporaryDirectory() as folder:
            for update in run(view, values, extras, last):
                if about := update.pop("about", None):
                    record |= about
                    continue
                last = update.pop("last", last)
                state |= files_of(update, Path(folder), record, shown)
                if "keep" in update:
                    state["link"] = f"[Link to these settings]({link(Settings(*values))})"
                yield [*state.values(), last]

    names = [field.name for field in fields(Settings)] + list(controls) + ["last"]
    handler.__signature__ = inspect.Signature([inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names])
    handler.__doc__ = says
    return handler


def build() -> gr.Blocks:
    with gr.Blocks(title="NoiseRefine", analytics_enabled=False, delete_cache=(3600, 7200)) as page:
        gr.HTML("<h1>NoiseRefine</h1><p>Guidance doubles the cost of every image. Refining the initial noise once, in one forward "
                "pass, lets plain unguided sampling reach a similar picture at half of it.</p>", elem_id="head", padding=False)
        with gr.Row(elem_id="ask"):
            prompt = gr.Textbox(EXAMPLES[0], label="Prompt", lines=1, max_lines=3, scale=5, autofocus=True)
            button = gr.Button("Generate", variant="primary", scale=1)
            stop = gr.Button("Stop", scale=0)
        examples = gr.Examples(EXAMPLES, prompt, label="Try")
        shown = {}
        with gr.Row(elem_id="arms"):
            for name, (noise, guidance) in ARMS.items():
                with gr.Column(elem_classes=["card", "best"] if name == "refined" else ["card"]):
                    gr.HTML(f"<b>{noise}</b><span>{guidance}</span>", elem_classes="title", padding=False)
                    shown[name] = picture(f"{noise}, {guidance}")
                    shown[f"{name}_cost"] = gr.Markdown(" ", elem_classes="cost", show_label=False)
        with gr.Row(elem_id="noise"):
            for name, title, text in (("heat", "Change of the noise", "low frequencies"), ("layout", "The image it laid out", "refined, unguided")):
                with gr.Column(elem_classes="card"):
                    gr.HTML(f"<b>{title}</b><span>{text}</span>", elem_classes="title", padding=False)
                    shown[name] = picture(f"{title}, {text}")
            shown["says"] = gr.Markdown("", elem_classes="says", show_label=False)
        with gr.Accordion("Settings", open=True):
            inputs = {"prompt": prompt} | settings_inputs()
        with gr.Accordion("Keep and restore", open=False):
            shown["link"] = gr.Markdown("", show_label=False)
            with gr.Row():
                shown["keep"] = gr.File(label="Contact sheet and images, which hold their settings", file_count="multiple", interactive=False)
                dropped = gr.File(label="Drop an image of this page to restore its settings", file_types=[".png"])
        last = gr.State({}, time_to_live=3600)

        def on(listen: Callable, view: str, outputs: dict, controls: dict | None = None, **kwargs) -> gr.events.Dependency:
            """Has a view worked on when the listener hears of its event."""
            controls, says = controls or {}, VIEWS[view].says or VIEWS[view].show.__doc__
            return listen(fn=endpoint(view, outputs, controls, says), inputs=[*inputs.values(), *controls.values(), last],
                          outputs=[*outputs.values(), last], concurrency_id="gpu", concurrency_limit=1, show_progress="minimal",
                          api_description=says, **kwargs)

        running = [on(functools.partial(gr.on, [button.click, prompt.submit]), "compare", shown, api_name="compare"),
                   on(examples.load_input_event.then, "compare", shown, api_visibility="private")]
        gr.HTML("<h2>Look closer</h2><p>The same prompt, seed and settings, seen in other ways. What was made already is not made again.</p>",
                elem_id="closer", padding=False)
        with gr.Tabs():
            for view, about in VIEWS.items():
                if about.title:
                    with gr.Tab(about.title):
                        running.append(build_view(view, about, on))
            with gr.Tab("Blind test"):
                running.append(build_blind_test(on))
        noise = gr.File(visible=False, label="x_T and the refined noise, as safetensors")
        on(gr.Button(visible=False).click, "refine", {"noise": noise}, api_name="refine")

        stop.click(None, cancels=running, api_visibility="private")
        dropped.upload(restore_png, dropped, list(inputs.values()), api_visibility="private")
        page.load(restore_link, None, list(inputs.values()), api_visibility="private")
    return page


def settings_inputs() -> dict[str, gr.components.Component]:
    """The inputs of Settings by name, all but the prompt."""
    default = Settings("")
    with gr.Row():
        with gr.Row(elem_id="seed", scale=1):
            seed = gr.Number(default.seed, label="Seed", min_width=140)
            dice = gr.Button("🎲 New seed", min_width=90, size="md")
        backbone = gr.Dropdown(CHOICES, value=default.backbone, label="Backbone", scale=1, allow_custom_value=FREE_CHOICE,
                               info="or a hub id, a folder, a .safetensors file" if FREE_CHOICE else None)
        sampler = gr.Dropdown(list(SAMPLERS), value=default.sampler, label="Sampler", scale=1)
    with gr.Row():
        strength = gr.Slider(0, 2, default.strength, step=0.05, label="Refinement strength", info="0 is the Gaussian noise, 1 as trained")
        scale = gr.Slider(1, 15, default.guidance_scale, step=0.1, label="Guidance scale", info="of the guided column, and of a refiner that takes it")
        steps = gr.Slider(1, 100, default.steps, step=1, label="Steps", info="of every column")
    with gr.Row():
        negative_prompt = gr.Textbox("", label="Negative prompt", info="of the guided column", max_lines=2, scale=2)
        width = gr.Number(default.width, label="Width", info="pixels; 0 for the model's own", min_width=120)
        height = gr.Number(default.height, label="Height", info="pixels; 0 for the model's own", min_width=120)
    with gr.Row():
        refiner = gr.Dropdown(REFINERS, value="", label="Refiner", info="or a hub id, a folder" if FREE_CHOICE else None, allow_custom_value=FREE_CHOICE)
        lora = gr.Textbox("", label="LoRA", info="hub id, folder or .safetensors; empty for none", max_lines=1, visible=FREE_CHOICE)
        lora_weight = gr.Slider(0, 2, default.lora_weight, step=0.05, label="LoRA weight", info="in all three columns", visible=FREE_CHOICE)
    dice.click(lambda: secrets.randbelow(MAX_SEED + 1), None, seed, api_visibility="private")
    backbone.input(defaults_of, backbone, [scale, steps, sampler], api_visibility="private")
    return dict(seed=seed, backbone=backbone, steps=steps, guidance_scale=scale, strength=strength, sampler=sampler, width=width, height=height,
                refiner=refiner, lora=lora, lora_weight=lora_weight, negative_prompt=negative_prompt)


def build_view(view: str, about: View, on: Callable):
    """The tab of a view: what it shows, its controls and its images."""
    gr.Markdown(about.says, elem_classes="says")
    with gr.Row(elem_classes="controls"):
        controls = about.controls()
        show = gr.Button("Show", variant="primary", min_width=110, scale=0)
    outputs = {}
    if view == "frequencies":
        with gr.Row(elem_id="bands"):
            outputs = {"histogram": gr.Plot(label="How far the entries of x_T moved", show_label=False),
                       "spectrum": gr.Plot(label="Where the correction's energy is", show_label=False),
                       "overlay": picture("Change of the noise below the cutoff, over the refined image")}
    outputs["images"] = gr.Gallery(label=about.title, columns=about.columns, show_label=False, object_fit="contain", height="auto", format="png",
                                   interactive=False, elem_classes="images")
    return on(show.click, view, outputs, controls, api_name=view)


def build_blind_test(on: Callable):
    """Two unlabelled images, two questions, and the running tally, which stays in this page."""
    gr.Markdown("Two images of one new seed for the prompt above, in random order: one from refined noise, one from Gaussian noise. Say which is "
                "better and which follows the prompt; then you learn which was which. Nothing is sent anywhere.", elem_classes="says")
    with gr.Row(elem_classes="controls"):
        opponent = gr.Radio([("guided", "guided"), ("unguided", "gaussian")], value="guided", label="Refined against")
        new = gr.Button("New pair", variant="primary", min_width=110, scale=0)
    with gr.Row(elem_id="pair"):
        outputs = {"left": picture("Left"), "right": picture("Right")}
    answers = [gr.Radio([LEFT, RIGHT, NEITHER], label=question) for question in QUESTIONS.values()]
    vote = gr.Button("Vote")
    result = gr.Markdown("", elem_classes="says")
    export = gr.DownloadButton("Votes as JSON", interactive=False, size="sm")
    pair, votes = gr.State(None), gr.State([])

    def count(pair: tuple | None, votes: list[Vote], *given: str | None):
        if pair is None:
            raise gr.Error("There is no open pair: press “New pair” first.", print_exception=False)
        if None in given:
            raise gr.Error("Answer both questions first.", print_exception=False)
        votes = [*votes, Vote(*pair, *given)]
        path = Path(tempfile.mkdtemp()) / "votes.json"
        path.write_text(json.dumps({"votes": [asdict(vote) for vote in votes], "refined": tally(votes)}, indent=2))
        return f"Left was {pair[2]}, right was {pair[3]}.\n\n{tally_table(votes)}", votes, None, gr.DownloadButton(value=str(path), interactive=True)

    vote.click(count, [pair, votes, *answers], [result, votes, pair, export], api_visibility="private")
    new.click(lambda: [None, None, ""], None, [*answers, result], api_visibility="private")
    return on(new.click, "blind", outputs | {"pair": pair}, {"opponent": opponent}, api_visibility="private")


def tally_table(votes: list[Vote]) -> str:
    """How often the refined image was chosen, as a Markdown table."""
    rows = ["| | refined chosen | of decided | 95 % interval | can't tell |", "|---|---|---|---|---|"]
    for question, counts in tally(votes).items():
        share = "–" if counts["share"] is None else f"{counts['share']:.0%}"
        rows.append("| {} | {} | {} | {:.0%} to {:.0%} | {} |".format(QUESTIONS[question], share, counts["n"], *counts["interval"], counts["undecided"]))
    return "\n".join(rows)


def defaults_of(name: str) -> tuple:
    """Guidance scale, steps and sampler of a model of the catalogue; any other leaves them as they are."""
    backbone = BACKBONES.get(name)
    return (backbone.guidance_scale or gr.skip(), backbone.steps, backbone.sampler) if backbone else (gr.skip(), gr.skip(), gr.skip())


def picture(label: str) -> gr.Image:
    return gr.Image(label=label, alt_text=label, show_label=False, interactive=False, format="png", elem_classes="picture",
                    buttons=["download", "fullscreen"])


if ZERO_GPU:
    for name in list(SERVED):  # a worker's models are lost with it: they are placed here, before it is forked
        try:
            MODELS.get(Model(name))
        except (ValueError, OSError) as error:
            print(f"{name} is not served: {error}")
            SERVED.remove(name)
CHOICES = [(BACKBONES[name].title, name) for name in SERVED]
demo = build().queue(max_size=32)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", help="address to listen on; GRADIO_SERVER_NAME or 127.0.0.1 if not given")
    parser.add_argument("--port", type=int, help="GRADIO_SERVER_PORT or the first free one from 7860 if not given")
    parser.add_argument("--offload", choices=OFFLOADS, default="none", help="for small cards: " + "; ".join(f"{k}: {v}" for k, v in OFFLOADS.items()))
    args = parser.parse_args()
    MODELS.offload = args.offload
    if args.offload != "none" and default_device().type == "cpu":
        parser.error("--offload spares the memory of a graphics card, and there is none here: leave it out.")
    demo.launch(server_name=args.host, server_port=args.port, theme=THEME, css_paths=[ASSETS / "page.css"], mcp_server=True)
