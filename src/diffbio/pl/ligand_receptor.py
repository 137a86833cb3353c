"""Figure of `tl.ligand_receptor`: a dot plot of pairs between groups."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, MissingKeyError
from ..slots import LIGAND_RECEPTOR
from .drawing import short

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

PER_ROW, PER_COLUMN = 0.2, 0.24  # inches
LARGEST = 70.0  # area of a dot, in points²
HIGHEST = 3.0  # -log10 of a p-value, beyond which dots grow no more


def ligand_receptor(
    adata: "AnnData",
    *,
    sources: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    n_pairs: int = 20,
    max_pvalue: float = 0.05,
) -> "Axes":
    """Draws the best pairs (rows) from sources to targets (columns): colour is the mean, size the p-value.

    Args:
        adata: cells with the results of `tl.ligand_receptor`.
        sources: names of groups; None is all.
        targets: names of groups; None is all.
        n_pairs: so many are drawn, those that come first in the table between these groups.
        max_pvalue: interactions with more are left out.

    Returns:
        The axes.

    Raises:
        MissingKeyError: there are no scores yet, or no such group.
        DataError: no interaction is left.
    """
    import matplotlib.pyplot as plt

    if LIGAND_RECEPTOR not in adata.uns:
        msg = f"pl.ligand_receptor: uns has no {LIGAND_RECEPTOR!r}; call tl.ligand_receptor(adata, groupby) first"
        raise MissingKeyError(msg)
    table: Any = adata.uns[LIGAND_RECEPTOR]
    asked = [_groups(table, side, names) for side, names in (("source", sources), ("target", targets))]
    table = table[table["pvalue"] <= max_pvalue]
    for side, names in zip(("source", "target"), asked, strict=True):
        table = table[table[side].astype(str).isin(names)]
    if not len(table):
        msg = f"pl.ligand_receptor: no interaction between these groups has a p-value of {max_pvalue:g} or less"
        raise DataError(msg)
    label = table["ligand"].astype(str) + " → " + table["receptor"].astype(str)
    rows = list(dict.fromkeys(label))[:n_pairs]
    table = table.assign(pair=label)[label.isin(rows)]
    flows = [
        (s, t) for s in asked[0] for t in asked[1] if ((table["source"] == s) & (table["target"] == t)).any()
    ]
    place = {flow: k for k, flow in enumerate(flows)}
    x = [place[flow] for flow in zip(table["source"].astype(str), table["target"].astype(str), strict=True)]
    y = [rows.index(name) for name in table["pair"]]
    size = (1.5 + 1.2 + PER_COLUMN * len(flows) + 1.3, 1.6 + PER_ROW * len(rows))
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    strength = -np.log10(np.maximum(table["pvalue"].to_numpy(float), 10**-HIGHEST))
    drawn = ax.scatter(x, y, c=table["mean"], s=LARGEST * _share(strength), cmap="viridis", edgecolor="none")
    ax.set_xticks(range(len(flows)), [f"{short(s)} → {short(t)}" for s, t in flows], rotation=90, fontsize=7)
    ax.set_yticks(range(len(rows)), [short(row) for row in rows], fontsize=7)
    ax.set(xlim=(-0.7, len(flows) - 0.3), ylim=(len(rows) - 0.4, -0.6))
    ax.grid(color="0.93", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    bar = figure.colorbar(drawn, ax=ax, shrink=0.6, aspect=18, pad=0.01)
    bar.set_label("mean expression", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    _sizes(ax, float(strength.min()))
    return ax


def _groups(table: Any, side: str, names: Sequence[str] | None) -> list[str]:
    column = table[side]
    there = [str(name) for name in (column.cat.categories if hasattr(column, "cat") else sorted(set(column)))]
    for name in names or ():
        if name not in there:
            msg = f"pl.ligand_receptor: there is no {side} {name!r}; there are {', '.join(there)}"
            raise MissingKeyError(msg)
    return there if names is None else list(names)


def _share(strength: Any) -> Any:
    return 0.12 + 0.88 * np.asarray(strength, float) / HIGHEST


def _sizes(ax: "Axes", least: float) -> None:
    """A legend of sizes, from the smallest that is drawn."""
    steps = [step for step in (0.0, 1.0, 2.0, 3.0) if step >= np.floor(least)]
    labels = {step: f"{'≤ ' if step == HIGHEST else ''}{10**-step:g}" for step in steps}
    marks = [ax.scatter([], [], s=LARGEST * _share(step), color="0.45", label=labels[step]) for step in steps]
    ax.legend(
        handles=marks, title="p-value", fontsize=7, title_fontsize=8, frameon=False, loc="lower left",
        bbox_to_anchor=(0.0, 1.0), ncols=len(marks), columnspacing=0.8, handletextpad=0.1, borderaxespad=0.1,
    )  # fmt: skip
