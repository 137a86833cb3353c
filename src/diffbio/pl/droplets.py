"""Figure of the cells called among droplets."""

from typing import TYPE_CHECKING

import numpy as np

from .. import slots
from ..data.droplets import droplet_counts
from .drawing import GREY, PALETTE, column_of, new_axes, tidy

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes


def call_cells(adata: "AnnData", *, ax: "Axes | None" = None) -> "Axes":
    """Draws the droplets' totals against their ranks, those called cells by `pp.call_cells` in colour."""
    ax = ax or new_axes((4.6, 3.4))
    called = column_of(adata, slots.IS_CELL).to_numpy(dtype=bool)
    totals = np.asarray(droplet_counts(adata).sum(axis=1)).ravel()
    order = np.argsort(-totals, kind="stable")
    rank, shown = np.arange(1, len(order) + 1), totals[order] > 0
    for cells, paint, name in ((False, GREY, "soup"), (True, PALETTE[0], "cells")):
        rows = shown & (called[order] == cells)
        label = f"{int((called == cells).sum()):,} {name}"
        ax.scatter(rank[rows], totals[order][rows], s=6, color=paint, linewidth=0, rasterized=True, label=label)
    ax.set(xscale="log", yscale="log", xlabel="rank of the droplet", ylabel="counts", title="cells among droplets")
    ax.legend(frameon=False, fontsize=8, markerscale=2)
    return tidy(ax)
