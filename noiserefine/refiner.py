"""The refiner g_phi: a LoRA on the pipeline's own UNet that corrects x_T in one forward (paper, section 3.3)."""

import copy
import itertools
import json
import math
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from noiserefine.noise import encode_prompt, unet_conditioning

FORMAT_VERSION = 1
ADAPTER = "refiner"  # beside whatever adapters the user has on the UNet
CONFIG_NAME, WEIGHTS_NAME = "refiner.json", "pytorch_lora_weights.safetensors"
# All attention, convolution and feed-forward layers (appendix D.1), as suffixes of their names in UNet2DConditionModel.
TARGET_MODULES = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2",
                  "conv", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out"]
# What has to agree for a LoRA of one UNet to fit another.
ARCHITECTURE = ["in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "down_block_types",
                "up_block_types", "transformer_layers_per_block", "addition_embed_type"]


PARAMETRISATION = "cancelled head"  # x_T + UNet_lora(x_T, t) - bias of conv_out


@dataclass
class RefinerConfig:
    """What refiner.json holds."""

    rank: int
    alpha: float
    prediction_type: str  # of the base: its UNet's output at t is what the correction was trained from
    architecture: dict  # the entries ARCHITECTURE of the base UNet's config
    base_model: str  # hub id or folder of the base
    base_signature: list[float]  # a few of its weights, to tell the base from its fine-tunes
    timestep: int = 999
    parametrisation: str = PARAMETRISATION
    takes_guidance_scale: bool = False
    format_version: int = FORMAT_VERSION
    training: dict = field(default_factory=dict)  # what it was trained towards
    results: dict = field(default_factory=dict)  # what was measured of it


