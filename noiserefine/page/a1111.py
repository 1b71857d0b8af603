"""The `parameters` text that AUTOMATIC1111's web UI and many programs after it write to PNGs."""

import re

from noiserefine.sampler_names import SAMPLERS

KEY = "parameters"
NAMES = {name.lower(): name for name in SAMPLERS} | {
    # As other programs call them, without "karras" and the like.
    "dpm++ 2m sde": "DPM++ SDE",
    "heun": "Heun (EDM)",
}
FIELD = re.compile(r'\s*([\w ]+):\s*("(?:\\.|[^"])*"|[^,]*)(?:,|$)')


def write(settings: dict, arm: str) -> str:
    """Return the settings of an image in this format."""
    guided = arm == "guided"
    lines = [str(settings["prompt"])]
    if guided and settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    values = {
        "Steps": settings["steps"],
        "Sampler": settings["sampler"],
        "CFG scale": settings["guidance_scale"] if guided else 1,
        "Seed": settings["seed"],
        "Model": settings["backbone"],
        "NoiseRefine strength": settings["strength"] if arm == "refined" else 0,
    }
    if settings["width"] and settings["height"]:
        values["Size"] = f"{settings['width']}x{settings['height']}"
    lines.append(", ".join(f"{name}: {value}" for name, value in values.items()))
    return "\n".join(lines)


def read(text: str) -> dict:
    """Return the settings in a text of this format, those that this page knows.

    Raises ValueError for an empty text.
    """
    if not text.strip():
        raise ValueError("The settings in this PNG are empty.")
    *lines, last = text.strip().splitlines()
    found = {name.strip().lower(): value.strip() for name, value in FIELD.findall(last)}
    if "steps" not in found:
        lines, found = [*lines, last], {}
    prompt, _, negative = "\n".join(lines).partition("Negative prompt:")
    settings = {"prompt": prompt.strip(), "negative_prompt": negative.strip()}
    names = {"steps": "steps", "cfg scale": "guidance_scale", "seed": "seed"}
    settings |= {ours: found[name] for name, ours in names.items() if name in found}
    sampler = re.sub(r" (karras|exponential|a)$", "", found.get("sampler", "").lower())
    if sampler in NAMES:
        settings["sampler"] = NAMES[sampler]
    if size := re.fullmatch(r"(\d+)x(\d+)", found.get("size", "")):
        settings |= {"width": size[1], "height": size[2]}
    return settings
