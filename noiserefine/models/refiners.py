"""Which refiner a model takes, and the command that trains the one it lacks."""

from pathlib import Path

from diffusers import DiffusionPipeline

from noiserefine.checkpoint import CONFIG_NAME, misfit, prediction_type, read_config
from noiserefine.models.catalogue import BACKBONES, Backbone


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
        # The distilled siblings and fine-tunes stand after the base whose refiner they take.
        base = next(entry for entry in BACKBONES.values() if entry.refiner == backbone.refiner)
        source, preset, output = base.source, base.preset, base.refiner
    else:
        alike = [entry for entry in BACKBONES.values() if entry.pipeline == type(pipe).__name__]
        alike.sort(key=lambda entry: entry.prediction_type != prediction_type(pipe))
        preset = next((entry.preset for entry in alike if entry.download), "sd21")
    return (
        f"python train/train_refiner.py --preset {preset} --quick --backbone {source} "
        f"--output_dir {output}"
    )
