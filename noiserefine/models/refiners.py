"""Which refiner a model takes, and the command that trains the one it lacks."""

import shlex
from pathlib import Path

from diffusers import DiffusionPipeline

from noiserefine.checkpoint import CONFIG_NAME, misfit, prediction_type, read_config
from noiserefine.models.catalogue import BACKBONES, Backbone
from noiserefine.models.loading import check_source


def refiner_for(pipe: DiffusionPipeline, backbone: Backbone | None) -> str | None:
    """Return the folder of a model's refiner, None where there is none.

    It is the catalogue entry's, else the one of a base in the catalogue with this architecture: a
    fine-tune takes its base's refiner (paper, table 4).
    """
    candidates = [backbone] if backbone else list(BACKBONES.values())
    for folder in dict.fromkeys(candidate.refiner for candidate in candidates):
        if (Path(folder) / CONFIG_NAME).is_file() and (
            backbone or not misfit(read_config(Path(folder)), pipe)
        ):
            return folder
    return None


def training_command(pipe: DiffusionPipeline, source: str, backbone: Backbone | None) -> str:
    """Return the command that trains the missing refiner, on the base that it belongs to."""
    output = "runs/refiner"
    if backbone:
        base = base_of(backbone)
        source, preset, output = base.source, base.preset, base.refiner
    else:
        preset = _preset_for(type(pipe).__name__, prediction_type(pipe))
    options = ["--preset", preset, "--quick", "--backbone", source, "--output_dir", output]
    return shlex.join(["python", "train/train_refiner.py", *options])


def base_of(backbone: Backbone) -> Backbone:
    """Return the entry of the catalogue whose refiner a listed model takes."""
    # The distilled siblings and fine-tunes stand after their base.
    return next(entry for entry in BACKBONES.values() if entry.refiner == backbone.refiner)


def preset_of(source: str) -> str:
    """Return the trainer's preset for a model that is not listed.

    Raise what check_source raises.
    """
    return _preset_for(check_source(source))


def _preset_for(pipeline: str, prediction: str | None = None) -> str:
    """Return the preset of the listed model most like one of this pipeline class."""
    alike = [entry for entry in BACKBONES.values() if entry.pipeline == pipeline]
    alike.sort(key=lambda entry: entry.prediction_type != prediction)
    return next((entry.preset for entry in alike if entry.download), "sd21")
