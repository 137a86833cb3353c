"""Figure of `tl.spatial_domains`: domains on the tissue, and where spots listen to few of their neighbours."""

from typing import TYPE_CHECKING

import numpy as np

from ..errors import MissingKeyError
from ..slots import DOMAIN, SPATIAL_ATTENTION
from .drawing import codes_of, color_of, column_of, legend, record_of, tidy

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

PANEL = 4.2  # inches
MOST_EDGES = 60_000  # drawn, the strongest


def spatial_domains(adata: "AnnData", *, spatial_key: str | None = None) -> np.ndarray:
    """Draws every slice twice: spots by domain, and the edges by which each spot is informed most.

    An edge is the darker the more the attention on it is above the mean over the spot's neighbours; edges of the mean
    or less are not drawn. Coordinates in three dimensions are drawn by their first two columns.

    Args:
        adata: spots with the results of `tl.spatial_domains`.
        spatial_key: coordinates in `obsm`; None is where `tl.spatial_domains` found them.

    Returns:
        The axes, (slices, 2).

    Raises:
        MissingKeyError: no domains, or no such coordinates.
    """
    import matplotlib.pyplot as plt

    if DOMAIN not in adata.obs or SPATIAL_ATTENTION not in adata.obsp:
        msg = f"pl.spatial_domains: obs has no {DOMAIN!r}; call tl.spatial_domains(adata, n_domains) first"
        raise MissingKeyError(msg)
    record = record_of(adata, DOMAIN)
    key = spatial_key or str(record.get("spatial_key", "spatial"))
    if key not in adata.obsm:
        msg = f"pl.spatial_domains: obsm has no {key!r}; it has {', '.join(map(str, adata.obsm)) or 'nothing'}"
        raise MissingKeyError(msg)
    places = np.asarray(adata.obsm[key], float)[:, :2]
    names, codes = codes_of(adata.obs[DOMAIN])
    batch_key = str(record.get("batch_key", ""))
    slices, rows_of = codes_of(column_of(adata, batch_key)) if batch_key else (["tissue"], np.zeros(len(codes), int))
    figure, axes = plt.subplots(
        len(slices), 2, figsize=(2 * PANEL + 1.2, PANEL * len(slices)), layout="constrained", squeeze=False
    )
    del figure
    for k, name in enumerate(slices):
        rows = np.flatnonzero(rows_of == k)
        left, right = axes[k]
        size = float(np.clip(9000 / max(len(rows), 1), 0.5, 30))
        paint = np.array([color_of(c) for c in range(len(names))])
        left.scatter(*places[rows].T, c=paint[codes[rows]], s=size, linewidth=0, rasterized=True)
        _edges(right, adata, places, rows)
        for ax, title in ((left, f"domains, {name}"), (right, f"attention, {name}")):
            ax.set(xticks=[], yticks=[], title=title, aspect="equal")
            tidy(ax)
            ax.spines[["left", "bottom"]].set_visible(False)
    legend(axes[0, 1], [f"domain {name}" for name in names], [color_of(k) for k in range(len(names))])
    return np.asarray(axes)


def _edges(ax: "Axes", adata: "AnnData", places: np.ndarray, rows: np.ndarray) -> None:
    """Edges of a slice above the mean of their spot's, the darker the stronger."""
    from matplotlib.collections import LineCollection
    from scipy import sparse

    part = sparse.csr_matrix(adata.obsp[SPATIAL_ATTENTION])[rows].tocoo()
    degree = np.bincount(part.coords[0], minlength=len(rows))
    excess = part.data * degree[part.coords[0]] - 1.0
    kept = np.argsort(-excess)[: min(MOST_EDGES, int((excess > 0).sum()))]
    ends = np.stack([places[rows[part.coords[0][kept]]], places[part.coords[1][kept]]], axis=1)
    strong = np.quantile(excess[kept], 0.95) if len(kept) else 1.0
    shade = np.zeros((len(kept), 4))
    shade[:, 3] = np.clip(excess[kept] / max(float(strong), 1e-12), 0.0, 1.0)
    ax.add_collection(LineCollection(list(ends), colors=shade, linewidths=0.5, rasterized=True))
    ax.autoscale_view()
