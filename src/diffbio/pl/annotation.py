"""Figures of `tl.annotate`: called types against labels, how sure they are, and their marker genes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..data.markers import as_markers
from ..data.matrix import row_chunks
from ..data.source import counts_of
from ..errors import DataError, MissingKeyError
from .drawing import GREY, PALETTE, codes_of, color_of, column_of, largest, new_axes, record_of, short, tidy

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

CELL_TYPE, CONFIDENCE, VOTED = "diffbio_cell_type", "diffbio_confidence", "diffbio_cell_type_voted"
CLUSTER = "diffbio_cluster"
UNASSIGNED = "unassigned"
NO_TYPE = ("Heterogeneous", "other", UNASSIGNED, "not known")  # come last, in this order
UNLABELLED = frozenset({"Unknown", "unknown", "NA", "nan", ""})
PER_GENE, PER_ROW = 0.19, 0.27  # inches
COUNTS_UP_TO = 30  # types with the numbers of cells written in the fields
MOST_GENES, MOST_PER_TYPE = 60, 6
FEW_CELLS = 30  # in a group: drawn one by one


class Confusion(NamedTuple):
    """Cells by label (rows) and called type (columns), in an order that puts agreement on the diagonal."""

    labels: list[str]
    called: list[str]
    counts: np.ndarray


def annotate(
    adata: "AnnData",
    *,
    labels_key: str | None = None,
    markers: "Mapping[str, Sequence[str]] | pd.DataFrame | str | Path | None" = None,
    clusters: str | None = None,
) -> np.ndarray:
    """Draws what `tl.annotate` found: types against labels, confidence, marker genes.

    Args:
        adata: cells with the results of `tl.annotate`.
        labels_key: column of `obs` with labels to compare with; None draws no such comparison.
        markers: as of `pl.markers`.
        clusters: as of `pl.confidence`.

    Returns:
        The axes, in one array: the comparison (if there are labels), confidence, markers (if any are known).
    """
    import matplotlib.pyplot as plt

    groups = _groups(adata, clusters)
    sizes = {"confidence": (5.0, _height(len(groups.names)))}
    if labels_key is not None:
        sizes = {"confusion": _confusion_size(_confusion(adata, labels_key)), **sizes}
    top = sum(width for width, _ in sizes.values()), 0.6 + max(height for _, height in sizes.values())
    with_markers = markers is not None or bool(_stored_markers(adata))
    bottom = _dots_size(*_dots_shape(adata, markers)) if with_markers else (0.0, 0.0)
    figure = plt.figure(figsize=(max(top[0], bottom[0]), top[1] + bottom[1]), layout="constrained")
    rows = figure.add_gridspec(1 + with_markers, 1, height_ratios=[top[1], bottom[1]][: 1 + with_markers])
    widths = [*(width for width, _ in sizes.values()), max(bottom[0] - top[0], 0.1)]  # the last stays empty
    columns = rows[0].subgridspec(1, len(widths), width_ratios=widths)
    axes = [figure.add_subplot(columns[k]) for k in range(len(sizes))]
    places = dict(zip(sizes, axes, strict=True))
    if labels_key is not None:
        confusion(adata, labels_key, ax=places["confusion"])
    confidence(adata, clusters=clusters, ax=places["confidence"])
    drawn = list(places.values())
    if with_markers:
        drawn.append(_drawn_markers(adata, markers, figure.add_subplot(rows[1])))
    return np.array(drawn)


def confusion(adata: "AnnData", labels_key: str, *, ax: "Axes | None" = None) -> "Axes":
    """Draws how the cells of each label were called: numbers of cells, coloured by their share of the label.

    Cells without a label are left out; called types that are no label come last, "unassigned" at the end.
    """
    table = _confusion(adata, labels_key)
    ax = ax or new_axes(_confusion_size(table))
    n_rows, n_columns = table.counts.shape
    share = table.counts / np.maximum(table.counts.sum(axis=1, keepdims=True), 1)
    shown = ax.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if max(n_rows, n_columns) <= COUNTS_UP_TO:
        size = 7.5 if n_columns <= 14 else 5.5
        for i, j in zip(*np.nonzero(table.counts), strict=True):
            paint = "white" if share[i, j] > 0.55 else "0.2"
            ax.text(j, i, _number(int(table.counts[i, j])), ha="center", va="center", fontsize=size, color=paint)
    known = sum(name not in NO_TYPE and name in table.labels for name in table.called)
    if known < n_columns:  # a line before what cannot agree
        ax.axvline(known - 0.5, color="0.5", linewidth=0.8)
    _name_ticks(ax, table.labels, table.called)
    found = agreement(adata, labels_key)
    title = "called types against labels"
    if found["trained_on"]:
        title += "\nlabels that training saw"
    elif found["cells"]:
        title += f"\naccuracy {found['accuracy']:.3f}, macro-F1 {found['macro_f1']:.3f}"
    if found["strangers"]:
        title += f"\n{len(found['strangers'])} of {n_rows} labels are no names of types"
    ax.set(xlabel="called", ylabel=short(labels_key), title=title)
    bar = ax.figure.colorbar(shown, ax=ax, shrink=0.6, aspect=25, pad=0.02)
    bar.set_label("share of the label", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    ax.spines[:].set_visible(False)
    ax.title.set_fontsize(10)
    return ax


def confidence(adata: "AnnData", *, clusters: str | None = None, ax: "Axes | None" = None) -> "Axes":
    """Draws the confidence of the calls by cluster: median, quartiles, 5th and 95th percentile.

    Groups of fewer than 30 cells are drawn cell by cell.

    Args:
        adata: cells with the results of `tl.annotate`.
        clusters: column of `obs`; None is "diffbio_cluster" where there is one, else the called type. A cluster
            has the colour of its commonest type, which is written behind its name.
        ax: where to draw.
    """
    groups = _groups(adata, clusters)
    values = np.asarray(column_of(adata, CONFIDENCE), float)
    ax = ax or new_axes((5.0, _height(len(groups.names))))
    n = len(groups.names)
    for k in range(n):
        here = values[groups.codes == k]
        here = here[np.isfinite(here)]
        if 0 < len(here) < FEW_CELLS:
            spread = k + np.linspace(-0.25, 0.25, len(here)) if len(here) > 1 else [k]
            ax.scatter(np.sort(here), spread, s=6, color=groups.paint[k], linewidth=0)
        elif len(here):
            ax.boxplot(
                here, positions=[k], orientation="horizontal", whis=(5, 95), showfliers=False, widths=0.65,
                patch_artist=True, manage_ticks=False,
                boxprops={"facecolor": groups.paint[k], "edgecolor": "0.25", "linewidth": 0.7},
                medianprops={"color": "0.1", "linewidth": 1.4}, whiskerprops={"color": "0.4", "linewidth": 0.8},
                capprops={"color": "0.4", "linewidth": 0.8},
            )  # fmt: skip
        ax.annotate(
            f"{(groups.codes == k).sum():,}", (1.0, k), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=7, color="0.35",
        )  # fmt: skip
    limit = _number_in(record_of(adata, "annotate").get("params", {}), "min_confidence")
    if limit:
        ax.axvline(limit, color=PALETTE[4], linestyle="--", linewidth=1)
    ax.annotate("cells", (1.0, 1.0), xycoords="axes fraction", xytext=(4, 2), textcoords="offset points",
                fontsize=7, color="0.35")  # fmt: skip
    ax.set_yticks(range(n), groups.names, fontsize=8 if n <= 30 else 6)
    ax.set(xlim=(-0.02, 1.02), ylim=(n - 0.4, -0.6), xlabel="confidence",
           title="confidence of the calls" + (f"\nunassigned below {limit:g}" if limit else ""))  # fmt: skip
    ax.grid(axis="x", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    return tidy(ax)


def markers(
    adata: "AnnData",
    markers: "Mapping[str, Sequence[str]] | pd.DataFrame | str | Path | None" = None,
    *,
    layer: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws marker genes in the called types: how many cells have a count (size), and how high it is (colour).

    The colour is the mean of log(1 + counts per 10,000) of the type's cells, from the lowest type (0) to the
    highest (1) for each gene.

    Args:
        adata: cells with the results of `tl.annotate`, and counts.
        markers: genes by type: a mapping, a table or a file; None is those that `tl.annotate` wrote down. Of each
            type the first that the data has, as many as there is room for.
        layer: layer of the counts; None is the one that `tl.annotate` read.
        ax: where to draw.

    Raises:
        MissingKeyError: no markers are given, and none were written.
        DataError: no marker is among the genes of the data.
    """
    return _drawn_markers(adata, markers, ax, layer)


