"""Figure of `tl.switch_de`: expression along pseudotime with the fitted switches."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..data.transform import shifted_log
from ..errors import MissingKeyError
from ..slots import SWITCH_DE, counts
from .drawing import GREY, PALETTE, column_of, record_of, short, tidy

if TYPE_CHECKING:
    from anndata import AnnData

PANEL = (2.9, 2.3)  # inches
MOST_COLUMNS = 4
MOST_POINTS = 3000  # cells drawn in a panel


def switch_de(
    adata: "AnnData", *, genes: Sequence[str] | None = None, n_genes: int = 8, pseudotime_key: str | None = None
) -> np.ndarray:
    """Draws cells' log-normalised expression along pseudotime and the fitted sigmoid, a panel for each gene.

    Args:
        adata: cells with the results of `tl.switch_de`.
        genes: names; None is the `n_genes` with the smallest p-values, of equal ones the steepest.
        n_genes: how many, if `genes` is None.
        pseudotime_key: column of `obs`; None is what `tl.switch_de` was called with.

    Returns:
        The axes, one for each gene. A dashed line marks t0 where cells are.

    Raises:
        MissingKeyError: there are no results yet, or no such gene or pseudotime.
    """
    import matplotlib.pyplot as plt
    import pandas as pd

    if SWITCH_DE not in adata.uns:
        msg = f"pl.switch_de: uns has no {SWITCH_DE!r}; call tl.switch_de(adata) first"
        raise MissingKeyError(msg)
    table = adata.uns[SWITCH_DE]
    record = record_of(adata, "switch_de").get("params", {})
    key = pseudotime_key or str(record.get("pseudotime_key", "diffbio_pseudotime"))
    when = np.asarray(column_of(adata, key), float)
    if genes is None:
        order = np.lexsort((-np.abs(table["k"].to_numpy()), table["pvalue"].to_numpy()))
        genes = [str(name) for name in table.index[order[:n_genes]]]
    for name in genes:
        if name not in table.index or name not in adata.var_names:
            msg = f"pl.switch_de: there is no gene {name!r} among the {len(table):,} of {SWITCH_DE!r}"
            raise MissingKeyError(msg)
    finite = np.flatnonzero(np.isfinite(when))
    drawn = np.sort(np.random.default_rng(0).choice(finite, min(MOST_POINTS, len(finite)), replace=False))
    layer = record.get("layer")
    chosen = shifted_log(counts(adata, None if layer in (None, "none") else str(layer)))
    columns = adata.var_names.get_indexer_for(pd.Index(genes))
    part = chosen[drawn][:, columns]
    expression = np.asarray(part.toarray() if hasattr(part, "toarray") else part)
    across = min(len(genes), MOST_COLUMNS)
    down = -(-len(genes) // across)
    figure, grid = plt.subplots(
        down, across, figsize=(PANEL[0] * across, PANEL[1] * down), layout="constrained", squeeze=False
    )
    axes = list(grid.ravel())
    for spare in axes[len(genes) :]:
        figure.delaxes(spare)
    axes = axes[: len(genes)]
    low, high = float(when[finite].min()), float(when[finite].max())
    times = np.linspace(low, high, 300)
    for ax, name, values in zip(axes, genes, expression.T, strict=True):
        fit = table.loc[name]
        ax.scatter(when[drawn], values, s=4, color=GREY, alpha=0.6, linewidth=0, rasterized=True)
        exponent = np.clip(-fit["k"] * (times - fit["t0"]), -700, 700)
        ax.plot(times, 2 * fit["mu0"] / (1 + np.exp(exponent)), color=PALETTE[4], lw=1.8)
        if low <= fit["t0"] <= high:
            ax.axvline(fit["t0"], color=PALETTE[0], lw=0.8, ls="--")
        ax.set_title(f"{short(name)}  k {fit['k']:.2g}, q {fit['qvalue']:.1g}")
        ax.tick_params(labelsize=7)
        tidy(ax)
    for ax in axes[-across:]:
        ax.set_xlabel("pseudotime", fontsize=8)
    for ax in axes[::across]:
        ax.set_ylabel("log expression", fontsize=8)
    return np.asarray(axes)
