"""The refiner g_phi: a LoRA on the pipeline's own UNet that corrects x_T in one forward (paper, section 3.3)."""

import copy
import hashlib
import itertools
import json
import math
import os
import re
import tempfile
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from noiserefine.noise import encode_prompt, unet_conditioning

HUB_ERRORS = (
    HFValidationError,
    httpx.HTTPError,
    OSError,
)  # no such id, no permission, no network, not cached, no such file
FORMAT_VERSION = 1
ADAPTER = "refiner"  # beside whatever adapters the user has on the UNet
CONFIG_NAME, WEIGHTS_NAME, GUIDANCE_NAME = (
    "refiner.json",
    "pytorch_lora_weights.safetensors",
    "guidance_embedding.safetensors",
)
GUIDANCE_EMBEDDING = 256  # width of the guidance scale's sinusoidal embedding
# All attention, convolution and feed-forward layers (appendix D.1), as suffixes of their names in UNet2DConditionModel.
TARGET_MODULES = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "conv",
    "conv1",
    "conv2",
    "conv_shortcut",
    "conv_in",
    "conv_out",
]
# What has to agree for a LoRA of one UNet to fit another.
ARCHITECTURE = [
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "down_block_types",
    "up_block_types",
    "transformer_layers_per_block",
    "addition_embed_type",
]
PARAMETRISATION = (
    "cancelled head"  # x_T + UNet_lora(x_T, t), whose conv_out has no bias and starts at zero
)


@dataclass
class RefinerConfig:
    """What refiner.json holds."""

    rank: int
    alpha: float
    prediction_type: (
        str  # of the base: its UNet's output at t is what the correction was trained from
    )
    architecture: dict  # the entries ARCHITECTURE of the base UNet's config
    base_model: str  # hub id or folder of the base
    base_signature: list[float]  # a few of its weights, to tell the base from its fine-tunes
    base_revision: str | None = None  # commit of the hub repository it was loaded from
    timestep: int = 999
    parametrisation: str = PARAMETRISATION
    guidance_scale_range: list[float] | None = (
        None  # of the scales it takes as an input (appendix A.4); None: it takes none
    )
    format_version: int = FORMAT_VERSION
    training: dict = field(default_factory=dict)  # what it was trained towards
    results: dict = field(default_factory=dict)  # what was measured of it


