"""Figure of `tl.differential_distribution`: the distributions of genes in both groups."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..data.transform import shifted_log
from ..errors import MissingKeyError
from ..slots import DIFFERENTIAL_DISTRIBUTION, counts
from .drawing import PALETTE, column_of, legend, record_of, short, tidy

if TYPE_CHECKING:
    from anndata import AnnData

PANEL = (2.9, 2.1)  # inches
MOST_COLUMNS = 4
BINS = 30


def differential_distribution(adata: "AnnData", *, genes: Sequence[str] | None = None, n_genes: int = 8) -> np.ndarray:
    """Draws histograms of log-normalised expression above 0 in both groups, and the shares of zeros as bars at 0.

    Args:
        adata: cells with the results of `tl.differential_distribution`.
        genes: names; None is the `n_genes` with the smallest p-values, of equal ones those with the largest statistic.
        n_genes: how many, if `genes` is None.

    Returns:
        The axes, one for each gene. All heights are shares of a group's cells.

    Raises:
        MissingKeyError: there are no results yet, or no such gene.
    """
    import matplotlib.pyplot as plt
    import pandas as pd

    who, key = "pl.differential_distribution", DIFFERENTIAL_DISTRIBUTION
    if key not in adata.uns:
        msg = f"{who}: uns has no {key!r}; call tl.differential_distribution(adata, groupby) first"
        raise MissingKeyError(msg)
    table, record = adata.uns[key], record_of(adata, key)
    if genes is None:
        order = np.lexsort((-table["statistic"].to_numpy(), table["pvalue"].to_numpy()))
        genes = [str(name) for name in table.index[order[:n_genes]]]
    for name in genes:
        if name not in table.index or name not in adata.var_names:
            msg = f"{who}: there is no gene {name!r} among the {len(table):,} of {key!r}"
            raise MissingKeyError(msg)
    names = [str(name) for name in record["groups"]]
    column = np.asarray(column_of(adata, str(record["groupby"])).astype(str))
    layer = str(record["layer"])
    normalized = shifted_log(counts(adata, None if layer == "X" else layer))
    columns = adata.var_names.get_indexer_for(pd.Index(genes))
    parts = []
    for name in names:
        part = normalized[np.flatnonzero(column == name)][:, columns]
        parts.append(np.asarray(part.toarray() if hasattr(part, "toarray") else part))
    across = min(len(genes), MOST_COLUMNS)
    down = -(-len(genes) // across)
    size = (PANEL[0] * across + 1.0, PANEL[1] * down)
    figure, grid = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    axes = list(grid.ravel())
    for spare in axes[len(genes) :]:
        figure.delaxes(spare)
    axes = axes[: len(genes)]
    for ax, gene, *values in zip(axes, genes, *(part.T for part in parts), strict=True):
        highest = max(float(max(x.max() for x in values)), 1e-3)
        edges = np.linspace(0, highest, BINS + 1)
        width = edges[1]
        for group, x in enumerate(values):
            share = np.histogram(x[x > 0], edges)[0] / len(x)
            ax.stairs(share, edges, fill=True, color=PALETTE[group], alpha=0.3)
            ax.stairs(share, edges, color=PALETTE[group], lw=1.2)
            ax.bar(-(3 - group * 1.2) * width, (x == 0).mean(), 1.1 * width, color=PALETTE[group])
        found = table.loc[gene]
        pattern = f"{found['pattern']}, " if found["pattern"] else ""
        ax.set_title(f"{short(gene)}  {pattern}q {found['qvalue']:.1g}")
        ticks = [tick for tick in ax.get_xticks() if 0 < tick <= highest]
        ax.set_xticks([-2.4 * width, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
        ax.tick_params(labelsize=7)
        tidy(ax)
    for ax in axes[-across:]:
        ax.set_xlabel("log expression", fontsize=8)
    for ax in axes[::across]:
        ax.set_ylabel("share of cells", fontsize=8)
    legend(axes[across - 1], [short(name) for name in names], list(PALETTE[:2]))
    return np.asarray(axes)
