"""From a name of the catalogue, a hub id, a folder or a file to a diffusers pipeline."""

import re
from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline

from noiserefine.checkpoint import prediction_type
from noiserefine.models.catalogue import BACKBONES, Backbone, backbone_of
from noiserefine.models.devices import default_device
from noiserefine.models.folder import examine, fetch, load_folder
from noiserefine.models.prediction_check import check_prediction
from noiserefine.models.single_file import Prediction, identify, load_single_file, prediction_of
from noiserefine.models.sources import is_safetensors, local_file, read_name
from noiserefine.samplers import is_flow

ASKED = re.compile(r"(.+):(v|epsilon|v-zsnr)")  # model.safetensors:v, folder:epsilon


def load_pipeline(
    source: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    prediction_type: str | None = None,
    place: Callable[..., DiffusionPipeline] | None = DiffusionPipeline.to,
) -> DiffusionPipeline:
    """Load a text-to-image pipeline, in safetensors only and without running a repository's code.

    source: a name of the catalogue, a hub id, a folder in diffusers' layout, or a .safetensors
    checkpoint, as `read_name` reads them.  A model of the catalogue comes with the autoencoder
    and LoRA named there, and is refused where the hub serves other weights than the original ones.
    device, dtype: where it will compute, in which precision; the machine's and the family's best
    where None.
    prediction_type: v, epsilon or v-zsnr (v with zero terminal SNR), for a model whose files say it
    wrongly or not at all; it may also end the source, as in model.safetensors:v or folder:v.
    place: brings the pipeline to the device and returns it; None leaves it on the CPU, where its
    prediction is not checked.
    Raises FileNotFoundError where the source cannot be reached, and ValueError where it holds no
    text-to-image model, damaged files, other weights, or a network that predicts v where its files
    say epsilon, or the reverse.
    """
    device = torch.device(device or default_device())
    name, asked, backbone = read_source(source, prediction_type)
    if is_safetensors(name):
        pipe = load_single_file(name, device, dtype, asked)
    else:
        pipe = load_folder(name, device, dtype, backbone)
        if asked:
            if is_flow(pipe.scheduler) or "beta_schedule" not in pipe.scheduler.config:
                raise ValueError(
                    f"{name} predicts neither v nor epsilon, as its scheduler shows: leave the "
                    "prediction type out."
                )
            pipe.scheduler = asked.scheduler(pipe.scheduler)
    _check_channels(name, pipe)
    if backbone:
        _complete(pipe, backbone)
    pipe.set_progress_bar_config(disable=True)
    if place is None:
        return pipe
    pipe = place(pipe, device)
    if not backbone and not asked:
        check_prediction(name, pipe)
    return pipe


def check_source(source: str) -> str:
    """Return the name of a source's pipeline class.

    Raise what load_pipeline raises, as far as small files tell.
    """
    name, asked, backbone = read_source(source)
    if is_safetensors(name):
        base, _ = identify(local_file(name), asked)
        return BACKBONES[base].pipeline
    kind, *_ = examine(name, default_device(), None, backbone)
    return kind.__name__


def fetch_source(source: str) -> None:
    """Download what load_pipeline reads of a source, where it is not on this machine.

    Raise what load_pipeline raises, as far as the files tell before they are loaded.
    """
    name, asked, backbone = read_source(source)
    if is_safetensors(name):
        identify(local_file(name), asked)
    else:
        _, index, variant = examine(name, default_device(), None, backbone)
        fetch(name, index, variant)


def read_source(
    source: str, prediction_type: str | None = None
) -> tuple[str, Prediction | None, Backbone | None]:
    """Return a source's path or hub id, the prediction that the user names, and its entry.

    Raises ValueError for a name that cannot be one, and a prediction that the model cannot have.
    """
    if not backbone_of(source) and (found := ASKED.fullmatch(source.strip())):
        source, prediction_type = found[1], prediction_type or found[2]
    name = BACKBONES[source].source if source in BACKBONES else read_name(source)
    backbone = backbone_of(source) or backbone_of(name)
    asked = prediction_of(prediction_type) if prediction_type else None
    if backbone and asked and asked != Prediction(backbone.prediction_type):
        raise ValueError(
            f"{backbone.title} predicts “{backbone.prediction_type}”: leave “:{prediction_type}” "
            "out."
        )
    return name, asked, backbone


def _check_channels(source: str, pipe: DiffusionPipeline) -> None:
    """Raise ValueError for a UNet that reads a picture beside the noise."""
    config = pipe.unet.config if hasattr(pipe, "unet") else None
    if config and config.in_channels != config.out_channels:
        raise ValueError(
            f"{source} takes {config.in_channels} channels: it changes a given picture "
            "(inpainting, for one) and makes none from text alone."
        )


def _complete(pipe: DiffusionPipeline, backbone: Backbone) -> None:
    """Check the pipeline against its entry and fold the entry's LoRA in."""
    predicts = prediction_type(pipe)
    if predicts != backbone.prediction_type:
        raise ValueError(
            f"{backbone.source} predicts “{predicts}” and not “{backbone.prediction_type}”: it is "
            "not the model that the catalogue means."
        )
    if backbone.lora:
        pipe.load_lora_weights(backbone.lora, use_safetensors=True)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
