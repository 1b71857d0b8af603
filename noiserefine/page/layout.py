"""The page: its components, and which button starts which handler."""

import functools
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from noiserefine.models.catalogue import BACKBONES
from noiserefine.page.blind import LEFT, NEITHER, QUESTIONS, RIGHT, Vote, tally
from noiserefine.page.handlers import handler_of, restore_link, restore_png
from noiserefine.page.settings import FREE_CHOICE, REFINERS, SERVED, Settings
from noiserefine.page.views import ARMS, VIEWS, View, picture
from noiserefine.sampler_names import SAMPLERS

Components = dict[str, gr.components.Component]

EXAMPLES = [
    "a panda on a pink background",
    "a red apple on a blue background",
    "a rocket on a black background",
    "an owl on a purple background",
    "a sailboat",
]
CSS = Path(__file__).with_name("page.css")
JAVASCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.orange,
    neutral_hue=gr.themes.colors.stone,
    radius_size=gr.themes.sizes.radius_lg,
    font=["ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    button_primary_background_fill="*primary_500",
    button_primary_background_fill_hover="*primary_600",
    button_primary_text_color="white",
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
)


@dataclass
class Wiring:
    """Connects buttons to the views, with the settings as their inputs."""

    inputs: Components
    known: gr.State  # the session's samples, changed in place: a Stop keeps what was finished
    running: list[gr.events.Dependency] = field(default_factory=list)

    def connect(
        self,
        listen: Callable,
        view: str,
        outputs: Components,
        controls: Mapping[str, gr.components.Component] | None = None,
        **kwargs: Any,
    ) -> None:
        """Run a view when the listener hears of its event."""
        controls = controls or {}
        for component in (*self.inputs.values(), *controls.values()):
            # Settings and the views say what is wrong with a value; Gradio fails on other types.
            component.preprocess = lambda value: value
        self.running.append(
            listen(
                fn=handler_of(view, outputs, controls),
                inputs=[*self.inputs.values(), *controls.values(), self.known],
                outputs=list(outputs.values()),
                concurrency_id="gpu",
                concurrency_limit=1,
                show_progress="minimal",
                **kwargs,
            )
        )


def build_page() -> gr.Blocks:
    """Return the page."""
    with gr.Blocks(title="NoiseRefine", analytics_enabled=False) as page:
        gr.HTML(
            "<h1>NoiseRefine</h1><p>One forward pass corrects the initial noise for the prompt. "
            "Sampling from it without guidance looks like sampling with guidance, at about half "
            "of the UNet’s forwards.</p>",
            elem_id="head",
            padding=False,
        )
        with gr.Row(elem_id="ask"):
            prompt = gr.Textbox(
                EXAMPLES[0], label="Prompt", lines=1, max_lines=3, scale=5, autofocus=True
            )
            generate = gr.Button("Generate", variant="primary", scale=1)
            stop = gr.Button("Stop", scale=0)
        examples = gr.Examples(EXAMPLES, prompt, label="Try")
        compared = _comparison()
        with gr.Accordion("Settings", open=True):
            inputs = {"prompt": prompt} | _settings_inputs()
        with gr.Accordion("Keep and restore", open=True):
            dropped = _files_to_keep(compared)
        wiring = Wiring(inputs, gr.State({}))
        wiring.connect(
            functools.partial(gr.on, [generate.click, prompt.submit]),
            "compare",
            compared,
            trigger_mode="always_last",
        )
        wiring.connect(
            examples.load_input_event.then, "compare", compared, api_visibility="private"
        )
        gr.HTML(
            "<h2>Look closer</h2><p>The same prompt, seed and settings, seen in other ways. What "
            "was made already is not made again.</p>",
            elem_id="closer",
            padding=False,
        )
        with gr.Tabs():
            for name, view in VIEWS.items():
                if view.title:
                    with gr.Tab(view.title):
                        _view_tab(name, view, wiring)
            with gr.Tab("Blind test"):
                _blind_test(wiring)
        noise = gr.File(visible=False, label="x_T and the refined noise, as safetensors")
        wiring.connect(gr.Button(visible=False).click, "refine", {"noise": noise})

        stop.click(None, cancels=wiring.running, api_visibility="private")
        _restoring(page, dropped, list(inputs.values()))
    return page


