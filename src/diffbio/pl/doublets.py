"""Figures of doublet detection."""

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import slots
from ..errors import MissingKeyError
from .drawing import GREY, PALETTE, column_of, short, tidy

if TYPE_CHECKING:
    from anndata import AnnData

BINS = 60
MOST_BATCHES = 8  # drawn one below the other


def doublets(adata: "AnnData") -> "np.ndarray":
    """Draws the scores of `pp.doublets`: histograms of the cells and of the simulated doublets, with the threshold.

    A threshold to trust lies in the valley between the two modes on the right, and beyond the bulk on the left.

    Returns:
        The axes (batches, 2): cells with a logarithmic axis, simulated doublets; the first eight batches.
    """
    import matplotlib.pyplot as plt

    scores = column_of(adata, slots.DOUBLET_SCORE).to_numpy(dtype=float)
    called = column_of(adata, slots.PREDICTED_DOUBLET).to_numpy(dtype=bool)
    record: Any = adata.uns.get("diffbio", {})
    for name in (slots.DOUBLET_THRESHOLDS, slots.SIMULATED_DOUBLETS):
        if name not in record:
            msg = f"uns['diffbio'] has no {name!r}; run pp.doublets first"
            raise MissingKeyError(msg)
    table, simulated = record[slots.DOUBLET_THRESHOLDS], record[slots.SIMULATED_DOUBLETS]
    settings: Any = record.get("doublets", {})
    key: Any = settings.get("params", {}).get("batch_key") if hasattr(settings, "get") else None
    of_cell = np.full(adata.n_obs, "all", object)
    if key is not None and key in adata.obs:
        of_cell = column_of(adata, key).astype(str).to_numpy()
    n_rows = min(len(table), MOST_BATCHES)
    figure = plt.figure(figsize=(8.4, 2.9 * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, 2, squeeze=False)
    for b in range(n_rows):
        name = str(table.index[b])
        cells = (of_cell == name) & np.isfinite(scores)
        doubles = np.asarray(simulated["scores"])[np.asarray(simulated["batch"]) == b]
        row = table.iloc[b]
        everything = np.concatenate([scores[cells], doubles])
        bins = np.linspace(min(0.0, everything.min()), everything.max(), BINS + 1)
        where = "" if len(table) == 1 else f"{short(name)}: "
        share = called[cells].mean() if cells.any() else 0.0  # of the cells that are drawn; some may have been dropped
        parts = [scores[cells & ~called], scores[cells & called]]
        axes[b, 0].hist(parts, bins=bins, stacked=True, color=[PALETTE[0], PALETTE[4]], label=["kept", "called"])
        axes[b, 0].set(yscale="log", title=f"{where}{share:.1%} of {cells.sum():,} cells called")
        axes[b, 1].hist(doubles, bins=bins, color=GREY)
        axes[b, 1].set(title=f"{where}{row['detectable_share']:.0%} of {len(doubles):,} simulated doublets above")
        for ax, what in zip(axes[b], ("cells", "simulated doublets"), strict=True):
            kind = "in the valley" if row["automatic"] else "not from a valley"
            label = f"threshold {row['threshold']:.2f}, {kind}"
            ax.axvline(row["threshold"], color="black", linewidth=1, linestyle="--", label=label)
            ax.set(xlabel="doublet score", ylabel=what)
            tidy(ax)
            ax.legend(frameon=False, fontsize=8)
    return np.asarray(axes)
