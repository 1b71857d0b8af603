"""From a click to the page: the function behind every button that makes images."""

import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

try:  # before anything that touches CUDA
    from spaces import GPU
except ImportError:  # only Hugging Face's ZeroGPU needs it

    def GPU(duration: Callable) -> Callable:  # noqa: N802
        """Return a decorator that changes nothing."""
        return lambda function: function


import gradio as gr

from noiserefine.page.events import Event, Made
from noiserefine.page.lazy import Lazy
from noiserefine.page.record import read_png, versions
from noiserefine.page.screen import Screen
from noiserefine.page.settings import Settings, link, restored
from noiserefine.page.views import VIEWS

jobs: Any = Lazy("noiserefine.page.jobs")
# Bounds of what a session keeps so that it is not made again.
MAX_IMAGES, MAX_PIXELS = 100, 8_000_000


def seconds_of_gpu(view: str, settings: Settings, controls: Mapping, *_: Any) -> int:
    """Return the seconds of a ZeroGPU card that a run asks for; takes the arguments of `run`."""
    return VIEWS[view].gpu_seconds(settings, controls)


@GPU(duration=seconds_of_gpu)
def run(view: str, settings: Settings, controls: Mapping, known: Mapping) -> Iterator[list[Event]]:
    """Yield the events of a view; errors become messages on the page."""
    if not hasattr(sys.modules.get("noiserefine.page.jobs"), "work"):
        gr.Info("Loading PyTorch and diffusers …")
    try:
        yield from jobs.work(view, settings, controls, known, gr.Info)
    except (ValueError, OSError, MemoryError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def handler_of(
    view: str,
    outputs: Mapping[str, gr.components.Component],
    controls: Mapping[str, gr.components.Component],
) -> Callable:
    """Return the event handler of a view.

    It takes the values of Settings, of the view's controls and the session's samples, to which it
    adds new ones, and yields values for the outputs.
    """
    names = [field.name for field in fields(Settings)]

    def handler(*inputs: Any) -> Iterator[dict]:
        *values, known, request = inputs
        settings = Settings(*values[: len(names)])
        given = dict(zip(controls, values[len(names) :], strict=True))
        if request.headers.get("x-gradio-user") == "mcp":
            known = {}  # Gradio has one session for all who call the tools
        record = {
            "settings": asdict(settings),
            "view": view,
            "controls": given,
            "versions": versions(),
        }
        with tempfile.TemporaryDirectory() as folder:
            screen = Screen(outputs, record, Path(folder), link(settings))
            for events in run(view, settings, given, dict(known)):
                for event in events:
                    if isinstance(event, Made):
                        known[event.model, event.sample.recipe] = event.sample
                keep_newest(known)
                if any([screen.show(event) for event in events]):
                    yield {output: screen.values[name] for name, output in outputs.items()}

    # Gradio reads the names of the API's parameters and its description from the function.
    parameters = [*names, *controls, "known", "request"]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    handler.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind) for name in parameters]
    )
    handler.__name__, handler.__doc__ = view, VIEWS[view].text
    handler.__annotations__ = {"request": gr.Request}
    return handler


def keep_newest(samples: dict) -> None:
    """Remove the oldest samples until MAX_IMAGES and MAX_PIXELS are kept."""
    pixels = sum(sample.image.width * sample.image.height for sample in samples.values())
    while pixels > MAX_PIXELS or len(samples) > MAX_IMAGES:
        image = samples.pop(next(iter(samples))).image
        pixels -= image.width * image.height


def restore_png(path: str | None) -> list:
    """Return the settings of a dropped image, for the page's inputs."""
    try:
        values = restored(read_png(path or "")["settings"])
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    gr.Info("The settings of this image are restored: press Generate.")
    return _updates(values)


def restore_link(request: gr.Request) -> Any:
    """Return the settings in the page's address, for its inputs."""
    try:
        return _updates(restored(dict(request.query_params)))
    except ValueError as error:
        gr.Warning(str(error))
        return gr.skip()


def _updates(values: list) -> list:
    """Return updates that leave an input as it is where it has no value."""
    return [gr.skip() if value is None else value for value in values]
