"""Figures of quality control."""

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import slots
from ..errors import MissingKeyError
from .drawing import GREY, PALETTE, column_of, short, tidy

if TYPE_CHECKING:
    from anndata import AnnData

LABELS = ("counts", "detected genes", "mitochondrial share")
LIMITS = (("counts_min", "counts_max"), ("genes_min", "genes_max"), ("mitochondrial_max",))


def quality(adata: "AnnData") -> "np.ndarray":
    """Draws what `pp.quality` found: histograms of the metrics with thresholds, and share against counts by weight.

    Returns:
        The axes, in one array: a histogram for each metric, then the scatter plot.
    """
    import matplotlib.pyplot as plt

    weight = column_of(adata, slots.CELL_WEIGHT).to_numpy(dtype=float)
    kept = column_of(adata, slots.QUALITY_PASS).to_numpy(dtype=bool)
    table: Any = adata.uns.get("diffbio", {}).get(slots.QUALITY_THRESHOLDS)
    if table is None:
        msg = f"uns['diffbio'] has no {slots.QUALITY_THRESHOLDS!r}; run pp.quality first"
        raise MissingKeyError(msg)
    columns = [name for name in slots.QUALITY_METRICS if name in adata.obs]
    figure = plt.figure(figsize=(3.7 * (len(columns) + 1), 3.2), layout="constrained")
    axes = figure.subplots(1, len(columns) + 1)
    for k, name in enumerate(columns):
        _histogram(axes[k], column_of(adata, name).to_numpy(dtype=float), kept, LABELS[k], log=k < 2)
        limits = [limit for limit in LIMITS[k] if limit in table]
        for b, batch in enumerate(table.index):
            paint = "black" if len(table) == 1 else PALETTE[b % len(PALETTE)]
            for i, limit in enumerate(limits):
                name_of = None if i or k < len(columns) - 1 or len(table) == 1 or len(table) > 8 else short(str(batch))
                axes[k].axvline(table[limit].iloc[b], color=paint, linewidth=1, linestyle="--", label=name_of)
    axes[len(columns) - 1].legend(frameon=False, fontsize=8)
    _weights(figure, axes[-1], adata, columns, weight)
    figure.suptitle(f"{kept.sum():,} of {len(kept):,} cells within all thresholds", fontsize=10)
    return np.asarray(axes)


def _histogram(ax: Any, values: np.ndarray, kept: np.ndarray, label: str, *, log: bool) -> None:
    """Cells that pass above those that do not; few failing cells stay visible on a log scale of cells."""
    shown = np.maximum(values, 1.0) if log else values
    low, high = float(shown.min()), float(shown.max())
    if high <= low:
        high = low + 1.0
    from matplotlib.ticker import NullFormatter

    bins = np.geomspace(low, high, 61) if log else np.linspace(low, high, 61)
    ax.hist([shown[kept], shown[~kept]], bins=bins, stacked=True, color=[PALETTE[0], PALETTE[4]],
            label=["within thresholds", "outside"])  # fmt: skip
    if log:
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())  # where a decade is wide, its labels would overlap
    ax.set(xlabel=label, ylabel="cells")
    tidy(ax)


def _weights(figure: Any, ax: Any, adata: "AnnData", columns: list[str], weight: np.ndarray) -> None:
    y_name = columns[-1]
    x, y = (column_of(adata, name).to_numpy(dtype=float) for name in (columns[0], y_name))
    order = np.argsort(-weight, kind="stable")  # doubtful cells on top
    size = float(np.clip(16_000 / max(len(x), 1), 0.5, 12))
    drawn = ax.scatter(
        np.maximum(x, 1.0)[order], y[order], c=weight[order], cmap="viridis", vmin=0, vmax=1, s=size, linewidth=0,
        rasterized=True,
    )  # fmt: skip
    figure.colorbar(drawn, ax=ax, label="cell weight").outline.set_edgecolor(GREY)
    ax.set(xscale="log", xlabel=LABELS[0], ylabel=LABELS[len(columns) - 1])
    if len(columns) == 2:
        ax.set_yscale("log")
    tidy(ax)
