"""Modules that are imported when they are first used."""

import importlib
from typing import Any


class Lazy:
    """A module by name: PyTorch takes seconds to import, which the page does not wait for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
