"""The predicted x0 over the steps, as a filmstrip (figure 11)."""

from collections.abc import Callable

from PIL import Image

from noiserefine.analysis.recipe import Maker, Recipe
from noiserefine.latents import decode
from noiserefine.samplers import unet_calls

FRAMES = 7


def evenly(total: int, count: int) -> list[int]:
    """Indices of at most `count` evenly spaced ones of `total` things, the first and the last among them."""
    count = min(count, total)
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def trajectory(
    make: Maker, recipe: Recipe, on_frame: Callable[[int, Image.Image], None], frames: int = FRAMES
) -> None:
    """Makes the recipe's image and calls on_frame(forward, picture) for predicted x0 of evenly spaced forwards, the first and the last among them.

    For a sampler with two forwards a step each counts; guidance counts none.
    """
    wanted, seen = evenly(unet_calls(recipe.sampler, recipe.steps), frames), 0

    def on_step(recipe, x0):
        nonlocal seen
        if seen in wanted:
            on_frame(seen + 1, decode(make.pipe, x0)[0])
        seen += 1
        if make.on_step:
            make.on_step(recipe, x0)

    watched = Maker(make.pipe, make.refiner, on_step=on_step)
    watched(recipe)
