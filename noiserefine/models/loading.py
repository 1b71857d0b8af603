"""How a model becomes a diffusers pipeline: the catalogue's, fine-tunes, users' LoRAs."""

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_OFFLINE
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open

from noiserefine.models.catalogue import BACKBONES, Backbone
from noiserefine.refiner import CONFIG_NAME, HUB_ERRORS, misfit, read_config

PIPELINES = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}


def backbone_of(source: str) -> Backbone | None:
    """The catalogue's entry of a hub id or folder."""
    return next((backbone for backbone in BACKBONES.values() if backbone.source == source), None)


def default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """float16 on CUDA and float32 elsewhere: half precision is slow on most CPUs and incomplete on MPS."""
    return torch.float16 if device.type == "cuda" else torch.float32


def load_pipeline(
    source: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """The diffusers text-to-image pipeline of a name of the catalogue, a hub id, a folder or a single .safetensors checkpoint, in safetensors only.

    A model of the catalogue comes with the autoencoder and revision that it names there, and is refused where the hub
    serves other weights than the original ones.  device and dtype: the machine's best where None.
    Raises FileNotFoundError where the source can't be reached, and ValueError where it holds a model of
    another family, files that cannot be read or other weights.
    """
    device = torch.device(device or default_device())
    dtype = dtype or default_dtype(device)
    backbone = BACKBONES.get(source) or backbone_of(source)
    source = backbone.source if backbone else source
    if source.endswith(".safetensors"):
        pipe = load_single_file(Path(source), dtype)
    else:
        pipe = load_diffusers(source, dtype)
    channels = pipe.unet.config.in_channels
    if channels != pipe.unet.config.out_channels:
        raise ValueError(
            f"{source} takes {channels} channels: it changes a given picture (inpainting, for one) and makes none from text alone."
        )
    if backbone and pipe.scheduler.config.prediction_type != backbone.prediction_type:
        raise ValueError(
            f"{source} predicts “{pipe.scheduler.config.prediction_type}” and not “{backbone.prediction_type}”: "
            "it is not the model that the catalogue means."
        )
    if backbone and backbone.lora:
        pipe.load_lora_weights(backbone.lora, use_safetensors=True)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    if backbone and backbone.timestep_spacing:
        pipe.scheduler = type(pipe.scheduler).from_config(
            pipe.scheduler.config, timestep_spacing=backbone.timestep_spacing
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_diffusers(source: str, dtype: torch.dtype) -> DiffusionPipeline:
    """Of a folder or hub repository in diffusers' layout; raises what load_pipeline raises."""
    backbone, local = backbone_of(source), Path(source).is_dir()
    if local and not (Path(source) / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{source} is not a diffusers pipeline: it holds no model_index.json."
        )
    revision = {"revision": backbone.revision} if backbone and backbone.revision else {}
    try:
        kind = DiffusionPipeline.load_config(source, **revision).get("_class_name")
        if kind not in PIPELINES:  # before anything large is downloaded
            raise ValueError(
                f"{source} is a {kind}. Models of the Stable Diffusion 1, 2 and XL families work, as {' or '.join(PIPELINES)}."
            )
        if backbone and backbone.sha256:
            check_weights(source, backbone)
        schedule = DDIMScheduler.load_config(source, subfolder="scheduler", **revision)
        if "beta_schedule" not in schedule:
            raise ValueError(
                f"{source} has the noise schedule of {schedule.get('_class_name')}. Models with Stable Diffusion's, a beta_schedule, work."
            )
        folder = Path(
            source
            if local
            else DiffusionPipeline.download(source, use_safetensors=True, **revision)
        )
        check_files(folder)
        vae = backbone.vae if backbone else None
        components = (
            {"vae": AutoencoderKL.from_pretrained(vae, dtype=dtype, use_safetensors=True)}
            if vae
            else {}
        )
        try:
            pipe = PIPELINES[kind].from_pretrained(
                folder, dtype=dtype, use_safetensors=True, **components
            )
        except (
            ValueError,
            KeyError,
            TypeError,
        ) as error:  # configuration and weights that disagree
            raise ValueError(f"The model in {source} is incomplete or damaged: {error}") from error
    except (*HUB_ERRORS, SafetensorError) as error:
        if local:
            raise ValueError(f"The model in {source} is incomplete or damaged: {error}") from error
        raise FileNotFoundError(
            f"The model {source} can't be loaded: it is no folder or file here, and the hub doesn't serve it to this "
            "machine (offline, a wrong id, or a model that asks for a login). The embedded model needs no download."
        ) from error
    pipe.register_to_config(_name_or_path=source)  # not the cache's folder
    return pipe


def check_files(folder: Path) -> None:
    """Raises ValueError for files by which a model in safetensors could send the loader to others, pickled or outside of its folder."""
    for index in folder.glob("**/*.index.json"):
        for shard in set(
            json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()
        ):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ValueError(
                    f"{index} names {shard}, which is no safetensors file beside it: the model was not loaded."
                )
    for config in folder.glob("*/config.json"):
        if "transformers_weights" in json.loads(config.read_text(encoding="utf-8")):
            raise ValueError(f"{config} names weight files of its own: the model was not loaded.")


def check_weights(source: str, backbone: Backbone) -> None:
    """Raises ValueError where the hub would serve other files than the original ones; offline only what is cached can load."""
    try:
        files = (
            HfApi().model_info(source, revision=backbone.revision, files_metadata=True).siblings
            or []
        )
    except HUB_ERRORS:
        return
    served = {file.rfilename: file.lfs.sha256 for file in files if file.lfs}
    for name, expected in backbone.sha256.items():
        if served.get(name) != expected:
            raise ValueError(
                f"{source} serves {name} with SHA-256 {served.get(name)}, not the original's {expected}: it is not the model "
                "that its name says, and was not downloaded."
            )


def family_of(path: Path) -> str:
    """The catalogue's base model of a single-file checkpoint, from the names, shapes and metadata in it.

    Raises ValueError for every other model, and for one whose prediction type the file doesn't tell.
    """
    try:
        with safe_open(path, "pt") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
            context = [
                file.get_slice(name).get_shape()[-1]
                for name in names
                if name.endswith("transformer_blocks.0.attn2.to_k.weight")
            ]
            first = "model.diffusion_model.input_blocks.0.0.weight"
            channels = file.get_slice(first).get_shape()[1] if first in names else None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors checkpoint: {error}") from error
    if any("lora_" in name or ".lora" in name for name in names):
        raise ValueError(
            f"{path} is a LoRA, not a model: name it in the LoRA field, beside the model it belongs to."
        )
    width = context[0] if context and channels else None
    if width not in (1024, 2048) or channels != 4 or {"edm_mean", "v_pred"} & names:
        what = "Stable Diffusion 1" if width == 768 else "another family"
        raise ValueError(
            f"{path} is a checkpoint of {what}; single files of Stable Diffusion 2.1 and XL descendants that make images from text "
            "can be loaded. Other Stable Diffusion models work as a folder in diffusers' layout."
        )
    if width == 2048:
        return "sdxl"
    said = " ".join(
        metadata.get(f"modelspec.{key}", "") for key in ("architecture", "prediction_type")
    ).lower()
    for family, marks in (
        ("sd21", ("768-v", "v_prediction", " v")),
        ("sd21-base", ("v2-512", "epsilon")),
    ):
        if any(mark in said for mark in marks):
            return family
    raise ValueError(
        f"{path} doesn't say whether it predicts v, as Stable Diffusion 2.1, or ε, as its base: its metadata lack “modelspec.architecture”. "
        "The model works as a folder in diffusers' layout."
    )


def load_single_file(path: Path, dtype: torch.dtype) -> DiffusionPipeline:
    """Of one .safetensors checkpoint; its configuration and tokenizers are those of the catalogue's base model."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    base = BACKBONES[family_of(path)]
    kind = StableDiffusionXLPipeline if base.family == "sdxl" else StableDiffusionPipeline
    try:
        folder = DiffusionPipeline.download(
            base.source, allow_patterns=["*.json", "*.txt"], use_safetensors=True
        )
    except HUB_ERRORS as error:
        raise FileNotFoundError(
            f"{path} needs the configuration of {base.source}, which the hub doesn't serve to this machine: {error}"
        ) from error
    try:
        return kind.from_single_file(str(path), config=folder, dtype=dtype)
    except (
        SingleFileComponentError,
        SafetensorError,
        ValueError,
        KeyError,
        RuntimeError,
        OSError,
    ) as error:
        raise ValueError(
            f"{path} lacks a part of {base.title} or doesn't fit it: {error}"
        ) from error


def refiner_for(pipe: DiffusionPipeline, backbone: Backbone | None) -> str | None:
    """Where the refiner of a model is: of the catalogue's entry, else of the catalogue's base with this architecture; None if nowhere.

    A fine-tune takes its base's refiner (paper, table 4).
    """
    found = [
        base.refiner
        for base in ([backbone] if backbone else BACKBONES.values())
        if (Path(base.refiner) / CONFIG_NAME).is_file()
    ]
    return next(
        (folder for folder in found if backbone or not misfit(read_config(Path(folder)), pipe)),
        None,
    )


def training_command(pipe: DiffusionPipeline, source: str, backbone: Backbone | None) -> str:
    """What trains the missing refiner: on the base that shares it, for a model that takes another one's."""
    base = (
        next(other for other in BACKBONES.values() if other.refiner == backbone.refiner)
        if backbone
        else None
    )
    preset = "sdxl" if isinstance(pipe, StableDiffusionXLPipeline) else "sd21"
    return (
        f"python train/train_refiner.py --preset {preset} --backbone {base.source if base else source} --prompts prompts.txt "
        f"--output_dir {base.refiner if base else 'runs/refiner'}"
    )


def adapter_layers(pipe: DiffusionPipeline, adapter: str) -> Iterator[BaseTunerLayer]:
    """The layers that hold the adapter, of the UNet and the text encoders."""
    for network in (
        getattr(pipe, name, None) for name in ("unet", "text_encoder", "text_encoder_2")
    ):
        for layer in network.modules() if network is not None else ():
            if isinstance(layer, BaseTunerLayer) and adapter in getattr(layer, "lora_A", {}):
                yield layer


def add_lora(pipe: DiffusionPipeline, name_or_path: str) -> str:
    """Puts a user's LoRA on the pipeline as the adapter "style"; returns a sentence where it fits some layers only, else nothing.

    Raises FileNotFoundError where there is none and ValueError where it fits no layer or can't be read;
    the pipeline is then as it was.
    """
    path = Path(name_or_path)
    where = {"pretrained_model_name_or_path_or_dict": name_or_path}
    if path.suffix == ".safetensors":
        where = {
            "pretrained_model_name_or_path_or_dict": str(path.parent),
            "weight_name": path.name,
        }
    try:
        state = pipe.lora_state_dict(**where, use_safetensors=True)
        state = state[0] if isinstance(state, tuple) else state
        asked = sum(
            key.endswith(("lora_A.weight", ".down.weight", "lora_down.weight")) for key in state
        )
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # what it says of keys that fit nothing is counted below
            pipe.load_lora_weights(**where, adapter_name="style", use_safetensors=True)
    except HUB_ERRORS as error:
        raise FileNotFoundError(no_lora(name_or_path)) from error
    except (
        SafetensorError,
        ValueError,
        KeyError,
        RuntimeError,
        TypeError,
        IndexError,
    ) as error:  # RuntimeError: shapes of another model
        pipe.unload_lora_weights()
        if HF_HUB_OFFLINE and not os.path.exists(
            path
        ):  # False too for a name longer than file systems take
            raise FileNotFoundError(no_lora(name_or_path)) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"The LoRA {name_or_path} belongs to another model or is damaged: {reason}"
        ) from error
    found = len(list(adapter_layers(pipe, "style")))
    if not found:
        pipe.unload_lora_weights()
        raise ValueError(
            f"The LoRA {name_or_path} matches no layer of this model: it belongs to another family."
        )
    return (
        f"The LoRA matches {found} of its {asked} layers; the others belong to another model."
        if found < asked
        else ""
    )


def no_lora(name_or_path: str) -> str:
    return f"There is no LoRA at {name_or_path}: it is neither a .safetensors file or folder nor a hub repository that can be reached."
