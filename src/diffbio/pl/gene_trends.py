"""Figure of `tl.gene_trends`: expression along pseudotime, a curve for each fate."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import MissingKeyError
from ..slots import GENE_TRENDS
from .drawing import color_of, legend, short, tidy

if TYPE_CHECKING:
    from anndata import AnnData

PANEL = (2.9, 2.3)  # inches
MOST_COLUMNS = 4


def gene_trends(
    adata: "AnnData", *, genes: Sequence[str] | None = None, fates: Sequence[str] | None = None
) -> np.ndarray:
    """Draws log-normalised expression along pseudotime, a curve with its band for each fate, a panel for each gene.

    Args:
        adata: cells with the results of `tl.gene_trends`.
        genes: of those, in this order; None is all.
        fates: of those; None is all.

    Returns:
        The axes, one for each gene.

    Raises:
        MissingKeyError: there are no trends yet, or none of such a gene or fate.
    """
    import matplotlib.pyplot as plt

    if GENE_TRENDS not in adata.uns:
        msg = f"pl.gene_trends: uns has no {GENE_TRENDS!r}; call tl.gene_trends(adata, genes) first"
        raise MissingKeyError(msg)
    found = adata.uns[GENE_TRENDS]
    chosen: dict[str, list[int]] = {}
    for what, wanted in (("genes", genes), ("fates", fates)):
        there = [str(name) for name in found[what]]
        for name in wanted or ():
            if name not in there:
                msg = f"pl.gene_trends: there is no {what[:-1]} {name!r}; there are {', '.join(there)}"
                raise MissingKeyError(msg)
        chosen[what] = [there.index(name) for name in (there if wanted is None else wanted)]
    columns = min(len(chosen["genes"]), MOST_COLUMNS)
    rows = -(-len(chosen["genes"]) // columns)
    size = (PANEL[0] * columns + 1.0, PANEL[1] * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    axes = list(grid.ravel())
    for spare in axes[len(chosen["genes"]) :]:
        figure.delaxes(spare)
    axes = axes[: len(chosen["genes"])]
    for ax, gene in zip(axes, chosen["genes"], strict=True):
        for fate in chosen["fates"]:
            time = found["pseudotime"][fate]
            ax.fill_between(
                time, found["low"][fate, gene], found["high"][fate, gene], color=color_of(fate), alpha=0.18, lw=0
            )
            ax.plot(time, found["mean"][fate, gene], color=color_of(fate), lw=1.5)
        ax.set_title(short(str(found["genes"][gene])))
        ax.tick_params(labelsize=7)
        tidy(ax)
    for ax in axes[-columns:]:
        ax.set_xlabel("pseudotime", fontsize=8)
    for ax in axes[::columns]:
        ax.set_ylabel("log expression", fontsize=8)
    paints = [color_of(fate) for fate in chosen["fates"]]
    legend(axes[columns - 1], [short(str(found["fates"][fate])) for fate in chosen["fates"]], paints)
    return np.asarray(axes)
