"""The tab that trains a refiner of the chosen model on the machine that runs the page."""

import html
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from noiserefine.page.layout import Page
from noiserefine.page.lazy import Lazy
from noiserefine.page.settings import FREE_CHOICE, ON_SPACE, Settings
from noiserefine.page.training import (
    ROOT,
    TRAINER,
    Clock,
    Plan,
    Progress,
    Run,
    Training,
    cost,
    plan_of,
    read_progress,
    shown,
)
from noiserefine.page.views import picture

figures: Any = Lazy("noiserefine.analysis.figures")

PRIVATE: Any = {"api_visibility": "private"}  # of events that are no endpoint
AVAILABLE = FREE_CHOICE and not ON_SPACE and (ROOT / TRAINER).is_file()
TRAINING = Training()
POLL = 1.0  # seconds
MINUTE, HOUR = 60, 3600
TEXT = (
    "Train a refiner of the chosen model on this machine: prompts are all it needs, the targets "
    "are the model's own guided images. **Stop** keeps what was done, and **Start** continues "
    "there. At the end the refiner is chosen under Settings, and the third column shows it."
)
SIZES = {
    "demonstration": "Demonstration: 128 targets",
    "quick": "Quick: --quick",
    "full": "Full: the whole preset",
}
INFO = (
    "On the embedded model the demonstration takes about two minutes of two idle cores, and comes "
    "some 40 % of the way to the guided images"
)


def train_tab(blocks: gr.Blocks, page: Page) -> None:
    """Add the tab to the views and connect it, where this machine may train."""
    if not AVAILABLE:
        return
    with page.parts["tabs"], gr.Tab("Train", id="train") as tab:
        gr.Markdown(TEXT, elem_classes="says")
        with gr.Row(elem_classes="controls"):
            choices = [(title, name) for name, title in SIZES.items()]
            size = gr.Radio(choices, value="demonstration", label="How much", info=INFO, scale=3)
            targets = gr.Number(0, label="Targets", info="0: as said", min_width=90)
            prompts = gr.Textbox(
                "", label="Prompts", info="a text file; empty: the preset's", max_lines=1
            )
            count = gr.Button("Cost", min_width=64, scale=0)
            start = gr.Button("Start", variant="primary", min_width=110, scale=0)
            stop = gr.Button("Stop", min_width=64, scale=0)
        status = gr.HTML(elem_id="training", padding=False)
        with gr.Row(elem_classes=["figures", "training"]):
            curve = picture("How far the refined images have come to the guided ones")
            sheet = picture("Held-out prompts. Rows: plain, guided, refined", show_label=True)
        command = gr.Code(
            language="shell",
            label="The command, from the root of the repository",
            interactive=False,
            wrap_lines=True,
            lines=1,
            max_lines=10,
        )
        price = gr.Markdown(elem_classes="says", show_label=False, label="cost")
        opened, options = gr.State(False), [size, targets, prompts]

    inputs, hidden = page.inputs, {"show_progress": "hidden"} | PRIVATE
    chosen = [*options, *inputs.values()]
    command_of: Any = {
        "fn": _command,
        "inputs": [opened, *chosen],
        "outputs": [command, price],
        "queue": False,
    }
    tab.select(lambda: True, None, opened, queue=False, **hidden).then(**command_of, **hidden)
    changes = [size.change, targets.blur, prompts.blur, inputs["backbone"].change]
    gr.on(changes, **command_of, trigger_mode="always_last", **hidden)
    count.click(_cost, chosen, price, concurrency_limit=None, **hidden)

    seen = [status, curve, sheet]
    many: Any = {"concurrency_limit": None} | hidden
    start.click(
        _train,
        chosen,
        [*seen, inputs["backbone"], inputs["refiner"], page.parts["go"]],
        trigger_mode="multiple",  # a second click is answered
        **many,
    )
    stop.click(_stop, queue=False, **hidden)
    blocks.load(_follow, None, seen, **many)  # a reloaded page


