"""The NoiseRefine page: one prompt and seed, three images side by side, and views that show why it works.

python app.py --host 127.0.0.1 --port 7860
"""

import argparse
import functools
import importlib
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

try:  # before anything that touches CUDA
    from spaces import GPU
except ImportError:  # it matters on Hugging Face's ZeroGPU only

    def GPU(duration):
        return lambda function: function


import gradio as gr
from PIL import Image

from noiserefine.models.catalogue import BACKBONES, OFFLOADS, SAMPLERS, Model
from noiserefine.page.blind import LEFT, NEITHER, QUESTIONS, RIGHT, Vote, tally
from noiserefine.page.record import contact_sheet, read_png, save_png, versions
from noiserefine.page.settings import (
    FREE_CHOICE,
    REFINERS,
    SERVED,
    ZERO_GPU,
    Settings,
    link,
    restored,
)

EXAMPLES = [
    "a panda on a pink background",
    "a red apple on a blue background",
    "a rocket on a black background",
    "an owl on a purple background",
    "a sailboat",
]
KEPT_IMAGES, KEPT_PIXELS = 100, 8_000_000  # at most, of a visitor's images that are not made again
ARMS = {
    "gaussian": ("Gaussian noise", "no guidance"),
    "guided": ("Gaussian noise", "guided (CFG)"),
    "refined": ("Refined noise", "no guidance"),
}

PAGE = Path(__file__).parent / "noiserefine" / "page"
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


@dataclass(frozen=True)
class View:
    """A way to look at a prompt and seed, as it is on the page; `noiserefine.page.views` makes what it shows."""

    title: str  # of its tab; empty where it has none of this kind
    says: str
    columns: int = 4  # of its gallery
    controls: Callable[[], dict[str, gr.components.Component]] = dict


VIEWS = {
    "compare": View(
        "",
        "One prompt and seed, three images: Gaussian noise unguided, Gaussian noise with classifier-free guidance, refined noise unguided.",
    ),
    "refine": View(
        "",
        "The initial noise of a seed and the noise refined for the prompt, as tensors x_T and refined in a safetensors file.",
    ),
    "strength": View(
        "Strength",
        "The refined image as the correction of the noise grows from nothing to one and a half times what was trained, and the guided "
        "image to compare with.",
        4,
    ),
    "guidance_scale": View(
        "Guidance scale",
        "Refined images over the guidance scale that the refiner is told, above guided images at the same scales. "
        "For a refiner that takes the scale: the embedded model has one, under Settings.",
        5,
    ),
    "samplers": View(
        "Samplers and steps",
        "The same two noises through every sampler with few and with many steps.",
        6,
    ),
    "frequencies": View(
        "Frequencies",
        "The correction is small and lives in the low frequencies. The images show what the frequencies below the cutoff do alone.",
        4,
        lambda: {
            "cutoff": gr.Slider(
                0, 1, 0.3, step=0.05, label="Cutoff", info="of the largest radial frequency"
            )
        },
    ),
    "trajectory": View(
        "Trajectory",
        "What the model expects the finished image to be, step by step: refined noise shows its layout at once.",
        7,
    ),
    "two_prompts": View(
        "Two prompts",
        "Noise refined with the prompt above, denoised with another one: what stays is what the noise itself says.",
        3,
        lambda: {
            "other": gr.Textbox(
                "a green frog on a yellow background", label="The other prompt", max_lines=2
            )
        },
    ),
    "interpolation": View(
        "Interpolation",
        "From one seed to another along the sphere: above from Gaussian noise, below refined on the way.",
        7,
        lambda: {"other_seed": gr.Number(8, label="The other seed")},
    ),
    "guided_from_refined": View(
        "Guided from refined",
        "Guidance and refining together: guided sampling from refined noise beside guided sampling from Gaussian noise.",
        4,
    ),
    "attention": View(
        "Attention",
        "Where the model looks for a word of the prompt while it denoises, over the finished image.",
        7,
        lambda: {
            "word": gr.Textbox(
                "",
                label="A word of the prompt",
                info="empty for the first after the article",
                max_lines=1,
            )
        },
    ),
    "blind": View(
        "",
        "Two images of one new seed for the prompt above, in random order: one from refined noise, one from Gaussian noise. Say which is "
        "better and which follows the prompt; then you learn which was which. The tally stays in this session and goes nowhere else.",
    ),
    "many": View(
        "Many at once",
        "The three columns for several prompts and seeds.",
        3,
        lambda: {
            "prompts": gr.Textbox(
                "",
                label="Prompts",
                info="one a line; empty for the prompt above",
                lines=3,
                max_lines=12,
            ),
            "count": gr.Slider(
                1, 16, 4, step=1, label="Images a prompt", info="their seeds count up"
            ),
        },
    ),
}


