"""Measure refined noise together with what else people do to a model: does the gap stay closed?

    python train/experiments/compatibility.py --refiner assets/refiners/emoji --sizes 64x128 \\
        --lora assets/loras/emoji-ink judge=train/emoji/classifier-ink.safetensors \\
        --negative_prompt "a blurred picture" --output runs/compatibility-emoji.json

Every condition has its own three arms, unguided, guided and refined, of the same prompts and seeds,
and its own gap: (unguided - refined) / (unguided - guided). The conditions are: as trained; each
--lora, with a metric of its own where one is named; each size of --sizes, width x height in pixels,
drawn anew; a negative prompt, which only the guided arm can follow; and --cache, diffusers'
FirstBlockCache at that threshold, where "forwards" counts calls of which some are cheap, so compare
seconds. A condition that the model does not take says why in the table.

The folder beside --output keeps what was measured, so that the same command continues.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import CacheMixin, FirstBlockCacheConfig

from noiserefine import Refiner, draw_noise
from noiserefine.denoiser import denoiser
from noiserefine.guidance import check_guidance, sample_latents
from noiserefine.models.loading import load_pipeline
from noiserefine.models.user_lora import add_lora, find_lora
from noiserefine.noise import check_negative_prompt, encode_prompt, image_size
from train.captions import chosen_prompts
from train.common import (
    FIRST_EVALUATION_SEED,
    argument_parser,
    markdown_table,
    run_script,
    with_interval,
    write_json,
)
from train.experiments.bench import Bench, Images, add_options, open_bench
from train.measurement import Batch, add_sampler, lora_sha256, sampler_of
from train.metrics import load_metrics

Change = Callable[[Batch], Batch]
Condition = Callable[[Bench, argparse.Namespace], tuple[Bench, Change]]


def main(arguments: list[str] | None = None) -> None:
    """Measure every condition and write the table."""
    args = parse(arguments)
    for path, *_ in args.lora:
        find_lora(path)  # a missing one ends the run now, and not after the first condition
    bench = open_bench(args)
    # What the model itself lacks ends the run, and is no property of a condition.
    sampler_of(bench.pipe, args)
    check_guidance(bench.pipe, bench.guidance_scale)
    prompts = chosen_prompts(args.prompts, args.n, bench.pipe)
    result: dict[str, Any] = {"n": args.n, "steps": args.steps, "conditions": {}}
    for name, condition in conditions(args):
        try:
            changed, change = condition(bench, args)
            sampling = {"steps": args.steps, "sampler": sampler_of(changed.pipe, args)}
        except ValueError as error:
            result["conditions"][name] = {"impossible": str(error)}
            continue
        changed = replace(changed, about=changed.about | sampling)
        arms = {
            "gaussian": partial(_images, changed, sampling, change, 1.0),
            "guided": partial(_images, changed, sampling, change, bench.guidance_scale),
            "refined": partial(_refined, changed, sampling, change),
        }
        folder = args.output.with_suffix("") / name.replace("/", "-")
        measurement = changed.measure(folder, arms, prompts, args)
        if bench.process.is_main_process:
            result["conditions"][name] = measurement.results(prompts, changed.metrics)
    if bench.process.is_main_process:
        write_json(args.output, result)
        print(table(result))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line; end the process for values that cannot work."""
    parser = argument_parser(__doc__)
    add_options(parser, n=1000)
    add = parser.add_argument
    add("--steps", type=int, default=20, help="sampling steps")
    add_sampler(parser)
    add("--lora", nargs="+", action="append", default=[], help="a LoRA, and metrics of its own")
    add("--sizes", nargs="+", default=[], help="WIDTHxHEIGHT in pixels")
    add("--negative_prompt", help="for the guided arm")
    add("--cache", type=float, help="threshold of FirstBlockCache")
    args = parser.parse_args(arguments)
    if not args.refiner:
        parser.error("--refiner is missing: its noise is what the conditions are tried with.")
    if not all(len(size.split("x")) == len(("width", "height")) for size in args.sizes):
        parser.error("--sizes are given as WIDTHxHEIGHT, for example 64x128.")
    return args


def conditions(args: argparse.Namespace) -> Iterator[tuple[str, Condition]]:
    """Yield the conditions that the options ask for, by name."""
    yield "as trained", lambda bench, _: (bench, _same)
    for path, *metrics in args.lora:
        yield f"LoRA {Path(path).name}", partial(with_lora, path, metrics)
    for size in args.sizes:
        yield f"size {size}", partial(at_size, size)
    if args.negative_prompt:
        yield "negative prompt", against
    if args.cache is not None:
        yield f"first block cache {args.cache:g}", cached


