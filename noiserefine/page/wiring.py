"""Which button starts what."""

import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr

from noiserefine.models.catalogue import BACKBONES
from noiserefine.page import blind, restoring, texts
from noiserefine.page.handlers import handler_of, jobs, request_stop, stop_next
from noiserefine.page.layout import (
    Components,
    Page,
    about_model,
    build_components,
    gallery_classes,
)
from noiserefine.page.lazy import Lazy
from noiserefine.page.opening import FOLDER, example_for
from noiserefine.page.settings import FREE_CHOICE, Settings
from noiserefine.page.train_tab import train_tab
from noiserefine.page.views import ARMS, VIEWS

HISTORY = 12  # results
HOUR, DAY = 3600, 86400  # seconds; old files are deleted every hour
PRIVATE: Any = {"api_visibility": "private"}  # of events that are no endpoint
RANDOM_SEED = "Math.floor(Math.random() * 2 ** 32)"
usages: Any = Lazy("noiserefine.models.usage")


def build_page() -> gr.Blocks:
    """Return the page, ready to launch."""
    gr.set_static_paths([FOLDER])  # not copied to the cache, where pictures of buttons grow old too
    with gr.Blocks(
        title="NoiseRefine", analytics_enabled=False, delete_cache=(HOUR, DAY)
    ) as blocks:
        page = build_components()
        known = gr.State({})  # the session's samples, changed in place: Stop keeps what is finished
        compared = _connect_views(page, known)
        _start_comparisons(page)
        _after_comparison(page, compared)
        _restore(blocks, page)
        _model_chosen(page, compared)
        _vote(page)
        train_tab(blocks, page)
    return blocks


def _connect_views(page: Page, known: gr.State) -> gr.events.Dependency:
    """Connect every view to its button, and Stop to all of them; return the comparison."""
    parts = page.parts

    def connect(listen: Callable, view: str, outputs: Components, controls: Components, **kwargs):
        for component in (*page.inputs.values(), *controls.values()):
            # Settings and the views say what is wrong with a value; Gradio fails on other types.
            component.preprocess = lambda value: value
        return listen(
            fn=handler_of(view, outputs, controls),
            inputs=[*page.inputs.values(), *controls.values(), known],
            outputs=list(outputs.values()),
            concurrency_id="gpu",
            concurrency_limit=1,
            show_progress="minimal",
            **kwargs,
        )

    # One event for all that starts a comparison, so that the latest request wins.
    compared = connect(parts["go"].change, "compare", page.compared, {}, trigger_mode="always_last")
    running = [compared]
    for name, tab in page.tabs.items():
        view = VIEWS[name]
        if view.per_row:
            tab.show.click(
                functools.partial(_columns_of, name, list(tab.controls)),
                [*page.inputs.values(), *tab.controls.values()],
                tab.outputs["images"],
                queue=False,
                **PRIVATE,
            )
        listen, options = tab.show.click, {}
        if name == "blind":
            listen, options = parts["next_pair"].change, PRIVATE
            tab.outputs["pair"] = parts["pair"]
        running.append(connect(listen, name, tab.outputs, tab.controls, **options))
    connect(parts["refine"].click, "refine", {"noise": parts["noise"]}, {})

    stopped = gr.State([])  # the views that Stop ended
    for stop in (page.buttons["stop"], *(tab.stop for tab in page.tabs.values())):
        # A run ends by itself at its next step; what still waits after that is cancelled, and what
        # the page starts then, since its button was clicked during the run, is ended, too.
        asked = stop.click(request_stop, outputs=stopped, queue=False, **PRIVATE)
        cancelled = asked.then(None, cancels=running, **PRIVATE)
        cancelled.then(stop_next, stopped, queue=False, **PRIVATE)
    return compared


def _columns_of(view: str, controls: list[str], *values: Any) -> gr.Gallery:
    """Return the view's gallery with columns in which its arms stand under one another."""
    per_row = VIEWS[view].per_row
    assert per_row is not None
    settings = Settings(*values[: len(Settings.names())])
    given = dict(zip(controls, values[len(Settings.names()) :], strict=True))
    columns = per_row(settings, given, jobs.number_of_arms(settings))
    return gr.Gallery(columns=columns, elem_classes=gallery_classes(view, columns))


