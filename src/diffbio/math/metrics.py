"""Distances between cells under the metrics that neighbour graphs are built with, differentiable."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .distances import safe_norm, unit_rows
from .neighbors import NO_SPREAD


def centred_rows(x: Float[Array, "cells features"]) -> Float[Array, "cells features"]:
    """Every row minus its own mean; a row that is constant up to rounding becomes 0."""
    centred = x - x.mean(axis=1, keepdims=True)
    varies = (centred**2).sum(axis=1, keepdims=True) > NO_SPREAD**2 * (x**2).sum(axis=1, keepdims=True)
    return jnp.where(varies, centred, 0.0)


def metric_points(x: Float[Array, "cells features"], metric: str) -> Float[Array, "cells coordinates"]:
    """Rows at whose Euclidean (or Manhattan) distance the cells are.

    Unchanged for "euclidean" and "manhattan". For "cosine" rows of length 1, and for "correlation" the same of rows
    minus their means, with a further coordinate that is 1 for a row without direction: so it is at distance 1 from
    all others and at 0 from its like, as in `neighbors.knn`.
    """
    if metric in ("euclidean", "manhattan"):
        return x
    units = unit_rows(centred_rows(x) if metric == "correlation" else x)
    return jnp.hstack([units, (units == 0).all(axis=1, keepdims=True).astype(x.dtype)])


def pairwise(x: Float[Array, "cells features"], metric: str = "euclidean") -> Float[Array, "cells _cells"]:
    """Distance of every cell to every other by differences, row by row: exact for near cells, 0 on the diagonal.

    metric: "euclidean"; "cosine", 1 - cos of the angle; "correlation", 1 - Pearson's; "manhattan".
    """
    points = metric_points(x, metric)

    @jax.checkpoint  # else the gradient keeps every difference
    def row(point: jax.Array) -> jax.Array:
        gap = points - point
        if metric == "manhattan":
            return jnp.abs(gap).sum(axis=1)
        return safe_norm(gap) if metric == "euclidean" else (gap * gap).sum(axis=1) / 2

    return jax.lax.map(row, points)
