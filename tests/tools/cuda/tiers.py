"""The peaks of training with the options that train/tools/cost.py --memory gives for a card.

    python tests/tools/cuda/tiers.py sdxl

Each is measured beside what was counted, with the parts where the trainer has them: encoding the
prompts of a call of targets, sampling it, two optimiser steps of one batch each, and a sheet's
picture.  The table is assets/results/tiers.json; AdamW is torch's in any case.
"""

import json
from dataclasses import replace
from typing import Any

import torch
from arms import small_pipeline
from diffusers import DiffusionPipeline
from results import arguments, device, free_memory, peak_gib, report, reset_peak, timed
from training import Step

from noiserefine import draw_noise
from noiserefine.denoiser import denoiser
from noiserefine.guidance import sample_latents
from noiserefine.latents import decode
from noiserefine.lora import store_in_8_bits
from noiserefine.noise import encode_prompt
from noiserefine.samplers import samplers_of, with_sampler
from train.common import ROOT
from train.options import DTYPES, Options, default_options
from train.placement import decoding_parts, encoding, on_device, taking_turns
from train.tools.architectures import PROMPT, random_pipeline

TABLE = ROOT / "assets" / "results" / "tiers.json"
SMALL: dict[str, Any] = dict(mixed_precision="no", rank=8, batch_size=2, target_batch_size=2)


def load(name: str, options: Options, small: bool) -> DiffusionPipeline:
    """Return the pipeline as the trainer places it."""
    dtype = DTYPES[options.mixed_precision]
    pipe = small_pipeline(name) if small else random_pipeline(name, device(), dtype)
    pipe.to(dtype)  # buffers, too
    if pipe.vae.config.get("force_upcast"):
        pipe.vae.float()  # as in the trainer
    return taking_turns(pipe, device())


def measure(pipe: DiffusionPipeline, options: Options) -> dict[str, Any]:
    """Return the peaks of a run's phases in GiB, and the seconds of a batch and of an update."""
    step = Step(pipe, options)
    free_memory()
    with encoding(pipe, device()):
        reset_peak()
        guided = encode_prompt(pipe, [PROMPT] * options.target_batch_size)
        picture = encode_prompt(pipe, "", guided=False)
        encoding_peak = peak_gib()
    free_memory()

    reset_peak()
    x_T = draw_noise(pipe, 0, options.target_batch_size).to(device())
    guidance = {"guidance_scale": options.guidance_scale, "pag_scale": options.pag_scale}
    sampler = with_sampler(pipe, options.sampler)
    seconds_of_targets, x0 = timed(lambda: sample_latents(sampler, x_T, guided, 2, **guidance))
    sampling = peak_gib()

    if options.fp8:
        store_in_8_bits(denoiser(pipe), step.refiner.network)
    free_memory()
    reset_peak()
    for _ in range(2):  # the second with AdamW's state
        seconds_of_batch, _ = timed(step.accumulate)
        seconds_of_update, _ = timed(step.update)
    steps = peak_gib()
    reset_peak()
    with on_device(decoding_parts(pipe), device()):
        decode(pipe, x0[:1], picture)
    return {
        "encoding_gib": encoding_peak,
        "sampling_gib": sampling,
        "training_gib": steps,
        "sheet_gib": peak_gib(),
        "seconds_of_two_target_steps": round(seconds_of_targets, 3),
        "batch_seconds": round(seconds_of_batch, 3),
        "update_seconds": round(seconds_of_update, 3),
    }


def main() -> None:
    args = arguments(__doc__, "preset")
    name, pipe, done = args.preset, None, []
    torch.manual_seed(0)
    for row in reversed(json.loads(TABLE.read_text())):
        changed = row["options"]
        if row["preset"] != name or row["peaks"] is None or changed in done:
            continue
        done.append(changed)
        options = replace(default_options(name), **changed)
        if args.small:
            options = replace(options, **SMALL)
        pipe = pipe or load(name, options, args.small)
        options.sampler = options.sampler or samplers_of(pipe)[0]
        counted = {f"counted_{phase}_gib": peak for phase, peak in row["peaks"].items()}
        measured = measure(pipe, options)
        report(f"{name}, {row['card']} GB", options=changed, **counted, **measured)
        if options.fp8:
            pipe = None  # its weights are rounded
        free_memory()


if __name__ == "__main__":
    main()