def _comparison() -> Components:
    """Build the cards of the three arms and of the change of the noise."""
    outputs: Components = {}
    with gr.Row(elem_id="arms"):
        for arm, (noise, guidance) in ARMS.items():
            with gr.Column(elem_classes=["card", "best"] if arm == "refined" else ["card"]):
                _card_title(noise, guidance)
                outputs[arm] = picture(f"{noise}, {guidance}")
                outputs[f"{arm}_cost"] = gr.Markdown(" ", elem_classes="cost", show_label=False)
    with gr.Row(elem_id="noise"):
        for name, title, text in (
            ("heat", "Change of the noise", "low frequencies"),
            ("layout", "The image it laid out", "refined, unguided"),
        ):
            with gr.Column(elem_classes="card"):
                _card_title(title, text)
                outputs[name] = picture(f"{title}, {text}")
        outputs["says"] = gr.Markdown("", elem_classes="says", show_label=False)
    return outputs


def _card_title(title: str, text: str) -> None:
    gr.HTML(f"<b>{title}</b><span>{text}</span>", elem_classes="title", padding=False)


def _settings_inputs() -> Components:
    """Build the inputs of Settings by name, all but the prompt."""
    default = Settings("")
    choices = [(BACKBONES[name].title, name) for name in SERVED]
    with gr.Row():
        with gr.Row(elem_id="seed", scale=1):
            seed = gr.Number(default.seed, label="Seed", min_width=170)
            new_seed = gr.Button("New seed", min_width=90, size="md")
        backbone = gr.Dropdown(
            choices,
            value=default.backbone,
            label="Backbone",
            scale=1,
            allow_custom_value=FREE_CHOICE,
            info="or a hub id, a folder, a .safetensors file" if FREE_CHOICE else None,
        )
        sampler = gr.Dropdown(list(SAMPLERS), value=default.sampler, label="Sampler", scale=1)
    with gr.Row():
        strength = gr.Slider(
            0,
            2,
            default.strength,
            step=0.05,
            label="Refinement strength",
            info="0 is the Gaussian noise, 1 as trained",
        )
        scale = gr.Slider(
            1,
            15,
            default.guidance_scale,
            step=0.1,
            label="Guidance scale",
            info="of the guided column, and of a refiner that takes it",
        )
        steps = gr.Slider(
            1, 100, default.steps, step=1, label="Steps", info="of every column, 1 to 100"
        )
    with gr.Row():
        negative_prompt = gr.Textbox(
            "", label="Negative prompt", info="of the guided column", max_lines=2, scale=2
        )
        width, height = (
            gr.Number(0, label=label, info="pixels; 0 for the model's own", min_width=120)
            for label in ("Width", "Height")
        )
    with gr.Row():
        refiner = gr.Dropdown(
            [("the backbone's own", "")] + [(title, name) for name, (title, _) in REFINERS.items()],
            value="",
            label="Refiner",
            info="or a hub id, a folder" if FREE_CHOICE else None,
            allow_custom_value=FREE_CHOICE,
        )
        lora = gr.Textbox(
            "",
            label="LoRA",
            info="hub id, folder or .safetensors; empty for none",
            max_lines=1,
            visible=FREE_CHOICE,
        )
        lora_weight = gr.Slider(
            0,
            2,
            default.lora_weight,
            step=0.05,
            label="LoRA weight",
            info="in all three columns",
            visible=FREE_CHOICE,
        )
    new_seed.click(
        None, None, seed, js="() => Math.floor(Math.random() * 2 ** 32)", api_visibility="private"
    )
    backbone.input(_defaults_of, backbone, [scale, steps, sampler], api_visibility="private")
    return {
        "seed": seed,
        "backbone": backbone,
        "steps": steps,
        "guidance_scale": scale,
        "strength": strength,
        "sampler": sampler,
        "width": width,
        "height": height,
        "refiner": refiner,
        "lora": lora,
        "lora_weight": lora_weight,
        "negative_prompt": negative_prompt,
    }


def _defaults_of(name: str) -> tuple:
    """Return guidance scale, steps and sampler of a listed model, and change nothing for others."""
    backbone = BACKBONES.get(name)
    if backbone is None:
        return gr.skip(), gr.skip(), gr.skip()
    return backbone.guidance_scale or gr.skip(), backbone.steps, backbone.sampler


