"""Single .safetensors checkpoints: which model one is, and what it predicts."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import SafetensorError, safe_open

from noiserefine.checkpoint import HUB_ERRORS
from noiserefine.models.catalogue import BACKBONES
from noiserefine.models.devices import default_dtype
from noiserefine.models.sources import local_file, sentence

V, EPSILON = "v_prediction", "epsilon"
# What trainers and user interfaces write for a prediction type.
SPELLINGS = {
    V: ("v", "v_prediction", "v-prediction", "vpred", "v_pred", "velocity"),
    EPSILON: ("epsilon", "eps", "noise"),
}
YES, NO = ("true", "1", "yes"), ("false", "0", "no")
# By the width of the text that the UNet reads: Stable Diffusion 1, 2, XL; the catalogue's base of
# each.
BASES = {768: "sd15", 2048: "sdxl"}
SD2_WIDTH, SD2_BASES = 1024, {V: "sd21", EPSILON: "sd21-base"}
KINDS = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}


@dataclass(frozen=True)
class Prediction:
    """What a checkpoint's network predicts, as its scheduler has to know it."""

    kind: str  # diffusers' prediction_type
    zero_snr: bool = False  # noise rescaled so that the last timestep holds no signal
    edm: tuple[float, float] | None = None  # smallest and largest sigma of EDM's levels (CosXL)

    def scheduler(self, native: SchedulerMixin) -> SchedulerMixin:
        """Return the base's scheduler with this prediction; the given one where nothing differs."""
        if self.edm:
            low, high = self.edm
            return EDMEulerScheduler(
                low, high, sigma_data=1.0, prediction_type=self.kind, sigma_schedule="exponential"
            )
        if self.zero_snr:  # few schedulers can rescale, and all have to begin at the last timestep
            return DDIMScheduler.from_config(
                native.config,
                prediction_type=self.kind,
                rescale_betas_zero_snr=True,
                timestep_spacing="trailing",
                clip_sample=False,
                set_alpha_to_one=False,
            )
        if native.config.prediction_type == self.kind:
            return native
        return type(native).from_config(native.config, prediction_type=self.kind)


def prediction_of(asked: str) -> Prediction:
    """Return the prediction that a user names: v, epsilon, or v-zsnr (v with zero terminal SNR).

    Raises ValueError for another word.
    """
    kind = _kind(asked.removesuffix("-zsnr"))
    if kind is None or asked == "epsilon-zsnr":
        raise ValueError(
            f"There is no prediction type {asked!r}; choose one of v, epsilon and v-zsnr, which is "
            "v with zero terminal SNR."
        )
    return Prediction(kind, asked.endswith("-zsnr"))


def _kind(word: str) -> str | None:
    word = word.strip().lower()
    return next((kind for kind, spellings in SPELLINGS.items() if word in spellings), None)


class Header(Mapping):
    """Names, shapes and metadata of a .safetensors file, whose tensors are not read."""

    def __init__(self, path: Path):
        """Raise ValueError for a file that is damaged."""
        try:
            with safe_open(path, "pt") as file:
                self.metadata = {k.lower(): v for k, v in (file.metadata() or {}).items()}
                names = list(file.keys())
                self.shapes = {name: file.get_slice(name).get_shape() for name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is damaged or no safetensors checkpoint: {sentence(error)}"
            ) from error
        self.path = path

    def __getitem__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(shape=self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def value(self, name: str) -> float:
        """Return a tensor of one number."""
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name).item()


def markers(header: Header) -> tuple[set[str], bool]:
    """Return the prediction types that a file states, and whether it states zero terminal SNR.

    They are read from its tensors' names (v_pred, ztsnr), from the metadata of sd-scripts,
    OneTrainer, ComfyUI and Stability's ModelSpec, and from the .yaml that A1111 looks for beside
    it.
    Raises ValueError for a prediction that is neither v nor epsilon.
    """
    found, metadata = set(), header.metadata
    if "v_pred" in header:
        found.add(V)
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if word := metadata.get(key):
            kind = _kind(word)
            if kind is None:
                raise ValueError(
                    f"{header.path} predicts {word!r} ({key}); models that predict v or epsilon "
                    "work as single files."
                )
            found.add(kind)
    said = metadata.get("ss_v_parameterization", "").lower()
    if said in YES + NO:
        found.add(V if said in YES else EPSILON)
    architecture = metadata.get("modelspec.architecture", "").lower()
    version = metadata.get("ss_base_model_version", "").lower()
    if "768-v" in architecture or re.fullmatch(r"sd_v\d_v", version):
        found.add(V)
    elif "v2-512" in architecture:
        found.add(EPSILON)
    beside = header.path.with_suffix(".yaml")
    if beside.is_file():
        found |= _of_yaml(beside)
    flags = ("ss_zero_terminal_snr", "modelspec.zero_terminal_snr")
    return found, "ztsnr" in header or any(metadata.get(f, "").lower() in YES for f in flags)


