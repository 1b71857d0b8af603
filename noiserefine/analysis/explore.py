"""Series of images that show what refining does, one function for each of the paper's figures.

Each function takes a Maker and a recipe that holds the guidance scale of the guided images and
the strength of the refined ones, and yields (caption, Sample) one by one. Captions call the
Gaussian arm “plain”, as the page does.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from noiserefine.analysis.recipe import Maker, Recipe, Sample
from noiserefine.analysis.spectrum import band
from noiserefine.limits import MAX_SEED
from noiserefine.noise import slerp
from noiserefine.samplers import samplers_of

STRENGTHS = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)
STEPS = (10, 20, 40)  # the paper's last is 50: too long for a visitor's two minutes of ZeroGPU
INTERPOLATIONS = 7
SCALES = 5
BANDS = 7  # images of `bands`
Images = Iterator[tuple[str, Sample]]


def strengths(make: Maker, recipe: Recipe, values: Sequence[float] = STRENGTHS) -> Images:
    """Yield the refined image over the strength, then the guided one (figure 13).

    Raises ValueError for what the refiner does not take, before any image.
    """
    make.check(replace(recipe, strength=max(values)).refined)
    for strength in values:
        yield f"strength {strength:g}", make(replace(recipe, strength=strength).refined)
    if recipe.guidance_scale > 1:
        yield f"guided, g = {recipe.guidance_scale:g}", make(recipe.guided)


def guidance_scales(make: Maker, recipe: Recipe, count: int = SCALES) -> Images:
    """Yield refined images over the refiner's guidance scale, then guided ones (figure 23).

    Raises ValueError for a refiner that takes no guidance scale.
    """
    assert make.refiner is not None
    if make.refiner.config.guidance_scale_range is None:
        raise ValueError("This refiner takes no guidance scale: it has one image, not a series.")
    low, high = make.refiner.config.guidance_scale_range
    scales = [low + (high - low) * i / (count - 1) for i in range(count)]
    for scale in scales:
        yield f"refined for g = {scale:g}", make(replace(recipe, refiner_scale=scale).refined)
    for scale in scales:
        yield f"guided, g = {scale:g}", make(replace(recipe, guidance_scale=scale).guided)


def samplers_and_steps(make: Maker, recipe: Recipe, steps: Sequence[int] = STEPS) -> Images:
    """Yield the refined and the Gaussian image of every sampler and number of steps (figure 28)."""
    for sampler in samplers_of(make.pipe):
        for count in steps:
            sampled = replace(recipe, sampler=sampler, steps=count)
            yield f"{sampler}, {count} steps, refined", make(sampled.refined)
            yield f"{sampler}, {count} steps, plain", make(sampled.gaussian)


def two_prompts(make: Maker, recipe: Recipe, other: str) -> Images:
    """Yield noise refined with one prompt, denoised with another one or none (figure 21)."""
    with_other = replace(recipe, refining_prompt=recipe.prompt, prompt=other)
    with_none = replace(with_other, prompt="")
    yield "one prompt for both", make(recipe.refined)
    yield "denoised with the other", make(with_other.refined)
    yield "denoised with none", make(with_none.refined)
    yield "plain noise, the other", make(with_other.gaussian)
    if recipe.guidance_scale > 1:
        yield "denoised with the other, guided", make(with_other)
        yield "plain noise, the other, guided", make(with_other.guided)


def interpolation(make: Maker, recipe: Recipe, seed: int, count: int = INTERPOLATIONS) -> Images:
    """Yield images on the way from the recipe's noise to another seed's (figure 22).

    First unguided ones from Gaussian noise on the sphere, then those refined on the way.
    Raises ValueError for the recipe's own seed.
    """
    if seed == recipe.seed:
        raise ValueError(
            f"Both seeds are {seed}: there is nothing between them. Choose another one."
        )
    ends = make.draw(recipe), make.draw(replace(recipe, seed=seed))
    for name, arm in (("plain", recipe.gaussian), ("refined", recipe.refined)):
        yield f"{name}, seed {recipe.seed}", make(arm)
        for i in range(1, count - 1):
            yield f"{name}, {i / (count - 1):.2g}", make(arm, slerp(*ends, i / (count - 1)))
        yield f"{name}, seed {seed}", make(replace(arm, seed=seed))


def guided_from_refined(make: Maker, recipe: Recipe) -> Images:
    """Yield both noises without and with guidance (appendix A.5, table 6)."""
    yield "plain", make(recipe.gaussian)
    yield "guided", make(recipe.guided)
    yield "refined", make(recipe.refined)
    yield "refined and guided", make(recipe)


def draw_next(make: Maker, recipe: Recipe) -> torch.Tensor:
    """Return x_T of the seed after the recipe's."""
    return make.draw(replace(recipe, seed=(recipe.seed + 1) % (MAX_SEED + 1)))


def bands(make: Maker, recipe: Recipe, cutoff: float) -> Images:
    """Yield images from noises mixed at a cutoff of the radial frequency (figures 15 to 19)."""
    refined, gaussian = make(recipe.refined), make(recipe.gaussian)
    x_T = make.draw(recipe)
    x_hat = torch.from_numpy(refined.latents)
    redrawn = draw_next(make, recipe)
    low, redrawn_low, plain = band(x_hat, 0, cutoff), band(redrawn, 0, cutoff), recipe.gaussian
    yield "refined noise", refined
    yield "plain noise", gaussian
    mixed = {0.0: gaussian, 1.0: refined}.get(cutoff)
    yield (
        f"refined below {cutoff:g}, plain above",
        mixed or make(plain, x_T + band(x_hat - x_T, 0, cutoff)),
    )
    yield f"refined below {cutoff:g}, zero above", make(plain, low)
    yield f"zero below {cutoff:g}, refined above", make(plain, x_hat - low)
    yield f"refined below {cutoff:g}, redrawn above", make(plain, low + redrawn - redrawn_low)
    yield f"redrawn below {cutoff:g}, refined above", make(plain, redrawn_low + x_hat - low)


def nearness(samples: Mapping[str, Sample]) -> float | None:
    """Return how much nearer to the guided x0 the refined one is than the Gaussian one.

    1 - |refined - guided| / |gaussian - guided|: 1 for the guided image itself, 0 for no change,
    negative for one further away. None where an arm is missing. It says nothing of quality.
    """
    if not samples.keys() >= {"gaussian", "guided", "refined"}:
        return None
    plain, guided, refined = (samples[arm].x0 for arm in ("gaussian", "guided", "refined"))
    distance = np.linalg.norm(plain - guided)
    return float(1 - np.linalg.norm(refined - guided) / distance) if distance else None


def variety(samples: Sequence[Sample]) -> float:
    """Return the mean distance between the x0 of two samples: how different they are."""
    x0 = np.stack([sample.x0.ravel() for sample in samples])
    pairs = itertools.combinations(range(len(x0)), 2)
    return float(np.mean([np.linalg.norm(x0[i] - x0[j]) for i, j in pairs]))