class Refiner:
    """x_T -> x_T + strength * correction, for the pipeline it was made with.

    The refining network is a second tree of modules over the pipeline's own parameters, so the pipeline's
    UNet is never touched, wrapped or toggled, and its weights are not copied.  Merged, the layers with a LoRA
    get weights of their own: nearly a second UNet in memory, and the speed of a plain forward.
    """

    note = ""  # what to say of a pipeline that is not the base, in a sentence
    weights_sha256: str | None = None  # of the LoRA's file, which tells one refiner from another
    offload_hook = (
        None  # what sends the refining network back to the CPU after its pass; see offload.py
    )

    def __init__(self, pipe: DiffusionPipeline, config: RefinerConfig, unet: UNet2DConditionModel):
        self.pipe, self.config, self.unet = pipe, config, unet

    @classmethod
    def create(
        cls,
        pipe: DiffusionPipeline,
        rank: int = 128,
        alpha: float | None = None,
        guidance_scale_range: list[float] | None = None,
    ) -> "Refiner":
        """An untrained refiner, the identity: its LoRA on conv_out starts as minus conv_out.

        guidance_scale_range: lowest and highest of the guidance scales it will take as an input
        (appendix A.4), through a projection that starts at zero; None for a refiner without that input.
        Raises ValueError where the rank is below the number of latent channels, which that needs.
        """
        channels = pipe.unet.config.out_channels
        if rank < channels:
            raise ValueError(
                f"The rank must be at least {channels}, the number of latent channels; got {rank}."
            )
        config = RefinerConfig(
            rank=rank,
            alpha=rank if alpha is None else alpha,
            prediction_type=pipe.scheduler.config.prediction_type,
            architecture=architecture(pipe.unet),
            base_model=pipe.name_or_path or "an unnamed model",
            base_signature=signature(pipe.unet),
            base_revision=revision(pipe),
            timestep=pipe.scheduler.config.num_train_timesteps - 1,
            guidance_scale_range=None
            if guidance_scale_range is None
            else [float(scale) for scale in guidance_scale_range],
        )
        unet = with_lora(pipe.unet, config)
        cancel_head(unet.conv_out)
        return cls(pipe, config, unet)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, pipe: DiffusionPipeline, merge: bool | None = None
    ) -> "Refiner":
        """Loads a refiner from a folder or a hub repository and checks it against the pipeline.

        merge: whether the LoRA is folded into weights of the refiner's own (faster, nearly a second UNet in
        memory) or stays apart over the pipeline's; None: folded in where that takes at most half of the free memory.
        Move the pipeline to its device first: the refiner's own weights stay where they are made.
        Warns (UserWarning) where the pipeline is not the base it was trained on but may work, a fine-tune.
        Raises FileNotFoundError where there is no refiner, and ValueError where the files are damaged or of
        another format, or the pipeline's UNet has another architecture or prediction type.
        """
        folder = resolve(name_or_path)
        config = read_config(folder)
        reason = misfit(config, pipe)
        if reason:
            raise ValueError(
                f"The refiner {name_or_path} was trained for {config.base_model} and doesn't fit: {reason}. Load "
                f"{config.base_model} or a fine-tune of it, or train a refiner for this model with train/train_refiner.py."
            )
        state = read_tensors(folder / WEIGHTS_NAME)
        check_rank(folder / WEIGHTS_NAME, state, config.rank)
        unet = with_lora(pipe.unet, config)
        load_exactly(unet, folder, state)
        refiner = cls(pipe, config, unet)
        with open(folder / WEIGHTS_NAME, "rb") as file:
            refiner.weights_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        refiner.note = note_on(pipe.unet, config)
        if refiner.note:
            warnings.warn(refiner.note, stacklevel=2)
        if merge or merge is None and merged_bytes(unet) <= free_memory(pipe.device) / 2:
            refiner.merge()
        for parameter in set(unet.parameters()) - set(pipe.unet.parameters()):
            parameter.data = parameter.data.to(pipe.unet.dtype)  # a new LoRA is in single precision
        return refiner

    def merge(self) -> None:
        """Folds the LoRA into weights of the refiner's own; it can't be saved or trained after that."""
        merge_lora(self.unet)

    @property
    def merged(self) -> bool:
        return not any(
            isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A
            for layer in self.unet.modules()
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes refiner.json and the LoRA, which pipe.load_lora_weights also reads. Raises ValueError for a merged refiner."""
        if self.merged:
            raise ValueError(
                "This refiner was loaded merged: its LoRA is gone. Load it with merge=False to save it."
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as part:  # nobody reads half a file
            save_lora(self.pipe, self.unet, part)
            if self.takes_guidance_scale:
                save_file(
                    self.unet.time_embedding.cond_proj.state_dict(), Path(part) / GUIDANCE_NAME
                )
            (Path(part) / CONFIG_NAME).write_text(json.dumps(asdict(self.config), indent=2) + "\n")
            for file in Path(part).iterdir():
                os.replace(file, folder / file.name)

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's precision, read off one layer: diffusers' own property walks all of them, 5 % of a small UNet's forward."""
        return self.pipe.unet.conv_in.weight.dtype

    @property
    def takes_guidance_scale(self) -> bool:
        return self.config.guidance_scale_range is not None

    def check_guidance_scale(self, guidance_scale: float | None) -> None:
        """Raises ValueError for a scale that this refiner was not trained for, for one it cannot take, and for a missing one."""
        scales = self.config.guidance_scale_range
        if scales is None:
            if guidance_scale is not None:
                raise ValueError(
                    "This refiner takes no guidance scale: it was trained for one. --guidance_scale_range of "
                    "train/train_refiner.py trains one that does."
                )
            return
        low, high = scales
        if guidance_scale is None or not low <= guidance_scale <= high:
            raise ValueError(
                f"This refiner takes a guidance scale from {low:g} to {high:g}, which it was trained for; got {guidance_scale}."
            )

    def scale_input(self, guidance_scale: float) -> float | None:
        """The scale where this refiner takes it, else None. Raises ValueError for one that it was not trained for."""
        scale = guidance_scale if self.takes_guidance_scale else None
        self.check_guidance_scale(scale)
        return scale

    def correction(
        self,
        x_T: torch.Tensor,
        embeds: dict[str, torch.Tensor],
        guidance_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What strength 1 adds to x_T: (B, C, h, w) in float32, one UNet forward at t = T, with gradient.

        embeds: what `encode_prompt` returns, for B prompts or for one.
        guidance_scale: (B,), diffusers' g, for a refiner that takes it.
        """
        embeds = {name: value.expand(len(x_T), *value.shape[1:]) for name, value in embeds.items()}
        factor = self.pipe.vae_scale_factor
        conditioning = unet_conditioning(
            self.pipe, embeds, x_T.shape[-2] * factor, x_T.shape[-1] * factor
        )
        dtype = self.dtype
        if self.takes_guidance_scale:
            assert guidance_scale is not None
            embedding = self.pipe.get_guidance_scale_embedding(
                guidance_scale.float().cpu() - 1, embedding_dim=GUIDANCE_EMBEDDING
            )
            conditioning["timestep_cond"] = embedding.to(x_T.device, dtype)
        if self.offload_hook:
            self.pipe.maybe_free_model_hooks()  # what an earlier call left on the device
        try:
            return self.unet(x_T.to(dtype), self.config.timestep, **conditioning).sample.float()
        finally:
            if self.offload_hook:
                self.offload_hook.offload()

    @torch.no_grad()
    def __call__(
        self,
        x_T: torch.Tensor,
        prompt: str | list[str] | dict[str, torch.Tensor],
        strength: float = 1.0,
        guidance_scale: float | None = None,
    ) -> torch.Tensor:
        """The refined noise, to be given to the pipeline as `latents`.

        x_T       (B, C, h, w), standard normal, not scaled by the scheduler
        prompt    one for all or one for each, or what `encode_prompt` made of it
        strength  0 returns x_T, 1 is what was trained; at least 0, at most 3
        guidance_scale  the guided sampling to come near to, for a refiner that takes it (appendix A.4)

        Returns (B, C, h, w) on the pipeline's device in its precision; the sum is made in float32.
        Raises ValueError for a strength or a scale that is no such number for an x_T of another shape
        and for prompts of another number.
        """
        check_strength(strength)
        self.check_guidance_scale(guidance_scale)
        if x_T.ndim != 4 or x_T.shape[1] != self.pipe.unet.config.in_channels:
            raise ValueError(
                f"x_T has shape {tuple(x_T.shape)}; this model takes (images, {self.pipe.unet.config.in_channels}, h, w)."
            )
        if strength == 0:
            return x_T.to(self.pipe._execution_device, self.dtype)
        embeds = (
            prompt if isinstance(prompt, dict) else encode_prompt(self.pipe, prompt, guided=False)
        )
        prompts = len(embeds["prompt_embeds"])
        if prompts not in (1, len(x_T)):
            raise ValueError(
                f"There are {prompts} prompts for {len(x_T)} images: give one for all or one for each."
            )
        x_T = x_T.to(embeds["prompt_embeds"].device, torch.float32)
        scales = None if guidance_scale is None else torch.full((len(x_T),), guidance_scale)
        return (x_T + strength * self.correction(x_T, embeds, scales)).to(self.dtype)


def check_strength(strength: float) -> None:
    """Raises ValueError for a refinement strength that is no number from 0 to 3."""
    if not math.isfinite(strength) or not 0 <= strength <= 3:
        raise ValueError(
            f"The refinement strength is a number from 0 to 3, 1 as trained; got {strength}."
        )


def architecture(unet: UNet2DConditionModel) -> dict:
    """The entries of the UNet's config that a LoRA depends on, as JSON would return them."""
    return json.loads(json.dumps({key: unet.config[key] for key in ARCHITECTURE}))


def misfit(config: RefinerConfig, pipe: DiffusionPipeline) -> str:
    """Why a refiner does not fit the pipeline, decided from the architecture; empty where it does, as it does for fine-tunes of its base."""
    for key, value in architecture(pipe.unet).items():
        if config.architecture.get(key) != value:
            return f"this model's UNet has another architecture, {key} {value!r} instead of {config.architecture.get(key)!r}"
    prediction_type = pipe.scheduler.config.prediction_type
    return (
        ""
        if prediction_type == config.prediction_type
        else f"this model predicts “{prediction_type}” and its base “{config.prediction_type}”"
    )


def note_on(unet: UNet2DConditionModel, config: RefinerConfig) -> str:
    """What to say of a pipeline that is not the refiner's base, in a sentence; empty where it is."""
    if same_weights(signature(unet), config.base_signature):
        return ""
    return (
        f"This model is not {config.base_model}, which the refiner was trained on, but has its architecture: "
        "on a fine-tune of it the refiner is expected to work, on a model trained from scratch not."
    )


def revision(pipe: DiffusionPipeline) -> str | None:
    """The commit of the hub repository that the UNet was loaded from, which the cache's path tells; None for a folder."""
    found = re.search(r"snapshots[/\\]([0-9a-f]{40})", pipe.unet.config.get("_name_or_path") or "")
    return found and found[1]


def signature(unet: UNet2DConditionModel) -> list[float]:
    """One weight of each of sixteen layers from the first to the last."""
    layers = [p for name, p in unet.named_parameters() if p.ndim > 1 and "lora_" not in name]
    return [round(layers[i * (len(layers) - 1) // 15].flatten()[0].item(), 6) for i in range(16)]


def same_weights(signature: list[float], other: list[float]) -> bool:
    """Whether two signatures are of the same weights, in half precision or not."""
    return torch.allclose(torch.tensor(signature), torch.tensor(other), rtol=5e-3, atol=1e-5)


def with_lora(unet: UNet2DConditionModel, config: RefinerConfig) -> UNet2DConditionModel:
    """A second tree of modules over the same parameters, with a fresh LoRA; the given UNet stays as it is.

    The LoRA is the only one there: a user's style LoRA is for the images, not for the refining pass.
    """
    tensors = itertools.chain(unet.parameters(), unet.buffers())
    flags = {parameter: parameter.requires_grad for parameter in unet.parameters()}
    twin = copy.deepcopy(unet, memo={id(tensor): tensor for tensor in tensors})
    twin.unload_lora()  # before another is added, which would take a fused one out of the weights, and those are shared
    twin.add_adapter(
        LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=TARGET_MODULES), ADAPTER
    )
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    twin.conv_out.get_base_layer().bias = None
    if config.guidance_scale_range is not None:
        # Only here, and not by the UNet's config, which would make the pipeline believe that its own UNet takes the scale.
        first = twin.time_embedding.linear_1
        twin.time_embedding.cond_proj = nn.Linear(
            GUIDANCE_EMBEDDING,
            first.in_features,
            bias=False,
            device=first.weight.device,
            dtype=first.weight.dtype,
        )
        nn.init.zeros_(twin.time_embedding.cond_proj.weight)
    return twin


def save_lora(pipe: DiffusionPipeline, unet: UNet2DConditionModel, folder: str | Path) -> None:
    """Writes the LoRA of what `with_lora` returned, in diffusers' format."""
    about = unet.peft_config[ADAPTER].to_dict() | {
        "target_modules": TARGET_MODULES
    }  # there a set, in another order in every process
    pipe.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet, adapter_name=ADAPTER),
        unet_lora_adapter_metadata=about,
    )


@torch.no_grad()
def cancel_head(conv_out: LoraLayer) -> None:
    """Sets a convolution's LoRA to minus its weight, by SVD, so that the sum of both is zero."""
    weight = conv_out.get_base_layer().weight
    u, s, vh = torch.linalg.svd(weight.cpu().double().flatten(1), full_matrices=False)
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


def merged_bytes(unet: UNet2DConditionModel) -> int:
    """What the weights take that merging gives the refiner."""
    weights = (
        layer.get_base_layer().weight
        for layer in unet.modules()
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A
    )
    return sum(weight.numel() * weight.element_size() for weight in weights)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device, those included that PyTorch keeps for reuse."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    return (
        torch.cuda.mem_get_info(device)[0]
        + torch.cuda.memory_reserved(device)
        - torch.cuda.memory_allocated(device)
    )


def load_exactly(unet: UNet2DConditionModel, folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Fills the LoRA from what WEIGHTS_NAME holds, and the guidance scale's projection if there is one; exactly their tensors are taken.

    Raises ValueError where they do not.
    """
    state = {name.removeprefix("unet."): tensor for name, tensor in state.items()}
    check_tensors(
        folder / WEIGHTS_NAME, state, get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    )
    set_peft_model_state_dict(unet, state, adapter_name=ADAPTER)
    projection = unet.time_embedding.cond_proj
    if projection is not None:
        state = read_tensors(folder / GUIDANCE_NAME)
        check_tensors(folder / GUIDANCE_NAME, state, projection.state_dict())
        projection.load_state_dict(state)


def check_rank(path: Path, state: dict[str, torch.Tensor], rank: int) -> None:
    """Raises ValueError where the file's LoRA has another rank, before memory is taken for one of that rank."""
    ranks = {tensor.shape[0] for name, tensor in state.items() if name.endswith("lora_A.weight")}
    if rank not in ranks:
        raise ValueError(
            f"{path} does not hold this refiner's weights: its LoRA has rank {', '.join(map(str, sorted(ranks)))} and "
            f"{CONFIG_NAME} says rank {rank}."
        )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Raises ValueError for a file that is missing, damaged or no safetensors."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}): download or train the refiner again."
        ) from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{path} is damaged: {name} holds numbers that are not finite. Download or train the refiner again."
            )
    return tensors


