"""What all figures share: colours, names, legends, scatter plots."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, MissingKeyError
from ..slots import MAPS

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

# Okabe & Ito's colours, then colours far from all before them also to eyes without red or green cones.
PALETTE = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#781E0F",
    "#5A2D4B", "#96E187", "#5A87FF", "#F0C3C3", "#003CA5", "#781E78", "#D23C4B",
    "#C3D2F0", "#B4A54B", "#A53C0F", "#3C7878", "#692D2D", "#F0D25A",
)  # fmt: skip
GREY = "#B8B8B8"
LEGEND_ROWS = 16
LONGEST_NAME = 28
NAME_EXTENT = 0.05  # of the map; a name on a smaller group of cells would hide them


def color_of(k: int) -> str:
    """The colour of category `k`; beyond the palette it repeats."""
    return PALETTE[k % len(PALETTE)]


def codes_of(column: Any) -> tuple[list[str], np.ndarray]:
    """Names and codes of a column; missing values become a category of their own, "not known"."""
    import pandas as pd

    found = pd.Categorical(column)
    names, codes = [str(name) for name in found.categories], np.asarray(found.codes).astype(int)
    if (codes < 0).any():
        codes = np.where(codes < 0, len(names), codes)
        names.append("not known")
    return names, codes


def record_of(adata: "AnnData", name: str) -> Any:
    """What `uns["diffbio"][name]` says, {} if there is nothing."""
    record = adata.uns.get("diffbio", {})
    record = record.get(name, {}) if hasattr(record, "get") else {}
    return record if hasattr(record, "get") else {}


def column_of(adata: "AnnData", key: str) -> Any:
    """The column `key` of `obs`.

    Raises:
        MissingKeyError: there is none; those there are get listed.
    """
    if key not in adata.obs:
        msg = f"obs has no column {key!r}; it has {', '.join(map(str, adata.obs.columns)) or 'none'}"
        raise MissingKeyError(msg)
    return adata.obs[key]


def map_key(adata: "AnnData", basis: str | None, who: str) -> str | None:
    """The key of `obsm` of a map: `basis`, or the first map that is there; None where there is none.

    Raises:
        MissingKeyError: `obsm` has no `basis`.
    """
    if basis is None:
        known = [*(f"X_diffbio_{name}" for name in MAPS), *(f"X_{name}" for name in MAPS)]
        return next((key for key in known if key in adata.obsm), None)
    if basis not in adata.obsm:
        msg = f"{who}: obsm has no {basis!r}; it has {', '.join(map(str, adata.obsm)) or 'nothing'}"
        raise MissingKeyError(msg)
    return basis


def scatter(ax: "Axes", xy: np.ndarray, values: Any = None, *, title: str = "") -> None:
    """Draws points (n, 2) coloured by a column: numbers on a scale, the rest by category with a legend."""
    import pandas as pd

    if len(xy) == 0:
        msg = "there are no cells to draw"
        raise DataError(msg)
    order = np.random.default_rng(0).permutation(len(xy))  # so that no batch lies on top of the others
    size = float(np.clip(16_000 / len(xy), 0.4, 16))
    style: dict[str, Any] = {"s": size, "linewidth": 0, "rasterized": True}
    x, y = xy[order].T
    if values is None:
        ax.scatter(x, y, color=PALETTE[0], **style)
    elif pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        drawn = ax.scatter(x, y, c=np.asarray(values, float)[order], cmap="viridis", plotnonfinite=True, **style)
        ax.figure.colorbar(drawn, ax=ax, shrink=0.7)
    else:
        names, codes = codes_of(values)
        names, codes = largest(names, codes)
        paint = [GREY if name in ("not known", "other") else color_of(k) for k, name in enumerate(names)]
        ax.scatter(x, y, color=np.array(paint)[codes[order]], **style)
        sizes = np.bincount(codes, minlength=len(names))
        used = [k for k in range(len(names)) if sizes[k]]
        legend(ax, [f"{short(names[k])} ({sizes[k]:,})" for k in used], [paint[k] for k in used])
        if all(len(name) <= 3 for name in names) and len(names) <= 40:
            _name_on_map(ax, xy, names, codes)
    ax.set(xticks=[], yticks=[], title=title)
    tidy(ax)


def largest(names: list[str], codes: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The categories that fit the palette twice; smaller ones become "other"."""
    most = 2 * len(PALETTE)
    if len(names) <= most:
        return names, codes
    sizes = np.bincount(codes, minlength=len(names))
    kept = np.sort(np.argsort(-sizes, kind="stable")[: most - 1])
    number = np.full(len(names), len(kept))
    number[kept] = np.arange(len(kept))
    return [*(names[k] for k in kept), "other"], number[codes]


def _name_on_map(ax: "Axes", xy: np.ndarray, names: list[str], codes: np.ndarray) -> None:
    """Writes short names where their cells are: colours alone do not tell twenty clusters apart."""
    from matplotlib.patheffects import withStroke

    for k, name in enumerate(names):
        cells = xy[codes == k]
        if len(cells):
            x, y = np.median(cells, axis=0)
            outline = [withStroke(linewidth=2.5, foreground="white")]
            extent = np.ptp(np.quantile(cells, [0.1, 0.9], axis=0), axis=0)  # a stray cell does not count
            hides = bool((extent < NAME_EXTENT * np.ptp(xy, axis=0)).all())
            ax.annotate(
                name, (x, y), xytext=(0, 9 if hides else 0), textcoords="offset points", ha="center",
                va="center", fontsize=9, weight="bold", path_effects=outline,
            )  # fmt: skip


def legend(ax: "Axes", names: list[str], paints: list[str]) -> None:
    """A legend of coloured points to the right of the axes."""
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], marker="o", linestyle="", markersize=5, color=paint, markeredgewidth=0) for paint in paints]
    ax.legend(
        marks,
        names,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        fontsize=8,
        handletextpad=0.2,
        ncols=-(-len(names) // LEGEND_ROWS),
        columnspacing=0.8,
        borderaxespad=0.2,
    )


def short(name: str | None) -> str:
    """A name as text for a figure: not too long, no control characters, no mathtext."""
    text = "".join(c if c.isprintable() else "?" for c in str(name))
    if len(text) > LONGEST_NAME:  # names of one study often differ at their ends
        text = text[: LONGEST_NAME - 11] + "…" + text[-10:]
    return text.replace("$", r"\$")


def widen(ax: "Axes", inches: float) -> None:
    """Changes the width of the figure so that the axes are `inches` wide, whatever the legend takes."""
    figure: Any = ax.figure
    for _ in range(2):  # a colour bar takes a share of the width: the first change is not exact
        figure.draw_without_rendering()
        figure.set_figwidth(figure.get_figwidth() + inches - ax.get_window_extent().width / figure.dpi)


def new_axes(size: tuple[float, float]) -> "Axes":
    """Axes in a new figure of that size in inches."""
    import matplotlib.pyplot as plt

    return plt.figure(figsize=size, layout="constrained").subplots()


def tidy(ax: "Axes") -> "Axes":
    """Takes away the frame above and to the right."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.title.set_fontsize(10)
    return ax
