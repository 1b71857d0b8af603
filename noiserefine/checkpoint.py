"""A refiner's files: what they hold, how they are read and written, whether they fit."""

import json
import math
import os
import re
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from noiserefine.denoiser import denoiser, stored_in_8_bits
from noiserefine.lora import UNET_TARGETS, save_lora

# No such id, no permission, no network, not cached, no such file.
HUB_ERRORS = (HFValidationError, httpx.HTTPError, OSError)
CONFIG_NAME = "refiner.json"
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
SCALE_NAME = "guidance_embedding.safetensors"
FORMAT_VERSION = 2  # 1 knew UNets only: no head, targets, vector, adds_input
PARAMETRISATION = "cancelled head"  # x_T + network_lora(x_T, t), whose last layer starts at zero
SIGNATURE = 16  # weights that tell a base from its fine-tunes
ROUNDING = 5e-3, 1e-5  # relative and absolute, of weights in half precision
ROUNDING_8_BITS = 2**-3, 2**-9  # in float8_e4m3fn, rounded once or twice
MAX_RANK = 4096
MARK = "noiserefine"  # key of the LoRA file's metadata that says what it is
# What has to agree for a LoRA of one UNet to fit another; of other networks the whole config has,
# but for NOT_ARCHITECTURE.
UNET_ARCHITECTURE = [
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
NOT_ARCHITECTURE = ("sample_size", "guidance_embeds", "pos_embed_max_size", "interpolation_scale")


@dataclass
class RefinerConfig:
    """What refiner.json holds. Raises ValueError for a value that no refiner can have."""

    rank: int
    alpha: float
    prediction_type: str  # of the base: its output at t = T is what the correction was trained from
    architecture: dict  # the entries of the base denoiser's config that a LoRA depends on
    base_model: str  # hub id or folder of the base
    base_signature: list[float]  # a few of its weights, to tell the base from its fine-tunes
    base_revision: str | None = None  # commit of the hub repository it was loaded from
    timestep: float = 999  # t = T in the scheduler's unit
    parametrisation: str = PARAMETRISATION
    target_modules: list[str] = field(default_factory=lambda: list(UNET_TARGETS))
    head: str = "conv_out"  # the layer that the prediction leaves the network by
    vector: str | None = "time_embedding.linear_1"  # the layer that reads the guidance scale
    adds_input: bool = False  # the pipeline adds its input to the output; see Refiner.correction
    guidance_scale_range: list[float] | None = None  # scales it takes as an input (appendix A.4)
    format_version: int = FORMAT_VERSION
    training: dict = field(default_factory=dict)  # what it was trained towards
    results: dict = field(default_factory=dict)  # what was measured of it

    def __post_init__(self) -> None:
        sound = {
            "rank": type(self.rank) is int and 1 <= self.rank <= MAX_RANK,
            "alpha": _finite(self.alpha),
            "timestep": _finite(self.timestep) and self.timestep >= 0,
            "architecture": isinstance(self.architecture, dict),
            "parametrisation": self.parametrisation == PARAMETRISATION,
            "base_signature": isinstance(self.base_signature, list)
            and len(self.base_signature) == SIGNATURE
            and all(map(_finite, self.base_signature)),
            "target_modules": isinstance(self.target_modules, list)
            and bool(self.target_modules)
            and all(isinstance(name, str) for name in self.target_modules),
            "head": isinstance(self.head, str),
            "vector": isinstance(self.vector, str)
            or self.vector is None
            and self.guidance_scale_range is None,
            "adds_input": isinstance(self.adds_input, bool),
            "guidance_scale_range": self.guidance_scale_range is None
            or isinstance(self.guidance_scale_range, list)
            and is_scale_range(self.guidance_scale_range),
        }
        for name, holds in sound.items():
            if not holds:
                raise ValueError(f"{name} {getattr(self, name)!r}")


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_scale_range(scales: list[Any]) -> bool:
    """Return whether the list is a lowest guidance scale of at least 1 and a higher one."""
    match scales:
        case [low, high]:
            return _finite(low) and _finite(high) and 1 <= low < high
    return False


# Whether a refiner fits


def architecture(network: ModelMixin) -> dict[str, Any]:
    """Return the entries of the denoiser's config that a LoRA depends on, as JSON has them."""
    config = network.config
    if "block_out_channels" in config and "down_block_types" in config:
        entries = {key: config[key] for key in UNET_ARCHITECTURE}
    else:
        entries = {"_class_name": type(network).__name__} | {
            key: value
            for key, value in config.items()
            if not key.startswith("_") and key not in NOT_ARCHITECTURE
        }
    return json.loads(json.dumps(entries))


def prediction_type(pipe: DiffusionPipeline) -> str:
    """Return what the pipeline's denoiser predicts: epsilon, v_prediction, flow_prediction, ..."""
    scheduler = pipe.scheduler
    flow = hasattr(scheduler, "scale_noise")  # flow matching's schedulers have no other
    return scheduler.config.get("prediction_type") or ("flow_prediction" if flow else "epsilon")


def misfit(config: RefinerConfig, pipe: DiffusionPipeline) -> str:
    """Return why a refiner does not fit the pipeline; empty where it does.

    It is decided from the architecture, so fine-tunes of its base fit.
    """
    network = denoiser(pipe)
    entries, base_entries = architecture(network), config.architecture
    kind, base_kind = (
        config_entries.get("_class_name", "UNet2DConditionModel")
        for config_entries in (entries, base_entries)
    )
    if kind != base_kind:
        return f"this model's denoiser is a {kind} and its base's a {base_kind}"
    for key, value in entries.items():
        if base_entries.get(key) != value:
            return (
                f"this model's denoiser has another architecture, {key} {value!r} instead of "
                f"{base_entries.get(key)!r}"
            )
    predicts = prediction_type(pipe)
    if predicts != config.prediction_type:
        return f"this model predicts “{predicts}” and its base “{config.prediction_type}”"
    return ""


def note_on(network: ModelMixin, config: RefinerConfig) -> str:
    """Return a sentence on a denoiser that is not the refiner's base; empty where it is."""
    tolerance = ROUNDING_8_BITS if stored_in_8_bits(network) else ROUNDING
    if same_weights(signature(network), config.base_signature, tolerance):
        return ""
    return (
        f"This model is not {config.base_model}, which the refiner was trained on, but has its "
        "architecture: on a fine-tune of it the refiner is expected to work, on a model trained "
        "from scratch not."
    )


def revision(pipe: DiffusionPipeline) -> str | None:
    """Return the commit of the denoiser's hub repository, which the cache's path tells."""
    source = denoiser(pipe).config.get("_name_or_path") or ""
    found = re.search(r"snapshots[/\\]([0-9a-f]{40})", source)
    return found and found[1]


def signature(network: ModelMixin) -> list[float]:
    """Return one weight of each of sixteen layers from the first to the last."""
    layers = [p for name, p in network.named_parameters() if p.ndim > 1 and "lora_" not in name]
    last = len(layers) - 1
    chosen = (layers[i * last // (SIGNATURE - 1)] for i in range(SIGNATURE))
    return [round(layer.flatten()[0].item(), 6) for layer in chosen]


def same_weights(
    signature: list[float], other: list[float], tolerance: tuple[float, float] = ROUNDING
) -> bool:
    """Return whether two signatures are of the same weights, rounded or not."""
    rtol, atol = tolerance
    return torch.allclose(torch.tensor(signature), torch.tensor(other), rtol, atol)


# Reading


def resolve(name_or_path: str | Path) -> Path:
    """Return the local folder of a refiner, downloaded where it is a hub id.

    Raises FileNotFoundError where there is none.
    """
    folder = Path(name_or_path)
    try:
        if not folder.is_dir():  # which itself fails for a name longer than file systems take
            patterns = [CONFIG_NAME, WEIGHTS_NAME, SCALE_NAME]
            folder = Path(snapshot_download(str(name_or_path), allow_patterns=patterns))
    except HUB_ERRORS as error:
        raise FileNotFoundError(
            f"There is no refiner at {str(name_or_path)[:100]}: it is neither a folder nor a hub "
            "repository that can be reached."
        ) from error
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{name_or_path} is not a refiner: it holds no {name}. train/train_refiner.py "
                "writes one."
            )
    return folder


def read_config(folder: Path) -> RefinerConfig:
    """Return refiner.json of the folder. Raises ValueError where this version cannot read it."""
    path = folder / CONFIG_NAME
    try:
        entries = json.loads(path.read_text())
        version = entries["format_version"]
        if version not in range(1, FORMAT_VERSION + 1):
            raise ValueError(
                f"format version {version!r}; this version of NoiseRefine reads 1 to "
                f"{FORMAT_VERSION}"
            )
        return RefinerConfig(**entries)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a refiner's configuration: {error}.") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the file's tensors. Raises ValueError for one that is damaged or no safetensors."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}): download or train the refiner "
            "again."
        ) from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{path} is damaged: {name} holds numbers that are not finite. Download or train "
                "the refiner again."
            )
    return tensors


