"""Matplotlib figures of how refined noise differs from Gaussian noise, for light and dark pages."""

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from noiserefine.analysis.spectrum import LOW_FREQUENCY, radius

INK, GAUSSIAN, REFINED = "#8a8580", "#7f8fa6", "#f97316"


def as_picture(figure: Figure) -> Image.Image:
    """Return the figure as an RGBA picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba()))


def axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """Return a figure without background and its one pair of labelled axes."""
    figure = Figure(figsize=(5, 3.2), layout="constrained", facecolor="none", dpi=150)
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.set_title(title, color=INK)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    return figure, axes


def difference_histogram(x_T: torch.Tensor, x_hat: torch.Tensor, other: torch.Tensor) -> Figure:
    """Plot how far each entry of x_T moved, beside its distance to another noise (figure 9)."""
    figure, ax = axes(
        "How far each entry of x_T moved", "absolute difference", "share of the entries"
    )
    edges = np.linspace(0, 4, 41)
    for y, colour, label in (
        (other, GAUSSIAN, "to another noise"),
        (x_hat, REFINED, "to the refined noise"),
    ):
        difference = (y.float().cpu() - x_T.float().cpu()).abs().flatten().numpy()
        ax.hist(
            difference.clip(max=edges[-1]),
            edges.tolist(),
            weights=np.full(difference.size, 1 / difference.size),
            color=colour,
            alpha=0.7,
            label=f"{label}, mean {difference.mean():.2f}",
        )
    ax.legend(frameon=False, labelcolor=INK)
    return figure


def radial_spectrum(
    x_T: torch.Tensor, x_hat: torch.Tensor, cutoff: float = LOW_FREQUENCY, count: int = 12
) -> Figure:
    """Plot the energy of the correction x_hat - x_T and of x_T over frequency (figure 9).

    Frequencies below the cutoff are shaded.
    """
    figure, ax = axes(
        "Where the correction is",
        "radial frequency, of the largest",
        "mean energy of a coefficient",
    )
    r = radius(*x_T.shape[-2:]).flatten().numpy()
    edges = np.linspace(0, 1, count + 1)
    which = np.digitize(r, edges[1:-1])
    bins = np.unique(which)
    for y, colour, label in (
        (x_T, GAUSSIAN, "plain noise"),
        (x_hat.float().cpu() - x_T.float().cpu(), REFINED, "the correction"),
    ):
        energy = (
            torch.fft.fft2(y.float().cpu(), norm="ortho")
            .abs()
            .pow(2)
            .mean((0, 1))
            .flatten()
            .numpy()
        )
        ax.semilogy(
            [r[which == i].mean() for i in bins],
            [energy[which == i].mean() for i in bins],
            color=colour,
            marker="o",
            label=label,
        )
    ax.axvspan(0, cutoff, color=REFINED, alpha=0.1, lw=0)
    ax.legend(frameon=False, labelcolor=INK)
    return figure
