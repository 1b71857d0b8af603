"""The metrics that evaluate.py measures images by.

A metric turns images into arrays with a row for every image, which evaluate.py keeps on disk, and
summarises the rows of any resample. Its model is named with it, NAME=HUB_ID_OR_FOLDER.

Add a metric as a subclass of Metric here and an entry in METRICS, or elsewhere: `--metrics` takes
module:Class too.
"""

import hashlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModelWithProjection,
)

from noiserefine.checkpoint import HUB_ERRORS
from train.common import load_named

# Name -> the class, imported when it is asked for.
METRICS = {
    "judge": "train.emoji.judge:EmojiJudge",
    "inception": "train.metrics:Inception",
    "dinov2": "train.dinov2:DinoV2",
    "clip_score": "train.metrics:ClipScore",
    "pick_score": "train.metrics:PickScore",
    "hpsv2": "train.metrics:HPSv2",
    "aesthetic": "train.metrics:Aesthetic",
}
UNAVAILABLE = {  # metrics that people ask for, and why they are not offered
    "hpsv2.1": "its weights in safetensors have OpenCLIP's names, which transformers does not read",
    "image_reward": "the package image-reward 1.5 does not import with transformers 5",
}
IMAGE_FILES = (".jpg", ".jpeg", ".png")
REAL_BATCH = 64  # real images in one forward
INCEPTION_PARTS = 10  # of the images, whose inception scores are averaged

Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Figure:
    """How a figure of a metric is shown and resampled."""

    title: str
    digits: int = 2
    biased: bool = False  # whether repeated images bias it: its interval is then centred
    in_gap: bool = True  # whether guidance is expected to improve it


class Metric(ABC):
    """A measure of images: one or more figures."""

    default_source: ClassVar[str]  # hub id, folder, file or address of its model
    figures: ClassVar[dict[str, Figure]]
    about: dict[str, Any]  # the model it uses, for the record

    @abstractmethod
    def __init__(self, source: str, real_images: Path | None, device: torch.device): ...

    @abstractmethod
    def measure(self, images: list[Image.Image], prompts: list[str]) -> Rows:
        """Return arrays of one row for each image."""

    @abstractmethod
    def summarise(self, rows: Rows, groups: list[np.ndarray]) -> dict[str, float]:
        """Return the figures of the rows. groups: the indices of each prompt's rows."""


def load_metrics(names: list[str], real_images: Path | None, device: torch.device) -> list[Metric]:
    """Return the metrics, each NAME, module:Class, NAME=SOURCE or module:Class=SOURCE.

    Raise ValueError for an unknown one and for one that cannot run, saying why.
    """
    chosen = [name.partition("=")[::2] for name in names]
    for name, _ in chosen:
        if name in UNAVAILABLE:
            raise ValueError(
                f"The metric {name} cannot be measured: {UNAVAILABLE[name]}. "
                f"There are {', '.join(METRICS)}."
            )
        if name not in METRICS and ":" not in name:
            raise ValueError(f"There is no metric {name!r}; choose from {', '.join(METRICS)}.")
    kinds = [(load_named("metrics", METRICS.get(name, name)), source) for name, source in chosen]
    return [kind(source or kind.default_source, real_images, device) for kind, source in kinds]


