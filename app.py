"""The NoiseRefine page: one prompt and seed, three images side by side.

    python app.py --host 127.0.0.1 --port 7860
"""

import argparse
import functools
import gc
import math
import re
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

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
from diffusers import DiffusionPipeline
from PIL import Image

from noiserefine import Refiner
from noiserefine.backbones import (
    BACKBONES,
    add_lora,
    any_model_allowed,
    default_device,
    default_dtype,
    load_pipeline,
    refiner_for,
    training_command,
)
from noiserefine.compare import MAX_STEPS, Arm, check_request, compare
from noiserefine.noise import MAX_SEED
from noiserefine.offload import OFFLOADS, offload
from noiserefine.samplers import SAMPLERS
from noiserefine.spectrum import LOW_FREQUENCY, energy_below, heat_map, low_frequency_difference

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

THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.orange, neutral_hue=gr.themes.colors.stone, radius_size=gr.themes.sizes.radius_lg,
    font=["ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
).set(button_primary_background_fill="*primary_500", button_primary_background_fill_hover="*primary_600",
      button_primary_text_color="white", body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950")

CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; }
#head h1 { font-size: 2rem; font-weight: 750; letter-spacing: -.03em; margin: .4rem 0 .1rem; }
#head p { margin: 0; opacity: .75; max-width: 44rem; }
#ask { align-items: stretch; }
#ask button { min-width: 8rem; }
#seed { align-items: stretch; flex-wrap: nowrap; gap: 8px; }
#arms, #noise { display: grid !important; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 14px; }
#noise { grid-template-columns: repeat(2, minmax(0, 1fr)) minmax(0, 1fr); }
.card { background: var(--block-background-fill); border: 1px solid var(--border-color-primary); border-radius: 16px;
        padding: 12px !important; gap: 8px !important; min-width: 0 !important; }
