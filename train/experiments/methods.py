"""Ways to spend network forwards on an image: what the frontier compares.

A Family is one of them in any number of steps. Its settings are tried on training prompts; the
first one is the usual. A new one is a function that returns a Family, and an entry in `families`.

InitNO (Guo et al. 2024) is not among them: it moves x_T by gradients of a UNet's attention to words
that the user names for each prompt, so transformers have no counterpart, and a forward is not what
its backward passes cost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance

from noiserefine import draw_noise
from noiserefine.denoiser import canvas_like
from noiserefine.guiders import EveryKth, forwards_of
from noiserefine.limits import MAX_STEPS
from noiserefine.noise import encode_prompt
from noiserefine.samplers import NATIVE, forwards
from train.common import FIRST_EVALUATION_SEED
from train.emoji.judge import EmojiJudge
from train.experiments.bench import Bench, Images
from train.measurement import Batch
from train.metrics import Aesthetic, ClipScore, Metric

SCALES = (1.0, 0.25, 0.5, 1.5, 3.0)  # of guidance, g - 1, times the usual
INTERVALS = ((0.2, 0.9), (0.0, 0.5), (0.0, 0.75), (0.25, 0.75))  # shares of the steps
STRENGTHS = (1.0, 0.5, 0.75, 1.25)
SHARPENINGS = (1.5, 1.25, 2.0, 3.0)
SEED_STRIDE = 10**7  # between the seeds of an image's candidates

Setting = dict[str, float]


@dataclass(frozen=True)
class Family:
    """A method in any number of steps."""

    title: str
    forwards: Callable[[int, Setting], int]  # of an image in so many steps
    images: Callable[[Batch, int, Setting], Images]
    settings: Sequence[Setting] = field(default_factory=lambda: [{}])
    unit: str = "steps"
    least: int = 1  # steps

    def steps_within(self, budget: int, setting: Setting) -> int:
        """Return the most steps that a budget of forwards is enough for; 0 for none."""
        every = range(MAX_STEPS, self.least - 1, -1)
        fitting = (n for n in every if self.forwards(n, setting) <= budget)
        return next(fitting, 0)


def families(bench: Bench, samplers: Sequence[str]) -> dict[str, Family]:
    """Return what can be compared on a bench, by name; the first sampler is the model's own."""
    usual = samplers[0]
    found = {"unguided": unguided(bench, usual)}
    found |= {f"cfg {name}": cfg(bench, name) for name in samplers}
    found |= {"interval": interval(bench, usual)}
    found |= {f"every {k}": every_kth(bench, usual, k) for k in (2, 3)}
    if negatives(encode_prompt(bench.pipe, "")):
        found["sharpened"] = sharpened(bench, usual)
    if isinstance(bench.metrics[0], EmojiJudge | ClipScore | Aesthetic):
        found |= {f"best seed, {n} steps": best_of(bench, usual, n) for n in (4, 10, 20)}
    if bench.distilled:
        found["distilled"] = lora("guidance-distilled LoRA", bench, bench.distilled, usual)
    if bench.few_step:
        found["few-step"] = lora("few-step LoRA", bench, bench.few_step, NATIVE)
    if bench.refiner:
        found |= {f"refined {name}": refined(bench, name) for name in samplers}
    return found


def scales(bench: Bench) -> list[float]:
    """Return the guidance scales to try, the usual one first: a Frechet distance asks for less."""
    return [1 + factor * (bench.guidance_scale - 1) for factor in SCALES]


def unguided(bench: Bench, sampler: str) -> Family:
    """Return plain sampling."""
    return Family(
        f"unguided, {sampler}",
        lambda steps, _: forwards(sampler, steps),
        lambda batch, steps, _: bench.sample(batch, steps, sampler),
    )


def cfg(bench: Bench, sampler: str) -> Family:
    """Return classifier-free guidance in every step, so in half the steps."""
    return Family(
        f"CFG, {sampler}",
        lambda steps, _: 2 * forwards(sampler, steps),
        lambda batch, steps, setting: bench.sample(
            batch, steps, sampler, guidance_scale=setting["g"]
        ),
        [{"g": g} for g in scales(bench)],
    )


def interval(bench: Bench, sampler: str) -> Family:
    """Return guidance in some of the steps, in a row (Kynkäänniemi et al. 2024)."""

    def guider(setting: Setting) -> BaseGuidance:
        start, stop = setting["from"], setting["to"]
        return ClassifierFreeGuidance(guidance_scale=setting["g"], start=start, stop=stop)

    settings = [
        {"g": g, "from": start, "to": stop} for start, stop in INTERVALS for g in scales(bench)
    ]
    return _guided(f"CFG in an interval, {sampler}", bench, sampler, guider, settings)