def agreement(adata: "AnnData", labels_key: str) -> dict[str, Any]:
    """How the called types agree with the column `labels_key` of `obs`.

    Returns:
        cells: how many have a label. accuracy: share of them whose type is the label; one called "unassigned"
        counts as wrong. macro_f1: mean over the labels of the F1 score. strangers: labels that are no called type and
        none that the annotator knows, so that their cells count as wrong whatever they are called. trained_on:
        whether the annotator was trained on these very labels, which then say little about other cells.
    """
    import pandas as pd

    truth, called = _pairs(adata, labels_key)
    codes, names = pd.factorize(np.concatenate([truth, called]))
    wanted, got = codes[: len(truth)], codes[len(truth) :]
    n_wanted, n_got = (np.bincount(side, minlength=len(names)) for side in (wanted, got))
    right = np.bincount(wanted[wanted == got], minlength=len(names))
    f1 = 2 * right[n_wanted > 0] / (n_wanted + n_got)[n_wanted > 0]
    known = set(called) | set(_names_in(record_of(adata, "annotate"), "types"))
    params = record_of(adata, "annotate").get("params", {})
    said = dict.fromkeys(("labels_key", "reference", "model", "markers"), "none")
    said |= {key: str(params[key]) for key in said if hasattr(params, "get") and key in params}
    elsewhere = any(said[key] not in ("none", "None", "") for key in ("reference", "model", "markers"))
    return {
        "cells": len(truth),
        "accuracy": float((wanted == got).mean()) if len(truth) else float("nan"),
        "macro_f1": float(f1.mean()) if len(f1) else float("nan"),
        "strangers": sorted(set(truth) - known),
        "trained_on": said["labels_key"] == labels_key and not elsewhere,
    }


