"""Couplings of many cells: never an array of cells by cells, but potentials from which rows are computed in blocks.

Up to `ot.MOST_DENSE` pairs the potentials are those of the exact plan. For more cells both time points are drawn
together to landmarks (means of k-means groups, with the masses of their cells); the plan of the landmarks gives the
later potentials, and each earlier cell gets its own, from its own place, by its marginal condition. That is the plan to
later cells who stand at their landmarks: of rank n_landmarks, cost and memory linear in the cells.

Cells far from all others have rows or columns that are 0 in double precision; `averages` works on their logarithms.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .ot import LEAST, MOST_DENSE, Potentials, coupling, potentials

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
    exact: bool = True  # whether every cell, early or late, is its own landmark

    @property
    def shape(self) -> tuple[int, int]:
        """Cells, later cells."""
        return len(self.x), len(self.labels)


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
    log_grown = np.log(growth)
    with jax.enable_x64(True):  # noqa: FBT003
        before = Potentials(jnp.zeros(len(early)), jnp.zeros(len(late)), jnp.zeros(()))
        for _ in range(growth_iterations):
            log_grown = np.maximum(log_grown, LEAST["float64"])
            of_landmarks = np.bincount(early_labels, np.exp(log_grown)) / len(x)
            before = _landmark_potentials(cost, of_landmarks, *masses, before, strengths)
            g = np.asarray(before.g)
            f = _own_potentials(x, late, g, masses[1], log_grown, scale, strengths)
            log_grown = log_grown - f / lambda1  # the marginal condition
    own = len(early) == len(x) and len(late) == len(y)
    found = CellCoupling(x, f, late, g, late_labels, scale, epsilon, float(before.error), own)
    return found, np.exp(log_grown)


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


def averages(
    coupling: CellCoupling,
    values: Float[np.ndarray, "later_cells columns"],
    log_mass: Float[np.ndarray, " later_cells"],
) -> tuple[Float[np.ndarray, "cells columns"], Float[np.ndarray, " cells"]]:
    """Means over each earlier cell's descendants, these weighted by a mass, and the log of the mass that it reaches.

    The second result is log(T exp(log_mass)), the first T (exp(log_mass) values) over that; both by softmax, so that
    they are finite also where T is 0 in double precision.

    Args:
        coupling: T.
        values: of the later cells.
        log_mass: of the later cells; -inf where there is none, not for all of them.
    """
    size = len(coupling.landmarks)
    top = np.full(size, -np.inf)
    np.maximum.at(top, coupling.labels, log_mass)
    there = np.isfinite(top)
    top = np.where(there, top, 0.0)
    mass = np.exp(log_mass - top[coupling.labels])
    held = np.bincount(coupling.labels, mass, minlength=size)
    means = np.empty((size, values.shape[1]))  # of no columns where only the mass is wanted
    for k, column in enumerate(values.T):
        means[:, k] = np.bincount(coupling.labels, mass * column, minlength=size) / np.where(there, held, 1.0)
    log_held = np.log(held, out=np.full(size, -np.inf), where=there) + top
    found, reached = np.empty((len(coupling.x), values.shape[1])), np.empty(len(coupling.x))
    for rows in _pieces(len(coupling.x), size):
        exponent = _exponents(coupling, rows) + log_held
        most = exponent.max(axis=1)
        share = np.exp(exponent - most[:, None])
        total = share.sum(axis=1)
        found[rows], reached[rows] = share @ means / total[:, None], most + np.log(total)
    return found, reached - math.log(len(coupling.labels))


def averages_back(
    coupling: CellCoupling, values: Float[np.ndarray, "cells columns"], log_mass: Float[np.ndarray, " cells"]
) -> tuple[Float[np.ndarray, "later_cells columns"], Float[np.ndarray, " later_cells"]]:
    """As `averages` for T^T: means over each later cell's ancestors, and the log of what arrives in its place."""
    n, m = coupling.shape
    turned = coupling._replace(
        x=coupling.landmarks, f=coupling.g, landmarks=coupling.x, g=coupling.f, labels=np.arange(n)
    )
    found, reached = averages(turned, values, log_mass)
    return found[coupling.labels], reached[coupling.labels] + math.log(n / m)


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
        exponent = _exponents(coupling, early[place])
        # each row over its largest entry: a cell far from all others has its nearest ones, not nobody
        share = np.cumsum(np.exp(exponent - exponent.max(axis=1, keepdims=True)) * on_landmark, axis=1)
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
    return np.exp(_exponents(coupling, rows)) / len(coupling.labels)


def _exponents(coupling: CellCoupling, rows: slice | np.ndarray) -> np.ndarray:
    cost = squared_distances(coupling.x[rows], coupling.landmarks) / coupling.scale
    return (coupling.f[rows][:, None] + coupling.g - cost) / coupling.epsilon


def _blocks(coupling: CellCoupling) -> Iterator[tuple[slice, np.ndarray]]:
    for rows in _pieces(len(coupling.x), len(coupling.landmarks)):
        yield rows, _rows(coupling, rows)


def _pieces(size: int, width: int) -> Iterator[slice]:
    step = max(1, ENTRIES_PER_BLOCK // max(width, 1))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _by_landmark(coupling: CellCoupling, values: np.ndarray) -> np.ndarray:
    if len(coupling.landmarks) == len(coupling.labels):
        return values[np.argsort(coupling.labels)]
    size = len(coupling.landmarks)
    return np.column_stack([np.bincount(coupling.labels, column, minlength=size) for column in values.T])