class Refiner:
    """x_T -> x_T + strength * correction, for the pipeline it was made with.

    The refining network is a second tree of modules over the pipeline's own parameters, so the pipeline's
    UNet is never touched, wrapped or toggled, and its weights are not copied.  Merged, the layers with a LoRA
    get weights of their own: nearly a second UNet in memory, and the speed of a plain forward.
    """

    def __init__(self, pipe: DiffusionPipeline, config: RefinerConfig, unet: UNet2DConditionModel):
        self.pipe, self.config, self.unet = pipe, config, unet

    @classmethod
    def create(cls, pipe: DiffusionPipeline, rank: int = 128, alpha: float | None = None) -> "Refiner":
        """An untrained refiner, the identity: its LoRA on conv_out starts as minus conv_out.

        Raises ValueError where the rank is below the number of latent channels, which that needs.
        """
        channels = pipe.unet.config.out_channels
        if rank < channels:
            raise ValueError(f"The rank must be at least {channels}, the number of latent channels; got {rank}.")
        config = RefinerConfig(
            rank=rank, alpha=rank if alpha is None else alpha, prediction_type=pipe.scheduler.config.prediction_type,
            architecture=architecture(pipe.unet), base_model=pipe.name_or_path or "an unnamed model", base_signature=signature(pipe.unet),
            timestep=pipe.scheduler.config.num_train_timesteps - 1)
        unet = with_lora(pipe.unet, config)
        cancel_head(unet.conv_out)
        return cls(pipe, config, unet)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, pipe: DiffusionPipeline, merge: bool = True) -> "Refiner":
        """Loads a refiner from a folder or a hub repository and checks it against the pipeline.

        Warns (UserWarning) where the pipeline is not the base it was trained on but may work, a fine-tune.
        Raises FileNotFoundError where there is no refiner, and ValueError where the files are damaged or of
        another format, or the pipeline's UNet has another architecture or prediction type.
        """
        folder = resolve(name_or_path)
        config = read_config(folder)
        misfit = [f"{key} {value!r} instead of {config.architecture.get(key)!r}"
                  for key, value in architecture(pipe.unet).items() if config.architecture.get(key) != value]
        if misfit:
            raise ValueError(f"The refiner {name_or_path} was trained for {config.base_model} and fits no other architecture; "
                             f"this pipeline's UNet has {misfit[0]}. Load {config.base_model} or a fine-tune of it, or train a "
                             "refiner for this model with train/train_refiner.py.")
        prediction_type = pipe.scheduler.config.prediction_type
        if prediction_type != config.prediction_type:
            raise ValueError(f"The refiner {name_or_path} was trained for a model that predicts “{config.prediction_type}”; this one "
                             f"predicts “{prediction_type}”. Load {config.base_model} or a fine-tune of it.")
        unet = with_lora(pipe.unet, config)
        load_lora(unet, folder / WEIGHTS_NAME)
        refiner = cls(pipe, config, unet)
        if refiner.note:
            warnings.warn(refiner.note, stacklevel=2)
        if merge:
            refiner.merge()
        return refiner

    def merge(self) -> None:
        """Folds the LoRA into weights of the refiner's own; it can't be saved or trained after that."""
        merge_lora(self.unet)

    @property
    def note(self) -> str:
        """What to say of a pipeline that is not the base, in a sentence; empty where it is."""
        theirs = torch.tensor(self.config.base_signature)
        if torch.allclose(torch.tensor(signature(self.pipe.unet)), theirs, rtol=5e-3, atol=1e-5):  # in float16 and bfloat16 too
            return ""
        return (f"This model is not {self.config.base_model}, which the refiner was trained on, but has its architecture: "
                "on a fine-tune of it the refiner is expected to work, on a model trained from scratch not.")

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes refiner.json and the LoRA, which pipe.load_lora_weights also reads. Raises ValueError for a merged refiner."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not any(isinstance(layer, LoraLayer) for layer in self.unet.modules()):
            raise ValueError("This refiner was loaded merged: its LoRA is gone. Load it with merge=False to save it.")
        layers = get_peft_model_state_dict(self.unet, adapter_name=ADAPTER)
        self.pipe.save_lora_weights(folder, unet_lora_layers=layers,
                                    unet_lora_adapter_metadata=self.unet.peft_config[ADAPTER].to_dict())
        (folder / CONFIG_NAME).write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    def correction(self, x_T: torch.Tensor, embeds: dict[str, torch.Tensor]) -> torch.Tensor:
        """What strength 1 adds to x_T: (B, C, h, w) in float32, one UNet forward at t = T, with gradient.

        embeds: what `encode_prompt` returns, for B prompts or for one.
        """
        embeds = {name: value.expand(len(x_T), *value.shape[1:]) for name, value in embeds.items()}
        factor = self.pipe.vae_scale_factor
        conditioning = unet_conditioning(self.pipe, embeds, x_T.shape[-2] * factor, x_T.shape[-1] * factor)
        head = self.unet.conv_out
        bias = head.bias if isinstance(head, nn.Conv2d) else head.get_base_layer().bias
        predicted = self.unet(x_T.to(bias.dtype), self.config.timestep, **conditioning).sample
        return predicted.float() - bias.float()[:, None, None]

    @torch.no_grad()
    def __call__(self, x_T: torch.Tensor, prompt: str | list[str] | dict[str, torch.Tensor], strength: float = 1.0) -> torch.Tensor:
        """The refined noise, to be given to the pipeline as `latents`.

        x_T       (B, C, h, w), standard normal, not scaled by the scheduler
        prompt    one for all or one for each, or what `encode_prompt` made of it
        strength  0 returns x_T, 1 is what was trained; at least 0, at most 3

        Returns (B, C, h, w) on the pipeline's device in its precision; the sum is made in float32.
        Raises ValueError for a strength that is no such number and for an x_T of another shape.
        """
        check_strength(strength)
        if x_T.ndim != 4 or x_T.shape[1] != self.pipe.unet.config.in_channels:
            raise ValueError(f"x_T has shape {tuple(x_T.shape)}; this model takes (images, {self.pipe.unet.config.in_channels}, h, w).")
        x_T = x_T.to(self.pipe._execution_device, torch.float32)
        if strength > 0:
            embeds = prompt if isinstance(prompt, dict) else encode_prompt(self.pipe, prompt, guided=False)
            x_T = x_T + strength * self.correction(x_T, embeds)
        return x_T.to(self.pipe.unet.dtype)


def check_strength(strength: float) -> None:
    """Raises ValueError for a refinement strength that is no number from 0 to 3."""
    if not math.isfinite(strength) or not 0 <= strength <= 3:
        raise ValueError(f"The refinement strength is a number from 0 to 3, 1 as trained; got {strength}.")


def architecture(unet: UNet2DConditionModel) -> dict:
    """The entries of the UNet's config that a LoRA depends on, as JSON would return them."""
    return json.loads(json.dumps({key: unet.config[key] for key in ARCHITECTURE}))


