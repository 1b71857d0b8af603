"""The embedded models' metric: a classifier judges objects and backgrounds."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from train.emoji.classifier import Judge
from train.emoji.render import BACKGROUNDS, article, objects, prompt
from train.metrics import Figure, Metric, Rows, frechet_distance


class EmojiJudge(Metric):
    """Accuracy of object and background, Frechet distance and variance of the judge's features.

    The distance is to real held-out renders; the variance is that among the images of one prompt,
    summed over features. Prompts that name the object alone, as the SiT's do, say nothing of the
    background: its accuracy is that of the others.
    """

    default_source = str(Path(__file__).with_name("classifier.safetensors"))
    figures = {
        "object_accuracy": Figure("object accuracy ↑", digits=3),
        "background_accuracy": Figure("background accuracy ↑", digits=3, in_gap=False),
        "frechet_distance": Figure("Fréchet distance ↓", biased=True),
        "feature_variance": Figure("feature variance ↑", in_gap=False),
    }

    def __init__(self, source: str, real_images: Path | None, device: torch.device):
        sha256 = hashlib.sha256(Path(source).read_bytes()).hexdigest()
        self.about = {"judge": Path(source).name, "judge_sha256": sha256}
        self.judge = Judge.from_pretrained(Path(source))
        self.real = self.judge.real_moments()
        self.judge.to(device)
        self.pairs = {
            text: (i, np.nan)
            for i, thing in enumerate(objects())
            for text in (thing.name, article(thing.name))
        } | {prompt(i, j): (i, j) for i in range(len(objects())) for j in range(len(BACKGROUNDS))}

    def measure(self, images: list[Image.Image], prompts: list[str]) -> Rows:
        """Return features (N, 128) and what is correct (N, 2); raise for unknown prompts."""
        unknown = [text for text in prompts if text not in self.pairs]
        if unknown:
            raise ValueError(
                "The judge of the embedded model knows prompts such as "
                f"“{prompt(0, 0)}” only; “{unknown[0]}” is none of them. "
                "Choose other --metrics, or leave --prompts out."
            )
        objects_found, backgrounds_found, features = self.judge.judge(images)
        found = np.stack([objects_found, backgrounds_found], 1)
        truth = np.array([self.pairs[text] for text in prompts], float)
        correct = np.where(np.isnan(truth), np.nan, found == truth)
        return {"features": features, "correct": correct}

    @torch.inference_mode()
    def log_probability(self, features: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Return the log probability of each prompt's object and background, (N,).

        features: (N, 128), as `measure` returns them for images of the prompts.
        """
        x = torch.from_numpy(features).float().to(self.judge.real_mean.device)
        truth = np.array([self.pairs[text] for text in prompts], float)
        total = np.zeros(len(prompts))
        for head, classes in zip((self.judge.object, self.judge.background), truth.T, strict=True):
            named = np.flatnonzero(~np.isnan(classes))
            log_p = head(x).log_softmax(1).double().cpu().numpy()
            total[named] += log_p[named, classes[named].astype(int)]
        return total

    def summarise(self, rows: Rows, groups: list[np.ndarray]) -> dict[str, float]:
        """Return the figures of measured images, grouped by prompt."""
        features, (objects_right, backgrounds_right) = rows["features"], rows["correct"].T
        named = backgrounds_right[~np.isnan(backgrounds_right)]
        variances = [features[group].var(0, ddof=1).sum() for group in groups if len(group) > 1]
        return {
            "object_accuracy": float(objects_right.mean()),
            "background_accuracy": float(named.mean()) if len(named) else np.nan,
            "frechet_distance": frechet_distance(features, self.real),
            "feature_variance": float(np.mean(variances)) if variances else np.nan,
        }