def every_kth(bench: Bench, sampler: str, k: int) -> Family:
    """Return guidance in every k-th step."""
    return _guided(
        f"CFG in every {k}. step, {sampler}",
        bench,
        sampler,
        lambda setting: EveryKth(setting["g"], k),
        [{"g": g} for g in scales(bench)],
    )


def _guided(
    title: str,
    bench: Bench,
    sampler: str,
    guider: Callable[[Setting], BaseGuidance],
    settings: Sequence[Setting],
) -> Family:
    return Family(
        title,
        lambda steps, setting: forwards_of(guider(setting), forwards(sampler, steps)),
        lambda batch, steps, setting: bench.sample(batch, steps, sampler, guider=guider(setting)),
        settings,
    )


def sharpened(bench: Bench, sampler: str) -> Family:
    """Return unguided sampling with the embedding moved away from the empty prompt's.

    DICE (Zhou et al. 2025) learns where to move it; this is the straight line through both, for
    which nothing is trained.
    """
    return Family(
        f"sharpened text embedding, {sampler}",
        lambda steps, _: forwards(sampler, steps),
        lambda batch, steps, setting: bench.sample(
            replace(batch, embeds=sharpen(batch.embeds, setting["scale"])), steps, sampler
        ),
        [{"scale": scale} for scale in SHARPENINGS],
    )


def negatives(embeds: dict[str, Any]) -> list[str]:
    """Return the names of the embeddings that have a counterpart for the empty prompt."""
    found = [name for name in embeds if torch.is_tensor(embeds.get(f"negative_{name}"))]
    return [name for name in found if embeds[name].is_floating_point()]


def sharpen(embeds: dict[str, Any], scale: float) -> dict[str, Any]:
    """Return embeddings e_empty + scale (e - e_empty); 1 changes nothing."""
    empty = {name: embeds[f"negative_{name}"] for name in negatives(embeds)}
    return embeds | {name: torch.lerp(empty[name], embeds[name], scale) for name in empty}


def best_of(bench: Bench, sampler: str, steps: int) -> Family:
    """Return the image, of as many seeds as the budget allows, that the judge likes most.

    Its number of steps is fixed, and what counts as steps is the number of seeds. The judge's own
    forwards are not counted.
    """

    def choose(batch: Batch, seeds: int, _: Setting) -> Images:
        size = canvas_like(bench.pipe, batch.x_T)
        candidates, scores = [], []
        for i in range(seeds):
            seed = FIRST_EVALUATION_SEED + batch.start + i * SEED_STRIDE
            x_T = draw_noise(bench.pipe, seed, len(batch.prompts), size.height, size.width)
            other = replace(batch, x_T=x_T.to(batch.x_T.device))
            images = bench.sample(other, steps, sampler)
            candidates.append(images)
            with torch.autocast(batch.x_T.device.type, enabled=False):  # as it measures
                scores.append(preference(bench.metrics[0], images, batch.prompts))
        best = np.argmax(scores, axis=0)
        return [candidates[i][row] for row, i in enumerate(best)]

    return Family(
        f"best of k seeds by the judge, {steps} steps each, {sampler}",
        lambda seeds, _: seeds * forwards(sampler, steps),
        choose,
        unit="seeds",
        least=2,
    )


def preference(judge: Metric, images: Images, prompts: list[str]) -> np.ndarray:
    """Return how much the judge likes each image, (N,)."""
    rows = judge.measure(images, prompts)
    if isinstance(judge, EmojiJudge):
        return judge.log_probability(rows["features"], prompts)
    (scores,) = rows.values()
    return scores


def lora(title: str, bench: Bench, pipe: DiffusionPipeline, sampler: str) -> Family:
    """Return unguided sampling with a LoRA on the denoiser."""
    return Family(
        f"{title}, {sampler}",
        lambda steps, _: forwards(sampler, steps),
        lambda batch, steps, _: bench.sample(batch, steps, sampler, pipe=pipe),
    )


def refined(bench: Bench, sampler: str) -> Family:
    """Return unguided sampling from refined noise, which costs one forward more."""
    return Family(
        f"refined, {sampler}",
        lambda steps, _: 1 + forwards(sampler, steps),
        lambda batch, steps, setting: bench.sample(
            bench.refine(batch, setting["strength"]), steps, sampler
        ),
        [{"strength": strength} for strength in STRENGTHS],
    )
