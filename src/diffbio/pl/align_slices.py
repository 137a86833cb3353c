"""Figure of `tl.align_slices`: slices as they were, on each other, and as a stack with what couples them."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingKeyError
from ..slots import ALIGNMENT, SPATIAL_ALIGNED
from .drawing import GREY, codes_of, color_of, column_of, largest, legend, short, tidy

if TYPE_CHECKING:
    from anndata import AnnData

LINES = 150  # couplings drawn between two slices
HEIGHT = 0.45  # of a slice above the one below, in widths of the tissue
SLANT = 0.35  # of the stack's second coordinate


def align_slices(adata: "AnnData", *, color: str | None = None) -> np.ndarray:
    """Draws the slices as given, aligned on each other, and as a stack whose lines join coupled spots.

    Lines join 150 spots of each slice, spread evenly over it, with the spot that they share the most mass with. In
    three dimensions the first two aligned coordinates are drawn.

    Args:
        adata: spots with the results of `tl.align_slices`.
        color: column of `obs` for the points; None is the slice.

    Returns:
        The three axes.

    Raises:
        MissingKeyError: there is no alignment yet, or no such column.
    """
    import matplotlib.pyplot as plt

    if ALIGNMENT not in adata.uns or SPATIAL_ALIGNED not in adata.obsm:
        msg = "pl.align_slices: there is no alignment; call tl.align_slices(adata, batch_key) first"
        raise MissingKeyError(msg)
    found = adata.uns[ALIGNMENT]
    slices = [str(name) for name in found["slices"]]
    own = np.asarray(adata.obs[str(found["batch_key"])].astype(str))
    rows = [np.flatnonzero(own == name) for name in slices]
    names, codes = codes_of(column_of(adata, color)) if color else (slices, _numbers(rows, len(own)))
    names, codes = largest(names, codes)
    paint = [GREY if name in ("not known", "other") else color_of(k) for k, name in enumerate(names)]
    paints = np.array(paint)[codes]
    aligned = np.asarray(adata.obsm[SPATIAL_ALIGNED], float)[:, :2]
    figure = plt.figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    size = float(np.clip(6_000 / len(own), 0.4, 14))
    for ax, xy, title in (
        (axes[0], np.asarray(adata.obsm[str(found["spatial_key"])], float)[:, :2], "as given"),
        (axes[1], aligned, "aligned"),
    ):
        order = np.random.default_rng(0).permutation(len(xy))
        ax.scatter(*xy[order].T, s=size, c=paints[order], linewidth=0, alpha=0.7, rasterized=True)
        ax.set(title=title, xticks=[], yticks=[], aspect="equal")
        tidy(ax)
    _stack(axes[2], aligned, rows, paints, found, size)
    axes[2].set(title="stack", xticks=[], yticks=[])
    used = [k for k in range(len(names)) if (codes == k).any()]
    legend(tidy(axes[2]), [short(names[k]) for k in used], [paint[k] for k in used])
    return axes


def _numbers(rows: list[np.ndarray], size: int) -> np.ndarray:
    codes = np.zeros(size, int)
    for k, own in enumerate(rows):
        codes[own] = k
    return codes


def _stack(ax: Any, xy: np.ndarray, rows: list[np.ndarray], paints: np.ndarray, found: Any, size: float) -> None:
    """The slices above each other in a slanted view, and lines between those that are neighbours in it."""
    from matplotlib.collections import LineCollection

    level = np.zeros(len(xy))
    for k, own in enumerate(rows):
        level[own] = k * HEIGHT * np.ptp(xy[:, 0])
    place = np.column_stack([xy[:, 0] + SLANT * xy[:, 1], SLANT * xy[:, 1] + level])
    for k, (a, b) in enumerate(np.asarray(found["pairs"])):
        if abs(int(a) - int(b)) != 1:
            continue
        plan = found["couplings"][str(k)].tocsr()
        some = np.unique(np.linspace(0, len(rows[a]) - 1, LINES).astype(int))
        some = some[np.diff(plan.indptr)[some] > 0]  # partial overlap leaves spots alone
        to = np.array([plan.indices[plan.indptr[i] + plan.data[plan.indptr[i] : plan.indptr[i + 1]].argmax()]
                       for i in some], int)  # fmt: skip
        ends = np.stack([place[rows[a][some]], place[rows[b][to]]], axis=1)
        ax.add_collection(LineCollection(list(ends), colors=GREY, linewidths=0.4, alpha=0.5, zorder=0))
    ax.scatter(*place.T, s=size, c=paints, linewidth=0, rasterized=True)
