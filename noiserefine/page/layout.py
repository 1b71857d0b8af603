"""The page: its components from top to bottom. `noiserefine.page.wiring` connects them."""

import html
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from noiserefine.limits import MAX_GUIDANCE_SCALE, MAX_STEPS, MAX_STRENGTH
from noiserefine.models.catalogue import BACKBONES
from noiserefine.page import texts
from noiserefine.page.blind import ANSWERS, KEYS, QUESTIONS
from noiserefine.page.opening import EXAMPLES, Opening, default_settings, opening
from noiserefine.page.settings import FREE_CHOICE, REFINERS, SERVED, Settings
from noiserefine.page.views import ARMS, MOST_SEEDS, OPPONENTS, VIEWS, View, picture
from noiserefine.page.vocabulary import vocabulary
from noiserefine.sampler_names import SAMPLER_NAMES

Components = dict[str, gr.components.Component]

PAPER = "https://arxiv.org/abs/2412.03895"
CSS = Path(__file__).with_name("page.css")
# Gradio makes as many columns as there are images, which would shrink with every one that comes.
COLUMNS_CSS = " ".join(f".columns-{n} {{ --columns: {n}; }}" for n in range(1, MOST_SEEDS + 1))
JAVASCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
HEAD = Path(__file__).with_name("head.html")
FAVICON = Path(__file__).with_name("favicon.png")
colors = gr.themes.colors
THEME = gr.themes.Base(
    primary_hue=colors.orange,
    neutral_hue=colors.stone,
    radius_size=gr.themes.sizes.radius_lg,
    font=["ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    # White on orange 700 and stone 600 on white pass WCAG AA; the theme's own pairs do not.
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
    button_primary_text_color="white",
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    link_text_color="*primary_700",
    link_text_color_dark="*primary_300",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
)


@dataclass
class Tab:
    """The parts of one view's tab."""

    tab: gr.Tab
    controls: Components
    outputs: Components
    show: gr.Button
    stop: gr.Button
    hindrance: gr.Markdown  # why this view cannot work with the loaded model


@dataclass
class Page:
    """The components that events connect."""

    inputs: Components = field(default_factory=dict)  # of Settings, by name
    compared: Components = field(default_factory=dict)  # outputs of the comparison
    buttons: dict[str, gr.Button] = field(default_factory=dict)
    examples: dict[str, gr.Button] = field(default_factory=dict)  # by prompt
    tabs: dict[str, Tab] = field(default_factory=dict)  # by view
    parts: dict[str, Any] = field(default_factory=dict)  # everything else, by name


def build_components() -> Page:
    """Build the page inside an open Blocks."""
    page, first = Page(), opening()
    _head()
    _ask(page, first)
    _comparison(page, first)
    _settings(page)
    gr.HTML(
        "<h2>Look closer</h2><p>The same prompt, seed and settings, seen in other ways. Images "
        "that were made before are not made again.</p>",
        elem_id="closer",
        padding=False,
    )
    with gr.Tabs(elem_id="views") as page.parts["tabs"]:
        for name, view in VIEWS.items():
            if view.title:
                with gr.Tab(view.title, id=name) as tab:
                    page.tabs[name] = _view_tab(tab, view)
                    if name == "blind":
                        _votes(page)
    _keep(page)
    page.parts["noise"] = gr.File(visible=False, label="noise")
    page.parts["refine"] = gr.Button(visible=False)
    # Set from JavaScript: its change starts a comparison with whatever the inputs then hold.
    page.parts["go"] = gr.Number(0, visible="hidden", label="go")
    return page


def _head() -> None:
    gr.HTML(
        "<h1>NoiseRefine</h1>"
        "<p><span class='long'>A picture grows from random noise. Following the prompt well "
        "usually takes <abbr title='Classifier-free guidance: every step runs the network twice, "
        "with and without the prompt, and exaggerates the difference.' tabindex='0'>guidance</abbr>"
        ", at twice the cost. </span>One extra <abbr title='One run of the denoising network. It "
        "is what takes the time.' tabindex='0'>forward</abbr> corrects the <abbr title='x_T in the "
        "paper: the Gaussian noise that a seed stands for.' tabindex='0'>noise</abbr> instead. "
        f"<a href='{PAPER}' target='_blank' rel='noopener'>Paper</a></p>",
        elem_id="head",
        padding=False,
    )


def _ask(page: Page, first: Opening | None) -> None:
    """Build the prompt with its buttons, the examples, seed and strength."""
    default = default_settings()
    with gr.Row(elem_id="ask"):
        page.inputs["prompt"] = gr.Textbox(
            default.prompt, label="Prompt", lines=1, max_lines=3, scale=5, elem_id="prompt"
        )
        page.buttons["generate"] = gr.Button("Generate", variant="primary", elem_id="generate")
        page.buttons["stop"] = gr.Button("Stop", min_width=64, scale=0, elem_id="stop")
    gr.HTML(
        "<div id='suggestions' role='group' aria-label='Words this model knows'></div>"
        f"<div id='vocabulary' hidden>{html.escape(json.dumps(vocabulary()))}</div>",
        padding=False,
    )
    with gr.Row(elem_id="examples"):
        for prompt in EXAMPLES:
            page.examples[prompt] = gr.Button(
                texts.short(prompt),
                icon=first.thumbnails.get(prompt) if first else None,
                size="sm",
                min_width=0,
            )
        page.buttons["surprise"] = gr.Button("Surprise me", size="sm", min_width=0)
    with gr.Row(elem_id="quick"):
        page.inputs["seed"] = gr.Number(
            default.seed, label="Seed", min_width=110, scale=1, elem_id="seed"
        )
        page.buttons["new_seed"] = gr.Button("New seed", min_width=84, size="md", scale=0)
        page.parts["each_time"] = gr.Checkbox(
            False, label="new each time", min_width=90, scale=0, elem_id="each-time"
        )
        page.inputs["strength"] = gr.Slider(
            0,
            MAX_STRENGTH,
            default.strength,
            step=0.05,
            label="Strength",
            min_width=200,
            scale=2,
            elem_id="strength",
        )


def _comparison(page: Page, first: Opening | None) -> None:
    """Build the cards of the three arms, filled with the shipped comparison."""
    outputs = page.compared
    with gr.Row(elem_id="arms"):
        for name, arm in ARMS.items():
            best = ["best"] if name == "refined" else []
            with gr.Column(elem_classes=["card", *best], elem_id=f"card-{name}"):
                gr.HTML(
                    f"<h2>{arm.title}</h2><span>{arm.text}</span>",
                    elem_classes="title",
                    padding=False,
                )
                outputs[name] = picture(
                    f"{arm.title}, {arm.text}", first.arms[name] if first else None, label=name
                )
                outputs[f"{name}_cost"] = gr.Markdown(
                    first.costs[name] if first else " ",
                    elem_classes="cost",
                    show_label=False,
                    label=f"{name}_cost",
                )
    outputs["caption"] = gr.Markdown(
        first.caption if first else "", elem_id="caption", show_label=False, label="caption"
    )
    outputs["note"] = gr.Markdown("", elem_classes="says", show_label=False, label="note")
    # What the images were made from, as JSON: the page greys them when the inputs differ.
    outputs["made_from"] = gr.Textbox(
        first.made_from if first else "", visible="hidden", label="made_from"
    )
    with gr.Row(elem_id="closer-look"):
        with gr.Column(elem_classes="card", elem_id="slide", min_width=260):
            page.parts["versus"] = gr.Radio(
                OPPONENTS,
                value="gaussian",
                label="Drag the line. Refined is on the right; on the left:",
                elem_id="versus",
            )
            page.parts["slider"] = gr.ImageSlider(
                (first.arms["gaussian"], first.arms["refined"]) if first else None,
                label="Two arms on one another",
                show_label=False,
                interactive=False,
                format="png",
                type="filepath",
                buttons=["fullscreen"],
            )
            gr.HTML(
                "<button id='flicker' type='button'>Hold to flicker between the two</button>",
                padding=False,
            )
        with gr.Column(min_width=260):
            page.parts["history"] = gr.Gallery(
                label="This session; click to restore",
                columns=6,
                object_fit="cover",
                height="auto",
                format="png",
                interactive=False,
                allow_preview=False,
                buttons=[],
                elem_id="history",
            )
            with gr.Accordion("Code for this picture", open=False):
                outputs["code"] = gr.Code(
                    first.code if first else "",
                    language="python",
                    label="code",
                    show_label=False,
                    interactive=False,
                    max_lines=22,
                    wrap_lines=True,
                )


def _settings(page: Page) -> None:
    """Build the inputs of Settings, all but prompt, seed and strength."""
    default, inputs = Settings(""), page.inputs
    choices = [(BACKBONES[name].title, name) for name in SERVED]
    with gr.Accordion("Settings", open=True, elem_id="settings"):
        with gr.Row():
            inputs["backbone"] = gr.Dropdown(
                choices,
                value=default.backbone,
                label="Model",
                allow_custom_value=FREE_CHOICE,
                info="or a hub id, a folder, a .safetensors file; ending in :v or :epsilon where "
                "its files say wrongly what it predicts"
                if FREE_CHOICE
                else None,
            )
            inputs["sampler"] = gr.Dropdown(
                SAMPLER_NAMES, value=default.sampler, label="Sampler", info="of every column"
            )
            inputs["steps"] = gr.Slider(
                1, MAX_STEPS, default.steps, step=1, label="Steps", info="of every column"
            )
            inputs["guidance_scale"] = gr.Slider(
                1,
                MAX_GUIDANCE_SCALE,
                default.guidance_scale,
                step=0.1,
                label="Guidance scale",
                info="of the guided column, and of a refiner that takes it",
            )
        page.parts["about_model"] = gr.Markdown(
            about_model(default.backbone), elem_classes="says", show_label=False, label="model"
        )
        with gr.Row():
            inputs["negative_prompt"] = gr.Textbox(
                "", label="Negative prompt", info="of the guided column", max_lines=2, scale=2
            )
            for side in ("width", "height"):
                inputs[side] = gr.Number(
                    0, label=side.capitalize(), info="pixels; 0: the model's size", min_width=120
                )
        with gr.Row():
            inputs["refiner"] = gr.Dropdown(
                [("the model's own", "")] + [(each.title, name) for name, each in REFINERS.items()],
                value="",
                label="Refiner",
                info="or a hub id, a folder" if FREE_CHOICE else None,
                allow_custom_value=FREE_CHOICE,
            )
            inputs["lora"] = gr.Textbox(
                "",
                label="LoRA",
                info="hub id, folder or .safetensors; empty for none",
                max_lines=1,
                visible=FREE_CHOICE,
            )
            inputs["lora_weight"] = gr.Slider(
                -2,
                2,
                default.lora_weight,
                step=0.05,
                label="LoRA weight",
                info="in all three columns; sliders take negative ones too",
                visible=FREE_CHOICE,
            )
    # Handlers take values in the order of Settings' fields.
    page.inputs = {name: inputs[name] for name in Settings.names()}


def about_model(name: str) -> str:
    """Return size, download, guidance, licence and refiner of a listed model as Markdown."""
    backbone = BACKBONES.get(name)
    if backbone is None:
        return ""
    download = f"download {backbone.download:g} GiB" if backbone.download else "no download"
    facts = [
        f"{backbone.parameters:g} B parameters",
        download,
        f"{backbone.memory:g} GiB of memory",
        f"guidance {backbone.guidance}",
        backbone.licence,
        "has a refiner"
        if backbone.has_refiner
        else "no refiner yet: the third card shows how to train one",
    ]
    return f"{backbone.title}: " + " · ".join(facts)


def _view_tab(tab: gr.Tab, view: View) -> Tab:
    """Build the tab of a view: its text, controls, figures and gallery."""
    gr.Markdown(view.text, elem_classes="says")
    hindrance = gr.Markdown("", elem_classes=["says", "hindrance"])
    with gr.Row(elem_classes="controls"):
        controls = {name: make() for name, make in view.controls.items()}
        show = gr.Button(view.button, variant="primary", min_width=110, scale=0)
        stop = gr.Button("Stop", min_width=64, scale=0)
    outputs: Components = {}
    name = view.function.__name__
    with gr.Row(elem_classes=["figures", name], visible=bool(view.outputs)):
        outputs |= {name: make() for name, make in view.outputs.items()}
    if view.columns:
        outputs["images"] = gr.Gallery(
            label="images",
            columns=view.columns,
            show_label=False,
            object_fit="contain",
            height="auto",
            format="png",
            interactive=False,
            buttons=["download", "download_all", "fullscreen"],
            elem_classes=gallery_classes(name, view.columns),
        )
    return Tab(tab, controls, outputs, show, stop, hindrance)


def gallery_classes(view: str, columns: int) -> list[str]:
    """Return the CSS classes of a view's gallery, which COLUMNS_CSS gives its columns by."""
    return ["images", f"columns-{columns}", *(["flipped"] if VIEWS[view].flip else [])]


def _votes(page: Page) -> None:
    """Build the answers of the blind test and the tally, which stays in this session."""
    parts = page.parts
    with gr.Row():
        parts["answers"] = {
            answer: gr.Button(f"{label} ({KEYS[answer]})", elem_id=f"answer-{answer}")
            for answer, label in ANSWERS.items()
        }
    parts["tally"] = gr.Markdown(
        f"**{QUESTIONS['better']}**", elem_classes="says", show_label=False, label="tally"
    )
    parts["export"] = gr.DownloadButton("Votes as JSON", interactive=False, size="sm")
    parts["pair"], parts["votes"] = gr.State(None), gr.State([])
    # Set when the next pair may come: its change starts it.
    parts["next_pair"] = gr.Number(0, visible="hidden", label="next pair")


def _keep(page: Page) -> None:
    """Build the files and the link to keep, and the field that takes a file back."""
    with gr.Accordion("Keep and restore", open=True):
        with gr.Row():
            page.compared["keep"] = gr.File(
                label="keep",
                show_label=False,
                file_count="multiple",
                interactive=False,
                height=250,
                elem_id="keep",
            )
            page.parts["dropped"] = gr.File(
                label="Drop an image of this page, or of another program, to restore its settings",
                file_types=[".png"],
                height=250,
                elem_id="restore",
            )
        page.compared["link"] = gr.Textbox("", visible="hidden", label="link")
        page.parts["address"] = gr.Textbox(
            "",
            label="Link to these settings",
            interactive=False,
            max_lines=1,
            buttons=["copy"],
        )
