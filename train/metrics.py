"""What images are measured by.

Each metric gives arrays with a row for every image, which evaluate.py keeps on disk, and makes its figures
of the rows of any resample.  A model of the hub is named with the metric, NAME=ID_OR_FOLDER in place of its own.
"""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

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
from train.emoji.classifier import Judge
from train.emoji.render import BACKGROUNDS, objects, prompt

PICK_SCORE, PICK_PROCESSOR = (
    "yuvalkirstain/PickScore_v1",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
)  # the model's card names both
Rows = dict[str, np.ndarray]


class Metric(Protocol):
    about: dict[str, Any]  # the model it uses, for the record

    def measure(self, images: list[Image.Image], prompts: list[str]) -> Rows:
        """Arrays of one row an image."""

    def figures(self, rows: Rows, groups: list[np.ndarray]) -> dict[str, float]:
        """Figures of the rows; groups: the rows of each prompt."""


def frechet_distance(features: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """Between Gaussians fitted to features (N, D) and given by mean (D,) and covariance (D, D)."""
    ours = np.cov(features, rowvar=False)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ ours @ root).clip(0)).sum()
    return float(
        ((features.mean(0) - mean) ** 2).sum() + np.trace(ours) + np.trace(covariance) - 2 * cross
    )


class EmojiJudge:
    """Of the embedded model: whether object and background are those of the prompt, the Frechet distance of the judge's features
    to those of real held-out renders, and their variance among the images of one prompt, summed over features."""

    def __init__(self, source: str, real_images: Path | None, device: torch.device):
        self.about = {"judge": Path(source).name}
        self.judge = Judge.from_pretrained(Path(source))
        self.real = (
            self.judge.real_mean.double().numpy(),
            self.judge.real_covariance.double().numpy(),
        )
        self.pairs = {
            prompt(i, j): (i, j) for i in range(len(objects())) for j in range(len(BACKGROUNDS))
        }

    def measure(self, images: list[Image.Image], prompts: list[str]) -> Rows:
        unknown = [text for text in prompts if text not in self.pairs]
        if unknown:
            raise ValueError(
                f"The judge of the embedded model knows prompts such as “{next(iter(self.pairs))}” only; “{unknown[0]}” is none of them. "
                "Choose other --metrics, or leave --prompts out."
            )
        thing, colour, features = self.judge.judge(images)
        return {
            "features": features,
            "correct": np.stack([thing, colour], 1) == [self.pairs[text] for text in prompts],
        }

    def figures(self, rows: Rows, groups: list[np.ndarray]) -> dict[str, float]:
        features, (thing, colour) = rows["features"], rows["correct"].mean(0).tolist()
        variances = [features[group].var(0, ddof=1).sum() for group in groups if len(group) > 1]
        return {
            "object_accuracy": thing,
            "background_accuracy": colour,
            "frechet_distance": frechet_distance(features, *self.real),
            "feature_variance": float(np.mean(variances)) if variances else np.nan,
        }


class Inception:
    """FID (Heusel et al. 2017) to a folder of real images and the inception score (Salimans et al. 2016, the mean of ten parts), by
    torch-fidelity's port of the original Inception network.  It has 2,048 features: give as many images as the paper's 30,000."""

    def __init__(self, source: str, real_images: Path | None, device: torch.device):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
            raise ValueError(
                f"The metric inception needs torch-fidelity and a torchvision of this torch ({error}): pip install torch-fidelity."
            ) from error
        if real_images is None or not (
            files := sorted(
                path
                for path in real_images.rglob("*")
                if path.suffix.lower() in (".jpg", ".jpeg", ".png")
            )
        ):
            raise ValueError(
                "The metric inception needs --real_images, a folder of JPEG or PNG files to compare with."
            )
        path = Path(source) if Path(source).is_file() else download(source)
        with tempfile.TemporaryDirectory() as folder:
            # torch-fidelity unpickles what it is given: it gets a copy that was read as tensors only.
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
        real = np.concatenate(
            [
                self.measure([Image.open(path) for path in files[i : i + 64]], [])[
                    "inception_features"
                ]
                for i in range(0, len(files), 64)
            ]
        )
        self.real = real.mean(0), np.cov(real, rowvar=False)

    @torch.inference_mode()
    def measure(self, images: list[Image.Image], prompts: list[str]) -> Rows:
        outputs = [
            self.network(
                torch.from_numpy(np.array(image.convert("RGB")))
                .permute(2, 0, 1)[None]
                .to(self.device)
            )
            for image in images
        ]
        features, logits = (torch.cat(parts).double().cpu().numpy() for parts in zip(*outputs))
        return {"inception_features": features, "inception_logits": logits.astype(np.float32)}

    def figures(self, rows: Rows, groups: list[np.ndarray]) -> dict[str, float]:
        scores = []
        shuffled = np.random.default_rng(0).permutation(
            rows["inception_logits"]
        )  # images of like prompts lie together, which lowers the score
        for logits in np.array_split(shuffled, 10):
            log_p = F.log_softmax(torch.from_numpy(logits).double(), 1)
            scores.append(
                (log_p.exp() * (log_p - log_p.exp().mean(0, keepdim=True).log()))
                .sum(1)
                .mean()
                .exp()
                .item()
            )
        return {
            "fid": frechet_distance(rows["inception_features"], *self.real),
            "inception_score": float(np.mean(scores)),
        }


