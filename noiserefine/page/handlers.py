"""From a click to the page: the functions behind the buttons that make images."""

import collections
import inspect
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:  # before anything that touches CUDA
    from spaces import GPU
except ImportError:  # only Hugging Face's ZeroGPU needs it

    def GPU(duration: Callable) -> Callable:  # noqa: N802
        """Return a decorator that changes nothing."""
        return lambda function: function


import gradio as gr

from noiserefine.analysis.versions import package_versions
from noiserefine.page.events import Event, Made
from noiserefine.page.lazy import Lazy
from noiserefine.page.screen import Screen
from noiserefine.page.settings import Settings
from noiserefine.page.views import VIEWS

# noiserefine/page/jobs.py, imported at first use, since it imports PyTorch.
jobs: Any = Lazy("noiserefine.page.jobs")
_LOG = logging.getLogger(__name__)
# Bounds of what a session keeps so that it is not made again.
MAX_IMAGES, MAX_PIXELS = 100, 8_000_000
STOP_SECONDS = 10  # that Stop waits for a run to end by itself at its next step
NEXT_RUN_SECONDS = 0.5  # within which the page starts what was clicked during the run before

RUNNING: collections.Counter[tuple[str, str]] = collections.Counter()  # by session and view
STOPPED: set[tuple[str, str]] = set()  # sessions whose Stop was pressed, and the view that ran


def seconds_of_gpu(view: str, settings: Settings, controls: Mapping, *_: Any) -> int:
    """Return the seconds of a ZeroGPU card that a run asks for; takes `run_view`'s arguments."""
    return VIEWS[view].gpu_seconds(settings, controls)


@GPU(duration=seconds_of_gpu)
def run_view(
    view: str, settings: Settings, controls: Mapping, known: Mapping
) -> Iterator[list[Event]]:
    """Yield the events of a view; errors become messages on the page."""
    if not hasattr(sys.modules.get("noiserefine.page.jobs"), "work"):
        gr.Info("Loading PyTorch and diffusers …")
    try:
        yield from jobs.work(view, settings, controls, known, gr.Info)
    except (ValueError, OSError, MemoryError) as error:
        raise gr.Error(str(error), print_exception=False) from error
    except Exception as error:  # a fault of the program: its traceback is for the log alone
        _LOG.exception("%s with %s", view, settings)
        raise gr.Error(
            "An unexpected error occurred; see the server's log. Other settings still work.",
            print_exception=False,
        ) from error


def handler_of(
    view: str,
    outputs: Mapping[str, gr.components.Component],
    controls: Mapping[str, gr.components.Component],
) -> Callable:
    """Return the event handler of a view.

    It takes the values of Settings, of the view's controls and the session's samples, to which it
    adds new ones, and yields values for the outputs.
    """
    names = Settings.names()

    def handler(*inputs: Any) -> Iterator[dict]:
        *values, known, request, progress = inputs
        settings = Settings(*values[: len(names)])
        given = dict(zip(controls, values[len(names) :], strict=True))
        if request.headers.get("x-gradio-user") == "mcp":
            known = {}  # Gradio has one session for all who call the tools
        record = {
            "settings": asdict(settings),
            "view": view,
            "controls": given,
            "versions": package_versions(),
        }
        run = (request.session_hash or "", view)
        RUNNING[run] += 1
        events, shown = run_view(view, settings, given, dict(known)), False
        try:
            with tempfile.TemporaryDirectory() as folder:
                screen = Screen(outputs, settings, record, Path(folder))
                for batch in events:
                    _remember(batch, known)
                    news = [screen.show(event) for event in batch]
                    shown = shown or any(news)
                    if status := screen.status:
                        progress((status.done, status.total), desc=status.text, unit=status.unit)
                    stop = run in STOPPED
                    if stop:
                        events.close()
                        _complete(screen, settings, has_note=shown and "note" in outputs)
                    if any(news) or stop:
                        yield {  # a run that was stopped before it showed anything changes nothing
                            output: screen.values[name] if shown else gr.skip()
                            for name, output in outputs.items()
                        }
                    if stop:
                        return
        finally:
            STOPPED.discard(run)
            RUNNING[run] -= 1
            if not RUNNING[run]:
                del RUNNING[run]

    _describe(handler, view, [*names, *controls])
    return handler


def _describe(handler: Callable, view: str, names: list[str]) -> None:
    """Give a handler the name, description and parameters that Gradio reads for the API.

    Gradio passes `known`, `request` and `progress` last.
    """
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in (*names, "known", "request")]
    parameters.append(inspect.Parameter("progress", kind, default=gr.Progress()))
    handler.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    handler.__name__, handler.__doc__ = view, VIEWS[view].text
    handler.__annotations__ = {"request": gr.Request}


def request_stop(request: gr.Request) -> list[str]:
    """End the session's runs at their next step, and return their views."""
    session = request.session_hash or ""
    views = [view for owner, view in list(RUNNING) if owner == session]  # others change it
    _stop(session, views)
    return views


def stop_next(views: list[str], request: gr.Request) -> None:
    """End what the buttons of stopped views were clicked for meanwhile, which starts only now."""
    if views:
        time.sleep(NEXT_RUN_SECONDS)
    _stop(request.session_hash or "", views)


def _stop(session: str, views: list[str]) -> None:
    """Ask a session's runs of some views to end, and wait for them."""
    runs = [(session, view) for view in views if RUNNING[session, view]]
    for run in runs:
        STOPPED.add(run)
    until = time.monotonic() + STOP_SECONDS
    while not STOPPED.isdisjoint(runs) and time.monotonic() < until:
        time.sleep(0.05)
    STOPPED.difference_update(runs)


def keep_newest(samples: dict) -> None:
    """Remove the oldest samples until MAX_IMAGES and MAX_PIXELS are kept."""
    pixels = sum(sample.image.width * sample.image.height for sample in samples.values())
    while pixels > MAX_PIXELS or len(samples) > MAX_IMAGES:
        image = samples.pop(next(iter(samples))).image
        pixels -= image.width * image.height


def _remember(events: list[Event], known: dict) -> None:
    for event in events:
        if isinstance(event, Made):
            known[event.model, event.sample.recipe] = event.sample
    keep_newest(known)


def _complete(screen: Screen, settings: Settings, has_note: bool) -> None:
    """Complete the screen of a stopped run; say how far it came where no note does."""
    screen.stopped(_picture_of(screen, settings))
    if screen.status and not has_note:
        gr.Info(f"Stopped after {screen.status}.")


def _picture_of(screen: Screen, settings: Settings) -> Any:
    """Return the image that an unfinished arm's last step expected, where it can be decoded."""
    if screen.unfinished is None:
        return None
    return jobs.decoded(settings.model, screen.unfinished.x0)
