"""Figures of `tl.communication`: a chord diagram between groups, pathways of groups, the strongest pairs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, MissingKeyError
from ..slots import COMMUNICATION
from .drawing import color_of, short, tidy

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

GAP = 0.035  # of the circle, shared by the gaps between groups
INNER, OUTER = 0.93, 1.0  # radii of the ring
FAINT = 0.002  # of all flow: ribbons of less are not drawn
STEPS = 24  # points of an arc


def communication(adata: "AnnData", *, pathways: Sequence[str] | None = None, n_pairs: int = 15) -> np.ndarray:
    """Draws what `tl.communication` found: pairs by strength; with groups also who signals to whom, and by what.

    In the chord diagram a ribbon leaves its source in the source's colour, as wide there as the score; a bar at its
    target, in the source's colour too, is where it arrives. The heat map shows the mean activity that a group's cells
    receive, each pathway over its highest.

    Args:
        adata: cells with the results of `tl.communication`.
        pathways: those that are drawn; None is all.
        n_pairs: so many pairs, the strongest.

    Returns:
        The axes: pairs; and with groups the chord diagram and the heat map.

    Raises:
        MissingKeyError: there are no results yet, or no such pathway.
        DataError: no pair of these pathways explains anything.
    """
    import matplotlib.pyplot as plt

    if COMMUNICATION not in adata.uns:
        msg = f"pl.communication: uns has no {COMMUNICATION!r}; call tl.communication(adata, groupby, resource) first"
        raise MissingKeyError(msg)
    found: Any = adata.uns[COMMUNICATION]
    there = [str(name) for name in found["pathways"].index]
    for name in pathways or ():
        if name not in there:
            msg = f"pl.communication: there is no {name!r}; there are {', '.join(there)}"
            raise MissingKeyError(msg)
    names = there if pathways is None else list(pathways)
    pairs = found["pairs"][found["pairs"]["pathway"].isin(names)]
    if not len(pairs) or not (pairs["strength"] > 0).any():
        msg = "pl.communication: no pair of these pathways explains anything"
        raise DataError(msg)
    grouped = "groups" in found
    height = max(3.8, 1.2 + 0.2 * min(n_pairs, len(pairs)))
    figure, grid = plt.subplots(
        1, 3 if grouped else 1, figsize=(13.5 if grouped else 4.6, height), layout="constrained", squeeze=False,
        width_ratios=[1.0, 1.35, 1.15] if grouped else None,
    )  # fmt: skip
    axes = grid[0]
    _pairs(axes[0], pairs.head(n_pairs), there)
    if grouped:
        groups = [str(name) for name in found["activity"].index]
        table = found["groups"][found["groups"]["pathway"].isin(names)]
        flow = np.zeros((len(groups), len(groups)))
        place = {name: k for k, name in enumerate(groups)}
        ends = [table[side].astype(str).map(place).to_numpy(int) for side in ("source", "target")]
        np.add.at(flow, tuple(ends), table["score"].to_numpy(float))
        chords(axes[1], flow, groups)
        _heat(figure, axes[2], found["activity"][names])
    return axes


def chords(ax: "Axes", flow: np.ndarray, names: Sequence[str]) -> None:
    """Draws a chord diagram of flow (sources, targets), 0 and more, between named groups."""
    from matplotlib.patches import PathPatch, Wedge
    from matplotlib.path import Path

    total = flow.sum()
    n = len(names)
    if not total > 0:
        msg = "pl.communication: nothing flows between groups"
        raise DataError(msg)
    size = flow.sum(axis=1) + flow.sum(axis=0)  # what leaves, then what arrives
    width = 2 * np.pi * (1 - GAP * min(n, 12)) * size / size.sum()
    gap = 2 * np.pi * GAP * min(n, 12) / n
    start = np.pi / 2 - np.concatenate([[0.0], np.cumsum(width + gap)[:-1]])  # clockwise from the top
    scale = width.sum() / size.sum()
    at = start.copy()
    leave, arrive = np.zeros((n, n)), np.zeros((n, n))
    for k in range(n):
        for other in np.roll(np.arange(n), -k - 1)[::-1]:  # so that ribbons of neighbours do not cross
            leave[k, other] = at[k]
            at[k] -= flow[k, other] * scale
        for other in np.roll(np.arange(n), -k - 1)[::-1]:
            arrive[other, k] = at[k]
            at[k] -= flow[other, k] * scale
    order = np.dstack(np.unravel_index(np.argsort(flow, axis=None), flow.shape))[0]
    for source, target in order:
        share = flow[source, target]
        if share < FAINT * total:
            continue
        first, second = leave[source, target], arrive[source, target]
        reach = share * scale
        path = _ribbon(first, second, reach)
        ax.add_patch(PathPatch(Path(*path), facecolor=color_of(source), alpha=0.55, linewidth=0))
        ends = np.degrees([second - reach, second])
        ax.add_patch(Wedge((0, 0), INNER - 0.01, *ends, width=0.035, color=color_of(source), lw=0))
    for k, name in enumerate(names):
        ends = np.degrees([start[k] - width[k], start[k]])
        ax.add_patch(Wedge((0, 0), OUTER, *ends, width=OUTER - INNER, color=color_of(k), lw=0))
        if size[k] > FAINT * size.sum():
            middle = start[k] - width[k] / 2
            x, y = 1.05 * np.cos(middle), 1.05 * np.sin(middle)
            turn = np.degrees(middle) % 360
            left = 90 < turn < 270
            ax.text(
                x, y, short(name), fontsize=8, ha="right" if left else "left", va="center", rotation_mode="anchor",
                rotation=turn - 180 if left else turn,
            )  # fmt: skip
    ax.set(xlim=(-1.8, 1.8), ylim=(-1.8, 1.8), aspect="equal", xticks=[], yticks=[])
    ax.set_title("signals between groups", pad=12)
    tidy(ax)
    ax.spines[:].set_visible(False)


def _ribbon(first: float, second: float, reach: float) -> tuple[np.ndarray, list[int]]:
    """From an arc at the source to one at the target, through the middle."""
    from matplotlib.path import Path

    def arc(begin: float, radius: float) -> np.ndarray:
        angle = np.linspace(begin, begin - reach, STEPS)
        return radius * np.column_stack([np.cos(angle), np.sin(angle)])

    a, b = arc(first, INNER - 0.01), arc(second, INNER - 0.05)
    middle = np.zeros((1, 2))
    points = np.concatenate([a, middle, b[:1], b[1:], middle, a[:1]])
    codes = [Path.MOVETO] + [Path.LINETO] * (STEPS - 1) + [Path.CURVE3] * 2 + [Path.LINETO] * (STEPS - 1)
    return points, [int(code) for code in (*codes, Path.CURVE3, Path.CURVE3)]


def _pairs(ax: "Axes", pairs: Any, pathways: list[str]) -> None:
    at = np.arange(len(pairs))
    paint = [color_of(pathways.index(name)) for name in pairs["pathway"]]
    ax.barh(at, pairs["strength"], color=paint, height=0.7)
    both = zip(pairs["ligand"], pairs["receptor"], strict=True)
    labels = [f"{short(ligand)} → {short(receptor)}" for ligand, receptor in both]
    ax.set_yticks(at, labels, fontsize=7)
    ax.invert_yaxis()
    ax.set(xlabel="strength (variance explained; 1 is a gene's)", title="pairs")
    ax.xaxis.label.set_fontsize(8)
    ax.tick_params(axis="x", labelsize=7)
    tidy(ax)
    from matplotlib.patches import Patch

    shown = list(dict.fromkeys(pairs["pathway"]))
    ax.legend(
        handles=[Patch(color=color_of(pathways.index(name)), label=short(name)) for name in shown],
        fontsize=7, frameon=False, loc="lower right",
    )  # fmt: skip


def _heat(figure: Any, ax: "Axes", activity: Any) -> None:
    values = activity.to_numpy(float)
    highest = values.max(axis=0)
    drawn = ax.imshow(values / np.where(highest > 0, highest, 1.0), cmap="viridis", aspect="auto", vmin=0, vmax=1)
    ax.set_yticks(range(len(values)), [short(name) for name in activity.index], fontsize=7)
    ax.set_xticks(range(values.shape[1]), [short(name) for name in activity.columns], rotation=90, fontsize=7)
    ax.set(title="activity received")
    ax.spines[:].set_visible(False)
    tidy(ax)
    bar = figure.colorbar(drawn, ax=ax, shrink=0.6)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("of the pathway's highest", fontsize=8)