class Clip:
    """CLIPScore, 100 max(cos, 0), or PickScore, the model's scaled cosine: how well an image and its prompt agree."""

    def __init__(self, name: str, processor: str, source: str, device: torch.device):
        self.name, self.model, self.device = name, from_hub(CLIPModel, source).to(device), device
        self.processor = from_hub(AutoProcessor, processor)
        self.about = {
            name: source,
            f"{name}_processor": processor,
            f"{name}_revision": getattr(self.model.config, "_commit_hash", None),
        }

    @torch.inference_mode()
    def measure(self, images: list[Image.Image], prompts: list[str]) -> Rows:
        batch = self.processor(
            text=prompts, images=images, padding=True, truncation=True, return_tensors="pt"
        ).to(self.device)
        output = self.model(**batch)
        scores = output.logits_per_image.diagonal()  # cosines times the model's own scale
        if self.name == "clip_score":
            scores = 100 * (scores / self.model.logit_scale.exp()).clamp(min=0)
        return {self.name: scores.double().cpu().numpy()}

    def figures(self, rows: Rows, groups: list[np.ndarray]) -> dict[str, float]:
        return {self.name: float(rows[self.name].mean())}


class Aesthetic:
    """The LAION aesthetic score (Schuhmann 2022): linear layers on CLIP's image embedding."""

    def __init__(self, source: str, real_images: Path | None, device: torch.device):
        self.model, self.device = from_hub(CLIPVisionModelWithProjection, source).to(device), device
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
        pixels = self.processor(images=images, return_tensors="pt").pixel_values.to(self.device)
        score = F.normalize(self.model(pixels).image_embeds.float(), dim=1)
        for weight, bias in self.head:
            score = F.linear(score, weight, bias)
        return {"aesthetic": score[:, 0].double().cpu().numpy()}

    def figures(self, rows: Rows, groups: list[np.ndarray]) -> dict[str, float]:
        return {"aesthetic": float(rows["aesthetic"].mean())}


def download(url: str) -> Path:
    """A file of the web, kept in torch's cache. Raises FileNotFoundError where it can't be reached."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            raise FileNotFoundError(
                f"{url} can't be downloaded ({error}); NAME=FILE in --metrics takes a copy that is here."
            ) from error
    return path


def from_hub(kind: type, source: str) -> Any:
    """A model or processor of a hub id or folder, in safetensors only. Raises FileNotFoundError where it can't be reached or read."""
    try:
        loaded = kind.from_pretrained(
            source, **({"use_safetensors": True} if hasattr(kind, "config_class") else {})
        )  # type: ignore[attr-defined]
    except (*HUB_ERRORS, ValueError) as error:
        raise FileNotFoundError(
            f"{source} can't be loaded: it is no folder here with a model in safetensors, and the hub doesn't serve it to this "
            f"machine ({str(error).splitlines()[0]}). NAME=FOLDER in --metrics takes a copy that is here."
        ) from error
    return loaded.eval() if isinstance(loaded, torch.nn.Module) else loaded


# Name -> the model it uses if none is named, and how it is made of (source, folder of real images, device).
METRICS: dict[str, tuple[str, Callable[[str, Path | None, torch.device], Metric]]] = {
    "judge": (str(Path(__file__).parent / "emoji" / "classifier.safetensors"), EmojiJudge),
    "inception": (
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        Inception,
    ),
    "clip_score": (
        "openai/clip-vit-large-patch14",
        lambda source, _, device: Clip("clip_score", source, source, device),
    ),
    "pick_score": (
        PICK_SCORE,
        lambda source, _, device: Clip(
            "pick_score", PICK_PROCESSOR if source == PICK_SCORE else source, source, device
        ),
    ),
    "aesthetic": ("shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE", Aesthetic),
}
CANNOT = {  # of the paper's metrics, and why
    "hpsv2": "HPSv2's weights are published as an OpenCLIP checkpoint only, not in safetensors or transformers' format",
    "image_reward": "the package image-reward 1.5 does not import with transformers 5",
}


def load_metrics(names: list[str], real_images: Path | None, device: torch.device) -> list[Metric]:
    """The metrics, each NAME or NAME=SOURCE. Raises ValueError for one that there is not or that cannot run, saying why."""
    chosen = [name.partition("=")[::2] for name in names]
    for name, _ in chosen:
        if name in CANNOT:
            raise ValueError(
                f"The metric {name} cannot be measured: {CANNOT[name]}. There are {', '.join(METRICS)}."
            )
        if name not in METRICS:
            raise ValueError(f"There is no metric {name!r}; choose of {', '.join(METRICS)}.")
    return [
        METRICS[name][1](source or METRICS[name][0], real_images, device) for name, source in chosen
    ]
