"""Refine the initial noise of a diffusion model once, then sample without guidance."""

import importlib

_HOMES = {"Refiner": "noiserefine.refiner", "draw_noise": "noiserefine.noise"}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """Import torch and diffusers when they are needed, not when the page is drawn."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
