"""Couplings of slices of any size, on the host, in double precision, as sparse matrices.

Up to `MOST_DENSE` pairs of spots the plan is that of `math.gromov`. Beyond, in two steps, cost and memory linear in the
spots (quantised Gromov-Wasserstein, Chowdhury, Miller & Needham 2021, with a transport problem in place of their
nearest pairs): spots are drawn together to landmarks by k-means on their coordinates, with mean counts and the masses
of their spots, and the plan of the landmarks is solved. Then spots are coupled with spots of the landmarks that theirs
is coupled with, by the transport problem, with the same entropy, of the objective's linear part at the landmarks' plan.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, cg
from scipy.spatial import ConvexHull, QhullError, cKDTree
from scipy.spatial.distance import cdist

from .couplings import landmarks_of
from .gromov import FusedSettings, Masses, fused_objective, fused_plan, fused_problem
from .slices import euclidean_dissimilarity, kl_dissimilarity

MOST_DENSE = 4_000_000  # pairs of spots of which an array is made
SMALLEST = 1e-4  # share of a spot's mass below which an entry is not kept
SMALLEST_PAIR = 1e-3  # share of a landmark's mass below which its spots are not coupled with those of the other one
SCALINGS = 100  # of rows and columns, at each epsilon
FALLING = np.array([64.0, 16.0, 4.0, 1.0])  # epsilon on the way, times its value
NEWTON_STEPS, CG_STEPS = 15, 300
TINY = 1e-300
BALANCED = 1e-5  # mass off its marginals at which they end

Counts = Any  # (spots, genes), dense or scipy sparse


class Slice(NamedTuple):
    """Counts of the genes that all slices share, and where the spots lie."""

    counts: Counts
    coords: Float[np.ndarray, "spots dims"]


class CouplingSettings(NamedTuple):
    """Settings of `couple_slices`, those of `PASTEAlignmentConfig` and of the landmarks."""

    alpha: float = 0.1
    epsilon: float = 0.005
    rounds: int = 20
    dissimilarity: str = "kl"
    pseudocount: float = 0.01
    scaling: str = "spacing"
    overlap: float = 1.0
    n_landmarks: int = 1000
    most_dense: int = MOST_DENSE
    seed: int = 0


class SliceCoupling(NamedTuple):
    """A plan between two slices."""

    plan: sparse.csr_matrix  # (spots, other spots), sums to the overlap
    objective: float  # without entropy; where there are landmarks, theirs
    error: float  # mass off its marginals
    moved: float  # mass that the last round moved
    exact: bool  # whether every spot is its own landmark


def couple_slices(first: Slice, second: Slice, settings: CouplingSettings | None = None) -> SliceCoupling:
    """Couples two slices; see `DifferentiablePASTEAlignment` for the objective."""
    settings = settings or CouplingSettings()
    units = distance_units(first.coords, second.coords, settings.scaling)
    # distances within either slice are arrays of pairs, too
    if max(first.counts.shape[0], second.counts.shape[0]) ** 2 <= settings.most_dense:
        masses = tuple(np.full(len(v.coords), 1 / len(v.coords)) for v in (first, second))
        plan, objective, error, moved, _ = _solved(first, second, masses, units, settings)
        kept = _kept(sparse.csr_matrix(plan), plan.sum(axis=1))
        return SliceCoupling(kept, objective, error, moved, True)  # noqa: FBT003
    return _by_landmarks(first, second, units, settings)


def distance_units(x: np.ndarray, y: np.ndarray, scaling: str) -> tuple[float, float]:
    """Lengths that count 1 in either slice, as `math.slices.scaled_distances` has them, without arrays of pairs."""
    if scaling == "none":
        return 1.0, 1.0
    if scaling == "max":
        return _widest(x), _widest(y)
    unit = float(np.mean([np.median(cKDTree(v).query(v, k=2)[0][:, 1]) for v in (x, y)])) or 1.0
    return unit, unit


def _solved(
    first: Slice, second: Slice, masses: Any, units: tuple[float, float], settings: CouplingSettings
) -> tuple[np.ndarray, float, float, float, float]:
    """Plan, objective, error, mass that moved last, and the scale S, of small slices."""
    overlap = None if settings.overlap == 1 else settings.overlap
    with jax.enable_x64(True):  # noqa: FBT003
        found = _dense_plan(
            *(jnp.asarray(_dense(v.counts)) for v in (first, second)),
            *(jnp.asarray(cdist(v.coords, v.coords) / unit) for v, unit in zip((first, second), units, strict=True)),
            Masses(*(jnp.asarray(mass) for mass in masses)),
            fused=FusedSettings(settings.epsilon, settings.rounds, overlap),
            alpha=settings.alpha,
            costs=(settings.dissimilarity, settings.pseudocount),
        )
        return np.asarray(found[0]), *(float(v) for v in found[1:])  # type: ignore[return-value]


@partial(jax.jit, static_argnames=("fused", "alpha", "costs"))
def _dense_plan(
    x: Any, y: Any, left: Any, right: Any, masses: Masses, *, fused: FusedSettings, alpha: float, costs: Any
) -> Any:
    problem, scale = fused_problem(_dissimilarity(x, y, *costs), left, right, alpha, masses)
    found = fused_plan(problem, fused, masses)
    return found.plan, scale * fused_objective(problem, found.plan), found.error, found.moved, scale


def _dissimilarity(x: Any, y: Any, kind: str, pseudocount: float) -> Any:
    return kl_dissimilarity(x, y, pseudocount) if kind == "kl" else euclidean_dissimilarity(x, y)


def _by_landmarks(first: Slice, second: Slice, units: tuple[float, float], settings: CouplingSettings) -> SliceCoupling:
    places, labels, means, masses = zip(*(_quantised(v, settings) for v in (first, second)), strict=True)
    coarse = [Slice(counts, place) for counts, place in zip(means, places, strict=True)]
    plan, objective, error, moved, scale = _solved(coarse[0], coarse[1], masses, units, settings)
    members = [_members(label) for label in labels]
    # what the landmarks leave out (partial overlap), their spots leave out alike
    targets = [
        (total / mass)[label] / len(label)
        for total, mass, label in zip((plan.sum(axis=1), plan.sum(axis=0)), masses, labels, strict=True)
    ]
    cost = _edges(first, second, places, units, plan, members, scale, settings)
    fine, off = _transported(cost, targets[0], targets[1], settings.epsilon)
    return SliceCoupling(_kept(fine, targets[0]), objective, max(error, off), moved, False)  # noqa: FBT003


def _quantised(v: Slice, settings: CouplingSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Places of the landmarks, landmark of each spot, mean counts of the landmarks, and their masses."""
    places, labels = landmarks_of(v.coords, settings.n_landmarks, seed=settings.seed)
    n, size = len(labels), len(places)
    average = sparse.csr_matrix((np.ones(n), (labels, np.arange(n))), shape=(size, n))
    held = np.bincount(labels, minlength=size)
    return places, labels, _dense(average @ v.counts) / held[:, None], held / n


