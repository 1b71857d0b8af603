"""Images of several arms, measured on disk, and their figures with intervals."""

import argparse
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors.torch import save
from tqdm import tqdm

from noiserefine import Refiner, draw_noise
from noiserefine.analysis.versions import package_versions
from noiserefine.denoiser import ForwardCounter, as_latents, denoiser
from noiserefine.guidance import sample
from noiserefine.noise import encode_prompt
from noiserefine.samplers import SAMPLER_NAMES, make_scheduler, samplers_of, with_sampler
from train.common import (
    FIRST_EVALUATION_SEED,
    WAIT,
    atomic,
    check_recorded,
    computes_on_cpu,
    interval,
    markdown_table,
    memory_advice,
    with_interval,
    without_bias,
    write_json,
)
from train.metrics import Figure, Metric

SHOWN, SHOWN_SIDE = 8, 256  # images of each arm in a row, and their largest side in pixels
MIN_IMAGES = 2  # of which a variance can be taken
NOT_BINDING = ("arms", "output", "images", "bootstrap", "reference")


@dataclass(frozen=True)
class Batch:
    """What the images of one file are made of, in every arm."""

    start: int  # number of the first image
    prompts: list[str]
    x_T: torch.Tensor  # (B, C, h, w), Gaussian
    embeds: dict[str, Any]  # the prompts, as the pipeline takes them


@dataclass(frozen=True)
class Arm:
    """How an image is made."""

    refined: bool = False  # from refined noise
    cfg: bool = False
    pag: bool = False

    def guidance(self, args: argparse.Namespace) -> dict[str, float]:
        """Return its guidance as `sample` takes it."""
        return {
            "guidance_scale": args.guidance_scale if self.cfg else 1.0,
            "pag_scale": args.pag_scale if self.pag else 0.0,
        }


ARMS = {
    "gaussian": Arm(),
    "guided": Arm(cfg=True),
    "pag": Arm(pag=True),
    "guided_pag": Arm(cfg=True, pag=True),
    "refined": Arm(refined=True),
    "refined_guided": Arm(refined=True, cfg=True),
}


