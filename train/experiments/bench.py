"""What the comparisons of whole methods share: models, prompts, and measured arms."""

import argparse
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image

from noiserefine import Refiner
from noiserefine.checkpoint import signature
from noiserefine.denoiser import canvas_like, denoiser, precision
from noiserefine.guidance import sample
from noiserefine.models.loading import load_pipeline
from noiserefine.models.user_lora import add_lora
from noiserefine.samplers import with_sampler
from train.captions import HELD_OUT
from train.measurement import (
    Batch,
    Measurement,
    add_precision,
    check_options,
    lora_sha256,
    open_process,
)
from train.metrics import METRICS, Metric, load_metrics

Images = list[Image.Image]


@dataclass
class Bench:
    """What the methods sample with."""

    pipe: DiffusionPipeline
    guidance_scale: float  # the usual one
    refiner: Refiner | None = None
    distilled: DiffusionPipeline | None = None  # with the LoRA of guidance distillation
    few_step: DiffusionPipeline | None = None  # with a few-step LoRA, and its scheduler
    metrics: list[Metric] = field(default_factory=list)  # the first one judges
    process: PartialState = field(default_factory=PartialState)
    about: dict[str, Any] = field(default_factory=dict)  # what images and figures depend on

    def networks(self) -> list[torch.nn.Module]:
        """Return the networks whose forwards count."""
        pipes = (self.pipe, self.distilled, self.few_step)
        networks = [denoiser(pipe) for pipe in pipes if pipe is not None]
        return networks + ([self.refiner.network] if self.refiner else [])

    def sample(
        self,
        batch: Batch,
        steps: int,
        sampler: str,
        pipe: DiffusionPipeline | None = None,
        **guidance: Any,
    ) -> Images:
        """Return a batch's images, by another pipeline than the bench's where one is given."""
        pipe = with_sampler(pipe or self.pipe, sampler)
        canvas = canvas_like(pipe, batch.x_T)
        return sample(
            pipe,
            latents=canvas.to_latents(batch.x_T.to(precision(denoiser(pipe)))),
            height=canvas.height,
            width=canvas.width,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(batch.start),
            **guidance,
            **batch.embeds,
        ).images

    def refine(self, batch: Batch, strength: float = 1.0) -> Batch:
        """Return a batch with refined noise.

        Raise ValueError if the bench has no refiner.
        """
        if self.refiner is None:
            raise ValueError("--refiner is missing for refined noise.")
        scale = self.refiner.scale_input(self.guidance_scale)
        x_hat = self.refiner.refine(batch.x_T, batch.embeds, strength, scale)
        return replace(batch, x_T=x_hat)

    def measure(
        self,
        folder: Path,
        arms: Mapping[str, Callable[[Batch], Images]],
        prompts: list[str],
        args: argparse.Namespace,
    ) -> Measurement:
        """Return the measurement of some arms in a folder, of which it makes what is missing.

        Raise ValueError if the folder holds measurements of other settings.
        """
        settings = argparse.Namespace(
            output=folder.with_name(f"{folder.name}.json"),  # names may have a dot
            arms=list(arms),
            n=len(prompts),
            batch_size=args.batch_size,
            mixed_precision=args.mixed_precision,
            bootstrap=args.bootstrap,
            images=None,
            reference="guided",
        )
        measurement = Measurement(settings, self.process)
        prompts_sha256 = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
        measurement.begin(self.about | {"prompts_sha256": prompts_sha256})
        measurement.measure(
            self.pipe,
            self.networks(),
            lambda name, batch: arms[name](batch),
            prompts,
            self.metrics,
        )
        return measurement


def add_options(parser: argparse.ArgumentParser, n: int) -> None:
    """Add the options that all comparisons take; n: the default number of images of an arm."""
    add = parser.add_argument
    add("--backbone", default="assets/emoji", help="folder or hub id of the pipeline")
    add("--refiner", help="folder or hub id of its refiner")
    add("--guidance_scale", type=float, help="the usual CFG scale; by default the refiner's")
    add("--prompts", default=HELD_OUT, help="prompt file, or COCO's annotations (.json)")
    add("--metrics", nargs="+", default=["judge"], help=f"{', '.join(METRICS)}, or module:Class")
    add("--real_images", type=Path, help="folder of real images, for the metric inception")
    add("--n", type=int, default=n, help="images of each arm")
    add("--batch_size", type=int, default=50)
    add_precision(parser)
    add("--bootstrap", type=int, default=300, help="resamples for the intervals")
    add("--output", type=Path, required=True, help="JSON file; the folder of its name resumes")


def open_bench(
    args: argparse.Namespace, distilled: str | None = None, few_step: str | None = None
) -> Bench:
    """Return the models and metrics that the options name; distilled and few_step are LoRAs.

    Raise ValueError for options that do not work, FileNotFoundError for what is not found.
    """
    check_options(args)
    process = open_process()
    pipe = load_pipeline(args.backbone, process.device)
    refiner = Refiner.from_pretrained(args.refiner, pipe) if args.refiner else None
    scale = args.guidance_scale
    if scale is None:
        if refiner is None or "guidance_scale" not in refiner.config.training:
            raise ValueError("--guidance_scale is missing: no refiner says which is usual.")
        scale = refiner.config.training["guidance_scale"]
    if refiner:
        refiner.scale_input(scale)  # one that it was not trained for ends the run now
    metrics = load_metrics(args.metrics, args.real_images, process.device)
    about = {
        "backbone": args.backbone,
        "backbone_signature": signature(denoiser(pipe)),
        "guidance_scale": scale,
        "refiner": args.refiner,
        "refiner_sha256": refiner and refiner.weights_sha256,
    }
    for metric in metrics:
        about |= metric.about
    bench = Bench(pipe, scale, refiner, metrics=metrics, process=process, about=about)
    for name, lora in (("distilled", distilled), ("few_step", few_step)):
        if lora:
            twin = load_pipeline(args.backbone, process.device)
            add_lora(twin, lora)
            setattr(bench, name, twin)
            about[f"{name}_sha256"] = lora_sha256(twin)
        about[name] = lora
    return bench