def check_tensors(
    path: Path, state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    """Raises ValueError where names or shapes differ."""
    wrong = [
        name
        for name in expected.keys() | state.keys()
        if name not in state or name not in expected or state[name].shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(
            f"{path} does not hold this refiner's weights: {len(wrong)} of {len(expected)} tensors are missing, superfluous "
            f"or of another shape, {min(wrong)} for one. It belongs to another model or rank."
        )


def resolve(name_or_path: str | Path) -> Path:
    """The local folder of a refiner, downloaded where it is a hub id. Raises FileNotFoundError where there is none."""
    folder = Path(name_or_path)
    try:
        if not folder.is_dir():  # which itself fails for a name longer than file systems take
            folder = Path(
                snapshot_download(
                    str(name_or_path), allow_patterns=[CONFIG_NAME, WEIGHTS_NAME, GUIDANCE_NAME]
                )
            )
    except HUB_ERRORS as error:
        raise FileNotFoundError(
            f"There is no refiner at {str(name_or_path)[:100]}: it is neither a folder nor a hub repository that "
            "can be reached."
        ) from error
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{name_or_path} is not a refiner: it holds no {name}. train/train_refiner.py writes one."
            )
    return folder


def read_config(folder: Path) -> RefinerConfig:
    """refiner.json of the folder. Raises ValueError where it is not what this version writes."""
    try:
        config = RefinerConfig(**json.loads((folder / CONFIG_NAME).read_text()))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder / CONFIG_NAME} is not a refiner's configuration: {error}."
        ) from error
    if config.format_version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {config.format_version}; this version of NoiseRefine reads {FORMAT_VERSION}."
        )
    numbers, scales = (int, float), config.guidance_scale_range
    sound = {
        "rank": type(config.rank) is int and 1 <= config.rank <= 4096,
        "alpha": type(config.alpha) in numbers and math.isfinite(config.alpha),
        "timestep": type(config.timestep) is int and config.timestep >= 0,
        "architecture": isinstance(config.architecture, dict),
        "parametrisation": config.parametrisation == PARAMETRISATION,
        "base_signature": isinstance(config.base_signature, list)
        and len(config.base_signature) == 16
        and all(type(value) in numbers for value in config.base_signature),
        "guidance_scale_range": scales is None
        or isinstance(scales, list)
        and len(scales) == 2
        and all(type(value) in numbers for value in scales)
        and 1 <= scales[0] < scales[1] < math.inf,
    }
    for name, holds in sound.items():
        if not holds:
            raise ValueError(
                f"{folder / CONFIG_NAME} is not a refiner's configuration: {name} {getattr(config, name)!r}."
            )
    return config