class _Groups(NamedTuple):
    names: list[str]
    codes: np.ndarray
    paint: list[str]


def _groups(adata: "AnnData", clusters: str | None) -> _Groups:
    """Clusters with the colour and the name of their commonest type."""
    types, type_codes = codes_of(column_of(adata, CELL_TYPE))
    key = clusters or (CLUSTER if CLUSTER in adata.obs else CELL_TYPE)
    column_of(adata, CONFIDENCE)
    names, codes = codes_of(column_of(adata, key))
    sizes = np.bincount(codes, minlength=len(names))
    kept = np.flatnonzero(sizes)
    names, codes = [names[k] for k in kept], np.searchsorted(kept, codes)
    names, codes = largest(names, codes)
    numbered = all(name.isdecimal() and len(name) < 10 for name in names if not _last(name))  # "10" comes after "9"
    places = [(_last(name), int(name) if numbered and not _last(name) else 0) for name in names]
    order = np.array(sorted(range(len(names)), key=places.__getitem__))
    names, codes = [names[k] for k in order], np.argsort(order)[codes]
    shown, paint = [], []
    for k, name in enumerate(names):
        here = np.bincount(type_codes[codes == k], minlength=len(types))
        top = int(here.argmax())
        paint.append(GREY if types[top] in NO_TYPE or name in NO_TYPE else color_of(top))
        shown.append(short(name) if key == CELL_TYPE else short(f"{name}: {types[top]}"))
    return _Groups(shown, codes, paint)