.card.best { border-color: var(--primary-500); box-shadow: 0 0 0 1px var(--primary-500); }
.card .title b { display: block; font-size: 1.02rem; line-height: 1.25; }
.card .title span { font-size: .86rem; opacity: .7; }
.card .picture { aspect-ratio: 1; border-radius: 10px; overflow: hidden; border: 0; padding: 0; min-height: 0; height: auto !important; }
.card .picture img { width: 100% !important; height: 100% !important; object-fit: contain; }
.card .cost { font-variant-numeric: tabular-nums; font-size: .86rem; min-height: 2.7em; opacity: .85; }
.card .cost p { margin: 0; line-height: 1.35; }
.says p { font-size: .92rem; line-height: 1.5; }
footer { display: none !important; }
@media (max-width: 640px) {
  #arms { gap: 6px; } #noise { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 6px; } #noise .says { grid-column: 1 / -1; }
  .card { padding: 7px !important; border-radius: 11px; } .card .title b { font-size: .82rem; } .card .title span, .card .cost { font-size: .72rem; }
  #head h1 { font-size: 1.6rem; } #ask button { min-width: 100%; }
}
"""


@dataclass(frozen=True)
class Model:
    """What a visitor chose to make images with."""

    backbone: str  # a name of BACKBONES, a hub id, a folder or a .safetensors checkpoint
    refiner: str = ""  # a hub id or folder; empty for the backbone's own
    lora: str = ""  # a hub id, folder or .safetensors file; empty for none
    lora_weight: float = 1.0

    def check(self) -> None:
        """Raises ValueError for names that visitors may not give here."""
        if not self.backbone:
            raise ValueError("No backbone is chosen.")
        ours = ((self.backbone, BACKBONES), (self.refiner, [folder for _, folder in REFINERS]), (self.lora, [""]))
        named = [name for name, known in ours if name not in known]
        if named and not FREE_CHOICE:
            raise ValueError(f"This Space serves its own models only; {named[0]} is none of them. Duplicate the Space, or run the app "
                             "on your machine, to use any model.")
        if self.backbone in BACKBONES and self.backbone not in SERVED:
            raise ValueError(f"{BACKBONES[self.backbone].title} is not served here; choose one of {', '.join(SERVED)}, or run the app on "
                             "your machine.")


class Models:
    """The models in memory: those that ZeroGPU serves, or the embedded one and the last other one.  One loads at a time."""

    def __init__(self) -> None:
        self.offload, self.loaded, self.lock = "none", {}, threading.Lock()

    def get(self, model: Model) -> tuple[DiffusionPipeline, Refiner | None, str]:
        """The pipeline, its refiner (None where there is none) and what to say of them.

        Raises what load_pipeline, add_lora and Refiner.from_pretrained raise, and ValueError where the card is too small.
        """
        files = replace(model, lora_weight=1.0)
        with self.lock:
            if files not in self.loaded:
                self.forget(lambda other: not ZERO_GPU and other != Model(DEFAULT))
                self.loaded[files] = self.load(files)
            pipe, refiner, says = self.loaded[files]
            if model.lora:
                pipe.set_adapters(["style"], [model.lora_weight])
            return pipe, refiner, says

    def forget(self, which: Callable[[Model], bool]) -> None:
        self.loaded = {model: value for model, value in self.loaded.items() if not which(model)}
        gc.collect()  # offloaded networks and their hooks hold each other
        if torch.cuda.is_available() and not ZERO_GPU:
            torch.cuda.empty_cache()

    def load(self, model: Model) -> tuple[DiffusionPipeline, Refiner | None, str]:
        backbone, device = BACKBONES.get(model.backbone), default_device()
        source = backbone.source if backbone else model.backbone
        if device.type == "cuda" and not ZERO_GPU and self.offload == "none" and backbone:
            there = torch.cuda.get_device_properties(device).total_memory / 2**30
            if there < backbone.memory:
                raise ValueError(f"{backbone.title} needs about {backbone.memory:g} GiB of GPU memory and this card has {there:.0f}: start the app "
                                 f"with {smaller_mode()}.")
        by_way_of_cpu = ZERO_GPU or self.offload != "none"  # where the card is not there yet, or too small
        pipe = load_pipeline(source, "cpu" if by_way_of_cpu else device, default_dtype(device))
        notes = [add_lora(pipe, model.lora)] if model.lora else []
        folder = model.refiner or refiner_for(pipe, backbone)
        refiner = Refiner.from_pretrained(folder, pipe, merge=True if ZERO_GPU else None) if folder else None
        if by_way_of_cpu:
            offload(pipe, refiner, self.offload, device)
        if refiner is None:
            notes.append("**No refiner exists for this model yet**, so there is no third column. This trains one:\n\n"
                         f"`{training_command(pipe, source, backbone)}`")
        else:
            scales = "takes no guidance scale: the slider drives the guided column only."
            if refiner.takes_guidance_scale:
                low, high = refiner.config.guidance_scale_range
                scales = f"takes the guidance scale, from {low:g} to {high:g}: the slider drives the guided and the refined column."
            notes += [refiner.note, f"This refiner {scales}"]
        return pipe, refiner, " ".join(note for note in notes if note)


MODELS = Models()


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


def seconds_of_gpu(prompt, seed, backbone, steps, *_) -> int:
    """What the comparison may take on ZeroGPU: four forwards a step, one to refine, and decoding; 18 s at SD2.1's defaults."""
    steps = steps if isinstance(steps, (int, float)) and 1 <= steps <= MAX_STEPS else 1  # others are refused
    return int(10 + (4 * steps + 1) * SECONDS_OF_A_FORWARD.get(backbone, 0.1))


def arm_keys(model: Model, refiner: Refiner | None, prompt: str, settings: dict, size: dict) -> dict[str, tuple]:
    """For each arm what it depends on: where that is as before, so is the arm."""
    common = (model.backbone, model.lora, model.lora_weight, prompt, settings["seed"], settings["steps"], settings["sampler"], *size.values())
    scale = settings["guidance_scale"]
    taken = scale if refiner and refiner.takes_guidance_scale else None
    return {"gaussian": common, "guided": (*common, scale), "refined": (*common, model.refiner, settings["strength"], taken)}


