"""The predicted x0 over the steps, as a filmstrip (figure 11)."""

import io
from collections.abc import Callable, Sequence

import torch
from PIL import Image

from noiserefine.analysis.recipe import Maker, Recipe
from noiserefine.latents import decode
from noiserefine.samplers import forwards

FRAMES, FRAME_MS = 7, 400


def evenly(total: int, count: int) -> list[int]:
    """Return at most `count` evenly spaced indices of `total` items, the first and the last too."""
    count = min(count, total)
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def trajectory(
    make: Maker, recipe: Recipe, on_frame: Callable[[int, Image.Image], None], frames: int = FRAMES
) -> None:
    """Sample the recipe and call on_frame(forwards so far, picture) with the predicted x0s.

    The frames are evenly spaced over the sampling, the first and the last among them. A sampler
    with two forwards a step has a frame for each; guidance adds none.
    """
    wanted, seen = evenly(forwards(recipe.sampler, recipe.steps), frames), 0

    def on_x0(x0: torch.Tensor, count: int) -> None:
        nonlocal seen
        if seen in wanted:
            on_frame(count, decode(make.pipe, x0, embeds)[0])
        seen += 1

    make.check(recipe)
    embeds = make.encode(recipe.prompt, recipe.negative_prompt)
    make.sample(recipe.reduced(), make.draw(recipe), on_x0)


def film(arms: Sequence[Sequence[Image.Image]]) -> bytes:
    """Return the frames of several arms side by side as an animated PNG, the last one held."""
    frames = []
    for pictures in zip(*arms, strict=True):
        width, height = pictures[0].size
        frames.append(Image.new("RGB", (width * len(pictures), height)))
        for i, picture in enumerate(pictures):
            frames[-1].paste(picture, (i * width, 0))
    data = io.BytesIO()
    durations = [FRAME_MS] * (len(frames) - 1) + [4 * FRAME_MS]
    frames[0].save(data, "PNG", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return data.getvalue()
