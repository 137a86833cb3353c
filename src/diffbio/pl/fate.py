"""Figures of `tl.fate` and `tl.driver_genes`: cells between their fates, fates on a map, genes that go with them."""

from collections.abc import Sequence
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, MissingKeyError
from ..slots import DRIVER_GENES, FATE_PROB
from .drawing import color_of, column_of, map_key, scatter, short, tidy

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

PANEL = (3.8, 3.4)  # inches
PER_GENE = 0.19
MOST_COLUMNS = 4
TRIED = 8  # corners whose orders are all looked at


def fate(
    adata: "AnnData", *, fates: Sequence[str] | None = None, color: str | None = None, basis: str | None = None
) -> np.ndarray:
    """Draws cells between the corners of a polygon of their fates, a triangle of three; and each fate on a map.

    A cell lies at the mean of the corners by its probabilities. Fates that cells share are neighbours; in a polygon of
    four and more, different mixtures may share a place.

    Args:
        adata: cells with the results of `tl.fate`.
        fates: those that are drawn, in this order on the maps; None is all. Of two and more the polygon is drawn.
        color: column of `obs` to colour the polygon's cells by; None is the likeliest fate.
        basis: key of `obsm`, of which the first two columns are the map; None is the first map that is there.

    Returns:
        The axes: the polygon, unless one fate is drawn, then a map for each fate, if there is a map.

    Raises:
        MissingKeyError: there are no fates yet, no such fate, column or basis.
        DataError: one fate and no map: there is nothing to draw.
    """
    import matplotlib.pyplot as plt
    import pandas as pd

    names, probabilities = _fates(adata, fates, "pl.fate")
    values = None if color is None else column_of(adata, color)
    if values is None:
        best = pd.Categorical.from_codes(probabilities.argmax(axis=1).tolist(), categories=pd.Index(names))
        values = pd.Series(best)
    key = map_key(adata, basis, "pl.fate")
    place = None if key is None else np.asarray(adata.obsm[key], float)[:, :2]
    if len(names) == 1 and place is None:
        msg = "pl.fate: there is one fate and no map; call tl.embed(adata), or name a basis"
        raise DataError(msg)
    polygon = len(names) > 1
    panels = polygon + (len(names) if place is not None else 0)
    rows = -(-panels // MOST_COLUMNS)
    columns = -(-panels // rows)
    figure, grid = plt.subplots(
        rows, columns, figsize=(PANEL[0] * columns + 0.8, PANEL[1] * rows), layout="constrained", squeeze=False
    )
    axes = list(grid.ravel())
    for spare in axes[panels:]:
        figure.delaxes(spare)
    axes = axes[:panels]
    if polygon:
        _polygon(axes[0], names, probabilities, values)
    if place is not None:
        for ax, name, column in zip(axes[polygon:], names, probabilities.T, strict=True):
            order = np.argsort(column)  # the surest on top
            size = float(np.clip(12_000 / len(column), 0.4, 14))
            drawn = ax.scatter(
                *place[order].T, c=column[order], s=size, vmin=0, vmax=1, cmap="viridis", linewidth=0, rasterized=True
            )
            ax.set(xticks=[], yticks=[], title=short(name))
            figure.colorbar(drawn, ax=ax, shrink=0.6)
            tidy(ax)
    return np.asarray(axes)


def driver_genes(adata: "AnnData", *, fates: Sequence[str] | None = None, n_genes: int = 10) -> np.ndarray:
    """Draws the genes whose expression goes most with each fate: correlation with its interval.

    Args:
        adata: cells with the results of `tl.driver_genes`.
        fates: names; None is all.
        n_genes: of each fate, those of largest correlation.

    Returns:
        The axes, one for each fate.

    Raises:
        MissingKeyError: there are no driver genes yet, or none of such a fate.
        DataError: no gene varies with a fate.
    """
    import matplotlib.pyplot as plt

    if DRIVER_GENES not in adata.varm:
        msg = f"pl.driver_genes: varm has no {DRIVER_GENES!r}; call tl.driver_genes(adata) first"
        raise MissingKeyError(msg)
    table: Any = adata.varm[DRIVER_GENES]
    there = [str(column)[: -len("_corr")] for column in table.columns if str(column).endswith("_corr")]
    names = there if fates is None else list(fates)
    for name in names:
        if name not in there:
            msg = f"pl.driver_genes: there is no fate {name!r}; there are {', '.join(there)}"
            raise MissingKeyError(msg)
    columns = min(len(names), MOST_COLUMNS)
    rows = -(-len(names) // columns)
    size = (2.8 * columns, (0.9 + PER_GENE * n_genes) * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    axes = list(grid.ravel())
    for spare in axes[len(names) :]:
        figure.delaxes(spare)
    for k, (ax, name) in enumerate(zip(axes, names, strict=False)):
        best = table[f"{name}_corr"].dropna().sort_values(ascending=False).index[:n_genes]
        if not len(best):
            msg = f"pl.driver_genes: no gene varies with {name!r}"
            raise DataError(msg)
        r, low, high = (table.loc[best, f"{name}_{what}"].to_numpy(float) for what in ("corr", "ci_low", "ci_high"))
        at = np.arange(len(best))[::-1]
        ax.errorbar(r, at, xerr=[r - low, high - r], fmt="o", ms=4, lw=1.2, color=color_of(k))
        ax.set_yticks(at, [short(gene) for gene in best], fontsize=7)
        ax.set(xlabel="correlation with the fate", title=short(name))
        ax.xaxis.label.set_fontsize(8)
        ax.tick_params(axis="x", labelsize=7)
        tidy(ax)
    return np.asarray(axes[: len(names)])


def _fates(adata: "AnnData", fates: Sequence[str] | None, who: str) -> tuple[list[str], np.ndarray]:
    if FATE_PROB not in adata.obsm:
        msg = f"{who}: obsm has no {FATE_PROB!r}; call tl.fate(adata) first"
        raise MissingKeyError(msg)
    table = adata.obsm[FATE_PROB]
    values = np.asarray(table, float)
    there = [str(name) for name in getattr(table, "columns", range(1, values.shape[1] + 1))]
    names = there if fates is None else list(fates)
    for name in names:
        if name not in there:
            msg = f"{who}: there is no fate {name!r}; there are {', '.join(there)}"
            raise MissingKeyError(msg)
    return names, values[:, [there.index(name) for name in names]]


def _polygon(ax: "Axes", names: list[str], probabilities: np.ndarray, values: Any) -> None:
    """Corners on a circle; two fates are a line with the cells spread along it."""
    k = len(names)
    order = _round(probabilities)
    if k == 2:
        corners = np.array([[-1.0, 0.0], [1.0, 0.0]])
    else:
        angle = np.pi / 2 + 2 * np.pi * np.arange(k) / k
        corners = np.column_stack([np.cos(angle), np.sin(angle)])
    share = probabilities[:, order]
    total = share.sum(axis=1, keepdims=True)
    # of some fates only: where they share nothing, a cell lies in the middle
    share = np.where(total > 0, share / np.where(total > 0, total, 1.0), 1 / k)
    xy = share @ corners
    if k == 2:
        xy[:, 1] = np.random.default_rng(0).uniform(-0.15, 0.15, len(xy))
    outline = np.vstack([corners, corners[:1]])
    ax.plot(*outline.T, color="0.7", lw=0.9, zorder=0)
    scatter(ax, xy, values)
    for text in list(ax.texts):  # names of groups belong to the corners here
        text.remove()
    for code, corner in zip(order, corners, strict=True):
        side = "center" if abs(corner[0]) < 0.3 else ("left" if corner[0] > 0 else "right")
        side = "center" if k == 2 else side
        lift = corner * np.array([1.05, 1.1]) + (np.array([0.0, 0.25]) if k == 2 else 0.0)
        ax.annotate(short(names[code]), lift, ha=side, va="center", fontsize=9, weight="bold", annotation_clip=False)
    ax.set(xlim=(-1.65, 1.65), ylim=(-1.2, 1.25) if k > 2 else (-0.6, 0.6), aspect="equal", title="cells between fates")
    ax.spines[["left", "bottom"]].set_visible(False)


def _round(probabilities: np.ndarray) -> list[int]:
    """An order around the polygon such that fates shared by many cells are neighbours."""
    k = probabilities.shape[1]
    if not 3 < k <= TRIED:
        return list(range(k))
    shared = probabilities.T @ probabilities
    rounds = ([0, *rest] for rest in permutations(range(1, k)))
    return max(rounds, key=lambda way: sum(shared[a, b] for a, b in zip(way, way[1:] + way[:1], strict=True)))