class Measurement:
    """What the metrics say of each arm's images, and their cost, in files of one batch each."""

    def __init__(self, args: argparse.Namespace, process: PartialState):
        self.args, self.process = args, process
        self.folder = args.output.with_suffix("")
        self.starts = range(0, args.n, args.batch_size)

    def begin(self, about: dict[str, Any]) -> None:
        """Open the folder for these settings. about: what the images and the metrics depend on.

        Raise ValueError if it holds measurements of other settings.
        """
        binding = {
            name: str(value) for name, value in vars(self.args).items() if name not in NOT_BINDING
        }
        self.settings = binding | {"about": about, "versions": package_versions()}
        path = self.folder / "settings.json"
        check_recorded(path, self.settings)
        if self.process.is_main_process:
            write_json(path, self.settings)
        self.process.wait_for_everyone()

    def file(self, arm: str, start: int) -> Path:
        """Return the file of the batch of an arm that starts with image `start`."""
        return self.folder / f"{arm}-{start:06d}.npz"

    def make(
        self,
        pipe: DiffusionPipeline,
        refiner: Refiner | None,
        prompts: list[str],
        metrics: list[Metric],
    ) -> None:
        """Make and measure the images that are missing of the arms of ARMS."""
        sampling_pipe = with_sampler(pipe, self.args.sampler)
        networks = [denoiser(pipe)]
        if refiner and isinstance(refiner.network, type(denoiser(pipe))):
            networks.append(refiner.network)

        def images(name: str, batch: Batch) -> list[Image.Image]:
            latents = self._latents(ARMS[name], pipe, refiner, batch.x_T, batch.embeds)
            return self._sample(ARMS[name], sampling_pipe, latents, batch.embeds, batch.start)

        self.measure(pipe, networks, images, prompts, metrics)

    def measure(
        self,
        pipe: DiffusionPipeline,
        networks: Sequence[torch.nn.Module],
        images_of: Callable[[str, Batch], list[Image.Image]],
        prompts: list[str],
        metrics: list[Metric],
    ) -> None:
        """Make and measure the images that are missing, every process its share.

        networks: those whose forwards count. images_of: makes an arm's images of a batch.
        """
        autocast = autocast_to(self.args.mixed_precision, pipe.device)
        for start in tqdm(
            self.starts[self.process.process_index :: self.process.num_processes],
            disable=not self.process.is_local_main_process,
        ):
            arms = [name for name in self.args.arms if self._is_missing(name, start)]
            if not arms:
                continue
            with memory_advice("to make and measure a batch", self._advice()):
                batch_prompts = prompts[start : start + self.args.batch_size]
                x_T = draw_noise(pipe, FIRST_EVALUATION_SEED + start, len(batch_prompts)).to(
                    pipe.device
                )
                batch = Batch(start, batch_prompts, x_T, encode_prompt(pipe, batch_prompts))
                for name in arms:
                    began, counter = time.perf_counter(), ForwardCounter()
                    with autocast, counter.watch(*networks):
                        images = images_of(name, batch)
                    cost = {"forwards": counter.count, "seconds": time.perf_counter() - began}
                    rows = {
                        key: value
                        for metric in metrics
                        for key, value in metric.measure(images, batch_prompts).items()
                    }
                    self._keep_images(name, start, images)
                    with atomic(self.file(name, start)) as part, part.open("wb") as file:
                        np.savez(file, **cost, **rows)  # type: ignore[arg-type]
        self.process.wait_for_everyone()

    def results(self, prompts: list[str], metrics: list[Metric]) -> dict[str, Any]:
        """Return the figures of every arm with their intervals, and how the arms differ."""
        estimates, result = self.estimates(prompts, metrics), self.head(prompts)
        figures = all_figures(metrics)
        for name, values in estimates.items():
            result["arms"][name] = self.cost(name) | summary(values, figures)

        # Differences to the reference arm, and the share of its distance that refining closes.
        reference = estimates.get(self.args.reference)
        if reference is None:
            return result
        for name, values in estimates.items():
            if name != self.args.reference:
                differences = {key: values[key] - reference[key] for key in values}
                result["differences"][name] = summary(differences, figures)
        if {"gaussian", "refined"} <= estimates.keys():
            three = estimates["gaussian"], estimates["refined"], reference
            closed = {
                key: _gap_closed([arm[key] for arm in three], figures[key].biased)
                for key in reference
                if figures[key].in_gap
            }
            unbiased = {key: replace(figure, biased=False) for key, figure in figures.items()}
            result["gap_closed"] = summary(closed, unbiased)
        return result

    def estimates(
        self, prompts: list[str], metrics: list[Metric]
    ) -> dict[str, dict[str, np.ndarray]]:
        """Return the figures of every arm: the value, then those of the bootstrap's resamples.

        The resamples are the same for all arms, so differences of arms are paired.
        """
        groups = _rows_of_each_prompt(prompts)
        resamples = _resamples(len(groups), self.args.bootstrap)
        return {
            name: _estimates(self._read(name)[0], metrics, groups, resamples)
            for name in self.args.arms
        }

    def cost(self, arm: str) -> dict[str, float]:
        """Return an arm's forwards and seconds for each image."""
        return self._read(arm)[1]

    def head(self, prompts: list[str]) -> dict[str, Any]:
        """Return what the results begin with: how the images were made, and no figures yet."""
        return {
            "n": self.args.n,
            "prompts": len(set(prompts)),
            "first_seed": FIRST_EVALUATION_SEED,
            "settings": self.settings,
            "arms": {},
            "differences": {},
        }

    def _advice(self) -> str:
        """Return what needs less memory; the batch's size binds what is measured."""
        size = self.args.batch_size
        if size == 1:
            return "A batch is one image already: take a smaller model, or another device."
        return f"Run the same command with --batch_size {size // 2}, and another --output."

    def _is_missing(self, arm: str, start: int) -> bool:
        if not self.file(arm, start).exists():
            return True
        if not self.args.images:
            return False
        numbers = range(start, min(start + self.args.batch_size, self.args.n))
        return not all(_image_file(self.args.images / arm, i).exists() for i in numbers)

    def _latents(
        self,
        arm: Arm,
        pipe: DiffusionPipeline,
        refiner: Refiner | None,
        x_T: torch.Tensor,
        embeds: dict[str, Any],
    ) -> torch.Tensor:
        if not (arm.refined and refiner):
            return as_latents(pipe, x_T)
        scale = refiner.scale_input(self.args.guidance_scale)
        return refiner(x_T, embeds, self.args.strength, scale)

    def _sample(
        self,
        arm: Arm,
        pipe: DiffusionPipeline,
        latents: torch.Tensor,
        embeds: dict[str, Any],
        start: int,
    ) -> list[Image.Image]:
        return sample(
            pipe,
            **arm.guidance(self.args),
            latents=latents,
            num_inference_steps=self.args.steps,
            generator=torch.Generator().manual_seed(start),
            **embeds,
        ).images

    def _keep_images(self, arm: str, start: int, images: list[Image.Image]) -> None:
        if self.args.images:
            folder = self.args.images / arm
            folder.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(images, start):
                image.save(_image_file(folder, number))
        if start == 0:
            shown = images[:SHOWN]
            row = make_image_grid(shown, 1, len(shown), resize=min(SHOWN_SIDE, shown[0].width))
            row.save(self.folder / f"{arm}.webp", quality=90)

    def _read(self, arm: str) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Return an arm's rows, and its forwards and seconds for each image."""
        files = []
        for start in self.starts:
            with np.load(self.file(arm, start)) as file:
                files.append(dict(file))
        rows = {
            key: np.concatenate([file[key] for file in files])
            for key, value in files[0].items()
            if value.ndim
        }
        cost = {
            key: sum(float(file[key]) for file in files) / self.args.n
            for key in ("forwards", "seconds")
        }
        return rows, cost


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for an --output or a number of images that cannot work."""
    if args.output.suffix != ".json":
        raise ValueError("--output is a .json file; the folder of that name keeps measurements.")
    if args.n < MIN_IMAGES or args.batch_size < 1 or args.bootstrap < 1:
        raise ValueError("--n must be at least 2, --batch_size and --bootstrap at least 1.")


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Add the option for the precision that the images are made in."""
    parser.add_argument(
        "--mixed_precision",
        choices=("no", "bf16"),
        default="no",
        help="bf16: under torch.autocast, for processors that multiply in it; models on CUDA are "
        "in 16 bits in any case",
    )