def _start_comparisons(page: Page) -> None:
    """Let every way to a new picture set the inputs and start the comparison."""
    inputs, buttons, go = page.inputs, page.buttons, page.parts["go"]
    each_time = page.parts["each_time"]
    gr.on(
        [buttons["generate"].click, inputs["prompt"].submit],
        None,
        [each_time, inputs["seed"]],
        [inputs["seed"], go],
        js=f"(anew, seed) => [anew ? {RANDOM_SEED} : seed, Date.now()]",
        **PRIVATE,
    )
    buttons["new_seed"].click(
        None, None, [inputs["seed"], go], js=f"() => [{RANDOM_SEED}, Date.now()]", **PRIVATE
    )
    buttons["surprise"].click(
        None,
        None,
        [inputs["prompt"], inputs["seed"], go],
        js=f"() => [surprise(), {RANDOM_SEED}, Date.now()]",
        **PRIVATE,
    )
    for prompt, button in page.examples.items():
        name, whole = json.dumps(texts.short(prompt)), json.dumps(prompt)
        js = f"() => [takesClasses() ? {name} : {whole}, Date.now()]"
        button.click(None, None, [inputs["prompt"], go], js=js, **PRIVATE)


def _after_comparison(page: Page, compared: gr.events.Dependency) -> None:
    """Keep the slider, the address, the history and the greying in step with the comparison."""
    parts, outputs = page.parts, page.compared
    arms = [outputs[arm] for arm in ARMS]
    slide = {"fn": _slide, "inputs": [parts["versus"], *arms], "outputs": parts["slider"]}
    compared.then(**slide, queue=False, show_progress="hidden", **PRIVATE)
    parts["versus"].change(**slide, queue=False, show_progress="hidden", **PRIVATE)

    outputs["link"].change(
        None, outputs["link"], parts["address"], js="query => setAddress(query)", **PRIVATE
    )
    gr.on(
        [component.change for component in (*page.inputs.values(), outputs["made_from"])],
        None,
        [outputs["made_from"], *page.inputs.values()],
        js="(madeFrom, ...values) => { markStale(madeFrom, values); return []; }",
        **PRIVATE,
    )
    shown = gr.State([])  # rows of file and values
    compared.success(
        _remember,
        [outputs["keep"], outputs["made_from"], shown],
        [shown, parts["history"]],
        queue=False,
        show_progress="hidden",
        **PRIVATE,
    )
    parts["history"].select(
        _recall, shown, [*page.inputs.values(), parts["go"]], queue=False, **PRIVATE
    )


def _slide(versus: str, gaussian: str | None, guided: str | None, refined: str | None) -> Any:
    """Return the two images of the slider, or nothing while one is missing."""
    left = guided if versus == "guided" else gaussian
    return (left, refined) if left and refined else None


def _remember(files: list[str] | None, made_from: str, shown: list) -> tuple[list, list]:
    """Add the comparison's last arm to the history."""
    if not files:
        return shown, gr.skip()
    path = [file for file in files[1:] if not file.endswith("-enlarged.png")][-1]
    values = json.loads(made_from)
    # Files are deleted after a day.
    shown = [row for row in shown if row[1] != values and Path(row[0]).is_file()]
    shown = [(path, values), *shown][:HISTORY]
    return shown, [(path, f"{values[0]}, seed {values[1]}") for path, values in shown]


def _recall(shown: list, event: gr.SelectData) -> list:
    """Return the settings of a picture of the history, and start the comparison."""
    return [*shown[event.index][1], time.time()]


def _hindrances(views: list[str], *values: Any) -> list:
    """Return for each view whether its button works, and why not."""
    reasons = jobs.hindrances(Settings(*values), views)
    updates: list = []
    for view in views:
        reason = reasons.get(view, "")
        updates += [gr.Button(interactive=not reason), reason]
    return updates


def _restore(blocks: gr.Blocks, page: Page) -> None:
    """Restore settings from a dropped image and from the page's address."""
    dropped, targets = page.parts["dropped"], restoring.targets(page)
    restored = dropped.upload(
        functools.partial(restoring.from_png, page), dropped, targets, **PRIVATE
    )
    for finished in (restored.success, restored.failure):  # ready for the next file either way
        finished(lambda: None, None, dropped, **PRIVATE)

    def from_address(request: gr.Request) -> list:
        return restoring.from_address(page, dict(request.query_params))

    blocks.load(from_address, None, targets, show_progress="hidden", **PRIVATE)
    blocks.load(None, None, page.parts["address"], js="() => location.href", **PRIVATE)