def _command(opened: bool, *chosen: Any) -> list:
    """Return the command, once the tab was opened, and no cost."""
    if not opened:
        return [gr.skip(), gr.skip()]
    try:
        return [_plan(*chosen).command, ""]
    except (ValueError, OSError) as error:
        return ["", str(error)]


def _cost(*chosen: Any) -> Iterator[str]:
    """Yield what the trainer's --dry_run says."""
    yield "The trainer counts …"
    try:
        yield cost(_plan(*chosen))
    except (ValueError, OSError) as error:
        yield str(error)


def _plan(size: str, targets: float | None, prompts: str, *values: Any) -> Plan:
    return plan_of(Settings(*values), size, targets, prompts)


def _train(*chosen: Any) -> Iterator[list]:
    """Start a training and show it; at its end choose the refiner and start a comparison."""
    unchanged = [gr.skip()] * 3
    try:
        plan = _plan(*chosen)
        run = None if plan.is_trained else TRAINING.start(plan)
    except (ValueError, OSError) as error:
        raise gr.Error(str(error), print_exception=False) from error
    if run:
        for seen in _watch(run):
            yield [*seen, *unchanged]
        if run.failure():
            return
    text = f"The refiner is in {shown(plan.folder)}, and the third column shows it."
    seen = [_status(text), gr.skip(), gr.skip()]
    yield [*seen, plan.backbone, str(plan.folder), time.time()]


def _follow() -> Iterator[list]:
    """Show the training that runs while a page is opened."""
    if run := TRAINING.run:
        yield from _watch(run)


def _stop() -> None:
    run = TRAINING.run
    if run is None:
        raise gr.Error("No training runs.", print_exception=False)
    run.stop()


def _watch(run: Run) -> Iterator[list]:
    """Yield status, curve and sheet of a training until it ends; what stays the same is skipped."""
    clock, before = Clock(), None
    yield [_status("Loading the model …"), None, None]
    ended = False
    while not ended:
        ended = run.wait(POLL)
        progress = read_progress(run.plan.folder)
        if progress is None:
            continue
        curve = sheet = gr.skip()
        if before is None or progress.curve != before.curve:
            curve = _curve(progress.curve)
        if progress.sheet and (before is None or progress.sheet != before.sheet):
            sheet = Image.open(progress.sheet)
        before = progress
        left = clock.remaining(progress.work)
        yield [_status(_words(progress, left), progress.work), curve, sheet]
    if failure := run.failure():
        text = f"{_words(before, None)}. {failure}" if before and run.stopped else failure
        yield [_status(text), gr.skip(), gr.skip()]


def _words(progress: Progress, left: float | None) -> str:
    """Return how far a training is."""
    unit = {"targets": "Guided targets:", "step": "Step"}[progress.doing]
    words = [f"{unit} {progress.done:,} of {progress.total:,}"]
    if len(progress.curve) > 1:
        words.append(f"{progress.curve[-1][1]:.0f} % of the way to the guided images")
    if left is not None:
        words.append(f"about {_duration(left)} left")
    return " · ".join(words)


def _duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds < 2 * MINUTE:
        return f"{seconds:.0f} s"
    return (
        f"{seconds / MINUTE:.0f} minutes" if seconds < 2 * HOUR else f"{seconds / HOUR:.1f} hours"
    )


def _status(text: str, work: float | None = None) -> str:
    """Return a sentence and, for a share of the work from 0 to 1, a bar, as HTML."""
    bar = "" if work is None else f"<progress value='{work:.4f}' aria-label='Training'></progress>"
    return f"{bar}<p role='status'>{html.escape(text)}</p>"


def _curve(points: tuple[tuple[int, float], ...]) -> Image.Image:
    """Plot the share of the distance to the guided latents that refining takes away."""
    figure, axes = figures.axes("Held-out prompts", "step", "% of the way to guided")
    axes.plot(*zip(*points, strict=True), color=figures.REFINED, marker="o")
    axes.axhline(100, color=figures.INK, linestyle=":")
    return figures.as_picture(figure)
