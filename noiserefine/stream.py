"""Long work as a generator that can be left."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Stopped(BaseException):
    """Raised inside work that nobody waits for any more; no `except Exception` holds it up."""


def stream(work: Callable[[Callable[[Any], None]], None], every: float = 0.0) -> Iterator[list]:
    """Runs work(report) in a thread and yields what it reports, as lists of all that came since, at most once in `every` seconds.

    When the generator is closed, the next report raises Stopped inside the work; its end is not waited for.
    What the work raises is raised here.
    """
    reports, stop, end = queue.SimpleQueue(), threading.Event(), object()
    failure: list[BaseException] = []

    def report(value: Any) -> None:
        if stop.is_set():
            raise Stopped
        reports.put(value)

    def run() -> None:
        try:
            work(report)
        except Stopped:
            pass
        except BaseException as error:  # raised again below, in the caller's thread
            failure.append(error)
        finally:
            reports.put(end)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            values = [reports.get()]
            thread.join(every)
            while not reports.empty():
                values.append(reports.get())
            finished = values[-1] is end
            if values := [value for value in values if value is not end]:
                yield values
            if finished:
                break
    finally:
        stop.set()
    if failure:
        raise failure[0]
