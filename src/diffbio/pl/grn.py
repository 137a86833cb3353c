"""Figures of `tl.grn`: the strongest edges as a network, and as a table."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, DataError, MissingKeyError
from ..slots import GRN
from .drawing import GREY, PALETTE, short, tidy

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

SIZE = (11.0, 6.4)  # inches
ACTIVATES, REPRESSES = PALETTE[0], PALETTE[4]
ROWS = 24  # of the table
ROUNDS = 300  # of the layout
NAMED = 60  # targets that still have room for their names


def grn(
    adata: "AnnData", *, n_edges: int = 60, regulators: Sequence[str] | None = None, random_state: int = 0
) -> np.ndarray:
    """Draws the strongest edges as a network, regulators large, and lists the very strongest beside it.

    Blue arrows activate, orange ones repress; their width goes with the weight.

    Args:
        adata: with the results of `tl.grn`.
        n_edges: drawn.
        regulators: only edges from these; None is all.
        random_state: of the layout.

    Returns:
        Two axes: the network and the table.

    Raises:
        MissingKeyError: there is no network yet, or no edge from a regulator of that name.
        ConfigError: n_edges < 1.
        DataError: the network has no edges.
    """
    import matplotlib.pyplot as plt

    if GRN not in adata.uns:
        msg = f"pl.grn: uns has no {GRN!r}; call tl.grn(adata) first"
        raise MissingKeyError(msg)
    if n_edges < 1:
        msg = f"pl.grn: n_edges must be >= 1, got {n_edges}."
        raise ConfigError(msg)
    table = adata.uns[GRN]
    if regulators is not None:
        source = table["regulator"].astype(str)
        for name in regulators:
            if name not in set(source):
                msg = f"pl.grn: there is no edge from {name!r}"
                raise MissingKeyError(msg)
        table = table[source.isin(list(regulators))]
    if not len(table):
        msg = "pl.grn: the network has no edges"
        raise DataError(msg)
    table = table.iloc[:n_edges]
    _, axes = plt.subplots(1, 2, figsize=SIZE, width_ratios=(1.9, 1.0), layout="constrained")
    _network(axes[0], table, random_state)
    _listing(axes[1], table)
    return np.asarray(axes)


def _network(ax: "Axes", table: Any, seed: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.patheffects import withStroke

    sources, targets = (table[key].astype(str).to_numpy() for key in ("regulator", "target"))
    names = list(dict.fromkeys([*sources, *targets]))
    number = {name: k for k, name in enumerate(names)}
    edges = np.array([[number[a], number[b]] for a, b in zip(sources, targets, strict=True)])
    weight = table["weight"].to_numpy(float)
    place = layout(edges, len(names), seed=seed)
    strength = weight / weight.max()
    regulates = np.isin(np.arange(len(names)), edges[:, 0])
    for (a, b), w, sign in zip(edges, strength, table["sign"].to_numpy(), strict=True):
        arrow = FancyArrowPatch(
            tuple(place[a]), tuple(place[b]), arrowstyle="-|>" if sign > 0 else "-[,widthB=0.35,lengthB=0",
            mutation_scale=8, shrinkA=6, shrinkB=6, linewidth=0.4 + 2.0 * w, alpha=0.75,
            color=ACTIVATES if sign > 0 else REPRESSES, connectionstyle="arc3,rad=0.08", zorder=1,
        )  # fmt: skip
        ax.add_patch(arrow)
    out = np.bincount(edges[:, 0], minlength=len(names))
    x, y = place.T
    ax.scatter(x[~regulates], y[~regulates], s=26, color=GREY, zorder=2, linewidth=0)
    ax.scatter(x[regulates], y[regulates], s=70 + 12 * out[regulates], color=PALETTE[1], zorder=3, edgecolor="white")
    outline = [withStroke(linewidth=2.0, foreground="white")]
    crowded = int((~regulates).sum()) > NAMED
    for name, xy, is_regulator in zip(names, place, regulates, strict=True):
        if is_regulator or not crowded:
            ax.annotate(
                short(name), tuple(xy), xytext=(0, 0 if is_regulator else 7), textcoords="offset points", ha="center",
                va="center", fontsize=8 if is_regulator else 6, weight="bold" if is_regulator else "normal",
                path_effects=outline, zorder=4,
            )  # fmt: skip
    marks = [Line2D([], [], color=paint, lw=2) for paint in (ACTIVATES, REPRESSES)]
    ax.legend(marks, ["activates", "represses"], frameon=False, fontsize=8, loc="upper left", ncols=2)
    margin = 0.12
    ax.set(xlim=(-margin, 1 + margin), ylim=(-margin, 1 + margin), xticks=[], yticks=[], aspect="equal")
    ax.set_title(f"the {len(table)} strongest edges")
    tidy(ax).spines[["left", "bottom"]].set_visible(False)


def _listing(ax: "Axes", table: Any) -> None:
    shown = table.iloc[:ROWS]
    head = ["regulator", "target", "weight", "sign"]
    cells = [
        [short(str(row.regulator)), short(str(row.target)), f"{row.weight:.3g}", "+" if row.sign > 0 else "-"]
        for row in shown.itertuples()
    ]
    if "confidence" in shown:
        head.append("confidence")
        for cell, value in zip(cells, shown["confidence"], strict=True):
            cell.append(f"{value:.2f}")
    drawn = ax.table(cells, colLabels=head, loc="upper center", cellLoc="left", edges="horizontal")
    drawn.auto_set_font_size(value=False)
    drawn.set_fontsize(7)
    drawn.auto_set_column_width(list(range(len(head))))
    for (row, column), box in drawn.get_celld().items():
        box.set_linewidth(0.8 if row == 0 else 0.2)
        if row == 0:
            box.get_text().set_fontweight("bold")
        elif column == 3:
            box.get_text().set_color(ACTIVATES if cells[row - 1][3] == "+" else REPRESSES)
    ax.set_axis_off()


def layout(edges: np.ndarray, n_nodes: int, *, seed: int = 0) -> np.ndarray:
    """Places in the unit square: edges pull, nodes push (Fruchterman and Reingold 1991).

    Args:
        edges: int (edges, 2).
        n_nodes: how many; some hundreds at most, every pair is looked at.
        seed: of the start.
    """
    place = np.random.default_rng(seed).uniform(size=(n_nodes, 2))
    ideal = 1.0 / np.sqrt(max(n_nodes, 1))
    linked = np.zeros((n_nodes, n_nodes))
    linked[edges[:, 0], edges[:, 1]] = linked[edges[:, 1], edges[:, 0]] = 1.0
    for heat in np.linspace(0.1, 0.002, ROUNDS):
        gap = place[:, None] - place[None, :]
        distance = np.maximum(np.linalg.norm(gap, axis=2), 1e-3)
        push = ideal**2 / distance**2 - linked * distance / ideal
        # a pull to the middle keeps parts that are not connected in one picture
        move = (gap * push[:, :, None]).sum(axis=1) - 0.6 * (place - 0.5)
        length = np.maximum(np.linalg.norm(move, axis=1, keepdims=True), 1e-9)
        place = place + move / length * np.minimum(length, heat)
    low, span = place.min(axis=0), np.maximum(np.ptp(place, axis=0), 1e-9)
    return (place - low) / span