def _model_chosen(page: Page, compared: gr.events.Dependency) -> None:
    """Set the defaults of a model that the visitor chooses; say of any what it is and cannot do."""
    inputs, hidden = page.inputs, {"queue": False, "show_progress": "hidden"} | PRIVATE
    inputs["backbone"].input(
        _defaults_of,
        [inputs["backbone"], inputs["prompt"]],
        [inputs[name] for name in ("prompt", "guidance_scale", "steps", "sampler")],
        **PRIVATE,
    )
    # A link, a PNG and the history choose a model too.
    inputs["backbone"].change(about_model, inputs["backbone"], page.parts["about_model"], **hidden)
    hindrances = {
        "fn": functools.partial(_hindrances, list(page.tabs)),
        "inputs": list(inputs.values()),
        "outputs": [part for tab in page.tabs.values() for part in (tab.show, tab.hindrance)],
    } | hidden
    decisive = ("backbone", "refiner", "lora", "strength", "guidance_scale")
    gr.on([inputs[name].change for name in decisive], trigger_mode="always_last", **hindrances)
    compared.then(**hindrances)  # now the model is in memory


def _defaults_of(name: str, prompt: str) -> list:
    """Return prompt, guidance scale, steps and sampler for a model, listed or not.

    Only an example of the page is exchanged, where the model does not take it.
    """
    try:
        listed = BACKBONES.get(name)
        usage = listed.usage if listed else usages.usage_by_name(name) if FREE_CHOICE else None
    except (ValueError, OSError) as error:  # said now, before anything is loaded
        raise gr.Error(str(error), print_exception=False) from error
    example = example_for(name, prompt)
    prompt = gr.skip() if example == prompt else example
    if usage is None:
        return [prompt, *[gr.skip()] * 3]
    if not listed:
        gr.Info(f"{usage.title}: its usual scale, steps and sampler are set.")
    return [prompt, usage.guidance_scale or gr.skip(), usage.steps, usage.sampler]


def _vote(page: Page) -> None:
    """Ask both questions about a pair, count the answers, and start the next pair."""
    parts = page.parts
    given = gr.State([])
    outputs = [
        given,
        parts["votes"],
        parts["tally"],
        parts["pair"],
        parts["next_pair"],
        parts["export"],
    ]
    page.tabs["blind"].show.click(
        _next_pair,
        parts["votes"],
        [given, parts["tally"], parts["pair"], parts["next_pair"]],
        queue=False,
        show_progress="hidden",
        **PRIVATE,
    )
    for answer, button in parts["answers"].items():
        button.click(
            functools.partial(_answer, answer),
            [given, parts["votes"], parts["pair"]],
            outputs,
            show_progress="hidden",
            **PRIVATE,
        )


def _next_pair(votes: list[blind.Vote]) -> list:
    """Forget the open pair and its answer, show the first question, and start the next pair."""
    question = f"**{blind.QUESTIONS['better']}**"
    return [[], f"{question}\n\n{blind.table(votes)}" if votes else question, None, time.time()]


def _answer(
    answer: str, given: list[str], votes: list[blind.Vote], pair: tuple | None
) -> Iterator[list]:
    """Take an answer up: ask the second question, or count the pair and start the next one."""
    if pair is None:
        raise gr.Error(
            "No pair is open: wait for the next one, or press “New pair”.", print_exception=False
        )
    given = [*given, answer]
    if len(given) < len(blind.QUESTIONS):
        question = list(blind.QUESTIONS.values())[len(given)]
        settings, *_ = pair
        yield [
            given,
            gr.skip(),
            f"**{question}** {texts.quoted(settings.prompt)}",
            gr.skip(),
            gr.skip(),
            gr.skip(),
        ]
        return
    votes = [*votes, blind.Vote(*pair, *given)]
    *_, left, right = pair
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "votes.json"
        record = {"votes": [asdict(vote) for vote in votes], "refined": blind.tally(votes)}
        path.write_text(json.dumps(record, indent=2))
        over = len(votes) % blind.ROUND == 0
        said = f"Left was {left}, right was {right}."
        said += (
            f"\n\n> {blind.result(votes)}"
            if over
            else f" Pair {len(votes) % blind.ROUND + 1} of {blind.ROUND}:"
        )
        said += "" if over else f" **{blind.QUESTIONS['better']}**"
        export = gr.DownloadButton(value=str(path), interactive=True)
        following = gr.skip() if over else time.time()
        yield [[], votes, f"{said}\n\n{blind.table(votes)}", None, following, export]
