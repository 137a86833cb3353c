"""Figure of `tl.ot_trajectory`: how groups of cells flow from day to day, and where each fate comes from."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingKeyError
from ..slots import OT
from .drawing import GREY, color_of, short, tidy

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

BAR = 0.16  # width of a day's bar, in steps
SMALLEST_NAMED = 0.04  # share of a day below which a bar is not named
SMALLEST_GROUP = 0.01  # share of its best day below which a group is drawn as "other"


def ot_trajectory(adata: "AnnData", *, day: float | None = None) -> np.ndarray:
    """Draws the flow of groups of cells over the days, and a heat map of ancestors: groups of a day by fates.

    In the flow a bar is a day, its parts the groups' shares of the cells; ribbons join the parts in proportion to the
    mass that is transported, scaled to the part at either end. In the heat map each row is a fate, a group of the last
    day, and sums to 1 over the groups that its ancestors on that day belong to. Groups that are nowhere above 1 percent
    are drawn together.

    Args:
        adata: cells with the results of `tl.ot_trajectory(..., groupby=...)`.
        day: of the ancestors; None draws a heat map for each day but the last.

    Returns:
        The axes: the flow, then the heat maps.

    Raises:
        MissingKeyError: there is no trajectory yet, it has no groups, or no such day.
    """
    import matplotlib.pyplot as plt

    found = adata.uns.get(OT, {})
    if "flow" not in found:
        msg = (
            f"pl.ot_trajectory: uns has no groups in {OT!r}; call tl.ot_trajectory(adata, time_key, groupby=...) first"
        )
        raise MissingKeyError(msg)
    days = [float(d) for d in found["days"]]
    if day is not None and day not in days[:-1]:
        earlier = ", ".join(f"{d:g}" for d in days[:-1])
        msg = f"pl.ot_trajectory: there are no ancestors on day {day}; there are on {earlier}"
        raise MissingKeyError(msg)
    names, share, flow, ancestors = _drawn(found)
    shown = [k for k in range(len(days) - 1) if day is None or days[k] == day]
    fates = np.flatnonzero(share[-1] > 0)
    heat = 1.6 + 0.34 * len(names)
    widths = [1.6 + 1.9 * len(days), *(heat for _ in shown)]
    figure, axes = plt.subplots(
        1, len(widths), figsize=(sum(widths), max(3.2, 1.2 + 0.3 * len(names))), width_ratios=widths,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    _flow(axes[0, 0], days, names, share, flow)
    for ax, k in zip(axes[0, 1:], shown, strict=True):
        image = _heat(ax, ancestors[k], names, fates, f"ancestors on day {days[k]:g}")
    figure.colorbar(image, ax=axes[0, -1], shrink=0.6, label="share of a fate's ancestors")
    return np.asarray(axes[0])


def _drawn(found: Any) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Names, shares, flow and ancestors of the groups that are drawn; rare ones are added up to "other"."""
    names = [str(name) for name in found["groups"]]
    share, flow, ancestors = (np.asarray(found[key], float) for key in ("share", "flow", "ancestors"))
    rare = share.max(axis=0) < SMALLEST_GROUP
    if rare.sum() < 2:
        return names, share, flow, ancestors
    keep = np.flatnonzero(~rare)
    to = np.zeros((len(names), len(keep) + 1))
    to[keep, np.arange(len(keep))] = 1
    to[rare, -1] = 1
    # rows of ancestors are shares of a fate: those of rare fates count by their cells
    by_fate = to * share[-1][:, None]
    total = np.where(by_fate.sum(axis=0) > 0, by_fate.sum(axis=0), 1.0)
    mixed = np.einsum("fo,dfg,gp->dop", by_fate / total, ancestors, to)
    return [*(names[k] for k in keep), "other"], share @ to, np.einsum("ao,sab,bp->sop", to, flow, to), mixed


def _paint(k: int, name: str) -> str:
    return GREY if name == "other" else color_of(k)


def _flow(ax: "Axes", days: list[float], names: list[str], share: np.ndarray, flow: np.ndarray) -> None:
    top = np.cumsum(share, axis=1)
    bottom = top - share
    for d, _ in enumerate(days):
        for k, name in enumerate(names):
            if share[d, k] <= 0:
                continue
            ax.bar(d, share[d, k], BAR, bottom[d, k], color=_paint(k, name), edgecolor="white", linewidth=0.4, zorder=3)
            ends = {0: ("right", -1), len(days) - 1: ("left", 1)}
            if d in ends and share[d, k] >= SMALLEST_NAMED:
                side, sign = ends[d]
                middle = (top[d, k] + bottom[d, k]) / 2
                ax.text(d + sign * (BAR / 2 + 0.04), middle, short(name), ha=side, va="center", fontsize=8)
    along = np.linspace(0, 1, 40)
    bend = along**2 * (3 - 2 * along)
    for step, mass in enumerate(flow):
        left, right = _ends(mass, share[step], axis=1), _ends(mass.T, share[step + 1], axis=1)
        x = step + BAR / 2 + along * (1 - BAR)
        for a, b in zip(*np.nonzero(mass > 1e-4), strict=True):
            low = bottom[step, a] + left[a, b, 0], bottom[step + 1, b] + right[b, a, 0]
            high = bottom[step, a] + left[a, b, 1], bottom[step + 1, b] + right[b, a, 1]
            edges = [begin + (end - begin) * bend for begin, end in (low, high)]
            ax.fill_between(x, *edges, color=_paint(int(a), names[a]), alpha=0.35, linewidth=0)
    ax.set(yticks=[], title="flow of cells", xlim=(-0.75, len(days) - 0.25))
    ax.set_xticks(range(len(days)), [f"day {day:g}" for day in days])
    tidy(ax)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)


def _ends(mass: np.ndarray, share: np.ndarray, axis: int) -> np.ndarray:
    """From where to where each ribbon stands in the bar of its row, (groups, groups, 2)."""
    total = mass.sum(axis=axis, keepdims=True)
    size = np.divide(mass, total, out=np.zeros_like(mass), where=total > 0) * share[:, None]
    upper = np.cumsum(size, axis=1)
    return np.stack([upper - size, upper], axis=-1)


def _heat(ax: "Axes", ancestors: np.ndarray, names: list[str], fates: np.ndarray, title: str) -> Any:
    shown = np.flatnonzero(ancestors[fates].sum(axis=0) > 1e-4)
    image = ax.imshow(ancestors[np.ix_(fates, shown)], cmap="viridis", vmin=0, vmax=1, aspect="auto")
    ax.set_yticks(np.arange(len(fates)), [short(names[k]) for k in fates], fontsize=8)
    ax.set_xticks(np.arange(len(shown)), [short(names[k]) for k in shown], fontsize=8, rotation=60, ha="right")
    ax.set(title=title, ylabel="fate on the last day")
    ax.tick_params(length=0)
    tidy(ax)
    ax.spines[["left", "bottom"]].set_visible(False)
    return image
