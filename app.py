"""The NoiseRefine page: one prompt and seed, three images side by side.

    python app.py --host 127.0.0.1 --port 7860
"""

import argparse
import functools
import math
import secrets
import threading
from collections.abc import Iterator

import gradio as gr
import spaces  # before anything that touches CUDA
import torch

from noiserefine import Refiner
from noiserefine.backbones import BACKBONES, load_pipeline
from noiserefine.compare import MAX_STEPS, check_request, compare
from noiserefine.noise import MAX_SEED
from noiserefine.samplers import SAMPLERS
from noiserefine.spectrum import LOW_FREQUENCY, energy_below, heat_map, low_frequency_difference

DEFAULT = "emoji"
EXAMPLES = ["a red apple on a blue background", "a panda on a pink background", "a rocket on a black background", "an owl on a purple background", "a sailboat"]
ARMS = {
    "gaussian": ("Gaussian noise", "no guidance"),
    "guided": ("Gaussian noise", "guided (CFG)"),
    "refined": ("Refined noise", "no guidance"),
}
CHOICES = [(backbone.title, name) for name, backbone in BACKBONES.items()]
LOADING = threading.Lock()

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


@functools.lru_cache(maxsize=2)
def _load(name: str):
    """The pipeline of a backbone and its refiner, None where nobody has trained one."""
    backbone = BACKBONES[name]
    pipe = load_pipeline(backbone.source)
    return pipe, Refiner.from_pretrained(backbone.refiner, pipe) if backbone.refiner else None


def load(name: str):
    with LOADING:  # two visitors must not load the same model twice
        return _load(name)


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
    """What the comparison may take on ZeroGPU: four passes of the UNet a step, and loading."""
    return int(20 + min(max(float(steps or 0), 1), MAX_STEPS) * (0.5 if "xl" in str(backbone) else 0.25))


@spaces.GPU(duration=seconds_of_gpu)
def run(prompt: str, seed: float, backbone: str, steps: float, guidance_scale: float, strength: float, sampler: str,
        width: float | None, height: float | None) -> Iterator[dict]:
    """Compares unguided, guided and refined sampling from one prompt and seed.

    Yields what to show, by the names of `shown`, each time a column is finished.
    """
    try:
        settings = dict(seed=whole(seed, "The seed"), steps=whole(steps, "The number of steps"), sampler=sampler,
                        guidance_scale=number(guidance_scale, "The guidance scale"), strength=number(strength, "The refinement strength"))
        check_request(prompt, **settings)
        size = {name: whole(side, f"The {name}") if side else None for name, side in (("width", width), ("height", height))}
        pipe, refiner = load(backbone)
        done, arms = {}, compare(pipe, refiner, prompt, **settings, **size)
        yield {}  # from here on it can only succeed: the last results go
        for arm in arms:
            done[arm.name] = arm
            share = "" if arm.name != "refined" else f" · {arm.seconds / done['guided'].seconds:.0%} of the guided time"
            yield {arm.name: arm.image, f"{arm.name}_cost": f"**{arm.forwards}** UNet forwards  \n{arm.seconds:.2f} s{share}"}
    except (ValueError, FileNotFoundError) as error:
        raise gr.Error(str(error), print_exception=False) from error
    except torch.OutOfMemoryError as error:
        raise gr.Error("The graphics card's memory is full: choose a smaller size or a smaller backbone.", print_exception=False) from error
    if refiner is None:
        yield {"says": f"Nobody has trained a refiner for {BACKBONES[backbone].title} yet. This makes one:\n\n"
                       f"`python train/train_refiner.py --backbone {BACKBONES[backbone].source} --prompts prompts.txt --output_dir runs/refiner`"}
        return
    x_T, x_hat = done["gaussian"].x_T, done["refined"].x_T
    share = energy_below(x_hat.float() - x_T.float())
    yield {"heat": heat_map(low_frequency_difference(x_T, x_hat), done["refined"].image.size), "layout": done["refined"].image,
           "says": f"**What the refiner changed.** The heat map is the part of the change in x_T below {LOW_FREQUENCY} of the frequency "
                   f"radius: {share:.0%} of its energy. Where it is bright, the noise already says that something will be there; "
                   f"beside it is the image that grew from it. {refiner.note}"}


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
                backbone = gr.Dropdown(CHOICES, value=DEFAULT, label="Backbone", scale=1)
                sampler = gr.Dropdown(list(SAMPLERS), value="DDIM", label="Sampler", scale=1)
            with gr.Row():
                strength = gr.Slider(0, 2, 1, step=0.05, label="Refinement strength", info="0 is the Gaussian noise, 1 as trained")
                scale = gr.Slider(1, 15, default.guidance_scale, step=0.1, label="Guidance scale", info="of the guided column")
                steps = gr.Slider(1, 100, default.steps, step=1, label="Steps", info="of every column")
            with gr.Row():
                width = gr.Number(0, label="Width", info="pixels; 0 for the model's own")
                height = gr.Number(0, label="Height", info="pixels; 0 for the model's own")

        names = list(shown)

        @functools.wraps(run)
        def generate(*inputs):
            state = {name: None if name in ("gaussian", "guided", "refined", "heat", "layout") else "" for name in names}
            for update in run(*inputs):
                state |= update
                yield [state[name] for name in names]

        inputs = [prompt, seed, backbone, steps, scale, strength, sampler, width, height]
        event = dict(fn=generate, inputs=inputs, outputs=list(shown.values()), concurrency_id="gpu", concurrency_limit=1, show_progress="minimal")
        gr.on([button.click, prompt.submit], **event, api_name="compare")
        examples.load_input_event.then(**event, api_visibility="private")
        dice.click(lambda: secrets.randbelow(MAX_SEED + 1), None, seed, api_visibility="private")
        backbone.input(lambda name: (BACKBONES[name].guidance_scale, BACKBONES[name].steps), backbone, [scale, steps],
                       api_visibility="private")
    return page


def picture(label: str) -> gr.Image:
    return gr.Image(label=label, show_label=False, interactive=False, format="png", elem_classes="picture", buttons=["download", "fullscreen"])


demo = build().queue(max_size=32)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", help="address to listen on; GRADIO_SERVER_NAME or 127.0.0.1 if not given")
    parser.add_argument("--port", type=int, help="GRADIO_SERVER_PORT or the first free one from 7860 if not given")
    args = parser.parse_args()
    demo.launch(server_name=args.host, server_port=args.port, theme=THEME, css=CSS)
