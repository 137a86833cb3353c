"""Figures of `tl.pseudotime`: time on a map of the cells, and by group."""

from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError, MissingKeyError
from ..slots import BRANCH, DIFFMAP, PSEUDOTIME
from .drawing import codes_of, color_of, column_of, map_key, new_axes, record_of, scatter, short, tidy

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

PANEL = (4.6, 3.6)  # inches
PER_GROUP = 0.24  # inches
MOST_GROUPS = 40


def pseudotime(adata: "AnnData", *, basis: str | None = None, groupby: str | None = None) -> np.ndarray:
    """Draws cells on a map, coloured by pseudotime, the root marked by a star if exactly one cell has its name.

    Args:
        adata: cells with the results of `tl.pseudotime`.
        basis: key of `obsm`, of which the first two columns are drawn; None is the first map that is there (UMAP,
            PHATE), else the first two diffusion components after the constant one.
        groupby: column of `obs`: draws the times of each group, too, that of earliest median first.

    Returns:
        The axes: the map; the branches on it, if they were looked for; the groups, if asked for.

    Raises:
        MissingKeyError: there is no pseudotime yet, no such key, or nothing to draw the cells on.
        DataError: the basis has fewer than two columns.
    """
    import matplotlib.pyplot as plt
    import pandas as pd

    if PSEUDOTIME not in adata.obs:
        msg = f"pl.pseudotime: obs has no {PSEUDOTIME!r}; call tl.pseudotime(adata, root=...) first"
        raise MissingKeyError(msg)
    name, xy = _map(adata, basis)
    time = np.asarray(adata.obs[PSEUDOTIME], float)
    time = np.where(np.isfinite(time), time, np.nan)
    groups = None if groupby is None else codes_of(column_of(adata, groupby))
    wide = 1 + (BRANCH in adata.obs)
    if groups is None and wide == 1:
        axes = [new_axes(PANEL)]
    else:
        high = PANEL[1] if groups is None else max(PANEL[1], 0.9 + PER_GROUP * min(len(groups[0]), MOST_GROUPS))
        count = wide + (groups is not None)
        axes = list(plt.subplots(1, count, figsize=(PANEL[0] * count, high), layout="constrained")[1])
    scatter(axes[0], xy, pd.Series(time), title="pseudotime")
    root = np.flatnonzero(adata.obs_names == record_of(adata, PSEUDOTIME).get("root_name"))
    if len(root) == 1:  # by its name: rows are others in a subset
        axes[0].plot(*xy[root[0]], marker="*", ms=13, mfc="white", mec="black", mew=1.0, ls="")
    axes[0].set_xlabel(short(name), fontsize=8)
    missing = int(np.isnan(time).sum())
    if missing:
        axes[0].set_title(f"pseudotime ({missing:,} cells not connected with the root)", fontsize=10)
    if wide == 2:
        scatter(axes[1], xy, adata.obs[BRANCH], title="branches")
    if groups is not None:
        _by_group(axes[-1], time, *groups)
    return np.asarray(axes)


def _map(adata: "AnnData", basis: str | None) -> tuple[str, np.ndarray]:
    basis = map_key(adata, basis, "pl.pseudotime")
    if basis is None:
        if DIFFMAP not in adata.obsm:
            msg = (
                f"pl.pseudotime: obsm has no map and no {DIFFMAP!r}; call tl.embed(adata) or tl.pseudotime(adata, "
                "root=...), or name a key of obsm (basis)"
            )
            raise MissingKeyError(msg)
        components = np.asarray(adata.obsm[DIFFMAP], float)
        if components.shape[1] < 3:
            msg = f"pl.pseudotime: obsm[{DIFFMAP!r}] has {components.shape[1]} components; name a map (basis)"
            raise DataError(msg)
        return "diffusion components 1 and 2", components[:, 1:3]
    values = np.asarray(adata.obsm[basis], float)
    if values.ndim != 2 or values.shape[1] < 2:
        msg = f"pl.pseudotime: obsm[{basis!r}] must have two columns at least; it is {values.shape}"
        raise DataError(msg)
    return basis.removeprefix("X_").removeprefix("diffbio_"), values[:, :2]


def _by_group(ax: "Axes", time: np.ndarray, names: list[str], codes: np.ndarray) -> None:
    """Quartiles of every group's times as boxes, from top to bottom in the order of their medians."""
    seen = np.isfinite(time)
    present = [k for k in range(len(names)) if (seen & (codes == k)).any()]
    present.sort(key=lambda k: float(np.median(time[seen & (codes == k)])))
    shown = present[:MOST_GROUPS]
    boxes = ax.boxplot(
        [time[seen & (codes == k)] for k in shown], orientation="horizontal", patch_artist=True, widths=0.65,
        showfliers=False, medianprops={"color": "black"},
    )  # fmt: skip
    for box, k in zip(boxes["boxes"], shown, strict=True):
        box.set(facecolor=color_of(k), alpha=0.85, linewidth=0.6)
    ax.set_yticks(range(1, len(shown) + 1), [short(names[k]) for k in shown], fontsize=8)
    ax.invert_yaxis()
    ax.set(
        xlabel="pseudotime", title="by group" if len(shown) == len(present) else f"the {MOST_GROUPS} earliest groups"
    )
    tidy(ax)
