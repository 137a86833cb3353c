"""Figure of simulated beside real cells: the statistics by which a simulator is judged."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.source import counts_of
from ..math.count_statistics import count_statistics, statistics_ks
from .drawing import PALETTE, tidy

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

POINTS = 4000  # genes that are drawn
NAMES = ("real", "simulated")
PAINT = ("0.55", PALETTE[0])
BINS = 60


def simulation(real: "AnnData | Any", simulated: "AnnData | Any", *, layer: str | None = None) -> np.ndarray:
    """Draws simulated beside real counts: mean and variance, zeros and mean, library size, correlation of genes.

    Titles hold the Kolmogorov-Smirnov distance of the two distributions (of the variance: about its trend over the
    mean), 0 where they are equal; see `diffbio.math.count_statistics`. The genes need not be the same.

    Args:
        real: an AnnData, or counts (cells, genes), dense or sparse.
        simulated: the same, say of `diffbio.data.simulated`.
        layer: of the counts in both; None is X.

    Returns:
        Four axes.
    """
    import matplotlib.pyplot as plt

    counts = [counts_of(x, layer=layer) if hasattr(x, "obs") else x for x in (real, simulated)]
    first = count_statistics(counts[0])
    both = (first, count_statistics(counts[1], trend=first["trend"]))
    distance = statistics_ks(*both)
    _, axes = plt.subplots(2, 2, figsize=(7.6, 6.2), layout="constrained")
    top, bottom = axes
    _points(top[0], [(s["mean"], s["variance"]) for s in both])
    grid = np.linspace(first["mean"].min(), first["mean"].max(), 100)
    top[0].plot(grid, np.polyval(first["trend"], grid), color="k", lw=0.9, label="trend of the real")
    top[0].set(xlabel="log10 mean", ylabel="log10 variance", title=f"variance: KS {distance['mean-variance']:.3f}")
    _points(top[1], [(s["mean"], s["gene zeros"][s["used"]]) for s in both])
    top[1].set(xlabel="log10 mean", ylabel="cells without a count", title=f"zeros: KS {distance['gene zeros']:.3f}")
    _densities(bottom[0], [s["library"] for s in both])
    bottom[0].set(xlabel="log10 library size", title=f"library size: KS {distance['library']:.3f}")
    _densities(bottom[1], [s["correlation"] for s in both])
    bottom[1].set_yscale("log")
    bottom[1].set(xlabel="correlation of two genes", title=f"correlation: KS {distance['correlation']:.3f}")
    for ax in axes.ravel():
        tidy(ax)
    top[0].legend(frameon=False, fontsize=8, markerscale=3)
    bottom[0].legend(frameon=False, fontsize=8)
    return np.asarray(axes.ravel())


def _points(ax: "Axes", values: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Genes as points, at most so many; the real ones larger and below."""
    for (x, y), name, paint, size in zip(values, NAMES, PAINT, (9.0, 2.5), strict=True):
        shown = np.random.default_rng(0).permutation(len(x))[:POINTS]
        ax.scatter(x[shown], y[shown], s=size, color=paint, linewidth=0, rasterized=True, label=name)


def _densities(ax: "Axes", values: list[np.ndarray]) -> None:
    """Histograms of unit area, the real one filled."""
    bins = np.linspace(min(v.min() for v in values), max(v.max() for v in values) + 1e-9, BINS)
    style: Any = {"bins": bins.tolist(), "density": True}
    ax.hist(values[0], histtype="stepfilled", color=PAINT[0], alpha=0.5, label=NAMES[0], **style)
    ax.hist(values[1], histtype="step", color=PAINT[1], lw=1.4, label=NAMES[1], **style)
    ax.set_ylabel("density")
