"""Figures of `pp.impute`: two genes before and after, and how the diffusion time was chosen."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from scipy import sparse

from .. import slots
from ..data.source import counts_of
from ..errors import ConfigError, MissingKeyError
from .drawing import PALETTE, column_of, new_axes, record_of, scatter, short, tidy

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

PER_CELL = 1e4  # molecules, that both sides are scaled to
PANEL = (3.6, 3.3)  # inches


def impute(
    adata: "AnnData", genes: Sequence[str] | None = None, *, color: str | None = None, layer: str | None = None
) -> "np.ndarray | Axes":
    """Draws a pair of genes as counted and as imputed, or without `genes` the curve by which t was chosen.

    Args:
        adata: cells with the results of `pp.impute`.
        genes: names of two genes; a cell is a point, log(1 + molecules per 10,000), the same axes on both sides.
        color: column of `obs` to colour the cells by.
        layer: of the counts that were imputed; None is X.

    Returns:
        Two axes, before and after; of the curve, one.

    Raises:
        ConfigError: `genes` are not two.
        MissingKeyError: nothing was imputed, a gene is not there, or no curve led to t.
    """
    if genes is None:
        return _choice_of_t(adata)
    if isinstance(genes, str) or len(genes) != 2:
        msg = f"pl.impute: genes must be two names, got {genes!r}."
        raise ConfigError(msg)
    import matplotlib.pyplot as plt
    import pandas as pd

    missing = [gene for gene in genes if gene not in adata.var_names]
    if missing:
        msg = f"pl.impute: {missing[0]!r} is not among var_names"
        raise MissingKeyError(msg)
    matrix = counts_of(adata, layer=layer)
    library = np.maximum(np.asarray(matrix.sum(axis=1)).ravel(), 1.0)
    places = adata.var_names.get_indexer_for(pd.Index(list(genes)))
    counted = cast("Any", sparse.csc_array)(matrix[:, places]).toarray()
    sides = [np.log1p(PER_CELL * x / library[:, None]) for x in (counted, _imputed(adata, genes, places))]
    figure, axes = plt.subplots(1, 2, figsize=(2 * PANEL[0], PANEL[1]), sharex=True, sharey=True, layout="constrained")
    values = None if color is None else column_of(adata, color)
    for ax, xy, name in zip(axes, sides, ("counted", "imputed"), strict=True):
        scatter(ax, xy, values, title=name)
        if ax is axes[0] and ax.get_legend() is not None:  # one is enough
            ax.get_legend().remove()
        ax.set_xlabel(short(genes[0]))
    axes[0].set_ylabel(short(genes[1]))
    for ax in axes:
        ax.xaxis.set_major_locator(plt.MaxNLocator(5))
        ax.yaxis.set_major_locator(plt.MaxNLocator(5))
    figure.supxlabel("log(1 + molecules per 10,000)", fontsize=8)
    return np.asarray(axes)


def _imputed(adata: "AnnData", genes: Sequence[str], places: np.ndarray) -> np.ndarray:
    table: Any = adata.obsm.get(slots.IMPUTED)
    if table is not None and all(gene in table for gene in genes):
        return np.column_stack([np.asarray(table[gene], float) for gene in genes])
    if slots.IMPUTED not in adata.layers:
        msg = f"pl.impute: there are no imputed values of {', '.join(genes)}; call pp.impute(adata) first"
        raise MissingKeyError(msg)
    values = np.asarray(adata.layers[slots.IMPUTED][:, places], float)
    unread = np.isnan(values).all(axis=0)
    if unread.any():
        gene = genes[int(unread.argmax())]
        msg = f"pl.impute: {gene!r} was not read by the method; name it: pp.impute(adata, genes=[...])"
        raise MissingKeyError(msg)
    return values


def _choice_of_t(adata: "AnnData") -> "Axes":
    from matplotlib.ticker import MaxNLocator

    found = record_of(adata, slots.IMPUTED)
    curves = np.atleast_2d(np.asarray(found.get("curve", np.zeros((0, 0))), float))
    if not curves.size:
        msg = "pl.impute: no curve led to t; call pp.impute with t='learned' or t='auto', or name two genes to draw"
        raise MissingKeyError(msg)
    learned = bool(np.isfinite(curves[:, 0]).all())
    ax = new_axes((4.4, 3.2))
    for k, (curve, t) in enumerate(zip(curves, np.atleast_1d(found["t"]), strict=True)):
        paint = PALETTE[k % len(PALETTE)]
        name = f"t = {float(t):.3g}" if len(curves) == 1 else f"batch {k + 1}: t = {float(t):.3g}"
        ax.plot(np.arange(len(curve)), curve, "o-", ms=3.5, lw=1.2, color=paint)
        ax.axvline(float(t), color=paint, lw=1.0, ls=":", label=name)
    ax.set_xlabel("steps of diffusion, t")
    if learned:
        ax.set_ylabel("Poisson loss of held-out molecules")
        low, rest = np.nanmin(curves), curves[:, 1:]
        ax.set_ylim(low - 0.1 * (np.nanmax(rest) - low), low + 1.2 * (np.nanmax(rest) - low))  # t = 0 is far above
        ax.set_title("least loss: t learned")
    else:
        ax.set_ylabel("disparity of two steps in a row")
        ax.set_yscale("log")
        ax.axhline(1e-3, color="0.6", lw=0.8)
        ax.set_title("stops below the line")
    ax.legend(frameon=False, fontsize=8)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(ax)
    return ax
