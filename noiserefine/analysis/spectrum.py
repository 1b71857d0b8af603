"""Frequency bands of noise, as arrays and as pictures (paper, section 5, A.2)."""

import matplotlib
import numpy as np
import torch
from PIL import Image

LOW_FREQUENCY = 0.3  # of the largest radius


def radius(height: int, width: int) -> torch.Tensor:
    """Return the radial frequency of each fft2 coefficient, (height, width), at most 1."""
    r = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])
    return r / r.max()


def band(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Return the part of x, (..., h, w), in the band [low, high) of radial frequency.

    An ideal filter; the band includes 1 where high = 1.
    """
    r = radius(*x.shape[-2:]).to(x.device)
    mask = (r >= low) & ((r < high) | (high >= 1))
    return torch.fft.ifft2(torch.fft.fft2(x.float()) * mask).real


def energy_below(x: torch.Tensor, cutoff: float = LOW_FREQUENCY) -> float:
    """Return the share of the energy of x, (..., h, w), below a radial frequency."""
    return (band(x, 0, cutoff).pow(2).sum() / x.float().pow(2).sum().clamp_min(1e-20)).item()


def density_ratio(x: torch.Tensor, cutoff: float = LOW_FREQUENCY) -> tuple[float, float | None]:
    """Return the share of the energy of x below a frequency, and how much denser it is there.

    The density is the energy of a coefficient; the ratio is None where there is none above.
    """
    r = radius(*x.shape[-2:])
    below = (r < cutoff) | (cutoff >= 1)
    count, share = below.sum().item(), energy_below(x, cutoff)
    if not 0 < count < r.numel() or share >= 1:
        return share, None
    return share, share / count / ((1 - share) / (r.numel() - count))


def low_frequency_difference(
    x_T: torch.Tensor, x_hat: torch.Tensor, cutoff: float = LOW_FREQUENCY
) -> np.ndarray:
    """Return |x_hat - x_T| below the cutoff, averaged over channels (figure 10).

    Both are (1, C, h, w); the result is (h, w).
    """
    difference = x_hat.float().cpu() - x_T.float().cpu()
    return band(difference[0], 0, cutoff).abs().mean(0).numpy()


def heat_map(values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Draw non-negative values (h, w) as a picture of `size` (width, height), black at 0."""
    scaled = values / max(float(values.max()), 1e-8)
    colours = (matplotlib.colormaps["magma"](scaled)[..., :3] * 255).round().astype(np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def overlaid(image: Image.Image, values: np.ndarray) -> Image.Image:
    """Return the image under the heat map of non-negative values (h, w)."""
    return Image.blend(image, heat_map(values, image.size), 0.6)