def _files_to_keep(outputs: Components) -> gr.File:
    """Build the files and the link to keep; return the field that takes a file back."""
    with gr.Row():
        outputs["keep"] = gr.File(
            label="Images, which hold their settings",
            file_count="multiple",
            interactive=False,
            height=250,
            elem_id="keep",
        )
        dropped = gr.File(
            label="Drop an image to restore settings",
            file_types=[".png"],
            height=250,
            elem_id="restore",
        )
    outputs["link"] = gr.Markdown("", show_label=False)
    return dropped


def _restoring(page: gr.Blocks, dropped: gr.File, inputs: list[gr.components.Component]) -> None:
    """Restore settings from a dropped image and from the page's address."""
    restoring = dropped.upload(restore_png, dropped, inputs, api_visibility="private")
    for finished in (restoring.success, restoring.failure):  # ready for the next file either way
        finished(lambda: None, None, dropped, api_visibility="private")
    page.load(restore_link, None, inputs, api_visibility="private")


def _view_tab(name: str, view: View, wiring: Wiring) -> None:
    """Build the tab of a view: its text, controls, outputs and gallery."""
    gr.Markdown(view.text, elem_classes="says")
    with gr.Row(elem_classes="controls"):
        controls = {control: make() for control, make in view.controls.items()}
        show = gr.Button("Show", variant="primary", min_width=110, scale=0)
    with gr.Row(elem_classes="figures", visible=bool(view.outputs)):
        outputs = {output: make() for output, make in view.outputs.items()}
    outputs["images"] = gr.Gallery(
        label=view.title,
        columns=view.columns,
        show_label=False,
        object_fit="contain",
        height="auto",
        format="png",
        interactive=False,
        buttons=["download", "download_all", "fullscreen"],
        elem_classes=["images", f"columns-{view.columns}"],
    )
    wiring.connect(show.click, name, outputs, controls)


def _blind_test(wiring: Wiring) -> None:
    """Build two unlabelled images, two questions, and the tally, which stays in this page."""
    view = VIEWS["blind"]
    gr.Markdown(view.text, elem_classes="says")
    with gr.Row(elem_classes="controls"):
        controls = {control: make() for control, make in view.controls.items()}
        new_pair = gr.Button("New pair", variant="primary", min_width=110, scale=0)
    with gr.Row(elem_id="pair"):
        outputs: Components = {"left": picture("Left"), "right": picture("Right")}
    answers = [gr.Radio([LEFT, RIGHT, NEITHER], label=question) for question in QUESTIONS.values()]
    vote = gr.Button("Vote")
    result = gr.Markdown("", elem_classes="says")
    export = gr.DownloadButton("Votes as JSON", interactive=False, size="sm")
    pair, votes = gr.State(None), gr.State([])

    vote.click(
        _count_vote,
        [pair, votes, *answers],
        [result, votes, pair, export],
        api_visibility="private",
    )
    new_pair.click(lambda: [None, None, ""], None, [*answers, result], api_visibility="private")
    wiring.connect(
        new_pair.click, "blind", outputs | {"pair": pair}, controls, api_visibility="private"
    )


def _count_vote(pair: tuple | None, votes: list[Vote], *answers: str | None) -> Any:
    """Add the answers to the votes; yield what the pair was, and the tally."""
    if pair is None:
        raise gr.Error("There is no open pair: press “New pair” first.", print_exception=False)
    if None in answers:
        raise gr.Error("Answer both questions first.", print_exception=False)
    votes = [*votes, Vote(*pair, *answers)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "votes.json"
        record = {"votes": [asdict(vote) for vote in votes], "refined": tally(votes)}
        path.write_text(json.dumps(record, indent=2))
        *_, left, right = pair
        yield (
            f"Left was {left}, right was {right}.\n\n{_tally_table(votes)}",
            votes,
            None,
            gr.DownloadButton(value=str(path), interactive=True),
        )


def _tally_table(votes: list[Vote]) -> str:
    """Return how often the refined image was chosen, as a Markdown table."""
    rows = [
        "| | refined chosen | of decided | 95 % interval | can't tell |",
        "|---|---|---|---|---|",
    ]
    for question, counts in tally(votes).items():
        share = "–" if counts["share"] is None else f"{counts['share']:.0%}"
        low, high = counts["interval"]
        rows.append(
            f"| {QUESTIONS[question]} | {share} | {counts['n']} | {low:.0%} to {high:.0%} "
            f"| {counts['undecided']} |"
        )
    return "\n".join(rows)