@GPU(duration=seconds_of_gpu)
def run(prompt: str, seed: float, backbone: str, steps: float, guidance_scale: float, strength: float, sampler: str,
        width: float | None, height: float | None, refiner: str, lora: str, lora_weight: float,
        last: dict[str, tuple[tuple, Arm]]) -> Iterator[dict]:
    """Compares unguided, guided and refined sampling from one prompt and seed.

    last: this visitor's last arms by name, with what they depended on; an arm that would be the same again is not sampled again.
    Yields what to show, by the names of `shown`, each time a column is finished, and under "last" the arms for the next run.
    """
    backbone = (backbone or "").strip()
    backbone = next((name for name, listed in BACKBONES.items() if listed.source == backbone), backbone)
    try:
        model = Model(backbone, (refiner or "").strip(), (lora or "").strip(), number(lora_weight, "The LoRA's weight") if lora else 1.0)
        model.check()
        listed = BACKBONES.get(model.backbone)
        unguided = listed is not None and listed.guidance_scale is None
        settings = dict(seed=whole(seed, "The seed"), steps=whole(steps, "The number of steps"), sampler=sampler,
                        guidance_scale=number(guidance_scale, "The guidance scale"),
                        strength=number(strength, "The refinement strength"))
        check_request(prompt, **settings)
        size = {name: whole(side, f"The {name}") if side else None for name, side in (("width", width), ("height", height))}
        pipe, refiner, says = MODELS.get(model)
        keys = arm_keys(model, refiner, prompt, settings, size)
        known = {name: arm for name, (key, arm) in (last or {}).items() if key == keys[name]}
        done, arms = {}, compare(pipe, refiner, prompt, **settings, **size, guided=not unguided, known=known)
        yield {}  # the input is sound: the last results go
        if unguided:
            yield {"guided_cost": f"**Not applicable**: {listed.title} is distilled to be sampled without guidance."}
        for arm in arms:
            done[arm.name] = arm
            share = f" · {arm.seconds / done['guided'].seconds:.0%} of the guided time" if arm.name == "refined" and "guided" in done else ""
            yield {arm.name: arm.image, f"{arm.name}_cost": f"**{arm.forwards}** UNet forwards  \n{arm.seconds:.2f} s{share}"}
    except (ValueError, OSError) as error:
        raise gr.Error(str(error), print_exception=False) from error
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not re.search("out of memory|can't allocate|ALLOC_FAILED", str(error)):
            raise
        MODELS.forget(lambda other: other.backbone == model.backbone and not ZERO_GPU)
        raise gr.Error("The memory is full. A smaller size or backbone needs less of it, and so does the app on a graphics card when it is started "
                       f"with {smaller_mode()}.", print_exception=False) from error
    yield {"last": {name: (keys[name], arm) for name, arm in done.items()}}
    if refiner is None:
        yield {"says": says}
        return
    x_T, x_hat = (torch.from_numpy(done[name].x_T) for name in ("gaussian", "refined"))
    share = energy_below(x_hat - x_T)
    yield {"heat": heat_map(low_frequency_difference(x_T, x_hat), done["refined"].image.size), "layout": done["refined"].image,
           "says": f"**What the refiner changed.** The heat map is the part of the change in x_T below {LOW_FREQUENCY} of the frequency "
                   f"radius: {share:.0%} of its energy. Where it is bright, the noise already says that something will be there; "
                   f"beside it is the image that grew from it. {says}"}


def smaller_mode() -> str:
    """The flag of the next offload mode that needs less memory."""
    modes = list(OFFLOADS)
    return f"--offload {modes[min(modes.index(MODELS.offload) + 1, len(modes) - 1)]}"