def _edges(
    first: Slice, second: Slice, places: Any, units: tuple[float, float], plan: np.ndarray,
    members: Any, scale: float, settings: CouplingSettings,
) -> sparse.csr_matrix:  # fmt: skip
    """Linear part of the objective over S between the spots of coupled landmarks; first row then column of the slices.

    Between spots it is, up to parts of a row or a column, (1 - alpha) M_ij - 4 alpha sum_uv C1_iu P_uv C2_vj.
    """
    pairs, blocks = _pairs(plan), []
    for u, rows in enumerate(members[0]):
        columns = np.concatenate([members[1][v] for v in np.flatnonzero(pairs[u])] or [np.zeros(0, int)])
        if not len(columns):
            continue
        cost = (1 - settings.alpha) * _block(first.counts[rows], second.counts[columns], settings)
        near = cdist(first.coords[rows], places[0]) / units[0]
        far = cdist(second.coords[columns], places[1]) / units[1]
        cost = (cost - 4 * settings.alpha * (near @ plan) @ far.T) / scale
        blocks.append((np.repeat(rows, len(columns)), np.tile(columns, len(rows)), cost.ravel()))
    row, column, value = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return sparse.csr_matrix((value, (row, column)), shape=(len(first.coords), len(second.coords)))


def _pairs(plan: np.ndarray) -> np.ndarray:
    """Which landmarks' spots are coupled: all pairs that matter to either, and the largest one of each."""
    rows, columns = plan.sum(axis=1), plan.sum(axis=0)
    pairs = plan > SMALLEST_PAIR * np.minimum(rows[:, None], columns)
    pairs[np.arange(len(rows)), plan.argmax(axis=1)] = True
    pairs[plan.argmax(axis=0), np.arange(len(columns))] = True
    return pairs


