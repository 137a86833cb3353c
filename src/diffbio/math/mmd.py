"""Maximum mean discrepancy between groups of points: how far apart several distributions are.

MMD² of two distributions is E k(x, x') + E k(y, y') - 2 E k(x, y) (Gretton et al. 2012, JMLR 13:723), here with
k(x, y) the mean of exp(-|x - y|² / w) over several widths w. It is 0 where the distributions are equal.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .distances import squared_euclidean

ROWS_PER_BLOCK = 4096


def mmd2(
    x: Float[Array, "rows features"],
    groups: Float[Array, "rows groups"],
    *,
    widths: Float[Array, " widths"],
    weights: Float[Array, "rows groups"] | None = None,
) -> Float[Array, "groups groups"]:
    """Unbiased estimate of MMD² of every pair of groups, from all pairs of rows (U-statistic): O(rows²).

    It may be below 0, and is 0 on average for two samples of one distribution. Exactly 0 where a group has fewer
    than two rows, and of a group with itself.

    groups: one row of zeros and a one for every point; a row of zeros takes no part.
    widths: of the kernels, in units of squared distance.
    weights: entry (i, b) is what row i counts where its own group is compared with b; 1 unless given.
    """
    distance = squared_euclidean(x, x)
    distance = distance * (1 - jnp.eye(len(x), dtype=x.dtype))  # exactly 0 where rounding leaves a little
    k = jnp.zeros_like(distance)
    for i in range(widths.shape[0]):
        k = k + jnp.exp(-distance / widths[i])
    return _unbiased(_members(groups, weights), lambda v: v.T @ (k @ v) / widths.shape[0])


def mmd2_random_features(
    x: Float[Array, "rows features"],
    groups: Float[Array, "rows groups"],
    *,
    directions: Float[Array, "features frequencies"],
    widths: Float[Array, " widths"],
    weights: Float[Array, "rows groups"] | None = None,
) -> Float[Array, "groups groups"]:
    """`mmd2` with the kernel approximated by random Fourier features (Rahimi & Recht 2007): O(rows), in blocks.

    k(x, y) is the mean over frequencies f of cos(f·(x - y)). Unbiased over the draw of the directions; the error
    falls as one over the root of their number.

    directions: standard normal; column j serves width j modulo the number of widths.
    """
    width = widths[jnp.arange(directions.shape[1]) % widths.shape[0]]
    frequencies = directions * jnp.sqrt(2 / width)

    def sums(v: Array) -> Array:
        n_blocks = -(-len(x) // ROWS_PER_BLOCK)
        padding = ((0, n_blocks * ROWS_PER_BLOCK - len(x)), (0, 0))
        rows, members = (jnp.pad(a, padding) for a in (x, v)) if n_blocks > 1 else (x, v)
        parts = rows.reshape(n_blocks, -1, x.shape[1]), members.reshape(n_blocks, -1, v.shape[1])

        @jax.checkpoint
        def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
            angles = jnp.matmul(part[0], frequencies, precision="highest")
            return total + jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1).T @ part[1], None

        start = jnp.zeros((2 * directions.shape[1], v.shape[1]), x.dtype)
        total = jax.lax.scan(add, start, parts)[0]
        return total.T @ total / directions.shape[1]

    return _unbiased(_members(groups, weights), sums)


def mean_over_pairs(
    values: Float[Array, "groups groups"], groups: Float[Array, "rows groups"], *, at_least: int = 2
) -> Float[Array, ""]:
    """Mean of a symmetric table over the pairs of groups that both have `at_least` rows; 0 if there is none."""
    there = groups.sum(axis=0) >= at_least
    pairs = (there[:, None] & there) & ~jnp.eye(len(there), dtype=bool)
    return jnp.where(pairs, values, 0).sum() / jnp.maximum(pairs.sum(), 1)


def median_squared_distance(x: Float[Array, "rows features"], *, at_most: int = 1000) -> Float[Array, ""]:
    """Median of the squared distance of two rows (the median heuristic); no gradient flows through it.

    at_most: rows that are looked at, evenly spaced. 1 where there are no two different rows.
    """
    rows = jax.lax.stop_gradient(x[:: max(1, -(-len(x) // at_most))])
    upper = jnp.triu_indices(len(rows), 1)
    if len(rows) < 2:
        return jnp.ones((), x.dtype)
    found = jnp.median(squared_euclidean(rows, rows)[upper])
    return jnp.where(found > 0, found, 1.0)


def overlap_weights(
    x: Float[Array, "rows features"],
    groups: Float[Array, "rows groups"],
    *,
    width: Float[Array, ""] | float,
    floor: float,
    at_most: int = 1000,
) -> Float[Array, "rows groups"]:
    """Entry (i, b): what row i counts where its group is compared with group b, from 0 to 1; no gradient.

    With p the density of a group at x_i (kernel of `width`, the row itself left out) it is
    (min(p_own, p_b) + f) / (p_own + f): the weighted groups agree on what they share, so that a kind of cell that b
    lacks is not drawn towards others. f = floor * mean density: where no group is near another all count, those in
    sparse places more; a large floor is no weight at all.

    at_most: rows that densities are read from, evenly spaced: O(rows * at_most).
    """
    x = jax.lax.stop_gradient(x)
    chosen = jnp.arange(0, len(x), max(1, -(-len(x) // at_most)))
    itself = (jnp.arange(len(x))[:, None] == chosen).astype(x.dtype)
    k = jnp.exp(-squared_euclidean(x, x[chosen]) / width) * (1 - itself)
    others = groups[chosen].sum(axis=0) - itself.sum(axis=1, keepdims=True) * groups
    density = k @ groups[chosen] / jnp.maximum(others, 1)
    own = (density * groups).sum(axis=1, keepdims=True)
    least = floor * density.mean()
    known = own + least > 0
    return jnp.where(known, (jnp.minimum(own, density) + least) / jnp.where(known, own + least, 1.0), 1.0)


def _members(groups: Array, weights: Array | None) -> Array:
    """(rows, groups, groups): what a row counts in a group where that is compared with another."""
    if weights is None:
        return groups[:, :, None]
    return groups[:, :, None] * weights[:, None, :]


def _unbiased(members: Array, products: Callable[[Array], Array]) -> Array:
    """The U-statistic from sums of kernels: `products` maps V to VᵀKV."""
    n, n_groups, others = members.shape
    table = products(members.reshape(n, -1)).reshape(n_groups, others, n_groups, others)
    own, other = jnp.meshgrid(jnp.arange(n_groups), jnp.arange(n_groups), indexing="ij")
    a, b = (other, own) if others > 1 else (jnp.zeros_like(own), jnp.zeros_like(own))
    total = members.sum(axis=0)[own, a]
    squares = (members**2).sum(axis=0)[own, a]
    pairs = total**2 - squares
    enough = pairs > 1e-6 * squares  # of one row, or of one with all the weight, rounding leaves a little
    safe = jnp.where(enough, pairs, 1.0)
    within = jnp.where(enough, (table[own, a, own, a] - squares) / safe, 0)
    cross = table[own, a, other, b] / jnp.where(enough & enough.T, total * total.T, 1.0)
    different = ~jnp.eye(n_groups, dtype=bool)
    return jnp.where(enough & enough.T & different, within + within.T - 2 * cross, 0)
