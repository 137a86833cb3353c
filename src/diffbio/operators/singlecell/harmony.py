"""Harmony: removes batch effects from an embedding, cluster by cluster, with exact gradients."""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ...errors import DataError
from ...math.distances import squared_euclidean, unit_rows
from ..base import Config, Data, Operator, nonnegative, positive

LLOYD_ROUNDS = 25  # of the hard k-means that starts Harmony, as in the R and Python packages


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchCorrectionConfig(Config):
    """Settings of `DifferentiableHarmony`; the defaults are those of the publication.

    n_clusters: number of clusters K; the R package takes min(100, cells / 30).
    n_features: width of the embedding.
    n_batches: number of batches; labels are 0 ... n_batches - 1.
    n_iterations: how often cells are clustered and corrected.
    n_rounds: updates of centroids and memberships in each iteration.
    theta: weight of the diversity penalty; 0 lets a cluster hold one batch only.
    sigma: width of the soft clusters, in units of squared distance between unit vectors; 0+ is hard.
    lamb: ridge penalty on the batch shift of a cluster, in cells; infinity corrects nothing. (lambda is
        a word of Python.)
    """

    n_clusters: int = positive(100)
    n_features: int = positive(50)
    n_batches: int = positive(2)
    n_iterations: int = positive(10)
    n_rounds: int = positive(20)
    theta: float = nonnegative(2.0)
    sigma: float = positive(0.1)
    lamb: float = positive(1.0)


class HarmonyReference(NamedTuple):
    """All that `project` needs to repeat a correction on any cells; nothing in it is per cell."""

    centroids: Float[Array, "iterations clusters features"]  # inside the unit sphere, on it at rest
    penalty: Float[Array, "iterations batches clusters"]  # theta log(expected / observed), added to log R
    shifts: Float[Array, "iterations batches clusters features"]  # what a batch adds to a cluster


class Corrected(TypedDict):
    """What `DifferentiableHarmony` adds."""

    corrected_embeddings: Float[Array, "cells features"]
    cluster_assignments: Float[Array, "cells clusters"]  # rows sum to 1