def check_tensors(
    path: Path, state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    """Raise ValueError where names or shapes differ."""
    wrong = [
        name
        for name in expected.keys() | state.keys()
        if name not in state or name not in expected or state[name].shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(
            f"{path} does not hold this refiner's weights: {len(wrong)} of {len(expected)} tensors "
            f"are missing, superfluous or of another shape, {min(wrong)} for one. It belongs to "
            "another model or rank."
        )


def check_rank(path: Path, state: dict[str, torch.Tensor], rank: int) -> None:
    """Raise ValueError where the file's LoRA has another rank, before memory is taken for it."""
    ranks = {tensor.shape[0] for name, tensor in state.items() if name.endswith("lora_A.weight")}
    if rank not in ranks:
        raise ValueError(
            f"{path} does not hold this refiner's weights: its LoRA has rank "
            f"{', '.join(map(str, sorted(ranks)))} and {CONFIG_NAME} says rank {rank}."
        )


def is_refiner_file(path: str | Path) -> bool:
    """Return whether a safetensors file is a refiner's, which as a style LoRA destroys images.

    Its metadata say so; files of format version 1 are known by the refiner.json beside them.
    """
    with safe_open(path, framework="pt") as file:
        marked = MARK in (file.metadata() or {})
    return marked or Path(path).name == WEIGHTS_NAME and (Path(path).parent / CONFIG_NAME).is_file()


# Writing


def about(config: RefinerConfig) -> dict[str, str]:
    """Return the metadata by which a refiner's file says what it is."""
    return {
        MARK: "noise refiner",
        "modelspec.title": f"Noise refiner for {config.base_model}",
        "modelspec.description": "Corrects the initial noise in one forward. It is no style LoRA: "
        "applied while sampling it destroys images.",
    }


def write(
    folder: str | Path,
    pipe: DiffusionPipeline,
    network: ModelMixin,
    config: RefinerConfig,
    dtype: torch.dtype | None = None,
) -> None:
    """Write refiner.json, the LoRA and, if there is one, the guidance scale's projection.

    dtype: precision of the tensors in the files; None for their own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:  # nobody reads half a file
        save_lora(pipe, network, Path(part) / WEIGHTS_NAME, dtype, **about(config))
        if config.guidance_scale_range is not None:
            projection = network.scale_input.state_dict()
            projection = {name: tensor.to(dtype) for name, tensor in projection.items()}
            save_file(projection, Path(part) / SCALE_NAME)
        (Path(part) / CONFIG_NAME).write_text(json.dumps(asdict(config), indent=2) + "\n")
        # refiner.json leaves first and comes last: where it is, the refiner is whole.
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        for file in sorted(Path(part).iterdir(), key=lambda file: file.name == CONFIG_NAME):
            os.replace(file, folder / file.name)
