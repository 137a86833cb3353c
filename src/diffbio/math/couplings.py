"""Couplings of many cells: never an array of cells by cells, but potentials from which rows are computed in blocks.

Up to `ot.MOST_DENSE` pairs the potentials are those of the exact plan. For more cells both time points are drawn
together to landmarks (means of k-means groups, with the masses of their cells); the plan of the landmarks gives the
later potentials, and each earlier cell gets its own, from its own place, by its marginal condition. That is the plan to
later cells who stand at their landmarks: of rank n_landmarks, cost and memory linear in the cells.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .ot import MOST_DENSE, Potentials, coupling, potentials

ENTRIES_PER_BLOCK = 1 << 22  # of the coupling, held at once
SAMPLE = 2000  # cells of each side whose distances give the median of many, evenly spaced
KMEANS_STEPS = 10

Points = Float[np.ndarray, "points features"]


class CellCoupling(NamedTuple):
    """T (cells, later_cells): T_ij is how many descendants of cell i are in the place of later cell j.

    T_ij = exp((f_i + g_l - |x_i - y_l|² / scale) / epsilon) / later_cells, for later cell j at landmark l.
    """

    x: Float[np.ndarray, "cells features"]
    f: Float[np.ndarray, " cells"]  # in units of the cost
    landmarks: Float[np.ndarray, "landmarks features"]
    g: Float[np.ndarray, " landmarks"]
    labels: Int[np.ndarray, " later_cells"]  # landmark of each later cell
    scale: float  # squared distance that costs 1
    epsilon: float
    error: float  # mass off its marginal condition, of the total; where there are landmarks, of their plan

    @property
    def shape(self) -> tuple[int, int]:
        """Cells, later cells."""
        return len(self.x), len(self.labels)

    @property
    def exact(self) -> bool:
        """Whether every later cell is its own landmark."""
        return len(self.landmarks) == len(self.labels)


def couple(
    x: Float[np.ndarray, "cells features"],
    y: Float[np.ndarray, "later_cells features"],
    growth: Float[np.ndarray, " cells"],
    *,
    epsilon: float = 0.05,
    lambda1: float = 1.0,
    lambda2: float = 50.0,
    growth_iterations: int = 3,
    n_landmarks: int = 2000,
    most_dense: int = MOST_DENSE,
    seed: int = 0,
) -> tuple[CellCoupling, Float[np.ndarray, " cells"]]:
    """Couples two time points (see `ot.coupling`), in double precision: the coupling, and the growth of each cell.

    Args:
        x: earlier cells, in the coordinates of the cost, squared Euclidean distance over its median.
        y: later cells.
        growth: expected descendants of each earlier cell, above 0.
        epsilon: see `ot.coupling`, as lambda1, lambda2 and growth_iterations.
        lambda1: see there.
        lambda2: see there.
        growth_iterations: see there.
        n_landmarks: of each time point, where there are more than `most_dense` pairs.
        most_dense: pairs up to which the plan is exact.
        seed: of k-means.
    """
    x, y, growth = (np.asarray(v, np.float64) for v in (x, y, growth))
    scale = median_distance(x, y, most_dense)
    strengths = (epsilon, lambda1, lambda2)
    if len(x) * len(y) <= most_dense:
        with jax.enable_x64(True):  # noqa: FBT003
            found = coupling(
                jnp.asarray(squared_distances(x, y) / scale), jnp.asarray(growth), epsilon=epsilon, lambda1=lambda1,
                lambda2=lambda2, growth_iterations=growth_iterations,
            )  # fmt: skip
        f, g, grown = (np.asarray(v) for v in (found.f, found.g, found.growth))
        return CellCoupling(x, f, y, g, np.arange(len(y)), scale, epsilon, float(found.error)), grown
    early, early_labels = landmarks_of(x, n_landmarks, seed=seed)
    late, late_labels = landmarks_of(y, n_landmarks, seed=seed)
    masses = np.bincount(early_labels) / len(x), np.bincount(late_labels) / len(y)
    cost = squared_distances(early, late) / scale
    grown = growth
    with jax.enable_x64(True):  # noqa: FBT003
        before = Potentials(jnp.zeros(len(early)), jnp.zeros(len(late)), jnp.zeros(()))
        for _ in range(growth_iterations):
            of_landmarks = np.bincount(early_labels, grown) / len(x)
            before = _landmark_potentials(cost, of_landmarks, *masses, before, strengths)
            g = np.asarray(before.g)
            f = _own_potentials(x, late, g, masses[1], np.log(grown), scale, strengths)
            grown = grown * np.exp(-f / lambda1)  # the marginal condition
    return CellCoupling(x, f, late, g, late_labels, scale, epsilon, float(before.error)), grown


def pull(
    coupling: CellCoupling, values: Float[np.ndarray, "later_cells columns"]
) -> Float[np.ndarray, "cells columns"]:
    """T values: what each earlier cell's descendants hold, added up."""
    on_landmarks = _by_landmark(coupling, np.asarray(values, np.float64))
    return np.concatenate([block @ on_landmarks for _, block in _blocks(coupling)])


def push(
    coupling: CellCoupling, values: Float[np.ndarray, "cells columns"]
) -> Float[np.ndarray, "later_cells columns"]:
    """T^T values: what arrives in the place of each later cell."""
    values = np.asarray(values, np.float64)
    total = np.zeros((len(coupling.landmarks), values.shape[1]))
    for rows, block in _blocks(coupling):
        total += block.T @ values[rows]
    return total[coupling.labels]