def with_lora(
    path: str, metrics: list[str], bench: Bench, args: argparse.Namespace
) -> tuple[Bench, Change]:
    """Return the bench with a user's LoRA on its model, and metrics of the LoRA's style."""
    pipe = load_pipeline(args.backbone, bench.process.device)
    add_lora(pipe, path)
    refiner = Refiner.from_pretrained(args.refiner, pipe)
    about = bench.about | {"lora": path, "lora_sha256": lora_sha256(pipe)}
    judges = load_metrics(metrics, args.real_images, bench.process.device) or bench.metrics
    for metric in judges:
        about |= metric.about
    return replace(bench, pipe=pipe, refiner=refiner, metrics=judges, about=about), _same


def at_size(size: str, bench: Bench, args: argparse.Namespace) -> tuple[Bench, Change]:
    """Return noise for pictures of another size. Raise ValueError where the model has none."""
    width, height = map(int, size.split("x"))
    image_size(bench.pipe, height, width)
    # A step tells what only the network refuses, such as more positions than it has.
    sample_latents(
        bench.pipe,
        draw_noise(bench.pipe, 0, 1, height, width),
        encode_prompt(bench.pipe, "", guided=False),
        steps=1,
    )

    def redraw(batch: Batch) -> Batch:
        seed = FIRST_EVALUATION_SEED + batch.start
        x_T = draw_noise(bench.pipe, seed, len(batch.prompts), height, width)
        return replace(batch, x_T=x_T.to(batch.x_T.device))

    return bench, redraw


def against(bench: Bench, args: argparse.Namespace) -> tuple[Bench, Change]:
    """Return prompts with a negative prompt. Raise ValueError where the model takes none."""
    check_negative_prompt(bench.pipe, args.negative_prompt)

    def encode(batch: Batch) -> Batch:
        embeds = encode_prompt(bench.pipe, batch.prompts, negative_prompt=args.negative_prompt)
        return replace(batch, embeds=embeds)

    return replace(bench, about=bench.about | {"negative_prompt": args.negative_prompt}), encode


def cached(bench: Bench, args: argparse.Namespace) -> tuple[Bench, Change]:
    """Return the bench with cached blocks. Raise ValueError where diffusers caches none."""
    if not isinstance(denoiser(bench.pipe), CacheMixin):
        raise ValueError(
            f"diffusers caches no blocks of {type(denoiser(bench.pipe)).__name__}, which is no "
            "CacheMixin."
        )
    pipe = load_pipeline(args.backbone, bench.process.device)
    denoiser(pipe).enable_cache(FirstBlockCacheConfig(threshold=args.cache))
    return replace(bench, pipe=pipe, about=bench.about | {"cache": args.cache}), _same


def table(result: dict[str, Any]) -> str:
    """Return what of each figure's gap refined noise closes in each condition, as Markdown."""
    measured = [
        condition["gap_closed"]
        for condition in result["conditions"].values()
        if "arms" in condition
    ]
    every = dict.fromkeys(key for closed in measured for key in closed)
    keys = [key for key in every if not key.endswith("_interval")]
    rows = []
    for name, condition in result["conditions"].items():
        if "impossible" in condition:
            rows.append([name, condition["impossible"], *[""] * len(keys)])
            continue
        closed = condition["gap_closed"]
        cells = [
            with_interval(100 * closed[key], [100 * x for x in closed[f"{key}_interval"]], 0)
            if key in closed
            else "no gap"
            for key in keys
        ]
        seconds = [f"{condition['arms'][arm]['seconds']:.3f}" for arm in ("guided", "refined")]
        rows.append([name, *cells, " / ".join(seconds)])
    header = [f"gap closed, %: {key.replace('_', ' ')}" for key in keys]
    return markdown_table(["condition", *header, "seconds guided / refined"], rows)


def _same(batch: Batch) -> Batch:
    return batch


def _images(
    bench: Bench, sampling: dict[str, Any], change: Change, scale: float, batch: Batch
) -> Images:
    return bench.sample(change(batch), guidance_scale=scale, **sampling)


def _refined(bench: Bench, sampling: dict[str, Any], change: Change, batch: Batch) -> Images:
    return bench.sample(bench.refine(change(batch)), **sampling)


if __name__ == "__main__":
    run_script(main)
