"""Places in tissue: neighbours within slices, means over them, and labels that neighbours should share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..errors import DataError
from .callbacks import on_host
from .neighbors import knn


def slice_neighbors(
    coordinates: Float[Array, "cells dimensions"], k: int, labels: Int[Array, " cells"] | None = None
) -> Int[Array, "cells neighbors"]:
    """Row numbers of the k nearest cells of the same slice, nearest first, the cell itself excluded.

    A discrete choice, made on the host: no gradient goes through it. Under jit it is a callback.

    Args:
        coordinates: 2 or 3 columns, of any unit; slices need no common frame.
        k: how many; every slice needs more cells than that.
        labels: slice of each cell; None is one slice.
    """
    shape = jax.ShapeDtypeStruct((len(coordinates), k), jnp.int32)
    given = (coordinates,) if labels is None else (coordinates, labels)

    def search(places: np.ndarray, slices: np.ndarray | None = None) -> np.ndarray:
        found = np.zeros((len(places), k), np.int32)
        for rows in rows_of_slices(len(places), slices):
            own = places[rows] - places[rows].mean(axis=0)  # float32 of large coordinates would round distances
            found[rows] = rows[knn(own, k).indices]
        return found

    result: Array = on_host(search, shape, *given)
    return result


def rows_of_slices(n_cells: int, labels: np.ndarray | None) -> list[np.ndarray]:
    """Row numbers of the cells of each slice."""
    if labels is None:
        return [np.arange(n_cells)]
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def check_places(who: str, coordinates: Any, k: int, labels: Any = None) -> None:
    """Refuses places that have no k neighbours; under jit, where values are not known, they pass.

    Raises:
        DataError: not 2 or 3 columns, NaN or infinity, two cells of a slice at one place, or a slice of k cells or
            fewer.
    """
    if coordinates.shape[1] not in (2, 3):
        msg = f"{who}: data['spatial_coords'] must have 2 or 3 columns, got {coordinates.shape[1]}."
        raise DataError(msg)
    if labels is None and k >= len(coordinates):
        msg = f"{who}: n_neighbors is {k}, but there are only {len(coordinates)} cells; pass less than that."
        raise DataError(msg)
    if any(isinstance(a, jax.core.Tracer) for a in (coordinates, labels)):
        return
    places = np.asarray(coordinates)
    if not np.isfinite(places).all():
        bad = ~np.isfinite(places).all(axis=1)
        msg = f"{who}: data['spatial_coords'] is missing or infinite in {int(bad.sum())} cells, first in row "
        msg += f"{int(np.flatnonzero(bad)[0])}; leave these cells out."
        raise DataError(msg)
    slices = None if labels is None else np.asarray(labels)
    for rows in rows_of_slices(len(places), slices):
        where = "" if slices is None else f" of slice {slices[rows[0]]}"
        if len(rows) <= k:
            msg = f"{who}: n_neighbors is {k}, but there are only {len(rows)} cells{where}; pass less than that."
            raise DataError(msg)
        order = np.lexsort(places[rows].T)
        same = (np.diff(places[rows][order], axis=0) == 0).all(axis=1)
        if same.any():
            first = int(np.flatnonzero(same)[0])
            pair = sorted(int(rows[order[i]]) for i in (first, first + 1))
            msg = f"{who}: data['spatial_coords'] has {int(same.sum())} duplicates{where}: rows {pair[0]} and "
            msg += f"{pair[1]} lie at one place. Merge such cells, or say by batch_labels that they are of two slices."
            raise DataError(msg)


def relative_gaps(
    coordinates: Float[Array, "cells dimensions"], indices: Int[Array, "cells neighbors"]
) -> Float[Array, "cells neighbors"]:
    """Squared distances to the neighbours over their mean: 1 on average, without a unit."""
    gaps = ((coordinates[indices] - coordinates[:, None]) ** 2).sum(axis=2)
    mean = gaps.mean(axis=1, keepdims=True)
    return gaps / jnp.where(mean > 0, mean, 1.0)


def mixed_with_neighbors(
    values: Float[Array, "cells features"], indices: Int[Array, "cells neighbors"], alpha: float
) -> Float[Array, "cells features"]:
    """(1 - alpha) own values + alpha times the mean of the neighbours'."""
    total = sum((values[indices[:, j]] for j in range(1, indices.shape[1])), start=values[indices[:, 0]])
    return (1 - alpha) * values + alpha * total / indices.shape[1]


def standardized_by_slice(
    values: Float[Array, "cells genes"], labels: Int[Array, " cells"] | None, n_slices: int, *, floor: float = 1e-3
) -> Float[Array, "cells genes"]:
    """Columns with mean 0 and variance 1 within every slice; one that hardly varies (sd below `floor`) is 0 there."""
    if labels is None:
        labels, n_slices = jnp.zeros(len(values), jnp.int32), 1
    member = jax.nn.one_hot(labels, n_slices, dtype=values.dtype)
    size = jnp.maximum(member.sum(axis=0), 1.0)[:, None]
    centred = values - jnp.matmul(member.T, values, precision="highest")[labels] / size[labels]
    variance = jnp.matmul(member.T, centred**2, precision="highest") / size
    varies = variance > floor**2
    scale = jnp.where(varies, 1.0 / jnp.sqrt(jnp.where(varies, variance, 1.0)), 0.0)
    return centred * scale[labels]


def mean_field(
    logits: Float[Array, "cells groups"],
    indices: Int[Array, "cells neighbors"],
    weights: Float[Array, "cells neighbors"],
    *,
    smoothness: float,
    temperature: float,
    n_rounds: int,
) -> Float[Array, "cells groups"]:
    """Memberships q_i = softmax((logit_i + smoothness sum_j w_ij q_j) / temperature), n_rounds times from q = none.

    The mean-field equations of a Potts model on the graph. As the temperature goes to 0, each round gives every cell
    the group with the largest logit plus smoothness times its neighbours' votes (iterated conditional modes, Besag
    1986, all cells at once).
    """

    def step(q: Array, _: None) -> tuple[Array, None]:
        votes = sum((weights[:, j, None] * q[indices[:, j]] for j in range(indices.shape[1])), jnp.zeros_like(q))
        return jax.nn.softmax((logits + smoothness * votes) / temperature, axis=1), None

    start = jax.nn.softmax(logits / temperature, axis=1)
    return jax.lax.scan(step, start, None, length=n_rounds)[0]