def seconds_of_gpu(view: str, settings: Settings, extras: tuple, *_) -> int:
    from noiserefine.page import views

    return views.seconds_of_gpu(view, settings, extras)


@GPU(duration=seconds_of_gpu)
def run(view: str, settings: Settings, extras: tuple, last: dict) -> Iterator[dict]:
    """What `views.work` yields, its errors as messages on the page."""
    if not hasattr(
        sys.modules.get("noiserefine.page.views"), "work"
    ):  # not imported, or not yet to its end
        gr.Info("Loading PyTorch and diffusers …")
    from noiserefine.page import views  # it takes seconds, which the page does not wait for

    try:
        yield from views.work(view, settings, extras, last, gr.Info)
    except (ValueError, OSError, MemoryError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def restore_png(path: str | None) -> list:
    """The settings of a dropped image, for the page's inputs."""
    try:
        values = restored(read_png(path or "")["settings"])
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    gr.Info("The settings of this image are restored: press Generate.")
    return kept(values)


def restore_link(request: gr.Request) -> list:
    """The settings in the page's address, for its inputs."""
    try:
        return kept(restored(dict(request.query_params)))
    except ValueError as error:
        gr.Warning(str(error))
        return gr.skip()


def kept(values: list) -> list:
    """Updates of the page's inputs that leave as it is what has no value."""
    return [gr.skip() if value is None else value for value in values]


def made_from(record: dict, sample) -> dict:
    """The record with what the sample itself was made from, and settings whose columns hold its image."""
    recipe = sample.recipe
    own = {"seed": recipe.seed, "steps": recipe.steps, "sampler": recipe.sampler} | (
        {"prompt": recipe.prompt} if recipe.prompt else {}
    )
    if recipe.strength:
        own["strength"] = recipe.strength
    if scale := recipe.refiner_scale or (recipe.guidance_scale > 1 and recipe.guidance_scale):
        own["guidance_scale"] = scale
    return record | {
        "settings": record["settings"] | own,
        "recipe": asdict(recipe),
        "forwards": sample.forwards,
    }


def files_of(update: dict, folder: Path, record: dict, shown: dict) -> dict:
    """The update with pictures as files, which Gradio copies once; it would write an image anew at every yield, while the browser reads it.

    Every file holds what it was made from.  shown: what was made into files before, by name.
    """

    def file(name: str, picture, **about) -> str:
        path = folder / f"{name}.png"
        if shown.get(name) is not picture:
            shown[name] = picture
            if isinstance(picture, Image.Image):
                save_png(picture, path, record | about)
            else:
                save_png(picture.image, path, made_from(record, picture) | about)
        return str(path)

    made = {}
    for name, value in update.items():
        if name == "images":
            images = shown.setdefault(
                "images", []
            )  # those that came with earlier updates stay as they were
            images += [
                (file(f"{i:02}", picture, caption=caption), caption)
                for i, (caption, picture) in enumerate(value[len(images) :], len(images))
            ]
            made[name] = (
                gr.Gallery(list(images), columns=update["columns"])
                if update["columns"]
                else list(images)
            )
        elif name == "keep":
            sheet = contact_sheet(
                [
                    (f"{', '.join(ARMS[arm])}, {sample.forwards} forwards", sample.image)
                    for arm, sample in value.items()
                ],
                record["settings"]["prompt"],
            )
            made[name] = [file("contact-sheet", sheet)] + [
                file(arm, sample, arm=arm) for arm, sample in value.items()
            ]
        elif name == "noise":
            (folder / "noise.safetensors").write_bytes(value)
            made[name] = str(folder / "noise.safetensors")
        elif isinstance(value, Image.Image) or hasattr(value, "image"):
            made[name] = file(name, value, arm=name)
        elif name != "columns":
            made[name] = value
    return made


def endpoint(
    view: str,
    outputs: dict[str, gr.components.Component],
    controls: dict[str, gr.components.Component],
) -> Callable:
    """The event handler of a view: takes Settings' values, those of the view's controls and the visitor's images, and adds to these; yields outputs."""
    empty = {
        name: "" if isinstance(output, gr.Markdown) else None for name, output in outputs.items()
    }

    def handler(*inputs):
        *inputs, last, request = inputs
        count = len(fields(Settings))
        settings, extras = Settings(*inputs[:count]), inputs[count:]
        if request.headers.get("x-gradio-user") == "mcp":
            last = {}  # Gradio has one session for all who call the tools
        record = {
            "settings": asdict(settings),
            "view": view,
            "controls": dict(zip(controls, extras)),
            "versions": versions(),
        }
        state, shown = dict(empty), {}
        with tempfile.TemporaryDirectory() as folder:
            for update in run(view, settings, extras, dict(last)):
                record |= update.pop("about", {})
                last |= update.pop("made")
                keep_newest(last)
                if update:  # else there is nothing to see yet, and the last results stay
                    state |= files_of(update, Path(folder), record, shown)
                    if "keep" in update:
                        state["link"] = f"[Link to these settings]({link(settings)})"
                    yield {output: state[name] for name, output in outputs.items()}

    names = [field.name for field in fields(Settings)] + list(controls) + ["last", "request"]
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names
    ]
    handler.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typeshed's function has no such attribute
    handler.__name__, handler.__doc__, handler.__annotations__ = (
        view,
        VIEWS[view].says,
        {"request": gr.Request},
    )
    return handler


