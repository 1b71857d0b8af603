"""Seconds and memory of the three arms on an architecture with random weights.

    python tests/tools/cuda/arms.py sdxl

Of the whole pipeline: text encoders, (the refining pass,) 20 steps and decoding.  The arms take
turns; ratios are medians over rounds of the ratio within a round.
"""

import functools
import statistics
from typing import Any

import torch
from diffusers import DiffusionPipeline
from results import arguments, device, free_memory, peak_gib, report, reset_peak, timed

from noiserefine import Refiner, draw_noise
from noiserefine.guidance import sample
from noiserefine.models.offload import offload
from noiserefine.noise import encode_prompt
from train.tools.architectures import PROMPT, UNETS, random_pipeline

STEPS, GUIDANCE_SCALE = 20, 7.0
RANKS = {"sdxl": 256}  # the presets'
RANK = 128
# Images a call, and rounds; a small network needs many images before the card, not Python, is busy.
MERGED: dict[str, dict[int, int]] = {"sd21": {1: 3, 4: 2, 16: 1}}
MERGED_DEFAULT = {1: 3, 4: 2}
ARMS = ("unguided", "guided", "refined")


def load(name: str, small: bool) -> tuple[DiffusionPipeline, Refiner]:
    """Return the pipeline on the device and an untrained refiner, as fast as a trained one."""
    torch.manual_seed(0)
    dtype = torch.float16 if name in UNETS else torch.bfloat16
    if small:
        pipe = small_pipeline(name).to(device())
        refiner = Refiner.create(pipe, 8)
    else:
        pipe = random_pipeline(name, device(), dtype)
        refiner = Refiner.create(pipe, RANKS.get(name, RANK))
    refiner.network.to(refiner.dtype)
    return pipe, refiner


def small_pipeline(name: str) -> DiffusionPipeline:
    """Return a small pipeline of the architecture's family."""
    if name in UNETS:
        return random_pipeline(name, small=True)
    from families import pipeline  # noqa: PLC0415 (of the tests)

    families = {"sd35-medium": "sd3", "klein": "flux2_klein"}
    return pipeline(families.get(name, name.replace("-", "_")))


def arm(pipe: DiffusionPipeline, refiner: Refiner, name: str, x_T: torch.Tensor) -> Any:
    """Make the images of an arm from the prompt on."""
    guided = name == "guided"
    embeds = encode_prompt(pipe, [PROMPT] * len(x_T), guided=guided)
    latents = refiner(x_T, embeds) if name == "refined" else refiner(x_T, embeds, strength=0)
    scale = GUIDANCE_SCALE if guided else 1.0
    return sample(
        pipe, latents=latents, num_inference_steps=STEPS, guidance_scale=scale, **embeds
    ).images


def measure(
    pipe: DiffusionPipeline, refiner: Refiner, batch_size: int, rounds: int
) -> dict[str, Any]:
    """Return the arms' median seconds, peak memory and ratios, after a round to warm up."""
    x_T = draw_noise(pipe, 0, batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    peaks = {}
    for i in range(rounds + 1):
        for name in ARMS:
            reset_peak()
            took, _ = timed(functools.partial(arm, pipe, refiner, name, x_T))
            peaks[name] = peak_gib()
            if i:
                seconds[name].append(took)
    return {
        "seconds": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
        "peak_gib": peaks,
        "rounds": rounds,
    } | {
        f"refined_over_{other}": round(
            statistics.median(
                a / b for a, b in zip(seconds["refined"], seconds[other], strict=True)
            ),
            4,
        )
        for other in ("unguided", "guided")
    }


def main() -> None:
    args = arguments(__doc__, "architecture")
    name = args.architecture
    built, (pipe, refiner) = timed(lambda: load(name, args.small))
    report(f"{name}, built", seconds=round(built, 1), peak_gib=peak_gib(), dtype=str(refiner.dtype))

    few = args.small
    report(f"{name}, shared, batch 1", **measure(pipe, refiner, 1, 1 if few else 3))
    refiner.merge()
    free_memory()
    for batch_size, rounds in MERGED.get(name, MERGED_DEFAULT).items():
        figures = measure(pipe, refiner, batch_size, 1 if few else rounds)
        report(f"{name}, merged, batch {batch_size}", **figures)

    # One network at a time on the card.
    pipe.to("cpu")
    refiner.network.to("cpu")
    free_memory()
    offload(pipe, refiner, "model", device())
    report(f"{name}, offload model, batch 1", **measure(pipe, refiner, 1, 1))


if __name__ == "__main__":
    main()
