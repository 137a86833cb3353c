"""Figures of the pipeline's stages and of `pp`."""

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import slots
from ..errors import MissingKeyError
from .drawing import (
    GREY,
    PALETTE,
    codes_of,
    color_of,
    column_of,
    legend,
    new_axes,
    record_of,
    scatter,
    short,
    tidy,
    widen,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

MAP_WIDTH = 4.2  # inches
NAMES_OF_MAPS = {
    "umap": "UMAP",
    "phate": "PHATE",
    "pca": "PC",
    "latent": "latent",
    "harmony": "Harmony",
    "mmd": "MMD",
    "wgan": "WGAN",
    "integrated": "integrated",
}


def pipeline(adata: "AnnData", *, color: "list[str] | None" = None) -> "np.ndarray":
    """Draws what `tl.pipeline` found: maps, cluster sizes, training curves.

    Args:
        adata: cells with the pipeline's results.
        color: columns of `obs` to colour the maps by; None is the clusters and the batches.

    Returns:
        The axes, in one array: a map for each colour, cluster sizes, then a curve for each stage.
    """
    import matplotlib.pyplot as plt

    colors = color or colors_of(adata)
    stages = stages_of(adata)
    columns = max(len(colors) + 1, 3)
    rows = 1 + -(-len(stages) // columns)
    heights = [1.5] + [1] * (rows - 1)
    figure = plt.figure(figsize=(4.6 * columns, 3.6 + 2.4 * (rows - 1)), layout="constrained")
    grid = figure.add_gridspec(rows, columns, height_ratios=heights)
    axes = [figure.add_subplot(grid[0, i]) for i in range(len(colors) + 1)]
    for ax, name in zip(axes, colors, strict=False):
        embed(adata, color=name, ax=ax)
    if "diffbio_cluster" in adata.obs:
        cluster(adata, ax=axes[len(colors)])
    else:
        axes.pop().remove()
    places = [figure.add_subplot(grid[1 + i // columns, i % columns]) for i in range(len(stages))]
    for ax, name in zip(places, stages, strict=True):
        training(adata, name, ax=ax)
    return np.array([*axes, *places])


def vae(adata: "AnnData", *, color: str | None = None, ax: "Axes | None" = None) -> "Axes":
    """Draws the latent space of `tl.vae` along its first two principal components."""
    return _map(adata, "X_diffbio_latent", color, ax)


def integrate(adata: "AnnData", *, color: str | None = None, ax: "Axes | None" = None) -> "Axes":
    """Draws the integrated embedding along its first two principal components, coloured by batch."""
    keys = (slots.INTEGRATED, *(f"X_diffbio_{method}" for method in slots.INTEGRATIONS))
    key = next((key for key in keys if key in adata.obsm), slots.INTEGRATED)
    return _map(adata, key, color or _batch_key(adata, "integrate", "pipeline"), ax)


def embed(adata: "AnnData", *, color: str | None = None, method: str | None = None, ax: "Axes | None" = None) -> "Axes":
    """Draws the map of `tl.embed` or `tl.pipeline`, coloured by a column of `obs` (clusters by default).

    Args:
        adata: cells with a map.
        color: column of `obs`; None is the clusters.
        method: "umap" or "phate"; None is the first that is there.
        ax: to draw into.
    """
    method = method or next(iter(maps_of(adata)), "umap")
    return _map(adata, f"X_diffbio_{method}", color or _present(adata, "diffbio_cluster"), ax)


def cluster(adata: "AnnData", *, ax: "Axes | None" = None) -> "Axes":
    """Draws how many cells each cluster has, divided by batch where there are batches."""
    ax = ax or new_axes((4.6, 3.6))
    names, codes = codes_of(column_of(adata, "diffbio_cluster"))
    batch_key = _batch_key(adata, "pipeline", "integrate")
    batches, parts = codes_of(adata.obs[batch_key]) if batch_key else (["cells"], np.zeros(adata.n_obs, int))
    split = 1 < len(batches) <= len(PALETTE)
    bottom = np.zeros(len(names))
    for b, batch in enumerate(batches if split else ["cells"]):
        sizes = np.bincount(codes[(parts == b) | (not split)], minlength=len(names))
        paint = color_of(b) if split else [color_of(k) for k in range(len(names))]
        ax.bar(range(len(names)), sizes, bottom=bottom, color=paint, width=0.8, label=short(batch))
        bottom += sizes
    if len(names) <= 30:
        for k, size in enumerate(bottom):
            ax.annotate(f"{size:,.0f}", (k, size), ha="center", va="bottom", fontsize=7, color="0.25")
    ax.set_ylim(0, 1.12 * max(bottom.max(), 1))  # a batch without cells would stick to the top of the others
    step = max(1, -(-len(names) // 25))
    ax.set_xticks(range(0, len(names), step), [short(n) for n in names[::step]], fontsize=8)
    ax.set(
        xlabel="cluster",
        ylabel="cells",
        title="cluster sizes" + (f" by {short(batch_key)}" if split else ""),
    )
    if split:
        legend(ax, [short(b) for b in batches], [color_of(b) for b in range(len(batches))])
    return tidy(ax)


def training(adata: "AnnData", stage: str, *, ax: "Axes | None" = None) -> "Axes":
    """Draws the loss of one stage of the pipeline against the epoch."""
    ax = ax or new_axes((4, 2.8))
    history = history_of(adata)
    rows = history["stage"] == stage
    epoch = history["epoch"][rows] + 1
    mark = "." if rows.sum() < 12 else None
    ax.plot(epoch, history["loss"][rows], color=PALETTE[0], marker=mark, label="training")
    validation = history.get("validation_loss", np.full(len(rows), np.nan))[rows]
    if np.isfinite(validation).any():
        ax.plot(epoch, validation, color=PALETTE[4], marker=mark, label="validation")
        ax.legend(frameon=False, fontsize=8)
    unit = "pair of neighbours" if stage.startswith("umap") else "cell"
    ax.set(xlabel="epoch", ylabel=f"loss per {unit}", title=stage)
    ax.ticklabel_format(axis="y", useOffset=False)
    return tidy(ax)


def ambient(adata: "AnnData", *, ax: "Axes | None" = None) -> "Axes":
    """Draws how large a share of the cells' counts was ascribed to the soup."""
    ax = ax or new_axes((4.6, 3.2))
    values = column_of(adata, "diffbio_ambient_fraction").to_numpy(dtype=float)
    ax.hist(values, bins=50, color=PALETTE[0])
    ax.axvline(float(np.median(values)), color=PALETTE[4], label=f"median {np.median(values):.3f}")
    ax.set(xlabel="ambient fraction of a cell's counts", ylabel="cells", title="ambient RNA")
    ax.legend(frameon=False, fontsize=8)
    return tidy(ax)


def highly_variable(adata: "AnnData", *, layer: str | None = None, ax: "Axes | None" = None) -> "Axes":
    """Draws variance against mean of the genes' counts, the variable genes in colour."""
    ax = ax or new_axes((4.6, 3.6))
    if "diffbio_highly_variable" not in adata.var:
        msg = "var has no 'diffbio_highly_variable'; run pp.highly_variable first"
        raise MissingKeyError(msg)
    counts: Any = adata.X if layer is None else adata.layers[layer]
    mean = np.asarray(counts.mean(axis=0)).ravel()
    square = counts.multiply(counts) if hasattr(counts, "multiply") else np.square(counts)
    variance = np.maximum(np.asarray(square.mean(axis=0)).ravel() - mean**2, 0)
    chosen = adata.var["diffbio_highly_variable"].to_numpy(dtype=bool)
    shown = (mean > 0) & (variance > 0)
    for rows, paint, name in ((~chosen, GREY, "other genes"), (chosen, PALETTE[4], "variable genes")):
        rows = rows & shown
        ax.scatter(
            mean[rows],
            variance[rows],
            s=4,
            color=paint,
            linewidth=0,
            rasterized=True,
            label=f"{rows.sum():,} {name}",
        )
    ax.set(xscale="log", yscale="log", xlabel="mean count", ylabel="variance", title="variable genes")
    ax.legend(frameon=False, fontsize=8, markerscale=3)
    return tidy(ax)


def normalize(adata: "AnnData", *, layer: str | None = None, ax: "Axes | None" = None) -> "Axes":
    """Draws the cells' totals before and after `pp.normalize`, each relative to its median."""
    ax = ax or new_axes((4.6, 3.2))
    if "diffbio_normalized" not in adata.layers:
        msg = "layers has no 'diffbio_normalized'; run pp.normalize first"
        raise MissingKeyError(msg)
    counts: Any = adata.X if layer is None else adata.layers[layer]
    for matrix, paint, name in (
        (counts, GREY, "counts"),
        (adata.layers["diffbio_normalized"], PALETTE[0], "normalized"),
    ):
        totals = np.asarray(matrix.sum(axis=1), dtype=float).ravel()
        totals = np.log2(totals[totals > 0] / np.median(totals[totals > 0]))
        ax.hist(totals, bins=60, color=paint, alpha=0.75, label=name)
    ax.set(xlabel="log2(total of a cell / median)", ylabel="cells", title="normalisation")
    ax.legend(frameon=False, fontsize=8)
    return tidy(ax)


def colors_of(adata: "AnnData", *more: str | None) -> list[str]:
    """What maps are coloured by: clusters, batches, and `more` columns, those that are there."""
    wanted = [_present(adata, "diffbio_cluster"), _batch_key(adata, "pipeline", "integrate"), *more]
    return list(dict.fromkeys(name for name in wanted if name))


def maps_of(adata: "AnnData") -> list[str]:
    """The maps that are there: "umap", "phate"."""
    return [method for method in slots.MAPS if f"X_diffbio_{method}" in adata.obsm]


def stages_of(adata: "AnnData") -> list[str]:
    """The stages whose training `tl.pipeline` wrote down, in their order."""
    try:
        return list(dict.fromkeys(map(str, history_of(adata)["stage"])))
    except MissingKeyError:
        return []


def history_of(adata: "AnnData") -> dict[str, np.ndarray]:
    """The training history of `tl.pipeline` as columns; `stage` holds names, the rest numbers."""
    history = record_of(adata, "pipeline").get("history", {})
    if "loss" not in history or "stage" not in history:
        msg = 'uns["diffbio"]["pipeline"] has no training history; run tl.pipeline or `diffbio run` first'
        raise MissingKeyError(msg)
    return {str(k): np.asarray(v).astype(str) if k == "stage" else np.asarray(v, float) for k, v in history.items()}


def _batch_key(adata: "AnnData", *functions: str) -> str | None:
    for name in functions:
        params = record_of(adata, name).get("params", {})
        key = params.get("batch_key") if hasattr(params, "get") else None
        if isinstance(key, str) and key in adata.obs:
            return key
    return None


def _present(adata: "AnnData", key: str) -> str | None:
    return key if key in adata.obs else None


def _map(adata: "AnnData", key: str, color: str | None, ax: "Axes | None") -> "Axes":
    """Scatters the cells at `obsm[key]` (its first two principal components if it is wider)."""
    if key not in adata.obsm:
        msg = f"obsm has no {key!r}; it has {', '.join(map(str, adata.obsm)) or 'nothing'}; run the tool first"
        raise MissingKeyError(msg)
    xy = np.asarray(adata.obsm[key], np.float32)
    axis = NAMES_OF_MAPS.get(key.removeprefix("X_diffbio_"), key)
    if xy.shape[1] > 2:
        from ..math.linalg import pca

        xy, axis = pca(xy, 2).scores, f"PC of {axis}"
    if xy.shape[1] == 1:
        xy = np.column_stack([xy[:, 0], np.zeros(len(xy))])
    own = ax is None
    ax = ax or new_axes((16, 4))  # room for any legend
    column = None if color is None else column_of(adata, color)
    scatter(ax, xy, column, title="" if color is None else short(color))
    ax.set(xlabel=f"{axis} 1", ylabel=f"{axis} 2")
    if own:
        widen(ax, MAP_WIDTH)
    return ax
