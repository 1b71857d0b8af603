"""What an image is made from, and how it is made."""

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from noiserefine.guidance import sample
from noiserefine.noise import (
    check_prompt_length,
    check_seed,
    draw_noise,
    encode_prompt,
    image_size,
    step_generator,
)
from noiserefine.refiner import Refiner, check_strength
from noiserefine.samplers import SAMPLERS, watch_x0, with_sampler

MAX_STEPS = 200


@dataclass(frozen=True)
class Recipe:
    """What an image depends on beside the models.

    With guidance_scale and strength both set it is guided sampling from refined noise (appendix A.5);
    `gaussian`, `guided` and `refined` are the three columns that belong to it.
    """

    prompt: str
    seed: int = 0
    steps: int = 20
    sampler: str = "DDIM"
    guidance_scale: float = 1.0  # diffusers' g; 1 is unguided
    strength: float = 0.0  # of the refinement; 0 is Gaussian noise
    refiner_scale: float | None = None  # the guidance scale that a refiner is told which takes one
    refining_prompt: str | None = None  # what the refiner reads in place of the prompt
    negative_prompt: str = ""
    height: int | None = None  # pixels; None for the model's own
    width: int | None = None
    noise: str | None = (
        None  # SHA-256 of the noise it starts from, where that is given in place of the seed's
    )

    @property
    def gaussian(self) -> "Recipe":
        return replace(self, guidance_scale=1.0, strength=0.0).reduced()

    @property
    def guided(self) -> "Recipe":
        return replace(self, strength=0.0).reduced()

    @property
    def refined(self) -> "Recipe":
        return replace(self, guidance_scale=1.0).reduced()

    def reduced(self) -> "Recipe":
        """Without what changes nothing, so that equal images have equal recipes."""
        recipe = self
        if self.guidance_scale == 1:
            recipe = replace(recipe, negative_prompt="")
        if self.strength == 0:
            recipe = replace(recipe, refiner_scale=None, refining_prompt=None)
        return recipe

    def check(self) -> None:
        """Raises ValueError for what no model can make an image from."""
        if (
            not isinstance(self.prompt, str)
            or not self.prompt.strip()
            and self.refining_prompt is None
        ):
            raise ValueError(
                "The prompt is empty: describe a picture, for example “a red apple on a blue background”."
            )
        check_seed(self.seed)
        check_settings(self.steps, self.guidance_scale, self.strength, self.sampler)


