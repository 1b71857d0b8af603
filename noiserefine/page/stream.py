"""Long work as a generator that can be left."""

import ctypes
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Stopped(BaseException):
    """Raised inside work that nobody waits for any more; no `except Exception` holds it up."""


class Worker:
    """A thread that does one job after the other: always the same one, since OpenMP and the allocator keep memory for every thread that computes."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        self.jobs.put(job)
        with self.lock:
            if self.thread is None or not self.thread.is_alive():  # in a forked process it is gone
                self.thread = threading.Thread(target=self.run, daemon=True)
                self.thread.start()

    def run(self) -> None:
        while True:
            self.jobs.get()()
            return_freed_memory()


def return_freed_memory() -> None:
    """To the system: glibc returns by itself only what lies at the end of its heap, above everything that is still in use."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def stream(
    worker: Worker, work: Callable[[Callable[[Any], None]], None], every: float = 0.0
) -> Iterator[list]:
    """Has the worker run work(report) and yields what it reports, as lists of all that came since, at most once in `every` seconds.

    When the generator is closed, the next report raises Stopped inside the work; its end is not waited for.
    What the work raises is raised here.
    """
    reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stop, ended, end = threading.Event(), threading.Event(), object()
    failure: list[BaseException] = []

    def report(value: Any) -> None:
        if stop.is_set():
            raise Stopped
        reports.put(value)

    def run() -> None:
        try:
            if not stop.is_set():
                work(report)
        except Stopped:
            pass
        except BaseException as error:  # raised again below, in the caller's thread
            failure.append(error)
        finally:
            reports.put(end)
            ended.set()

    worker.submit(run)
    try:
        while True:
            values = [reports.get()]
            ended.wait(every)
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
