"""Sentences that the page shows in more than one place."""

import re
from pathlib import Path
from typing import Any

from noiserefine.models.catalogue import Model
from noiserefine.page.settings import Settings, changed
from noiserefine.page.training import shown

SHOWN_SECONDS = 1.0  # below it the time says more about the machine than about the method


def counted(number: float, noun: str) -> str:
    """Return a number with its noun, in the plural but for 1."""
    return f"{_whole(number)} {noun}{'s' * (number != 1)}"


def cost(
    forwards: int, seconds: float | None, guided_forwards: int | None, nearness: float | None
) -> str:
    """Return what an arm cost, beside the guided arm where there is one.

    nearness: how much nearer to the guided image it is than the plain one, in latents, from 0 to 1.
    """
    text = f"**{forwards}** forward{'s' * (forwards != 1)}"
    if guided_forwards and forwards != guided_forwards:
        text += f", {forwards / guided_forwards:.0%} of guided"
    if seconds is not None:
        text += f" · {seconds:.1f} s"
    if nearness is None:
        return text
    if round(100 * nearness) == 0:
        return f"{text}  \nas near to the guided image as plain is"
    words = "nearer to" if nearness > 0 else "further from"
    return f"{text}  \n{abs(nearness):.0%} {words} the guided image than plain is"


def caption(settings: Settings) -> str:
    """Return what a comparison was made from, as one line of Markdown."""
    seed = f"seed {_whole(settings.seed)}"
    return f"Made from {quoted(settings.prompt)} · {seed} · {made_with(settings)}"


def made_with(settings: Settings) -> str:
    """Return all settings but prompt and seed, as one line of Markdown."""
    parts = [
        f"{counted(settings.steps, 'step')}, {settings.sampler}",
        f"guidance {settings.guidance_scale:g}",
        f"strength {settings.strength:g}",
        Model(str(settings.backbone)).title,
    ]
    given = changed(settings)
    if not settings.lora:
        given.pop("lora_weight", None)
    for name in ("refiner", "lora", "lora_weight", "width", "height", "negative_prompt"):
        if name in given:
            value = given[name]
            shown_value = quoted(value) if isinstance(value, str) else f"{value:g}"
            parts.append(f"{name.replace('_', ' ')} {shown_value}")
    return " · ".join(parts)


def quoted(prompt: str) -> str:
    """Return the prompt in quotation marks, as one line without Markdown."""
    return "“" + re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(prompt.split())) + "”"


def _whole(value: float | None) -> Any:
    """Return a whole number without its decimal point, and anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def file_name(settings: dict, what: str) -> str:
    """Return a descriptive file name, without its ending: panda-pink-background-seed7-refined."""
    words = re.findall(r"\w+", str(settings["prompt"]).lower())
    words = [word for word in words if word not in ("a", "an", "the", "on", "of")]
    about = "-".join(words[:4])[:40]  # a prompt without spaces is one word
    return "-".join(filter(None, (about, f"seed{_whole(settings['seed'])}", what)))


def short(prompt: str) -> str:
    """Return the prompt's object, without article and background."""
    return re.sub("^an? ", "", prompt).split(" on ")[0]


def code(settings: Settings, refiner: str | None, refiner_scale: float | None = None) -> str:
    """Return Python that makes the refined image, or the plain one without a refiner.

    refiner_scale: the guidance scale that the refiner was given, if it takes one.
    """
    imports = [
        "from noiserefine import Refiner, draw_noise",
        "from noiserefine.guidance import sample",
        "from noiserefine.models.loading import load_pipeline",
        "from noiserefine.noise import step_generator",
        "from noiserefine.samplers import with_sampler",
    ]
    size = {"height": settings.height, "width": settings.width}
    sizes = "".join(f", {name}={int(side)}" for name, side in size.items() if side)
    lines = [
        f"prompt, seed = {settings.prompt!r}, {_whole(settings.seed)}",
        f"pipe = load_pipeline({settings.backbone!r})",
    ]
    if settings.lora:
        imports.insert(3, "from noiserefine.models.user_lora import add_lora, set_lora_weight")
        lines += [
            f"add_lora(pipe, {settings.lora!r})",
            f"set_lora_weight(pipe, {settings.lora_weight:g})",
        ]
    lines += [
        f"pipe = with_sampler(pipe, {settings.sampler!r})",
        f"latents = draw_noise(pipe, seed{sizes})  # x_T",
    ]
    if refiner and settings.strength:
        scale = "" if refiner_scale is None else f", guidance_scale={refiner_scale:g}"
        lines += [
            f"refiner = Refiner.from_pretrained({shown(Path(refiner))!r}, pipe)",
            f"latents = refiner(latents, prompt, strength={settings.strength:g}{scale})",
        ]
    arguments = ", ".join(f"{name}={value!r}" for name, value in changed(settings).items())
    lines += [
        f"image = sample(pipe, prompt=prompt, latents=latents, num_inference_steps="
        f"{settings.steps:g}{sizes},",
        "               generator=step_generator(seed)).images[0]",
        "",
        "# The same through the API of this page:",
        "# from gradio_client import Client",
        f"# Client(address).predict({arguments}, api_name='/compare')",
    ]
    return "\n".join([*imports, "", *lines])


def remaining(done: int, total: int, seconds: float) -> str:
    """Return about how long the rest of a series of images takes."""
    left = seconds / done * (total - done) if done else 0
    return f"about {left:.0f} s left" if left >= SHOWN_SECONDS else "nearly done"


def variety(distances: dict[str, float]) -> str:
    """Return how different the images of several seeds are in every arm; plain is the unit."""
    plain = distances["plain"]
    lines = ["**Variety** (mean distance between the images of two seeds, in latents; plain is 1):"]
    lines += [f"{arm} {distance / plain:.2f}" for arm, distance in distances.items()]
    return lines[0] + " " + ", ".join(lines[1:])


def nearness(values: list[float]) -> str:
    """Return how much nearer refined images are to the guided ones than plain ones, with a bar."""
    mean = sum(values) / len(values)
    filled = round(20 * min(max(mean, 0), 1))
    nearer = sum(value > 0 for value in values)
    direction = "further from" if mean < 0 else "nearer to"
    return (
        f"{'█' * filled}{'░' * (20 - filled)} The refined images are on average "
        f"**{abs(mean):.0%}** {direction} the guided ones than the plain images are (distance of "
        f"latents); nearer in {nearer} of {len(values)}."
    )


def change_of_noise(cutoff: float, share: float, ratio: float | None) -> str:
    """Return where the correction is.

    ratio: the mean energy of a coefficient below the cutoff, divided by that of one above it.
    """
    energy = f"{share:.0%} of the correction's energy is below {cutoff:g} of the frequency radius."
    if ratio is None:
        return energy
    return f"{energy} A coefficient below it has {ratio:.1f} times the energy of one above."