@dataclass(frozen=True)
class Moments:
    """The Gaussian of real images' features: mean (D,) and covariance (D, D)."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def fitted(cls, features: np.ndarray) -> "Moments":
        """Return the moments of features (N, D)."""
        return cls(features.mean(0), np.cov(features, rowvar=False))

    @cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root of the covariance, (D, D)."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def frechet_distance(features: np.ndarray, real: Moments) -> float:
    """Return the Frechet distance of a Gaussian fitted to features (N, D) to the real one."""
    made = Moments.fitted(features)
    cross = np.sqrt(np.linalg.eigvalsh(real.root @ made.covariance @ real.root).clip(0)).sum()
    apart = ((made.mean - real.mean) ** 2).sum()
    return float(apart + np.trace(made.covariance) + np.trace(real.covariance) - 2 * cross)


def real_files(folder: Path | None, metric: str) -> list[Path]:
    """Return the real images that a metric compares with. Raise ValueError if there are none."""
    files = sorted(
        path for path in (folder.rglob("*") if folder else ()) if path.suffix.lower() in IMAGE_FILES
    )
    if not files:
        raise ValueError(
            f"The metric {metric} needs --real_images, a folder of JPEG or PNG files to compare "
            "with."
        )
    return files


def fitted_to(files: list[Path], features_of: Callable[[list[Image.Image]], np.ndarray]) -> Moments:
    """Return the moments of the features, (N, D), of image files."""
    batches = [files[i : i + REAL_BATCH] for i in range(0, len(files), REAL_BATCH)]
    features = [features_of([Image.open(path) for path in batch]) for batch in batches]
    return Moments.fitted(np.concatenate(features))


class Inception(Metric):
    """FID (Heusel et al. 2017) and inception score (Salimans et al. 2016, the mean of ten parts).

    The network is torch-fidelity's port of the original. It has 2,048 features: measure as many
    images as the paper's 30,000.
    """

    default_source = (
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth"
    )
    figures = {
        "fid": Figure("FID ↓", biased=True),
        "inception_score": Figure("inception score ↑", biased=True),
    }

    def __init__(self, source: str, real_images: Path | None, device: torch.device):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (  # noqa: PLC0415  # optional
                FeatureExtractorInceptionV3,
            )
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
            raise ValueError(
                "The metric inception needs torch-fidelity and a torchvision of this torch "
                f"({error}): pip install torch-fidelity."
            ) from error
        files = real_files(real_images, "inception")
        path = Path(source) if Path(source).is_file() else _download(source)
        with tempfile.TemporaryDirectory() as folder:
            # torch-fidelity unpickles the file: give it a copy that was read as tensors only.
            copy = Path(folder) / "inception.pth"
            torch.save(torch.load(path, map_location="cpu", weights_only=True), copy)
            self.network = (
                FeatureExtractorInceptionV3(
                    "inception-v3-compat",
                    ["2048", "logits_unbiased"],
                    feature_extractor_weights_path=str(copy),
                )
                .to(device)
                .eval()
            )
        self.about = {
            "inception": source,
            "inception_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "real_images": len(files),
        }
        self.device = device
        self.real = fitted_to(files, lambda images: self.measure(images, [])["inception_features"])

    @torch.inference_mode()
    def measure(self, images: list[Image.Image], prompts: list[str]) -> Rows:
        """Return the features, (N, 2048), and class logits, (N, 1008), of the images."""
        outputs = [
            self.network(
                torch.from_numpy(np.array(image.convert("RGB")))
                .permute(2, 0, 1)[None]
                .to(self.device)
            )
            for image in images
        ]
        features, logits = (
            torch.cat(parts).double().cpu().numpy() for parts in zip(*outputs, strict=True)
        )
        return {"inception_features": features, "inception_logits": logits.astype(np.float32)}

    def summarise(self, rows: Rows, groups: list[np.ndarray]) -> dict[str, float]:
        """Return the inception score and the FID."""
        scores = []
        # Shuffled: images of like prompts lie together, which lowers the score of a part.
        shuffled = np.random.default_rng(0).permutation(rows["inception_logits"])
        for logits in np.array_split(shuffled, INCEPTION_PARTS):
            log_p = F.log_softmax(torch.from_numpy(logits).double(), 1)
            scores.append(
                (log_p.exp() * (log_p - log_p.exp().mean(0, keepdim=True).log()))
                .sum(1)
                .mean()
                .exp()
                .item()
            )
        return {
            "fid": frechet_distance(rows["inception_features"], self.real),
            "inception_score": float(np.mean(scores)),
        }


class ClipScore(Metric):
    """CLIPScore, 100 max(cos, 0): how well an image and its prompt agree."""

    name = "clip_score"
    default_source = "openai/clip-vit-large-patch14"
    figures = {"clip_score": Figure("CLIPScore ↑")}

    def __init__(self, source: str, real_images: Path | None, device: torch.device):
        self.model, self.device = from_hub(CLIPModel, source).to(device), device
        processor = self.processor_of(source)
        self.processor = from_hub(AutoProcessor, processor)
        self.about = {
            self.name: source,
            f"{self.name}_processor": processor,
            f"{self.name}_revision": getattr(self.model.config, "_commit_hash", None),
        }

    def processor_of(self, source: str) -> str:
        """Return the hub id or folder of the model's preprocessing."""
        return source

    @torch.inference_mode()
    def measure(self, images: list[Image.Image], prompts: list[str]) -> Rows:
        """Return the score of each image with its prompt, (N,)."""
        batch = self.processor(
            text=prompts, images=images, padding=True, truncation=True, return_tensors="pt"
        ).to(self.device)
        scaled_cosines = self.model(**batch).logits_per_image.diagonal()
        return {self.name: self.score(scaled_cosines).double().cpu().numpy()}

    def score(self, scaled_cosines: torch.Tensor) -> torch.Tensor:
        """Return the score, (B,), of cosines that the model's own scale is multiplied to."""
        return 100 * (scaled_cosines / self.model.logit_scale.exp()).clamp(min=0)

    def summarise(self, rows: Rows, groups: list[np.ndarray]) -> dict[str, float]:
        """Return the mean score."""
        return {self.name: float(rows[self.name].mean())}