def dense(coupling: CellCoupling) -> Float[np.ndarray, "cells later_cells"]:
    """T as an array."""
    return np.concatenate([block for _, block in _blocks(coupling)])[:, coupling.labels]


def pairs(
    coupling: CellCoupling, mass: Float[np.ndarray, " cells"], size: int, seed: int
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
    """Draws cells in proportion to `mass`, and to each one of its descendants: their numbers."""
    rng = np.random.default_rng(seed)
    early = np.sort(rng.choice(len(mass), size, p=mass / mass.sum()))
    on_landmark = np.bincount(coupling.labels, minlength=len(coupling.landmarks))
    members, first = np.argsort(coupling.labels, kind="stable"), np.cumsum(on_landmark) - on_landmark
    late = np.empty(size, int)
    for place in _pieces(size, len(coupling.landmarks)):
        share = np.cumsum(_rows(coupling, early[place]) * on_landmark, axis=1)
        drawn = (share < (rng.random(len(share)) * share[:, -1])[:, None]).sum(axis=1)
        late[place] = members[first[drawn] + rng.integers(on_landmark[drawn])]
    return early, late


def landmarks_of(
    points: Points, n_landmarks: int, *, seed: int = 0
) -> tuple[Float[np.ndarray, "landmarks features"], Int[np.ndarray, " points"]]:
    """Means of at most so many groups of points by k-means (faiss), and the group of each point; none is empty."""
    if len(points) <= n_landmarks:
        return points, np.arange(len(points))
    import faiss

    single = np.ascontiguousarray(points, np.float32)
    means = faiss.Kmeans(
        points.shape[1], n_landmarks, niter=KMEANS_STEPS, seed=seed, min_points_per_centroid=1,
        max_points_per_centroid=64,
    )  # fmt: skip
    means.train(single)
    _, labels = np.unique(means.assign(single)[1], return_inverse=True)
    sums = np.column_stack([np.bincount(labels, column) for column in points.T])
    return sums / np.bincount(labels)[:, None], labels


def squared_distances(x: Points, y: Float[np.ndarray, "others features"]) -> Float[np.ndarray, "points others"]:
    """Squared Euclidean distances on the host."""
    origin = y.mean(axis=0)
    x, y = x - origin, y - origin
    return np.maximum((x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1) - 2 * x @ y.T, 0.0)


def median_distance(x: Points, y: Float[np.ndarray, "others features"], most_dense: int = MOST_DENSE) -> float:
    """Median squared distance; of 2000 evenly spaced points each where there are more pairs; infinite if it is 0."""
    if len(x) * len(y) > most_dense:
        x, y = (v[np.linspace(0, len(v) - 1, min(len(v), SAMPLE)).astype(int)] for v in (x, y))
    return float(np.median(squared_distances(x, y))) or math.inf


@partial(jax.jit, static_argnames=("strengths",))
def _landmark_potentials(
    cost: Array, mass: Array, early: Array, late: Array, start: Potentials, strengths: tuple[float, float, float]
) -> Potentials:
    """Potentials against the product of the landmarks' shares of the cells, as `ot` has them against 1 / (n m)."""
    epsilon = strengths[0]
    counted = cost - epsilon * (jnp.log(len(early) * early)[:, None] + jnp.log(len(late) * late))
    return potentials(counted, jnp.log(mass), jnp.log(mass.sum() * late), start, strengths)


def _own_potentials(
    x: Points, late: Float[np.ndarray, "landmarks features"], g: np.ndarray, share: np.ndarray,
    log_growth: np.ndarray, scale: float, strengths: tuple[float, float, float],
) -> np.ndarray:  # fmt: skip
    """The f of each cell by which its row of the coupling has the sum growth exp(-f / lambda1)."""
    epsilon, lambda1, _ = strengths
    reached = np.empty(len(x))
    for rows in _pieces(len(x), len(late)):
        exponent = (g - squared_distances(x[rows], late) / scale) / epsilon + np.log(share)
        top = exponent.max(axis=1)
        reached[rows] = top + np.log(np.exp(exponent - top[:, None]).sum(axis=1))
    return (log_growth - reached) / (1 / epsilon + 1 / lambda1)


def _rows(coupling: CellCoupling, rows: slice | np.ndarray) -> np.ndarray:
    """Rows of T, one column for each landmark: what one of its cells gets."""
    cost = squared_distances(coupling.x[rows], coupling.landmarks) / coupling.scale
    return np.exp((coupling.f[rows][:, None] + coupling.g - cost) / coupling.epsilon) / len(coupling.labels)


def _blocks(coupling: CellCoupling) -> Iterator[tuple[slice, np.ndarray]]:
    for rows in _pieces(len(coupling.x), len(coupling.landmarks)):
        yield rows, _rows(coupling, rows)


def _pieces(size: int, width: int) -> Iterator[slice]:
    step = max(1, ENTRIES_PER_BLOCK // max(width, 1))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _by_landmark(coupling: CellCoupling, values: np.ndarray) -> np.ndarray:
    if coupling.exact:
        return values[np.argsort(coupling.labels)]
    size = len(coupling.landmarks)
    return np.column_stack([np.bincount(coupling.labels, column, minlength=size) for column in values.T])