def _pairs(adata: "AnnData", labels_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Label and called type of the cells that have a label, as text."""
    import pandas as pd

    called = np.array(column_of(adata, CELL_TYPE).astype(object).fillna("not known").astype(str), dtype=object)
    column = pd.Series(np.asarray(column_of(adata, labels_key), dtype=object))
    params = record_of(adata, "annotate").get("params", {})
    unlabelled = UNLABELLED | {str(params.get("unlabeled_category", ""))} if hasattr(params, "get") else UNLABELLED
    kept = np.array([not pd.isna(value) and str(value) not in unlabelled for value in column], bool)
    return np.array([str(value) for value in column[kept]], dtype=object), called[kept]


def _confusion(adata: "AnnData", labels_key: str) -> Confusion:
    truth, called = _pairs(adata, labels_key)
    if not len(truth):
        msg = f"obs[{labels_key!r}] holds no label; pass a column of obs with the types of the cells"
        raise DataError(msg)
    types = _names_in(record_of(adata, "annotate"), "types")
    order = [*types, *codes_of(adata.obs[labels_key])[0]]
    names = [*dict.fromkeys([name for name in order if name in set(truth) | set(called)]), *sorted(set(called))]
    names = list(dict.fromkeys(names))
    number = {name: k for k, name in enumerate(names)}
    pairs = np.array([[number[name] for name in side] for side in (truth, called)])
    names, codes = largest(names, pairs.ravel())
    rows, columns = codes.reshape(2, -1)
    full = np.zeros((len(names), len(names)), int)
    np.add.at(full, (rows, columns), 1)
    missed = np.array([name in types for name in names]) & full.any(axis=1)  # that no cell was called: a column of 0
    i = sorted(np.flatnonzero(full.any(axis=1)).tolist(), key=lambda k: _last(names[k]))
    j = sorted(np.flatnonzero(full.any(axis=0) | missed).tolist(), key=lambda k: _last(names[k]))
    i, j = _on_the_diagonal(full, i, j, names)
    return Confusion([names[k] for k in i], [names[k] for k in j], full[np.ix_(i, j)])


def _on_the_diagonal(full: np.ndarray, i: list[int], j: list[int], names: list[str]) -> tuple[list[int], list[int]]:
    """Names that both sides have first; those of one side are paired where most of their cells are."""
    from scipy.optimize import linear_sum_assignment

    both = [k for k in i if k in j and names[k] not in NO_TYPE]
    rows = [k for k in i if k not in both]
    columns = [k for k in j if k not in both]
    free = [k for k in columns if names[k] not in NO_TYPE]
    pairs = np.transpose(linear_sum_assignment(-full[np.ix_(rows, free)])).tolist() if rows and free else []
    paired_rows, paired = [rows[k] for k, _ in pairs], [free[k] for _, k in pairs]
    rest = [k for k in columns if k not in paired]
    return [*both, *paired_rows, *(k for k in rows if k not in paired_rows)], [*both, *paired, *rest]


def _drawn_markers(adata: "AnnData", given: Any, ax: "Axes | None", layer: str | None = None) -> "Axes":
    chosen = _chosen(adata, given)
    rows, codes = _type_rows(adata, list(chosen))
    genes = [gene for listed in chosen.values() for gene in listed]
    position = {str(name): k for k, name in enumerate(adata.var_names)}
    distinct = list(dict.fromkeys(genes))
    share, mean = _expression(adata, [position[gene] for gene in distinct], codes, len(rows), layer)
    column = [distinct.index(gene) for gene in genes]
    share, mean = share[:, column], mean[:, column]
    low, high = mean.min(axis=0), mean.max(axis=0)
    shade = (mean - low) / np.where(high > low, high - low, 1.0)
    ax = ax or new_axes(_dots_size(len(rows), len(genes)))
    x, y = np.meshgrid(np.arange(len(genes)), np.arange(len(rows)))
    biggest = 72 * 72 * (0.8 * min(PER_GENE, PER_ROW)) ** 2
    dots = ax.scatter(
        x.ravel(), y.ravel(), s=biggest * share.ravel(), c=shade.ravel(), cmap="Reds", vmin=-0.08, vmax=1,
        linewidth=0.35, edgecolor="0.55",
    )  # fmt: skip
    ax.set_xticks(range(len(genes)), [short(gene) for gene in genes], rotation=90, fontsize=7)
    ax.set_yticks(range(len(rows)), [short(name) for name in rows], fontsize=8)
    ax.set(xlim=(-0.8, len(genes) - 0.2), ylim=(len(rows) - 0.3, -0.7), ylabel="called")
    _brackets(ax, chosen)
    _dot_legend(ax, dots, biggest)
    return tidy(ax)


def _brackets(ax: "Axes", chosen: Mapping[str, Sequence[str]]) -> None:
    """Over each group of genes the type that they mark."""
    start = 0
    across: Any = ("data", "axes fraction")
    for kind, genes in chosen.items():
        end = start + len(genes) - 1
        ax.annotate("", (start - 0.35, 1.01), (end + 0.35, 1.01), xycoords=across, textcoords=across,
                    arrowprops={"arrowstyle": "-", "color": "0.4", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0},
                    annotation_clip=False)  # fmt: skip
        ax.annotate(short(kind), ((start + end) / 2, 1.01), xycoords=across, xytext=(0, 4), rotation=45, ha="left",
                    textcoords="offset points", va="bottom", fontsize=8, rotation_mode="anchor",
                    annotation_clip=False)  # fmt: skip
        start = end + 1


def _dot_legend(ax: "Axes", dots: Any, biggest: float) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], marker="o", linestyle="", color="0.6", markersize=float(np.sqrt(biggest * s)), markeredgewidth=0)
        for s in (0.25, 0.5, 1.0)
    ]
    ax.legend(marks, ["25 %", "50 %", "100 %"], loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False,
              fontsize=7, title="cells with\na count", title_fontsize=7.5, alignment="left")  # fmt: skip
    place = ax.inset_axes((1.02, 0.04, 0.012, 0.38))
    bar = ax.figure.colorbar(dots, cax=place, ticks=[0, 1], boundaries=np.linspace(0, 1, 65))
    bar.ax.set_yticklabels(["lowest", "highest"], fontsize=7)
    bar.ax.tick_params(length=2)
    bar.outline.set_visible(False)
    bar.ax.set_title("mean\nlog1p CP10k", fontsize=7.5, loc="left")


def _chosen(adata: "AnnData", given: Any) -> dict[str, list[str]]:
    """The markers to draw, of each type the first ones that the data has."""
    found = as_markers(given) if given is not None else _stored_markers(adata)
    if not found:
        msg = 'uns["diffbio"]["annotate"] names no markers; run tl.annotate first, or pass markers={type: [genes]}'
        raise MissingKeyError(msg)
    there = set(map(str, adata.var_names))
    kept = {kind: [gene for gene in genes if gene in there] for kind, genes in found.items()}
    kept = {kind: genes for kind, genes in kept.items() if genes}
    if not kept:
        some = ", ".join([gene for genes in found.values() for gene in genes][:3])
        msg = f"none of the markers ({some}) is among the genes of the data; use the same gene names"
        raise DataError(msg)
    most = int(np.clip(MOST_GENES // len(kept), 1, MOST_PER_TYPE))
    return {kind: genes[:most] for kind, genes in list(kept.items())[:MOST_GENES]}


def _stored_markers(adata: "AnnData") -> dict[str, list[str]]:
    record = record_of(adata, "annotate")
    types, genes = _names_in(record, "marker_types"), _names_in(record, "marker_genes")
    if len(types) != len(genes):
        return {}
    found: dict[str, list[str]] = {}
    for kind, gene in zip(types, genes, strict=True):
        found.setdefault(kind, []).append(gene)
    return found


def _type_rows(adata: "AnnData", order: list[str]) -> tuple[list[str], np.ndarray]:
    """Called types that have cells, those of the markers first and in their order; each cell's number."""
    names, codes = largest(*codes_of(column_of(adata, CELL_TYPE)))
    used = [k for k in np.argsort([order.index(n) if n in order else len(order) for n in names], kind="stable")
            if (codes == k).any()]  # fmt: skip
    used = sorted(used, key=lambda k: _last(names[k]))
    number = np.full(len(names), -1)
    number[used] = np.arange(len(used))
    return [names[k] for k in used], number[codes]


def _expression(
    adata: "AnnData", columns: Sequence[int], codes: np.ndarray, n_types: int, layer: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Share of cells with a count, and mean log(1 + CP10k): (types, genes) each, in one pass over the counts."""
    params = record_of(adata, "annotate").get("params", {})
    if layer is None and hasattr(params, "get"):
        said = params.get("layer")
        layer = said if isinstance(said, str) and said in adata.layers else None
    place = np.full(adata.n_vars, -1)
    place[list(columns)] = np.arange(len(columns))
    share, mean = np.zeros((n_types, len(columns))), np.zeros((n_types, len(columns)))
    for start, rows in row_chunks(counts_of(adata, layer=layer)):
        if isinstance(rows, np.ndarray):
            total = rows.sum(axis=1, dtype=float)
            cells, genes = np.nonzero(rows[:, list(columns)])
            values = rows[:, list(columns)][cells, genes]
        else:
            of_cell = np.repeat(np.arange(len(rows.starts) - 1), np.diff(rows.starts))
            total = np.bincount(of_cell, rows.values, minlength=len(rows.starts) - 1)
            genes = place[rows.columns]
            kept = (genes >= 0) & (rows.values > 0)
            cells, genes, values = of_cell[kept], genes[kept], rows.values[kept]
        at = codes[start + cells]
        np.add.at(share, (at, genes), 1.0)
        np.add.at(mean, (at, genes), np.log1p(1e4 * values / np.maximum(total, 1e-12)[cells]))
    sizes = np.bincount(codes, minlength=n_types)[:, None]
    return share / sizes, mean / sizes


def _name_ticks(ax: "Axes", rows: Sequence[str], columns: Sequence[str]) -> None:
    size = 8 if max(len(rows), len(columns)) <= 30 else 6
    ax.set_xticks(range(len(columns)), [short(name) for name in columns], rotation=45, ha="right",
                  rotation_mode="anchor", fontsize=size)  # fmt: skip
    ax.set_yticks(range(len(rows)), [short(name) for name in rows], fontsize=size)
    ax.tick_params(length=0)


def _names_in(record: Any, key: str) -> list[str]:
    value = record.get(key) if hasattr(record, "get") else None
    return [] if value is None else [str(item) for item in np.ravel(np.asarray(value, dtype=object))]


def _number_in(params: Any, key: str) -> float:
    value = params.get(key) if hasattr(params, "get") else None
    return float(value) if isinstance(value, int | float | np.number) and np.isfinite(value) else 0.0


def _last(name: str) -> int:
    return NO_TYPE.index(name) + 1 if name in NO_TYPE else 0


def _number(n: int) -> str:
    return f"{n:,}" if n < 10_000 else f"{n / 1000:,.0f}k"


def _height(n_rows: int) -> float:
    return 1.2 + PER_ROW * max(n_rows, 6)


def _confusion_size(table: Confusion) -> tuple[float, float]:
    n_rows, n_columns = table.counts.shape
    return 3.2 + 0.36 * max(n_columns, 5), 2.2 + PER_ROW * max(n_rows, 6)


def _dots_shape(adata: "AnnData", given: Any) -> tuple[int, int]:
    chosen = _chosen(adata, given)
    return len(_type_rows(adata, list(chosen))[0]), sum(map(len, chosen.values()))


def _dots_size(n_rows: int, n_genes: int) -> tuple[float, float]:
    return 3.6 + PER_GENE * max(n_genes, 8), 2.4 + PER_ROW * max(n_rows, 5)
