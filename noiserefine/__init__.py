"""Refine the initial noise of a diffusion model once, then sample without guidance."""

from noiserefine.noise import draw_noise
from noiserefine.refiner import Refiner

__all__ = ["Refiner", "draw_noise"]