class DifferentiableHarmony(Operator):
    """Shifts the cells of each batch so that every soft cluster holds all batches (Harmony).

    Korsunsky et al. 2019, Nature Methods 16:1289. Alternates between clustering the cells on the unit
    sphere with a penalty on clusters that favour a batch, and subtracting, cluster by cluster, what a
    ridge regression ascribes to the batch. Differences: all cells are updated at once instead of in random
    blocks of 5 % (damped, which makes each update lower the same objective), so the result does not
    depend on the order of the cells; the number of rounds is fixed instead of stopping at convergence;
    the start is a k-means++ whose draws are fixed quantiles instead of random numbers. That start picks
    cells, which is discrete: the gradient flows through their means, and through all else exactly.

    Harmony has no weights. `apply` corrects the cells it is given; after `init_from` (which `diffbio.fit`
    calls) it repeats the stored correction on any cells, so that new cells land where the old ones are,
    in chunks of any size, and the cells of the fit get exactly the result of the fit.
    """

    config: BatchCorrectionConfig

    def __init__(self, config: BatchCorrectionConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        empty = self._no_reference()
        self.reference_centroids = nnx.BatchStat(empty.centroids)
        self.reference_penalty = nnx.BatchStat(empty.penalty)
        self.reference_shifts = nnx.BatchStat(empty.shifts)

    def __call__(
        self, embeddings: Float[Array, "cells features"], batch_labels: Int[Array, " cells"]
    ) -> Corrected:
        """Corrects the cells: by the stored reference if there is one, else by one made of these cells.

        A cell whose label is outside 0 ... n_batches - 1 raises DataError; where labels are traced and
        cannot be looked at (under `jax.jit`), it takes no part and is returned as it is.

        Raises:
            DataError: a label out of range; fewer cells than clusters, where there is no reference.
        """
        self._check_labels(batch_labels)
        reference = self.reference
        if reference is None:
            reference = self._learn(embeddings, batch_labels)
        corrected, assignments = project(embeddings, batch_labels, reference, sigma=self.config.sigma)
        return {"corrected_embeddings": corrected, "cluster_assignments": assignments}

    def init_from(self, data: Data) -> None:
        """Learns the correction from `data` and keeps it: from now on `apply` repeats it on any cells.

        Raises:
            DataError: a label out of range, fewer cells than clusters, or values that are not finite.
        """
        inputs = self._inputs(data)
        cells, labels = inputs["embeddings"], inputs["batch_labels"]
        self._check_labels(labels)
        finite = np.isfinite(np.asarray(cells)).all(axis=1)
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            msg = f"Harmony: data['embeddings'] holds NaN or infinity, first in row {row}."
            raise DataError(msg)
        self._keep(self._learn(cells, labels))

    def clear_reference(self) -> None:
        """Forgets the stored correction: `apply` again corrects the cells it is given by themselves."""
        self._keep(self._no_reference())

    @property
    def reference(self) -> HarmonyReference | None:
        """The stored correction; None before `init_from`."""
        # its length says whether there is one: static, so that `jax.jit` compiles one way only
        stored = HarmonyReference(
            self.reference_centroids[...], self.reference_penalty[...], self.reference_shifts[...]
        )
        return stored if len(stored.centroids) else None

    def _learn(self, embeddings: Array, batch_labels: Array) -> HarmonyReference:
        config = self.config
        if len(embeddings) < config.n_clusters:
            msg = (
                f"Harmony: n_clusters is {config.n_clusters}, but there are only {len(embeddings)} cells; "
                f"pass n_clusters={len(embeddings)} or fewer (about 1 for every 30 cells)."
            )
            raise DataError(msg)
        return learn(
            embeddings,
            batch_labels,
            n_clusters=config.n_clusters,
            n_batches=config.n_batches,
            n_iterations=config.n_iterations,
            n_rounds=config.n_rounds,
            theta=config.theta,
            sigma=config.sigma,
            lamb=config.lamb,
        )

    def _check_labels(self, batch_labels: Array) -> None:
        if isinstance(batch_labels, jax.core.Tracer):
            return  # unknown while compiling; see `__call__`
        n_batches = self.config.n_batches
        labels = np.asarray(batch_labels)
        lowest, highest = (labels.min(), labels.max()) if len(labels) else (0, 0)
        if highest >= n_batches:
            msg = (
                f"Harmony: batch_labels holds label {highest}, but n_batches is {n_batches}; "
                f"pass n_batches={highest + 1}."
            )
            raise DataError(msg)
        if lowest < 0:
            msg = f"Harmony: batch_labels holds label {lowest}; number the batches 0 ... {n_batches - 1}."
            raise DataError(msg)

    def _no_reference(self) -> HarmonyReference:
        batches, clusters, features = self.config.n_batches, self.config.n_clusters, self.config.n_features
        return HarmonyReference(
            jnp.zeros((0, clusters, features)),
            jnp.zeros((0, batches, clusters)),
            jnp.zeros((0, batches, clusters, features)),
        )

    def _keep(self, reference: HarmonyReference) -> None:
        self.reference_centroids.set_value(reference.centroids)
        self.reference_penalty.set_value(reference.penalty)
        self.reference_shifts.set_value(reference.shifts)

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableHarmony", Data]]:
        """Cells of three batches that correct themselves, and new cells with a stored reference."""
        config = BatchCorrectionConfig(n_clusters=3, n_features=4, n_batches=3, n_iterations=2, n_rounds=3)

        def cells(seed: int) -> Data:
            keys = jax.random.split(jax.random.key(seed), 3)
            x, kinds, shifts = (jax.random.normal(k, (m, 4)) for k, m in zip(keys, (15, 3, 3), strict=True))
            labels = jnp.arange(15) % 3
            return {"embeddings": x + 3 * kinds[jnp.arange(15) // 5] + shifts[labels], "batch_labels": labels}

        stored = cls(config, rngs=nnx.Rngs(0))
        stored.init_from(cells(seed=1))
        return {
            "corrects itself": (cls(config, rngs=nnx.Rngs(0)), cells(seed=0)),
            "stored reference": (stored, cells(seed=2)),
        }


@partial(jax.jit, static_argnames=("n_clusters", "n_batches", "n_iterations", "n_rounds"))
def learn(
    z: Float[Array, "cells features"],
    batch_labels: Int[Array, " cells"],
    *,
    n_clusters: int,
    n_batches: int,
    n_iterations: int = 10,
    n_rounds: int = 20,
    theta: Any = 2.0,
    sigma: Any = 0.1,
    lamb: Any = 1.0,
) -> HarmonyReference:
    """Harmony on the cells `z`: the correction of every iteration, to be applied by `project`.

    Differentiable in `z`, `theta`, `sigma` and `lamb`. Time and memory grow as cells · clusters, whatever
    the number of batches; a gradient recomputes the memberships instead of keeping those of every round.
    """
    labels = _labels(batch_labels, n_batches)
    known = (labels < n_batches)[:, None]
    share = _per_batch(known.astype(z.dtype), labels, n_batches)
    share = share / jnp.maximum(share.sum(), 1)  # (batches, 1)
    # Memberships R minimise, for fixed centroids, a convex function of R that is (1 + theta)-smooth
    # relative to the entropy of R. A full update of all cells overshoots by that factor; damped by 1 / (1 +
    # theta) it is mirror descent: log R moves towards its optimum by this step and the objective never
    # rises. log R is linear in centroids and penalty, so moving these moves it, and no array of memberships
    # has to be carried on.
    step = 1 / (1 + theta)

    def update(x: Array, centroids: Array, penalty: Array) -> tuple[Array, Array]:
        r = _memberships(x, labels, centroids, penalty, sigma)
        observed = _per_batch(r, labels, n_batches)
        expected = share * observed.sum(axis=0)
        wanted = theta * (jnp.log(expected + 1) - jnp.log(observed + 1))
        means = unit_rows(_product(r.T, x))
        return centroids + step * (means - centroids), penalty + step * (wanted - penalty)

    def ridge(r: Array) -> Array:
        # minimises Σ_i R_ik |z_i - w_0 - w_b(i)|² + lamb Σ_b |w_b|² in closed form; w_0 goes unpenalised
        observed = _per_batch(r, labels, n_batches)[..., None]
        sums = jnp.moveaxis(jax.lax.map(lambda f: _per_batch(r * f[:, None], labels, n_batches), z.T), 0, -1)
        weight = 1 / (observed + lamb)
        mass = (weight * observed).sum(axis=0)
        intercept = (weight * sums).sum(axis=0) / jnp.where(mass > 0, mass, 1)
        return weight * (sums - observed * intercept)

    update, ridge = jax.checkpoint(update), jax.checkpoint(ridge)

    def iterate(state: tuple[Array, Array, Array], _: None) -> tuple[Any, HarmonyReference]:
        corrected, centroids, penalty = state
        x = jnp.where(known, unit_rows(corrected), 0)
        centroids, penalty = jax.lax.fori_loop(
            0, n_rounds, lambda _, now: update(x, *now), (centroids, penalty)
        )
        shifts = ridge(_memberships(x, labels, centroids, penalty, sigma))
        found = HarmonyReference(centroids, penalty, shifts)
        return (_correct(z, corrected, labels, found, sigma)[0], centroids, penalty), found

    start = _start(z, known[:, 0], n_clusters)
    flat = jnp.zeros((n_batches, n_clusters), z.dtype)
    return jax.lax.scan(iterate, (z, start, flat), length=n_iterations)[1]


@jax.jit
def project(
    z: Float[Array, "cells features"],
    batch_labels: Int[Array, " cells"],
    reference: HarmonyReference,
    *,
    sigma: Any = 0.1,
) -> tuple[Float[Array, "cells features"], Float[Array, "cells clusters"]]:
    """Repeats the iterations of `reference` on `z`, each cell by itself: (corrected cells, memberships)."""
    labels = _labels(batch_labels, reference.penalty.shape[1])
    reference = jax.tree.map(lambda v: jnp.asarray(v, z.dtype), reference)
    before, last = jax.tree.map(lambda v: v[:-1], reference), jax.tree.map(lambda v: v[-1], reference)
    corrected = jax.lax.scan(
        lambda current, found: (_correct(z, current, labels, found, sigma)[0], None), z, before
    )[0]
    return _correct(z, corrected, labels, last, sigma)


@jax.checkpoint
def _correct(
    z: Array, current: Array, labels: Array, found: HarmonyReference, sigma: Any
) -> tuple[Array, Array]:
    """One correction of `z`, by memberships that `current`, its last correction, has."""
    r = _memberships(unit_rows(current), labels, found.centroids, found.penalty, sigma)
    # feature by feature: (cells, clusters) is the largest array, never (cells, clusters, features)
    shift = jax.lax.map(lambda s: (r * _of_batch(s, labels)).sum(axis=1), jnp.moveaxis(found.shifts, -1, 0))
    return z - shift.T, r


def _memberships(x: Array, labels: Array, centroids: Array, penalty: Array, sigma: Any) -> Array:
    """R_ik ~ exp(-2 (1 - x_i·y_k) / sigma) (expected / observed)^theta, the latter of the cell's batch."""
    logits = 2 / sigma * (_product(x, centroids.T) - 1)
    return jax.nn.softmax(logits + _of_batch(penalty, labels), axis=1)


def _product(a: Array, b: Array) -> Array:
    # an accelerator's default product has 10 bits of mantissa; sigma magnifies their loss twentyfold
    return jnp.matmul(a, b, precision="highest")


def _labels(batch_labels: Array, n_batches: int) -> Array:
    """Labels with everything out of range as `n_batches`, which gathers read as 0 and sums drop."""
    return jnp.where((batch_labels >= 0) & (batch_labels < n_batches), batch_labels, n_batches)


def _of_batch(table: Array, labels: Array) -> Array:
    return table.at[labels].get(mode="fill", fill_value=0)


def _per_batch(values: Array, labels: Array, n_batches: int) -> Array:
    return jax.ops.segment_sum(values, labels, n_batches)


def _start(
    z: Float[Array, "cells features"], known: Bool[Array, " cells"], k: int
) -> Float[Array, "clusters features"]:
    """Unit centroids from k-means of the known unit cells, the same for every order of the cells.

    Greedy k-means++ as in scikit-learn, where the random draws are fixed quantiles of the cells in
    lexicographic order; then Lloyd's rounds. Which cells form a cluster is discrete: no gradient there.
    """
    order = jnp.lexsort(jax.lax.stop_gradient(z).T)
    weight = known[order].astype(z.dtype)
    x = unit_rows(z[order]) * weight[:, None]
    fixed = jax.lax.stop_gradient(x)
    n_draws = 2 + int(math.log(k))

    def seed(closest: Array, i: Array) -> tuple[Array, Array]:
        # the golden ratio spreads the quantiles of successive draws evenly
        quantiles = (jnp.arange(n_draws) + (i * 0.6180339887) % 1) / n_draws
        mass = jnp.cumsum(closest)
        drawn = fixed[jnp.clip(jnp.searchsorted(mass, quantiles * mass[-1]), max=len(fixed) - 1)]
        left = jnp.minimum(closest[:, None], squared_euclidean(fixed, drawn))
        best = left.sum(axis=0).argmin()
        return left[:, best], drawn[best]

    def nearest(centroids: Array) -> Array:
        return squared_euclidean(fixed, centroids).argmin(axis=1)

    def means(points: Array, labels: Array, empty: Array) -> Array:
        count = jax.ops.segment_sum(weight, labels, k)[:, None]
        total = jax.ops.segment_sum(points, labels, k)
        return jnp.where(count > 0, total / jnp.maximum(count, 1), empty)

    # 4, the squared diameter of the sphere: nothing is drawn yet
    centroids = jax.lax.scan(seed, 4 * weight, jnp.arange(1, k + 1))[1]
    centroids = jax.lax.fori_loop(0, LLOYD_ROUNDS, lambda _, c: means(fixed, nearest(c), c), centroids)
    return unit_rows(means(x, nearest(centroids), centroids))
