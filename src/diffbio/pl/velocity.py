"""Figures of `tl.velocity`: streams on a map of the cells."""

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from ..errors import ConfigError, MissingKeyError
from ..math.kernels import cosine_lists_of
from ..math.velocity_graph import projected
from ..slots import VELOCITY_GRAPH
from .drawing import column_of, map_key, new_axes, scatter, short

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

PANEL = (5.2, 4.2)  # inches
GRID = 40  # places along either side
SHARE_NEAR = 0.02  # of the cells, that a place of the grid looks at
THIN = 0.05  # of the usual density of cells: no arrow is drawn there
FEWEST = 3


def velocity(adata: "AnnData", *, basis: str | None = None, color: str | None = None, kind: str = "stream") -> "Axes":
    """Draws where the velocities lead on a map: lines of flow, or arrows on a grid.

    Every cell's direction is the mean of the ways to the cells nearby, weighted by how far its velocity points to each
    (scVelo's `velocity_embedding`); then a Gaussian mean is taken at each place of a grid.

    Args:
        adata: cells with the results of `tl.velocity`.
        basis: key of `obsm`, of which the first two columns are drawn; None is the first map that is there.
        color: column of `obs`.
        kind: "stream" or "arrows".

    Raises:
        ConfigError: another kind.
        MissingKeyError: no velocities, no map or no such column.
    """
    if kind not in ("stream", "arrows"):
        msg = f"pl.velocity: kind must be 'stream' or 'arrows', got {kind!r}."
        raise ConfigError(msg)
    if VELOCITY_GRAPH not in adata.obsp:
        msg = f"pl.velocity: obsp has no {VELOCITY_GRAPH!r}; call tl.velocity(adata) first"
        raise MissingKeyError(msg)
    key = map_key(adata, basis, "pl.velocity")
    if key is None:
        msg = "pl.velocity: there is no map of the cells; call tl.embed(adata) first, or name a key of obsm as basis"
        raise MissingKeyError(msg)
    xy = np.asarray(adata.obsm[key], float)[:, :2]
    values = None if color is None else column_of(adata, color)
    lists = cosine_lists_of(adata.obsp[VELOCITY_GRAPH])
    moved = np.asarray(projected(lists, jnp.asarray(xy, jnp.float32)), float)
    ax = new_axes(PANEL)
    scatter(ax, xy, values, title="RNA velocity")
    x, y, u, v = _on_grid(xy, moved)
    if kind == "stream" and np.isfinite(u).sum() > FEWEST:
        speed = np.nan_to_num(np.hypot(u, v))
        width = 0.4 + 1.2 * speed / max(float(speed.max()), 1e-12)
        ax.streamplot(x, y, u, v, color="black", density=1.4, linewidth=width, arrowsize=0.9, zorder=3)
    elif kind == "arrows":
        ax.quiver(*np.meshgrid(x, y), u, v, color="black", zorder=3, width=0.003)
    ax.set_xlabel(short(key.removeprefix("X_").removeprefix("diffbio_")), fontsize=8)
    return ax


def _on_grid(xy: np.ndarray, moved: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates of the grid, and the two directions there (rows along y); NaN where there are no cells."""
    from scipy.spatial import cKDTree

    low, high = xy.min(axis=0), xy.max(axis=0)
    room = 0.01 * np.maximum(high - low, 1e-9)
    x, y = (np.linspace(a, b, GRID) for a, b in zip(low - room, high + room, strict=True))
    places = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    step = float(np.mean([x[1] - x[0], y[1] - y[0]]))
    near = max(FEWEST, int(SHARE_NEAR * len(xy)))
    distance, cells = cKDTree(xy).query(places, k=min(near, len(xy)))
    distance, cells = distance.reshape(len(places), -1), cells.reshape(len(places), -1)
    weight = np.exp(-0.5 * (distance / step) ** 2)
    mass = weight.sum(axis=1)
    mean = (weight[..., None] * moved[cells]).sum(axis=1) / np.maximum(mass, 1e-12)[:, None]
    crowded = mass > THIN * np.quantile(mass, 0.95)
    mean[~crowded] = np.nan
    u, v = mean.T.reshape(2, GRID, GRID)
    return x, y, u, v