def add_sampler(parser: argparse.ArgumentParser) -> None:
    """Add the option for the sampler of all arms; `sampler_of` says what it is by default."""
    parser.add_argument(
        "--sampler", choices=SAMPLER_NAMES, help="the first that the model takes, by default"
    )


def sampler_of(pipe: DiffusionPipeline, args: argparse.Namespace) -> str:
    """Return the sampler that the options ask for. Raise ValueError if the model lacks it."""
    sampler = args.sampler or samplers_of(pipe)[0]
    make_scheduler(sampler, pipe)
    return sampler


def open_process() -> PartialState:
    """Return this process and its device, also under `accelerate launch`."""
    return PartialState(cpu=computes_on_cpu(), timeout=WAIT)


def lora_sha256(pipe: DiffusionPipeline) -> str:
    """Return the SHA-256 of the weights of a pipeline's LoRA: a file of the hub may change."""
    weights = {
        f"{part}.{name}": value
        for part, network in pipe.components.items()
        if isinstance(network, torch.nn.Module)
        for name, value in network.state_dict().items()
        if "lora_" in name
    }
    return hashlib.sha256(save(weights)).hexdigest()


def autocast_to(mixed_precision: str, device: torch.device) -> torch.autocast:
    """Return the context that images are made in: bf16 where mixed_precision is "bf16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision == "bf16")


def all_figures(metrics: Sequence[Metric | type[Metric]]) -> dict[str, Figure]:
    """Return the figures of several metrics, in their order."""
    return {key: figure for metric in metrics for key, figure in metric.figures.items()}


def arms_table(rows: list[tuple[str, dict]], figures: dict[str, Figure]) -> str:
    """Return a Markdown table of arms, or of values made of them: (title, summary)."""
    shown = {key: f for key, f in figures.items() if any(key in values for _, values in rows)}

    def cell(values: dict, key: str) -> str:
        if key not in values:
            return ""
        return with_interval(values[key], values[f"{key}_interval"], shown[key].digits)

    return markdown_table(
        ["", *(figure.title for figure in shown.values()), "forwards"],
        [
            [
                title,
                *(cell(values, key) for key in shown),
                f"{values['forwards']:.0f}" if "forwards" in values else "",
            ]
            for title, values in rows
        ],
    )


def _rows_of_each_prompt(prompts: list[str]) -> list[np.ndarray]:
    _, prompt_number = np.unique(prompts, return_inverse=True)
    return [np.flatnonzero(prompt_number == k) for k in range(prompt_number.max() + 1)]


def _resamples(prompts: int, count: int) -> list[np.ndarray]:
    """Return the prompts themselves, then `count` bootstrap resamples, the same for all arms."""
    drawn = np.random.default_rng(0).integers(prompts, size=(count, prompts))
    return [np.arange(prompts), *drawn]


def _estimates(
    rows: dict[str, np.ndarray],
    metrics: list[Metric],
    groups: list[np.ndarray],
    resamples: list[np.ndarray],
) -> dict[str, np.ndarray]:
    """Return the values of every figure: that of the images, then those of the resamples."""
    values: dict[str, list[float]] = {}
    for resample in resamples:
        drawn = [groups[k] for k in resample]
        ends = np.cumsum([len(group) for group in drawn])
        images = np.concatenate(drawn)
        drawn_rows = {key: value[images] for key, value in rows.items()}
        drawn_groups = np.split(np.arange(len(images)), ends[:-1])
        for metric in metrics:
            for key, value in metric.summarise(drawn_rows, drawn_groups).items():
                values.setdefault(key, []).append(value)
    return {key: np.array(value) for key, value in values.items()}


def _gap_closed(arms: list[np.ndarray], biased: bool) -> np.ndarray:
    """Return (gaussian - refined) / (gaussian - reference); arms: the three, in that order.

    A bias is taken off the arms: the mean of the shares says nothing where some are near 0 / 0.
    """
    gaussian, refined, reference = map(without_bias, arms) if biased else arms
    with np.errstate(divide="ignore", invalid="ignore"):  # not finite, which the summary leaves out
        return (gaussian - refined) / (gaussian - reference)


def summary(estimates: dict[str, np.ndarray], figures: dict[str, Figure]) -> dict[str, Any]:
    """Return each figure's value and interval; one that these images do not tell is left out."""
    known = {key: values for key, values in estimates.items() if np.isfinite(values).all()}
    return {key: float(values[0]) for key, values in known.items()} | {
        f"{key}_interval": interval(values, figures[key].biased) for key, values in known.items()
    }


def _image_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.png"