def keep_newest(samples: dict) -> None:
    """Removes the oldest of the samples until there are KEPT_IMAGES and KEPT_PIXELS at most."""
    pixels = sum(sample.image.width * sample.image.height for sample in samples.values())
    while pixels > KEPT_PIXELS or len(samples) > KEPT_IMAGES:
        image = samples.pop(next(iter(samples))).image
        pixels -= image.width * image.height


class Page(gr.Blocks):
    def validate_inputs(self, block_fn, inputs: list) -> None:
        """In place of Gradio's, which quotes all that came, in words for the page's authors."""
        if len(inputs) < len(block_fn.inputs):
            raise gr.Error(
                f"This takes {len(block_fn.inputs)} values; {len(inputs)} came.",
                print_exception=False,
            )


def build() -> gr.Blocks:
    with Page(title="NoiseRefine", analytics_enabled=False, delete_cache=(3600, 7200)) as page:
        gr.HTML(
            "<h1>NoiseRefine</h1><p>Guidance doubles the cost of every image. Refining the initial noise once, in one forward "
            "pass, lets plain unguided sampling reach a similar picture with about half of the UNet's forwards.</p>",
            elem_id="head",
            padding=False,
        )
        with gr.Row(elem_id="ask"):
            prompt = gr.Textbox(
                EXAMPLES[0], label="Prompt", lines=1, max_lines=3, scale=5, autofocus=True
            )
            button = gr.Button("Generate", variant="primary", scale=1)
            stop = gr.Button("Stop", scale=0)
        examples = gr.Examples(EXAMPLES, prompt, label="Try")
        shown = {}
        with gr.Row(elem_id="arms"):
            for name, (noise, guidance) in ARMS.items():
                with gr.Column(elem_classes=["card", "best"] if name == "refined" else ["card"]):
                    gr.HTML(
                        f"<b>{noise}</b><span>{guidance}</span>",
                        elem_classes="title",
                        padding=False,
                    )
                    shown[name] = picture(f"{noise}, {guidance}")
                    shown[f"{name}_cost"] = gr.Markdown(" ", elem_classes="cost", show_label=False)
        with gr.Row(elem_id="noise"):
            for name, title, text in (
                ("heat", "Change of the noise", "low frequencies"),
                ("layout", "The image it laid out", "refined, unguided"),
            ):
                with gr.Column(elem_classes="card"):
                    gr.HTML(
                        f"<b>{title}</b><span>{text}</span>", elem_classes="title", padding=False
                    )
                    shown[name] = picture(f"{title}, {text}")
            shown["says"] = gr.Markdown("", elem_classes="says", show_label=False)
        with gr.Accordion("Settings", open=True):
            inputs = {"prompt": prompt} | settings_inputs()
        with gr.Accordion("Keep and restore", open=True):
            with gr.Row():
                shown["keep"] = gr.File(
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
            shown["link"] = gr.Markdown("", show_label=False)
        last = gr.State(
            {}
        )  # changed in place: what is made before a Stop stays in it, and tools of MCP can't have a state as output

        def on(
            listen: Callable, view: str, outputs: dict, controls: dict | None = None, **kwargs
        ) -> gr.events.Dependency:
            """Has a view worked on when the listener hears of its event."""
            controls = controls or {}
            for component in (*inputs.values(), *controls.values()):
                component.preprocess = lambda value: (
                    value
                )  # Settings and the views say what is wrong with it; Gradio fails on other types
            return listen(
                fn=endpoint(view, outputs, controls),
                inputs=[*inputs.values(), *controls.values(), last],
                outputs=list(outputs.values()),
                concurrency_id="gpu",
                concurrency_limit=1,
                show_progress="minimal",
                **kwargs,
            )

        running = [
            on(
                functools.partial(gr.on, [button.click, prompt.submit]),
                "compare",
                shown,
                trigger_mode="always_last",
            ),
            on(examples.load_input_event.then, "compare", shown, api_visibility="private"),
        ]
        gr.HTML(
            "<h2>Look closer</h2><p>The same prompt, seed and settings, seen in other ways. What was made already is not made again.</p>",
            elem_id="closer",
            padding=False,
        )
        with gr.Tabs():
            for view, about in VIEWS.items():
                if about.title:
                    with gr.Tab(about.title):
                        running.append(build_view(view, about, on))
            with gr.Tab("Blind test"):
                running.append(build_blind_test(on))
        noise = gr.File(visible=False, label="x_T and the refined noise, as safetensors")
        on(gr.Button(visible=False).click, "refine", {"noise": noise})

        stop.click(None, cancels=running, api_visibility="private")
        restoring = dropped.upload(
            restore_png, dropped, list(inputs.values()), api_visibility="private"
        )
        for after in (restoring.success, restoring.failure):
            after(
                lambda: None, None, dropped, api_visibility="private"
            )  # ready for the next one, whether this one was good or not
        page.load(restore_link, None, list(inputs.values()), api_visibility="private")
    return page


def settings_inputs() -> dict[str, gr.components.Component]:
    """The inputs of Settings by name, all but the prompt."""
    default = Settings("")
    with gr.Row():
        with gr.Row(elem_id="seed", scale=1):
            seed = gr.Number(default.seed, label="Seed", min_width=170)
            dice = gr.Button("New seed", min_width=90, size="md")
        backbone = gr.Dropdown(
            CHOICES,
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
        width = gr.Number(
            default.width, label="Width", info="pixels; 0 for the model's own", min_width=120
        )
        height = gr.Number(
            default.height, label="Height", info="pixels; 0 for the model's own", min_width=120
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
    dice.click(
        None, None, seed, js="() => Math.floor(Math.random() * 2 ** 32)", api_visibility="private"
    )
    backbone.input(defaults_of, backbone, [scale, steps, sampler], api_visibility="private")
    return dict(
        seed=seed,
        backbone=backbone,
        steps=steps,
        guidance_scale=scale,
        strength=strength,
        sampler=sampler,
        width=width,
        height=height,
        refiner=refiner,
        lora=lora,
        lora_weight=lora_weight,
        negative_prompt=negative_prompt,
    )


def build_view(view: str, about: View, on: Callable):
    """The tab of a view: what it shows, its controls and its images."""
    gr.Markdown(about.says, elem_classes="says")
    with gr.Row(elem_classes="controls"):
        controls = about.controls()
        show = gr.Button("Show", variant="primary", min_width=110, scale=0)
    outputs = {}
    if view == "frequencies":
        with gr.Row(elem_id="bands"):
            outputs = {
                "histogram": gr.Plot(label="How far the entries of x_T moved", show_label=False),
                "spectrum": gr.Plot(label="Where the correction's energy is", show_label=False),
                "overlay": picture("Change of the noise below the cutoff, over the refined image"),
            }
    outputs["images"] = gr.Gallery(
        label=about.title,
        columns=about.columns,
        show_label=False,
        object_fit="contain",
        height="auto",
        format="png",
        interactive=False,
        buttons=["download", "download_all", "fullscreen"],
        elem_classes=["images", f"columns-{about.columns}"],
    )
    return on(show.click, view, outputs, controls)


def build_blind_test(on: Callable):
    """Two unlabelled images, two questions, and the running tally, which stays in this page."""
    gr.Markdown(VIEWS["blind"].says, elem_classes="says")
    with gr.Row(elem_classes="controls"):
        opponent = gr.Radio(
            [("guided", "guided"), ("unguided", "gaussian")],
            value="guided",
            label="Refined against",
        )
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
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "votes.json"
            path.write_text(
                json.dumps(
                    {"votes": [asdict(vote) for vote in votes], "refined": tally(votes)}, indent=2
                )
            )
            yield (
                f"Left was {pair[2]}, right was {pair[3]}.\n\n{tally_table(votes)}",
                votes,
                None,
                gr.DownloadButton(value=str(path), interactive=True),
            )

    vote.click(
        count, [pair, votes, *answers], [result, votes, pair, export], api_visibility="private"
    )
    new.click(lambda: [None, None, ""], None, [*answers, result], api_visibility="private")
    return on(
        new.click,
        "blind",
        outputs | {"pair": pair},
        {"opponent": opponent},
        api_visibility="private",
    )


def tally_table(votes: list[Vote]) -> str:
    """How often the refined image was chosen, as a Markdown table."""
    rows = [
        "| | refined chosen | of decided | 95 % interval | can't tell |",
        "|---|---|---|---|---|",
    ]
    for question, counts in tally(votes).items():
        share = "–" if counts["share"] is None else f"{counts['share']:.0%}"
        rows.append(
            "| {} | {} | {} | {:.0%} to {:.0%} | {} |".format(
                QUESTIONS[question], share, counts["n"], *counts["interval"], counts["undecided"]
            )
        )
    return "\n".join(rows)


def defaults_of(name: str) -> tuple:
    """Guidance scale, steps and sampler of a model of the catalogue; any other leaves them as they are."""
    backbone = BACKBONES.get(name)
    return (
        (backbone.guidance_scale or gr.skip(), backbone.steps, backbone.sampler)
        if backbone
        else (gr.skip(), gr.skip(), gr.skip())
    )


def picture(label: str) -> gr.Image:
    return gr.Image(
        label=label,
        alt_text=label,
        show_label=False,
        interactive=False,
        format="png",
        elem_classes="picture",
        buttons=["download", "fullscreen"],
    )


if ZERO_GPU:
    from noiserefine.page import views

    for name in list(
        SERVED
    ):  # a worker's models are lost with it: they are placed here, before it is forked
        try:
            views.MODELS.get(Model(name))
        except (ValueError, OSError) as error:
            print(f"{name} is not served: {error}")
            SERVED.remove(name)
    for _, folder in REFINERS.values():
        views.MODELS.get(Model("emoji", folder))
CHOICES = [(BACKBONES[name].title, name) for name in SERVED]
demo = build().queue(max_size=64)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--host", help="address to listen on; GRADIO_SERVER_NAME or 127.0.0.1 if not given"
    )
    parser.add_argument(
        "--port", type=int, help="GRADIO_SERVER_PORT or the first free one from 7860 if not given"
    )
    parser.add_argument(
        "--offload",
        choices=OFFLOADS,
        default="none",
        help="for small cards: " + "; ".join(f"{k}: {v}" for k, v in OFFLOADS.items()),
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the UNet's transformer blocks: a slow first image, quicker ones after it",
    )
    args = parser.parse_args()
    if args.offload != "none" and args.compile:
        parser.error(
            "--compile and --offload exclude each other: compiled blocks stay where they are."
        )
    if args.offload != "none" or args.compile:
        from noiserefine.models import loading as backbones
        from noiserefine.page import views

        if args.offload != "none" and backbones.default_device().type == "cpu":
            parser.error(
                "--offload spares the memory of a graphics card, and there is none here: leave it out."
            )
        views.MODELS.offload, views.MODELS.compiled = args.offload, args.compile
    demo.launch(
        server_name=args.host,
        server_port=args.port,
        theme=THEME,
        css_paths=[PAGE / "page.css"],
        js=(PAGE / "page.js").read_text(),
        show_error=True,
        state_session_capacity=100,
        mcp_server=True,
        prevent_thread_lock=True,
    )
    importlib.import_module(
        "noiserefine.page.views"
    )  # what images are made with, while the first visitor reads
    demo.block_thread()
