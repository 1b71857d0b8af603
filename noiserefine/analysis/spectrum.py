"""Where refined noise differs from Gaussian noise: frequency bands, as arrays and as pictures (paper, section 5, A.2)."""

import matplotlib
import numpy as np
import torch
from PIL import Image

LOW_FREQUENCY = 0.3  # of the largest radius


def radius(height: int, width: int) -> torch.Tensor:
    """Radial frequency of each coefficient of fft2, (height, width), scaled so that the largest is 1."""
    r = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])
    return r / r.max()


def band(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The part of x, (..., h, w), whose radial frequency lies in [low, high), or [low, 1] for high = 1: an ideal filter."""
    r = radius(*x.shape[-2:]).to(x.device)
    mask = (r >= low) & ((r < high) | (high >= 1))
    return torch.fft.ifft2(torch.fft.fft2(x.float()) * mask).real


def energy_below(x: torch.Tensor, cutoff: float = LOW_FREQUENCY) -> float:
    """The share of the energy of x, (..., h, w), at radial frequencies below the cutoff."""
    return (band(x, 0, cutoff).pow(2).sum() / x.float().pow(2).sum().clamp_min(1e-20)).item()


def low_frequency_difference(
    x_T: torch.Tensor, x_hat: torch.Tensor, cutoff: float = LOW_FREQUENCY
) -> np.ndarray:
    """|x_hat - x_T| below the cutoff, averaged over channels: (h, w) of one image given as (1, C, h, w) (figure 10)."""
    difference = x_hat.float().cpu() - x_T.float().cpu()
    return band(difference[0], 0, cutoff).abs().mean(0).numpy()


def heat_map(values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """An array (h, w) of values from 0 up as a picture of the given width and height, black at 0 and bright at its maximum."""
    scaled = values / max(float(values.max()), 1e-8)
    colours = (matplotlib.colormaps["magma"](scaled)[..., :3] * 255).round().astype(np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)