def check_settings(steps: int, guidance_scale: float, strength: float, sampler: str) -> None:
    """Raises ValueError for values no sampling can be done with."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise ValueError(
            f"The number of steps is a whole number from 1 to {MAX_STEPS}; got {steps!r}."
        )
    if not 1 <= guidance_scale <= 30:
        raise ValueError(
            f"The guidance scale is a number from 1 (none) to 30; got {guidance_scale}."
        )
    check_strength(strength)
    if sampler not in SAMPLERS:
        raise ValueError(f"There is no sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}.")


@dataclass(frozen=True)
class Sample:
    """An image that was made."""

    recipe: Recipe
    image: Image.Image
    x_T: np.ndarray  # the noise it started from, (1, C, h, w) in float32, unit variance
    forwards: int  # of the UNet, for one image; a guided step counts two
    seconds: float


class Maker:
    """Makes images from recipes with one pipeline and its refiner; each recipe once, and each prompt is encoded once.

    known    samples that need not be made, by reduced recipe
    on_made  called with every new sample
    on_step  called with the recipe and the predicted x0, (1, C, h, w), at every step; what it raises stops the
             sampling and leaves the pipeline as it was
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        refiner: Refiner | None = None,
        known: Mapping[Recipe, Sample] | None = None,
        on_made: Callable[[Sample], None] = lambda sample: None,
        on_step: Callable[[Recipe, torch.Tensor], None] | None = None,
    ):
        self.pipe, self.refiner, self.on_made, self.on_step = pipe, refiner, on_made, on_step
        self.known = dict(known or {})
        self.embeds: dict[tuple[str, str], dict[str, torch.Tensor]] = {}

    def encode(self, prompt: str, negative_prompt: str) -> dict[str, torch.Tensor]:
        """What `encode_prompt` returns for guided sampling, once for each pair of prompts."""
        if (prompt, negative_prompt) not in self.embeds:
            self.embeds[prompt, negative_prompt] = encode_prompt(
                self.pipe, prompt, negative_prompt=negative_prompt
            )
        return self.embeds[prompt, negative_prompt]

    def check(self, recipe: Recipe) -> None:
        """Raises ValueError for what these models cannot make, without a forward."""
        recipe.check()
        for prompt in (recipe.prompt, recipe.negative_prompt, recipe.refining_prompt or ""):
            check_prompt_length(self.pipe, prompt)
        image_size(self.pipe, recipe.height, recipe.width)
        if recipe.strength > 0:
            if self.refiner is None:
                raise ValueError(
                    "There is no refiner for this model: strength 0 is what can be made."
                )
            self.refiner.check_guidance_scale(recipe.refiner_scale)

    def __call__(self, recipe: Recipe, x_T: torch.Tensor | None = None) -> Sample:
        """The image of the recipe, from a given x_T, (1, C, h, w), or from the seed's. Raises ValueError for one that these models cannot make."""
        recipe = recipe.reduced()
        if x_T is not None:
            recipe = replace(
                recipe, noise=hashlib.sha256(x_T.float().cpu().numpy().tobytes()).hexdigest()
            )
        if recipe not in self.known:
            self.check(recipe)
            self.known[recipe] = self.sample(recipe, self.draw(recipe) if x_T is None else x_T)
            self.on_made(self.known[recipe])
        return self.known[recipe]

    def draw(self, recipe: Recipe) -> torch.Tensor:
        """x_T of the recipe's seed and size, as `draw_noise` returns it."""
        return draw_noise(self.pipe, recipe.seed, height=recipe.height, width=recipe.width)

    def refine(self, recipe: Recipe, x_T: torch.Tensor) -> torch.Tensor:
        """x_T refined as the recipe says, on the pipeline's device in its precision; unchanged at strength 0."""
        if recipe.strength == 0:
            return x_T.to(self.pipe._execution_device, self.pipe.unet.dtype)
        prompt = recipe.prompt if recipe.refining_prompt is None else recipe.refining_prompt
        assert self.refiner is not None  # check refuses a strength without one
        return self.refiner(
            x_T, self.encode(prompt, recipe.negative_prompt), recipe.strength, recipe.refiner_scale
        )

    def sample(self, recipe: Recipe, x_T: torch.Tensor) -> Sample:
        """The image that the recipe makes of an x_T, (1, C, h, w), sampled whether it was made before or not."""
        embeds: dict[str, Any] = self.encode(recipe.prompt, recipe.negative_prompt)
        height, width = image_size(self.pipe, recipe.height, recipe.width)
        pipe = with_sampler(self.pipe, recipe.sampler)
        watched = (
            watch_x0(pipe.scheduler, functools.partial(self.on_step, recipe))
            if self.on_step
            else contextlib.nullcontext()
        )
        began, counter = time.perf_counter(), ForwardCounter()
        with watched, counter.watch(pipe.unet, *([self.refiner.unet] if self.refiner else [])):
            latents = self.refine(recipe, x_T)
            # Stochastic samplers draw from the seed too, so that the arms differ in one thing only.
            image = sample(
                pipe,
                guidance_scale=recipe.guidance_scale,
                latents=latents,
                num_inference_steps=recipe.steps,
                height=height,
                width=width,
                generator=step_generator(recipe.seed),
                **embeds,
            ).images[0]
        return Sample(
            recipe, image, latents.float().cpu().numpy(), counter.count, time.perf_counter() - began
        )


class ForwardCounter:
    """Counts the images that pass through UNets: a guided step counts two."""

    def __init__(self) -> None:
        self.count = 0

    @contextlib.contextmanager
    def watch(self, *unets: torch.nn.Module) -> Iterator["ForwardCounter"]:
        def count(module: torch.nn.Module, args: tuple) -> None:
            self.count += len(args[0])

        handles = [unet.register_forward_pre_hook(count) for unet in unets]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
