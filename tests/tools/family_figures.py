"""Figures of the refiner on the tiny random pipelines of tests/families.py, as a table.

    python -m tests.tools.family_figures [FAMILY ...]

Start: root mean square of an untrained refiner's correction at 16 seeds, beside that of x_T, 1, in
float32 and bfloat16.  A: the gain of the family's own sampler in N = 4 steps.  Forwards of the
refining pass, of N unguided and of N guided steps.  Overhead: milliseconds of process time of a
refining pass beside its forward, the median of 20.
"""

import argparse
import statistics
import time

import torch

from noiserefine import Refiner
from noiserefine.denoiser import ForwardCounter, can_guide, canvas, denoiser
from noiserefine.guidance import sample_latents
from noiserefine.lora import adapted
from noiserefine.msd import sampler_gain
from noiserefine.noise import encode_prompt
from tests.families import FAMILIES, pipeline

STEPS, SEEDS, ROUNDS = 4, 16, 20
PROMPT = "a red apple"


def figures(name: str) -> list[str]:
    """Return the family's row."""
    pipe = pipeline(name)
    side = 384 if name == "cascade_prior" else 64
    shape, embeds = canvas(pipe, side, side).shape, encode_prompt(pipe, PROMPT)
    x_T = torch.randn(SEEDS, *shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    refiner, counter = Refiner.create(pipe, 8), ForwardCounter()
    x, forwards = x_T[:1], []
    with counter.watch(denoiser(pipe), refiner.network):
        starts = [root_mean_square(refiner, x_T, embeds)]
        forwards.append(counter.count // SEEDS)
        for scale in (1.0, 3.0) if can_guide(pipe) else (1.0,):
            counter.count = 0
            sample_latents(pipe, x, embeds, STEPS, guidance_scale=scale)
            forwards.append(counter.count)
    try:
        gain = f"{sampler_gain(pipe.scheduler, STEPS):.4g}"
    except ValueError:
        gain = "none"
    beside = overhead(refiner, x, embeds)
    half = pipeline.__wrapped__(name).to(torch.bfloat16)
    embeds = encode_prompt(half, PROMPT)
    starts.append(root_mean_square(Refiner.create(half, 8), x_T, embeds))
    return [
        name,
        type(pipe).__name__,
        refiner.config.head,
        str(len(adapted(refiner.network))),
        *(f"{start:.0e}" for start in starts),
        gain,
        ", ".join(map(str, forwards)),
        f"{beside:.1f}",
    ]


@torch.no_grad()
def root_mean_square(refiner: Refiner, x_T: torch.Tensor, embeds: dict) -> float:
    """Return that of the correction."""
    return refiner.correction(x_T, embeds).pow(2).mean().sqrt().item()


def overhead(refiner: Refiner, x_T: torch.Tensor, embeds: dict) -> float:
    """Return milliseconds of a refining pass beside its forward."""
    forward, inside, beside = refiner.network.forward, [], []

    def timed(*args, **kwargs):
        began = time.process_time()
        made = forward(*args, **kwargs)
        inside.append(time.process_time() - began)
        return made

    refiner.network.forward = timed
    for _ in range(ROUNDS):
        began = time.process_time()
        refiner(x_T, embeds)
        beside.append(time.process_time() - began - inside[-1])
    del refiner.network.forward
    return 1000 * statistics.median(beside)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], help="all if none is given")
    names = parser.parse_args().families or list(FAMILIES)
    columns = ["family", "pipeline", "last layer", "LoRA layers", "start fp32", "start bf16"]
    columns += ["A", "forwards", "overhead, ms"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in names:
        print(f"| {' | '.join(figures(name))} |", flush=True)


if __name__ == "__main__":
    main()