def build() -> gr.Blocks:
    default = BACKBONES[DEFAULT]
    with gr.Blocks(title="NoiseRefine", analytics_enabled=False) as page:
        gr.HTML("<h1>NoiseRefine</h1><p>Guidance doubles the cost of every image. Refining the initial noise once, in one forward "
                "pass, lets plain unguided sampling reach a similar picture at half of it.</p>", elem_id="head", padding=False)
        with gr.Row(elem_id="ask"):
            prompt = gr.Textbox(EXAMPLES[0], label="Prompt", lines=1, max_lines=3, scale=5, autofocus=True)
            button = gr.Button("Generate", variant="primary", scale=1)
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
            with gr.Row():
                with gr.Row(elem_id="seed", scale=1):
                    seed = gr.Number(7, label="Seed", min_width=140)
                    dice = gr.Button("🎲 New seed", min_width=90, size="md")
                backbone = gr.Dropdown(CHOICES, value=DEFAULT, label="Backbone", scale=1, allow_custom_value=FREE_CHOICE,
                                       info="or a hub id, a folder, a .safetensors file" if FREE_CHOICE else None)
                sampler = gr.Dropdown(list(SAMPLERS), value="DDIM", label="Sampler", scale=1)
            with gr.Row():
                strength = gr.Slider(0, 2, 1, step=0.05, label="Refinement strength", info="0 is the Gaussian noise, 1 as trained")
                scale = gr.Slider(1, 15, default.guidance_scale, step=0.1, label="Guidance scale", info="of the guided column, and of a refiner that takes it")
                steps = gr.Slider(1, 100, default.steps, step=1, label="Steps", info="of every column")
            with gr.Row():
                width = gr.Number(0, label="Width", info="pixels; 0 for the model's own")
                height = gr.Number(0, label="Height", info="pixels; 0 for the model's own")

            with gr.Row():
                refiner = gr.Dropdown(REFINERS, value="", label="Refiner", info="or a hub id, a folder" if FREE_CHOICE else None, allow_custom_value=FREE_CHOICE)
                lora = gr.Textbox("", label="LoRA", info="hub id, folder or .safetensors; empty for none", max_lines=1, visible=FREE_CHOICE)
                lora_weight = gr.Slider(0, 2, 1, step=0.05, label="LoRA weight", info="in all three columns", visible=FREE_CHOICE)
        last = gr.State({})

        names = list(shown)

        @functools.wraps(run)
        def generate(*inputs):
            state = {name: None if name in ("gaussian", "guided", "refined", "heat", "layout") else "" for name in names} | {"last": inputs[-1]}
            # As files, which Gradio copies once; it would write an image anew at every yield, while the browser reads it.
            with tempfile.TemporaryDirectory() as folder:
                for update in run(*inputs):
                    for name, value in update.items():
                        if isinstance(value, Image.Image):
                            value.save(path := f"{folder}/{name}.png")
                            value = path
                        state[name] = value
                    yield [state[name] for name in (*names, "last")]

        inputs = [prompt, seed, backbone, steps, scale, strength, sampler, width, height, refiner, lora, lora_weight, last]
        event = dict(fn=generate, inputs=inputs, outputs=[*shown.values(), last], concurrency_id="gpu", concurrency_limit=1, show_progress="minimal")
        gr.on([button.click, prompt.submit], **event, api_name="compare")
        examples.load_input_event.then(**event, api_visibility="private")
        dice.click(lambda: secrets.randbelow(MAX_SEED + 1), None, seed, api_visibility="private")
        backbone.input(defaults_of, backbone, [scale, steps, sampler], api_visibility="private")
    return page


def defaults_of(name: str) -> tuple:
    """Guidance scale, steps and sampler of a model of the catalogue; any other leaves them as they are."""
    backbone = BACKBONES.get(name)
    return (backbone.guidance_scale or gr.skip(), backbone.steps, backbone.sampler) if backbone else (gr.skip(), gr.skip(), gr.skip())


def picture(label: str) -> gr.Image:
    return gr.Image(label=label, show_label=False, interactive=False, format="png", elem_classes="picture", buttons=["download", "fullscreen"])


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
    demo.launch(server_name=args.host, server_port=args.port, theme=THEME, css=CSS)
