"""Downloads from the hub that tell how far they are, and end when the listener raises."""

import contextlib
import io
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

Listener = Callable[[int, int], None]  # takes the bytes so far and those of all files begun
LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let this thread's downloads report to the listener.

    What it raises ends the download, of which complete files stay.
    """
    token = LISTENER.set(listener)
    try:
        yield
    finally:
        LISTENER.reset(token)


def bar_class() -> type[tqdm] | None:
    """Return `tqdm_class` for huggingface_hub, which counts bytes with it; None for its own."""
    listener = LISTENER.get()
    return listener and _reporting_to(listener)


def _reporting_to(listener: Listener) -> type[tqdm]:
    class Bar(tqdm):
        """Report instead of printing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **kwargs | {"file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            updated = super().update(n)
            if self.counts_bytes and self.total:
                listener(int(self.n), int(self.total))
            return updated

    return Bar