def _transported(
    cost: sparse.csr_matrix, a: np.ndarray, b: np.ndarray, epsilon: float
) -> tuple[sparse.csr_matrix, float]:
    """Entropic plan of those masses on the entries of `cost`, and the mass off its marginals.

    Rows and columns are scaled in turn while epsilon falls, then Newton's method on the potentials.
    """
    plan, counts = cost.copy(), np.diff(cost.indptr)
    rows = np.repeat(np.arange(len(a)), counts)
    f, g = np.zeros(len(a)), np.zeros(len(b))
    f[counts > 0] = np.minimum.reduceat(cost.data, cost.indptr[:-1][counts > 0])
    for now in epsilon * FALLING:
        plan.data = np.exp((f[rows] + g[plan.indices] - cost.data) / now)
        across, u, v = plan.T.tocsr(), np.ones(len(a)), np.ones(len(b))
        for _ in range(SCALINGS):
            u = a / np.maximum(plan @ v, TINY)
            v = b / np.maximum(across @ u, TINY)
        f, g = f + now * np.log(np.maximum(u, TINY)), g + now * np.log(np.maximum(v, TINY))
    plan.data *= u[rows] * v[plan.indices]
    off = _off(plan, a, b)
    for _ in range(NEWTON_STEPS):
        if off < BALANCED:
            break
        x, y = _newton_step(plan, a, b)
        for part in (1.0, 0.5, 0.2, 0.05):
            trial = plan.copy()
            trial.data = plan.data * np.exp(np.clip(part * (x[rows] + y[plan.indices]), -30.0, 30.0))
            found = _off(trial, a, b)
            if found < off:
                break
        else:
            break
        plan, off = trial, found
    return plan, off


def _off(plan: sparse.csr_matrix, a: np.ndarray, b: np.ndarray) -> float:
    return float(sum(np.abs(np.asarray(plan.sum(axis=1 - k)).ravel() - mass).sum() for k, mass in enumerate((a, b))))


def _newton_step(plan: sparse.csr_matrix, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Changes of the logarithms of both scalings, as `math.ot.solve_marginals`, of a sparse plan."""
    rows, columns = (np.maximum(np.asarray(plan.sum(axis=k)).ravel(), TINY) for k in (1, 0))
    n, across, left, right = len(a), plan.T.tocsr(), 1 / np.sqrt(rows), 1 / np.sqrt(columns)

    def product(z: np.ndarray) -> np.ndarray:
        x, y = z[:n], z[n:]
        return np.concatenate([x + left * (plan @ (right * y)), y + right * (across @ (left * x))])

    wanted = np.concatenate([left * (a - rows), right * (b - columns)])
    size = len(wanted)
    z, _ = cg(LinearOperator((size, size), matvec=product, dtype=np.float64), wanted, rtol=1e-3, maxiter=CG_STEPS)
    return left * z[:n], right * z[n:]


def _kept(plan: sparse.csr_matrix, rows: np.ndarray) -> sparse.csr_matrix:
    """The plan without the entries that matter to neither of their spots, its rows as they were."""
    found = plan.tocoo()
    columns = np.asarray(plan.sum(axis=0)).ravel()
    kept = found.data > SMALLEST * np.minimum(rows[found.row], columns[found.col])
    short = sparse.csr_matrix((found.data[kept], (found.row[kept], found.col[kept])), shape=plan.shape)
    total = np.asarray(short.sum(axis=1)).ravel()
    return sparse.csr_matrix(sparse.diags_array(rows / np.maximum(total, TINY)) @ short)


def _members(labels: np.ndarray) -> list[np.ndarray]:
    """Spots of each landmark."""
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])


def _block(x: Counts, y: Counts, settings: CouplingSettings) -> np.ndarray:
    """Dissimilarities in numpy: blocks are of many sizes, and each would be compiled anew."""
    x, y = _dense(x), _dense(y)
    if settings.dissimilarity == "kl":
        x, y = x + settings.pseudocount, y + settings.pseudocount
        x, y = x / x.sum(axis=1, keepdims=True), y / y.sum(axis=1, keepdims=True)
        return np.asarray((x * np.log(x)).sum(axis=1)[:, None] - x @ np.log(y).T)
    x, y = (np.log1p(v * (1e4 / v.sum(axis=1, keepdims=True))) for v in (x, y))
    return cdist(x, y)


def _widest(x: np.ndarray) -> float:
    """Largest distance of two points; both lie on the convex hull."""
    try:
        x = x[ConvexHull(x).vertices]
    except QhullError:  # all on a line, or too few
        x = x[np.unique(np.concatenate([x.argmin(axis=0), x.argmax(axis=0)]))]
    return float(cdist(x, x).max()) or 1.0


def _dense(counts: Counts) -> np.ndarray:
    return np.asarray(counts.toarray() if hasattr(counts, "toarray") else counts, np.float64)
