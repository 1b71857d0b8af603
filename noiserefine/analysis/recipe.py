"""Recipes: everything an image depends on beside the models, and the maker that samples them."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from noiserefine.denoiser import ForwardCounter, canvas_like, denoiser, precision
from noiserefine.guidance import sample
from noiserefine.limits import MAX_GUIDANCE_SCALE, MAX_STEPS
from noiserefine.noise import (
    check_negative_prompt,
    check_prompt_length,
    check_seed,
    draw_noise,
    encode_prompt,
    image_size,
    step_generator,
)
from noiserefine.refiner import Refiner, check_strength
from noiserefine.samplers import SAMPLER_NAMES, watch_x0, with_sampler


@dataclass(frozen=True)
class Recipe:
    """Everything an image depends on beside the models.

    With guidance_scale and strength both set, the image is sampled with guidance from refined
    noise (appendix A.5). `gaussian`, `guided` and `refined` give the three arms of a comparison.
    """

    prompt: str
    seed: int = 0
    steps: int = 20
    sampler: str = "DDIM"
    guidance_scale: float = 1.0  # diffusers' g; 1 is unguided
    strength: float = 0.0  # of the refinement; 0 is Gaussian noise
    refiner_scale: float | None = None  # guidance scale given to a refiner that takes one
    refining_prompt: str | None = None  # read by the refiner in place of the prompt
    negative_prompt: str = ""
    height: int | None = None  # pixels; None for the model's own
    width: int | None = None
    noise: str | None = None  # SHA-256 of a starting noise given in place of the seed's

    @property
    def gaussian(self) -> "Recipe":
        """Return the recipe of unguided sampling from Gaussian noise."""
        return replace(self, guidance_scale=1.0, strength=0.0).reduced()

    @property
    def guided(self) -> "Recipe":
        """Return the recipe of guided sampling from Gaussian noise."""
        return replace(self, strength=0.0).reduced()

    @property
    def refined(self) -> "Recipe":
        """Return the recipe of unguided sampling from refined noise."""
        return replace(self, guidance_scale=1.0).reduced()

    def reduced(self) -> "Recipe":
        """Return the recipe without fields that change nothing: equal images have equal recipes."""
        recipe = self
        if self.guidance_scale == 1:
            recipe = replace(recipe, negative_prompt="")
        if self.strength == 0:
            recipe = replace(recipe, refiner_scale=None, refining_prompt=None)
        return recipe

    def check(self) -> None:
        """Raise ValueError for what no model can make an image from."""
        if (
            not isinstance(self.prompt, str)
            or not self.prompt.strip()
            and self.refining_prompt is None
        ):
            raise ValueError(
                "The prompt is empty: describe a picture, for example “a red apple on a blue "
                "background”."
            )
        check_seed(self.seed)
        check_settings(self.steps, self.guidance_scale, self.strength, self.sampler)


def check_settings(steps: int, guidance_scale: float, strength: float, sampler: str) -> None:
    """Raise ValueError for values that no sampler can work with."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise ValueError(
            f"The number of steps is a whole number from 1 to {MAX_STEPS}; got {steps!r}."
        )
    if not 1 <= guidance_scale <= MAX_GUIDANCE_SCALE:
        raise ValueError(
            f"The guidance scale is a number from 1 (none) to {MAX_GUIDANCE_SCALE}; "
            f"got {guidance_scale}."
        )
    check_strength(strength)
    if sampler not in SAMPLER_NAMES:
        raise ValueError(
            f"There is no sampler {sampler!r}; choose one of {', '.join(SAMPLER_NAMES)}."
        )


@dataclass(frozen=True)
class Sample:
    """A finished image."""

    recipe: Recipe
    image: Image.Image
    latents: np.ndarray  # where sampling began: x_T or x_hat, (1, C, h, w), float32
    x0: np.ndarray  # predicted at the last step, (1, C, h, w), float32
    forwards: int  # of the denoiser, for one image; a guided step counts two
    seconds: float
    blocked: bool = False  # blacked out by the pipeline's safety checker


