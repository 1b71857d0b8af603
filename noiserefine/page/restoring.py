"""Settings that come back: from a dropped image, the page's address, the session's history."""

import time
from typing import Any

import gradio as gr

from noiserefine.page.layout import Page
from noiserefine.page.opening import default_settings, example_for
from noiserefine.page.record import read_png
from noiserefine.page.settings import Settings, restored
from noiserefine.page.views import VIEWS


def from_png(page: Page, path: str | None) -> list:
    """Return updates of `targets` from a PNG's record; a comparison is made at once."""
    try:
        record = read_png(path or "")
        values, problems = restored(record["settings"])
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    if "program" in record:  # what it does not write, the model above all, stays as it is
        given = zip(Settings.names(), values, strict=True)
        values = [value if name in record["settings"] else None for name, value in given]
        problems.append(
            f"The settings are {record['program']}'s: another program makes another image of them."
        )
    _warn(problems)
    name, view = record.get("view"), VIEWS.get(str(record.get("view")))
    if view is None or not view.title:
        return _updates(page, values)
    gr.Info(f"The settings are restored: press {view.button} under {view.title}.")
    return _updates(page, values, str(name), record.get("controls"))


def from_address(page: Page, query: dict) -> list:
    """Return updates of `targets` from the page's address, and start a comparison if it has any."""
    values, problems = restored(query)
    _warn(problems)
    known = {name for name in page.inputs if name in query}
    if "prompt" not in query:
        values[0] = example_for(str(query.get("backbone")), default_settings().prompt)
    return _updates(page, values) if known else [gr.skip()] * len(targets(page))


def targets(page: Page) -> list[gr.components.Component]:
    """Return what is restored: the inputs, every view's controls, the open tab, and the start."""
    controls = [control for tab in page.tabs.values() for control in tab.controls.values()]
    return [*page.inputs.values(), *controls, page.parts["tabs"], page.parts["go"]]


def _updates(page: Page, values: list, view: str = "", controls: Any = None) -> list:
    """Return the updates, in the order of `targets`: of a view's tab, else a comparison's start.

    None and what is not given change nothing.
    """
    given = controls if isinstance(controls, dict) else {}
    of_controls = [
        given[name] if tab_of == view and name in given else None
        for tab_of, tab in page.tabs.items()
        for name in tab.controls
    ]
    updates = [gr.skip() if value is None else value for value in (*values, *of_controls)]
    if view:
        return [*updates, gr.Tabs(selected=view), gr.skip()]
    return [*updates, gr.skip(), time.time()]


def _warn(problems: list[str]) -> None:
    for problem in problems:
        gr.Warning(problem)