def _of_yaml(path: Path) -> set[str]:
    """Return the prediction in the original code's configuration, "eps" by default."""
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]
        kind = _kind(str(params.get("parameterization", "eps")))
    except (yaml.YAMLError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()  # another program's notes
    return {kind} if kind else set()


def identify(path: Path, asked: Prediction | None = None) -> tuple[str, Prediction]:
    """Return the catalogue's base of a single-file checkpoint and what it predicts.

    asked: what the user says that it predicts, which counts above the file's word.
    Raises ValueError for a model of another kind, and where neither says what cannot be guessed.
    """
    header = Header(path)
    width = _text_width(header)
    if "edm_vpred.sigma_max" in header and "edm_vpred.sigma_min" in header:  # CosXL
        low, high = (header.value(f"edm_vpred.sigma_{end}") for end in ("min", "max"))
        return BASES[width], Prediction(V, edm=(low, high))
    stated, zero_snr = markers(header)
    if asked:
        prediction = asked
    elif len(stated) == 1:
        prediction = Prediction(stated.pop(), zero_snr)
    else:
        prediction = _unstated(path, width, stated, zero_snr)
    if prediction.zero_snr and prediction.kind == EPSILON:
        raise ValueError(
            f"{path} has zero terminal SNR and predicts epsilon, from which the first step cannot "
            f"be made: if it predicts v, name it {path}:v-zsnr."
        )
    return (SD2_BASES[prediction.kind] if width == SD2_WIDTH else BASES[width]), prediction


def _unstated(path: Path, width: int, stated: set[str], zero_snr: bool) -> Prediction:
    """Return what a file without a clear word predicts; ask where its family leaves it open."""
    how = f"Say which, as {path}:v or {path}:epsilon."
    if stated:
        raise ValueError(f"{path} says both that it predicts v and that it predicts epsilon. {how}")
    if width == SD2_WIDTH:
        raise ValueError(
            f"{path} doesn't say whether it predicts v, as Stable Diffusion 2.1, or ε, as its "
            f"base. {how}"
        )
    if zero_snr or re.search(r"v[-_ ]?pred", path.stem.lower()):
        raise ValueError(
            f"{path} doesn't say what it predicts, and "
            f"{'its zero terminal SNR' if zero_snr else 'its name'} points to v, while its family "
            f"predicts ε. {how}"
        )
    return Prediction(EPSILON)


def _text_width(header: Header) -> int:
    """Return the width of the text that the UNet reads; raise ValueError for other files."""
    path = header.path
    if any("lora_" in name or ".lora" in name or ".hada_" in name for name in header):
        raise ValueError(
            f"{path} is a LoRA, not a model: name it in the LoRA field, beside the model it "
            "belongs to."
        )
    first = "model.diffusion_model.input_blocks.0.0.weight"
    ends = "transformer_blocks.0.attn2.to_k.weight"
    widths = {tuple(shape[-1:]) for name, shape in header.shapes.items() if name.endswith(ends)}
    unet = len(header.shapes.get(first, ())) == 4  # noqa: PLR2004 - dimensions of a convolution
    if unet and "edm_mean" not in header and len(widths) == 1:
        channels, (width,) = header.shapes[first][1], widths.pop() or (0,)
        if channels != 4:  # noqa: PLR2004 - of the latents
            raise ValueError(
                f"{path} takes {channels} channels: it changes a given picture (inpainting, for "
                "one) and makes none from text alone."
            )
        if width in (*BASES, SD2_WIDTH):
            return width
    try:
        kind = infer_diffusers_model_type(header)
    except IndexError:  # a known name with another number of dimensions
        kind = "v1"
    family = "of another family" if kind == "v1" else f"of the kind {kind}"
    raise ValueError(
        f"{path} is a checkpoint {family}; single files of Stable Diffusion 1, 2 and XL and their "
        "descendants can be loaded. Other models work as a folder in diffusers' layout."
    )


def load_single_file(
    source: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    asked: Prediction | None = None,
) -> DiffusionPipeline:
    """Load one .safetensors checkpoint with the configuration of the catalogue's base.

    source: a path, or owner/name/file of the hub; device: where it will compute.  Raises
    FileNotFoundError where it or the base's configuration cannot be reached, and ValueError where
    it cannot be used.
    """
    path = local_file(source)
    name, prediction = identify(path, asked)
    base = BACKBONES[name]
    dtype = dtype or default_dtype(device, base.pipeline)
    try:
        folder = DiffusionPipeline.download(
            base.source, allow_patterns=["*.json", "*.txt"], use_safetensors=True
        )
    except HUB_ERRORS as error:
        raise FileNotFoundError(
            f"{path} needs the configuration of {base.source}, which the hub doesn't serve to this "
            f"machine: {sentence(error)}"
        ) from error
    try:
        pipe = KINDS[base.pipeline].from_single_file(str(path), config=folder, dtype=dtype)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what a stranger's file makes diffusers raise
        raise ValueError(
            f"{path} lacks a part of {base.title} or doesn't fit it: {sentence(error)}"
        ) from error
    pipe.scheduler = prediction.scheduler(pipe.scheduler)
    pipe.register_to_config(_name_or_path=source)
    return pipe
