"""FD-DINOv2, the Frechet distance in a network that was trained without labels.

torch-fidelity's extractor of that name runs the code of a hub repository and unpickles its weights;
transformers has the same network in safetensors.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Dinov2Model

from train.metrics import (
    Figure,
    Metric,
    Rows,
    fitted_to,
    frechet_distance,
    from_hub,
    real_files,
)

SIDE = 224  # pixels
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours


class DinoV2(Metric):
    """FD-DINOv2 (Stein et al. 2023): the class token of DINOv2 on 224 x 224 pixels.

    Images are resized by Pillow's bicubic filter, whatever their shape. The network has 1,024
    features: measure as many images as for an FID.
    """

    default_source = "facebook/dinov2-large"
    figures = {"fd_dinov2": Figure("FD-DINOv2 ↓", biased=True)}

    def __init__(self, source: str, real_images: Path | None, device: torch.device):
        files = real_files(real_images, "dinov2")
        self.network, self.device = from_hub(Dinov2Model, source).to(device), device
        self.about = {
            "dinov2": source,
            "dinov2_revision": getattr(self.network.config, "_commit_hash", None),
            "real_images": len(files),
        }
        self.real = fitted_to(files, lambda images: self.measure(images, [])["dinov2_features"])

    @torch.inference_mode()
    def measure(self, images: list[Image.Image], prompts: list[str]) -> Rows:
        """Return the features of the images, (N, D)."""
        resized = [
            np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
            for image in images
        ]
        pixels = torch.from_numpy(np.stack(resized)).to(self.device).movedim(-1, 1) / 255
        mean, deviation = (
            torch.tensor(values, device=self.device)[:, None, None] for values in (MEAN, DEVIATION)
        )
        features = self.network((pixels - mean) / deviation).pooler_output
        return {"dinov2_features": features.double().cpu().numpy()}

    def summarise(self, rows: Rows, groups: list[np.ndarray]) -> dict[str, float]:
        """Return the distance."""
        return {"fd_dinov2": frechet_distance(rows["dinov2_features"], self.real)}
