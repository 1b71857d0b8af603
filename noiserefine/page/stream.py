"""Long work on a thread of its own, as a generator that can be closed early."""

import ctypes
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Stopped(BaseException):
    """Raised in the worker to abandon a run. No `except Exception` catches it."""


class Worker:
    """One thread that runs one job after the other.

    OpenMP and the allocator keep memory for every thread that computes, so there is only one.
    """

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Append a job to those that wait."""
        self.jobs.put(job)
        with self.lock:
            if self.thread is None or not self.thread.is_alive():  # a fork loses its threads
                self.thread = threading.Thread(target=self._loop, daemon=True)
                self.thread.start()

    def _loop(self) -> None:
        while True:
            self.jobs.get()()
            _return_freed_memory()


def _return_freed_memory() -> None:
    """Return freed memory to the system; glibc alone returns only the end of its heap."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


class _Run:
    """One run of work: what it reported, whether it should stop, how it failed."""

    END = object()

    def __init__(self, work: Callable[[Callable[[Any], None]], None]) -> None:
        self.work = work
        self.reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.stop, self.ended = threading.Event(), threading.Event()
        self.failure: BaseException | None = None

    def report(self, value: Any) -> None:
        if self.stop.is_set():
            raise Stopped
        self.reports.put(value)

    def __call__(self) -> None:
        try:
            if not self.stop.is_set():
                self.work(self.report)
        except Stopped:
            pass
        except BaseException as error:  # raised again in the caller's thread
            self.failure = error
        finally:
            self.reports.put(self.END)
            self.ended.set()

    def next_values(self, every: float) -> list:
        """Return what was reported since the last call, END among it when the work is over."""
        values = [self.reports.get()]
        self.ended.wait(every)
        # As many as there are now: work that reports without a pause would never let it end.
        return values + [self.reports.get() for _ in range(self.reports.qsize())]


def stream(
    worker: Worker, work: Callable[[Callable[[Any], None]], None], every: float = 0.0
) -> Iterator[list]:
    """Let the worker run work(report) and yield the values it reports.

    Each list holds the values since the last one; there is at most one in `every` seconds.
    Closing the generator returns at once and makes the next report raise Stopped in the work.
    An exception of the work is raised again in the caller.
    """
    run = _Run(work)
    worker.submit(run)
    finished = False
    try:
        while not finished:
            values = run.next_values(every)
            if finished := values[-1] is run.END:
                values.pop()
            if values:
                yield values
    finally:
        run.stop.set()
    if run.failure:
        raise run.failure
