"""Figures of `tl.archetypes`: cells as mixtures in a polygon, the genes of each archetype, how many there are."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, MissingKeyError
from ..slots import ARCHETYPE_GENES, ARCHETYPE_QVALUES
from ..slots import ARCHETYPE_WEIGHTS as WEIGHTS
from ..slots import ARCHETYPES as RECORD
from .drawing import column_of, record_of, scatter, short, tidy

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

PANEL = (3.4, 3.4)  # inches
PER_GENE, PER_ARCHETYPE = 0.17, 0.42  # inches
SIGNIFICANT = 0.05


def archetypes(adata: "AnnData", *, color: str | None = None, n_genes: int = 6) -> np.ndarray:
    """Draws cells in the polygon of their archetypes, and the genes that are highest near each of them.

    A corner is an archetype, a cell lies at the mean of the corners by its weights; in a polygon of four and more,
    different mixtures may share a place.

    Args:
        adata: cells with the results of `tl.archetypes`.
        color: column of `obs` to colour the cells by; None is the archetype of largest weight.
        n_genes: of each archetype, those of `tl.archetypes` with the smallest q-values; 0 draws no genes.

    Returns:
        The axes: polygon, genes (unless there are none), and explained variance if several numbers were tried.

    Raises:
        MissingKeyError: there are no archetypes yet, or no column `color`.
        DataError: there is only one archetype.
    """
    import matplotlib.pyplot as plt

    if WEIGHTS not in adata.obsm:
        msg = f"pl.archetypes: obsm has no {WEIGHTS!r}; call tl.archetypes(adata) first"
        raise MissingKeyError(msg)
    weights = np.asarray(adata.obsm[WEIGHTS], float)
    if weights.shape[1] < 2:
        msg = "pl.archetypes: there is one archetype, and all cells are it; nothing to draw"
        raise DataError(msg)
    values = None if color is None else column_of(adata, color)
    genes = _top_genes(adata, weights, n_genes) if n_genes else None
    curve = np.asarray(record_of(adata, RECORD).get("explained_by_number", ()), float)
    widths = [PANEL[0] + 1.4]
    if genes is not None:
        widths.append(1.9 + PER_ARCHETYPE * weights.shape[1])
    if curve.size > 1:
        widths.append(PANEL[0])
    rows = 0 if genes is None else len(genes[0])
    height = max(PANEL[1], 0.9 + PER_GENE * rows)
    figure, found = plt.subplots(
        1, len(widths), figsize=(sum(widths), height), width_ratios=widths, layout="constrained", squeeze=False
    )
    axes = list(found[0])
    _polygon(axes[0], weights, values)
    if genes is not None:
        shown = _genes(axes[1], *genes)
        figure.colorbar(shown, ax=axes[1], shrink=0.5, label="higher than elsewhere, log")
    if curve.size > 1:
        _numbers(axes[-1], curve, weights.shape[1])
    return np.asarray(axes)


def _polygon(ax: "Axes", weights: np.ndarray, values: Any) -> None:
    """Cells at the mean of the corners of a regular polygon; two archetypes are a line with the cells spread along."""
    import pandas as pd

    k = weights.shape[1]
    if k == 2:
        corners = np.array([[-1.0, 0.0], [1.0, 0.0]])
    else:
        angle = np.pi / 2 + 2 * np.pi * np.arange(k) / k
        corners = np.column_stack([np.cos(angle), np.sin(angle)])
    xy = weights @ corners
    if k == 2:  # side by side
        xy[:, 1] = np.random.default_rng(0).uniform(-0.15, 0.15, len(xy))
    if values is None:
        values = pd.Categorical([f"A{a + 1}" for a in weights.argmax(axis=1)], [f"A{a + 1}" for a in range(k)])
        values = pd.Series(values)
    outline = np.vstack([corners, corners[:1]])
    ax.plot(*outline.T, color="0.7", lw=0.9, zorder=0)
    scatter(ax, xy, values)
    for text in list(ax.texts):  # names of groups belong to the corners here
        text.remove()
    for a, corner in enumerate(corners):
        ax.annotate(f"A{a + 1}", corner * 1.12, ha="center", va="center", fontsize=9, weight="bold")
    ax.set(xlim=(-1.3, 1.3), ylim=(-1.25, 1.25) if k > 2 else (-0.6, 0.6), aspect="equal", title="cells as mixtures")
    ax.spines[["left", "bottom"]].set_visible(False)


def _top_genes(adata: "AnnData", weights: np.ndarray, n_genes: int) -> tuple[list[str], np.ndarray]:
    """Names of the best genes of each archetype, and how much higher they are near it, (genes, archetypes)."""
    difference, qvalues = (np.asarray(adata.varm[key], float).T for key in (ARCHETYPE_GENES, ARCHETYPE_QVALUES))
    chosen: list[int] = []
    for a in range(weights.shape[1]):
        order = np.lexsort((-difference[a], qvalues[a]))
        best = [g for g in order[: n_genes + len(chosen)] if qvalues[a, g] <= SIGNIFICANT and g not in chosen]
        chosen.extend(best[:n_genes])
    if not chosen:
        msg = "pl.archetypes: no gene is higher near an archetype than elsewhere; pass n_genes=0"
        raise DataError(msg)
    return [str(name) for name in adata.var_names[chosen]], difference[:, chosen].T


def _genes(ax: "Axes", names: list[str], difference: np.ndarray) -> Any:
    most = float(np.abs(difference).max())
    shown = ax.imshow(difference, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    ax.set_yticks(np.arange(len(names)), [short(name) for name in names], fontsize=7)
    ax.set_xticks(np.arange(difference.shape[1]), [f"A{a + 1}" for a in range(difference.shape[1])], fontsize=8)
    ax.tick_params(length=0)
    ax.set_title("genes near each archetype")
    tidy(ax)
    ax.spines[["left", "bottom"]].set_visible(False)
    return shown


def _numbers(ax: "Axes", curve: np.ndarray, chosen: int) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.plot(np.arange(1, len(curve) + 1), curve, "o-", ms=3.5, lw=1.2)
    ax.axvline(chosen, color="0.5", lw=1.0, ls=":")
    ax.set(xlabel="archetypes", ylabel="explained variance", ylim=(0, 1), title=f"{chosen} archetypes")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(ax)