class PickScore(ClipScore):
    """PickScore (Kirstain et al. 2023): the scaled cosine of a CLIP trained on preferences."""

    name = "pick_score"
    default_source = "yuvalkirstain/PickScore_v1"
    figures = {"pick_score": Figure("PickScore ↑")}

    def processor_of(self, source: str) -> str:
        """Return the processor that the model's card names."""
        is_default = source == self.default_source
        return "laion/CLIP-ViT-H-14-laion2B-s32B-b79K" if is_default else source

    def score(self, scaled_cosines: torch.Tensor) -> torch.Tensor:
        """Return the cosines with the model's own scale."""
        return scaled_cosines


class HPSv2(PickScore):
    """HPSv2 (Wu et al. 2023), times 100, by its port to transformers' CLIP.

    It rises with guidance alone (Guidance Matters, 2602.22570): compare at equal guidance.
    """

    name = "hpsv2"
    default_source = "adams-story/HPSv2-hf"
    figures = {"hpsv2": Figure("HPSv2 ↑")}


class Aesthetic(Metric):
    """The LAION aesthetic score (Schuhmann 2022): linear layers on CLIP's image embedding."""

    default_source = "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE"
    figures = {"aesthetic": Figure("aesthetic score ↑")}

    def __init__(self, source: str, real_images: Path | None, device: torch.device):
        self.model, self.device = (
            from_hub(CLIPVisionModelWithProjection, source).to(device),
            device,
        )
        self.processor = from_hub(CLIPImageProcessorPil, source)
        folder = (
            Path(source)
            if Path(source).is_dir()
            else Path(snapshot_download(source, allow_patterns=["model.safetensors"]))
        )
        head = {
            name: value.to(device).float()
            for name, value in load_file(folder / "model.safetensors").items()
            if name.startswith("layers.")
        }
        numbers = sorted({int(name.split(".")[1]) for name in head})
        if not numbers:
            raise ValueError(
                f"{source} is no aesthetic predictor: it holds no linear layers beside CLIP."
            )
        self.head = [(head[f"layers.{i}.weight"], head[f"layers.{i}.bias"]) for i in numbers]
        self.about = {
            "aesthetic": source,
            "aesthetic_revision": getattr(self.model.config, "_commit_hash", None),
        }

    @torch.inference_mode()
    def measure(self, images: list[Image.Image], prompts: list[str]) -> Rows:
        """Return the aesthetic score of each image, (N,)."""
        pixels = self.processor(images=images, return_tensors="pt").pixel_values.to(self.device)
        score = F.normalize(self.model(pixels).image_embeds.float(), dim=1)
        for weight, bias in self.head:
            score = F.linear(score, weight, bias)
        return {"aesthetic": score[:, 0].double().cpu().numpy()}

    def summarise(self, rows: Rows, groups: list[np.ndarray]) -> dict[str, float]:
        """Return the mean score."""
        return {"aesthetic": float(rows["aesthetic"].mean())}


def _download(url: str) -> Path:
    """Return a downloaded file, cached by torch. Raise FileNotFoundError if it can't be reached."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            raise FileNotFoundError(
                f"{url} can't be downloaded ({error}); NAME=FILE in --metrics takes a local copy."
            ) from error
    return path


def from_hub(kind: Any, source: str) -> Any:
    """Return a model, in safetensors only, or a processor of a hub id or folder.

    Raise FileNotFoundError if it cannot be reached or read.
    """
    safetensors = {"use_safetensors": True} if hasattr(kind, "config_class") else {}
    try:
        loaded = kind.from_pretrained(source, **safetensors)
    except (*HUB_ERRORS, ValueError) as error:
        raise FileNotFoundError(
            f"{source} can't be loaded: it is neither a local folder with a model in safetensors "
            f"nor served by the hub ({str(error).splitlines()[0]}). NAME=FOLDER in --metrics takes "
            "a local copy."
        ) from error
    return loaded.eval() if isinstance(loaded, torch.nn.Module) else loaded