class Maker:
    """Makes images from recipes with one pipeline and its refiner, each recipe once.

    samples  those that need not be made again, by reduced recipe; new ones join them
    on_made  called with every new sample
    on_step  called before every step of every image; what it raises stops the sampling and
             leaves the pipeline as it was
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        refiner: Refiner | None = None,
        samples: Mapping[Recipe, Sample] | None = None,
        on_made: Callable[[Sample], None] = lambda sample: None,
        on_step: Callable[[], None] = lambda: None,
    ):
        self.pipe, self.refiner, self.on_made, self.on_step = pipe, refiner, on_made, on_step
        self.samples = dict(samples or {})
        self.embeds: dict[tuple[str, str], dict[str, torch.Tensor]] = {}

    def encode(self, prompt: str, negative_prompt: str) -> dict[str, torch.Tensor]:
        """Return `encode_prompt` for guided sampling, computed once for each pair of prompts."""
        if (prompt, negative_prompt) not in self.embeds:
            self.embeds[prompt, negative_prompt] = encode_prompt(
                self.pipe, prompt, negative_prompt=negative_prompt
            )
        return self.embeds[prompt, negative_prompt]

    def check(self, recipe: Recipe) -> None:
        """Raise ValueError for what these models cannot make, without a forward."""
        recipe.check()
        for prompt in (recipe.prompt, recipe.negative_prompt, recipe.refining_prompt or ""):
            check_prompt_length(self.pipe, prompt)
        check_negative_prompt(self.pipe, recipe.negative_prompt)
        image_size(self.pipe, recipe.height, recipe.width)
        if recipe.strength > 0:
            if self.refiner is None:
                raise ValueError(
                    "There is no refiner for this model: strength 0 is what can be made."
                )
            self.refiner.check_guidance_scale(recipe.refiner_scale)

    def __call__(
        self,
        recipe: Recipe,
        x_T: torch.Tensor | None = None,
        on_x0: Callable[[torch.Tensor, int], None] | None = None,
    ) -> Sample:
        """Return the image of the recipe, from a given x_T (1, C, h, w) or from the seed's.

        on_x0 is called at every step that is sampled with the predicted x0, (1, C, h, w), and the
        forwards so far, counted as in Sample.
        Raises ValueError for a recipe that these models cannot make.
        """
        recipe = recipe.reduced()
        if x_T is not None:
            recipe = replace(
                recipe, noise=hashlib.sha256(x_T.float().cpu().numpy().tobytes()).hexdigest()
            )
        if recipe not in self.samples:
            self.check(recipe)
            x_T = self.draw(recipe) if x_T is None else x_T
            self.samples[recipe] = self.sample(recipe, x_T, on_x0)
            self.on_made(self.samples[recipe])
        return self.samples[recipe]

    def draw(self, recipe: Recipe) -> torch.Tensor:
        """Return x_T of the recipe's seed and size, as `draw_noise` does."""
        return draw_noise(self.pipe, recipe.seed, height=recipe.height, width=recipe.width)

    def refine(self, recipe: Recipe, x_T: torch.Tensor) -> torch.Tensor:
        """Return x_T refined by the recipe's strength, on the pipeline's device."""
        if recipe.strength == 0:
            return x_T.to(self.pipe._execution_device, precision(denoiser(self.pipe)))
        prompt = recipe.prompt if recipe.refining_prompt is None else recipe.refining_prompt
        assert self.refiner is not None  # check refuses a strength without one
        return self.refiner.refine(
            x_T, self.encode(prompt, recipe.negative_prompt), recipe.strength, recipe.refiner_scale
        )

    def sample(
        self,
        recipe: Recipe,
        x_T: torch.Tensor,
        on_x0: Callable[[torch.Tensor, int], None] | None = None,
    ) -> Sample:
        """Sample the recipe from x_T, (1, C, h, w), whether it was made before or not."""
        embeds: dict[str, Any] = self.encode(recipe.prompt, recipe.negative_prompt)
        height, width = image_size(self.pipe, recipe.height, recipe.width)
        pipe = with_sampler(self.pipe, recipe.sampler)

        size, counter = canvas_like(pipe, x_T), ForwardCounter()
        last: list[torch.Tensor] = []

        def watch(sample_x0: torch.Tensor) -> None:
            self.on_step()
            x0 = size.from_sample(sample_x0)
            last[:] = [x0]
            if on_x0:
                on_x0(x0, counter.count)

        began = time.perf_counter()
        with (
            watch_x0(pipe.scheduler, watch),
            _finite(pipe),
            counter.watch(denoiser(pipe), *([self.refiner.network] if self.refiner else [])),
        ):
            x_hat = self.refine(recipe, x_T)
            # Stochastic samplers draw from the seed too, so that the arms differ in one thing only.
            output = sample(
                pipe,
                guidance_scale=recipe.guidance_scale,
                latents=size.to_latents(x_hat),
                num_inference_steps=recipe.steps,
                height=height,
                width=width,
                generator=step_generator(recipe.seed),
                **embeds,
            )
        return Sample(
            recipe,
            output.images[0],
            x_hat.float().cpu().numpy(),
            last[0].float().cpu().numpy(),
            counter.count,
            time.perf_counter() - began,
            any(output.get("nsfw_content_detected") or ()),
        )


@contextlib.contextmanager
def _finite(pipe: DiffusionPipeline) -> Iterator[None]:
    """Raise ValueError where a picture is decoded from or to NaN: it would look black."""

    def check(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        if not args[0].isfinite().all():
            raise ValueError(
                "The picture holds numbers that are not finite (NaN): denoising diverged. Take "
                "another precision, sampler or LoRA weight; the model may also be damaged."
            )
        if isinstance(output, torch.Tensor) and not output.isfinite().all():
            raise ValueError(
                "The picture holds numbers that are not finite (NaN): the model's autoencoder "
                f"overflows in {output.dtype}. Take another precision, or an autoencoder made for "
                "this one."
            )

    decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
    handle = decoder.register_forward_hook(check) if decoder is not None else None
    try:
        yield
    finally:
        if handle:
            handle.remove()