def signature(unet: UNet2DConditionModel) -> list[float]:
    """One weight of each of sixteen layers from the first to the last."""
    layers = [p for name, p in unet.named_parameters() if p.ndim > 1 and "lora_" not in name]
    return [round(layers[i * (len(layers) - 1) // 15].flatten()[0].item(), 6) for i in range(16)]


def with_lora(unet: UNet2DConditionModel, config: RefinerConfig) -> UNet2DConditionModel:
    """A second tree of modules over the same parameters, with a fresh LoRA; the given UNet stays as it is."""
    tensors = itertools.chain(unet.parameters(), unet.buffers())
    flags = {parameter: parameter.requires_grad for parameter in unet.parameters()}
    twin = copy.deepcopy(unet, memo={id(tensor): tensor for tensor in tensors})
    twin.add_adapter(LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=TARGET_MODULES), ADAPTER)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    return twin


@torch.no_grad()
def cancel_head(conv_out: LoraLayer) -> None:
    """Sets a convolution's LoRA to minus its weight, by SVD, so that the sum of both is zero."""
    weight = conv_out.get_base_layer().weight
    u, s, vh = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
    down, up = conv_out.lora_A[ADAPTER].weight, conv_out.lora_B[ADAPTER].weight
    down[: len(s)] = (s.sqrt()[:, None] * vh).view(-1, *down.shape[1:])
    up[:, : len(s)] = (-u * s.sqrt() / conv_out.scaling[ADAPTER])[..., None, None]


@torch.no_grad()
def merge_lora(unet: UNet2DConditionModel) -> None:
    """Replaces every LoRA layer by a plain one with weights of its own; the shared weights stay as they are."""
    for name, layer in list(unet.named_modules()):
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
            plain = layer.get_base_layer()
            merged = plain.weight.float() + layer.get_delta_weight(ADAPTER).float()
            plain.weight = nn.Parameter(merged.to(plain.weight.dtype), requires_grad=False)
            unet.set_submodule(name, plain)


def load_lora(unet: UNet2DConditionModel, path: Path) -> None:
    """Fills the UNet's LoRA from a safetensors file that holds exactly its tensors. Raises ValueError where it does not."""
    try:
        state = {name.removeprefix("unet."): tensor for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): download or train the refiner again.") from error
    expected = get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    wrong = [name for name in expected.keys() | state.keys()
             if name not in state or name not in expected or state[name].shape != expected[name].shape]
    if wrong:
        raise ValueError(f"{path} does not hold this refiner's LoRA: {len(wrong)} of {len(expected)} tensors are missing, superfluous "
                         f"or of another shape, {min(wrong)} for one. It belongs to another model or rank.")
    set_peft_model_state_dict(unet, state, adapter_name=ADAPTER)


def resolve(name_or_path: str | Path) -> Path:
    """The local folder of a refiner, downloaded where it is a hub id. Raises FileNotFoundError where there is none."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(name_or_path), allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(f"There is no refiner at {name_or_path}: it is neither a folder nor a hub repository that "
                                    "can be reached.") from error
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{name_or_path} is not a refiner: it holds no {name}. train/train_refiner.py writes one.")
    return folder


def read_config(folder: Path) -> RefinerConfig:
    """refiner.json of the folder. Raises ValueError where it is not what this version writes."""
    try:
        config = RefinerConfig(**json.loads((folder / CONFIG_NAME).read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_NAME} is not a refiner's configuration: {error}.") from error
    if config.format_version != FORMAT_VERSION:
        raise ValueError(f"{folder} has format version {config.format_version}; this version of NoiseRefine reads {FORMAT_VERSION}.")
    numbers = (int, float)
    sound = {"rank": type(config.rank) is int and 1 <= config.rank <= 4096, "alpha": type(config.alpha) in numbers,
             "timestep": type(config.timestep) is int and config.timestep >= 0, "architecture": isinstance(config.architecture, dict),
             "parametrisation": config.parametrisation == PARAMETRISATION, "base_signature": isinstance(config.base_signature, list)
             and len(config.base_signature) == 16 and all(type(value) in numbers for value in config.base_signature)}
    for name, holds in sound.items():
        if not holds:
            raise ValueError(f"{folder / CONFIG_NAME} is not a refiner's configuration: {name} {getattr(config, name)!r}.")
    return config
