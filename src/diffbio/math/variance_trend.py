"""The mean-variance trend of genes: local regression (loess), differentiable."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..errors import ConfigError

CELL = 0.2  # a cell of the partition is cut while it holds more than span * CELL of the points
MOST_CUTS = 63  # an even partition has 31; ties make it uneven
MARGIN = 0.005  # of the range, by which the outermost vertices lie outside
FLAT = 1e-5  # relative to the unit window: a term of the local parabola that spans no more is left out


def loess(
    x: Float[Array, " points"], y: Float[Array, " points"], *, used: Bool[Array, " points"], span: float = 0.3
) -> Float[Array, " points"]:
    """Fits y by local parabolas in x and evaluates the fit at x: linear in y, differentiable in x and y.

    Cleveland & Grosse 1991, Computational methods for local regression, Stat. Comput. 1:47, as their `dloess` does it
    (and scikit-misc, and R): parabolas weighted by tricube are fitted at the vertices of a partition of x, whose
    cells hold at most a fifth of `span`, and joined by cubic polynomials. Equal to `skmisc.loess.loess(degree=2)`
    where its fit is well posed. Where a window holds fewer than three different x the parabola becomes a line or a
    constant. Cost O(points log points).

    Args:
        x: positions.
        y: values.
        used: which points take part; the fit at the others means nothing.
        span: fraction of the points in each window, in (0, 1].

    Raises:
        ConfigError: span is out of range.
    """
    if not 0 < span <= 1:
        msg = f"loess: span must be in (0, 1], got {span}."
        raise ConfigError(msg)
    size = x.shape[0]
    counts = np.arange(size + 1)
    n = used.sum()
    leaf = jnp.asarray(np.floor(counts * (span * CELL)).astype(np.int32))[n]
    window = np.minimum(counts, np.maximum(np.floor(counts * span + 1e-5), np.minimum(counts, 4))).astype(np.int32)
    near = jnp.asarray(window)[n]
    # points that are left out stand at the far end
    far = jax.lax.stop_gradient(jnp.where(used, jnp.abs(x), 0.0).max() * 2 + 1)
    x = jnp.where(used, x, far)
    order = jnp.argsort(x)
    x_sorted, y_sorted = x[order], jnp.where(used, y, 0.0)[order]
    vertices = _vertices(x_sorted, n, leaf)
    weight = used[order].astype(x.dtype)
    values, slopes = jax.vmap(_parabola, (0, None, None, None, None, None))(
        vertices, x_sorted, y_sorted, weight, n, near
    )
    return _join(jnp.where(used, x, vertices[0]), vertices, values, slopes)


def _vertices(x: Float[Array, " points"], n: Array, leaf: Array) -> Float[Array, " vertices"]:
    """Ends and cuts of the partition, in order; places that are not needed repeat the upper end."""
    size = x.shape[0]
    fixed = jax.lax.stop_gradient(x)
    place = jnp.arange(size)
    between = jnp.concatenate([fixed[1:] != fixed[:-1], jnp.array([False])])

    def cut(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        first, last, found, cells = state
        low, high = first[i], last[i]
        middle = (low + high) // 2
        # the nearest place between two different x, upwards first, as long as neither side has run out
        offset = place - middle
        turn = jnp.where(offset > 0, 2 * offset - 1, -2 * offset)
        ends = jnp.minimum(2 * (high - middle) - 1, 2 * (middle - low + 1))
        ends = jnp.where(high == middle, 0, ends)
        allowed = between & (place >= low) & (place < high) & (turn < ends)
        nearest = jnp.argmin(jnp.where(allowed, turn, 4 * size))
        middle = jnp.where(allowed.any(), nearest, middle)
        splits = (i < cells) & (high - low + 1 > leaf) & (cells + 2 <= first.shape[0])
        here = jnp.where(splits, cells, first.shape[0])  # out of bounds: dropped
        first = first.at[here].set(low, mode="drop").at[here + 1].set(middle + 1, mode="drop")
        last = last.at[here].set(middle, mode="drop").at[here + 1].set(high, mode="drop")
        found = found.at[i].set(jnp.where(splits, middle, -1))
        return first, last, found, cells + 2 * splits

    most = 2 * MOST_CUTS + 1
    start = (
        jnp.zeros(most, int), jnp.zeros(most, int).at[0].set(n - 1), jnp.full(most, -1, int), jnp.asarray(1),
    )  # fmt: skip
    _, _, found, _ = jax.lax.fori_loop(0, most, cut, start)
    lowest, highest = x[0], x[jnp.maximum(n - 1, 0)]
    margin = MARGIN * jnp.maximum(highest - lowest, 1e-10 * jnp.maximum(jnp.abs(lowest), jnp.abs(highest)) + 1e-30)
    chosen = jnp.sort(jnp.where(found >= 0, found, size))[:MOST_CUTS]  # by place: x is sorted
    inner = jnp.where(chosen < size, x[jnp.minimum(chosen, size - 1)], highest + margin)
    return jnp.concatenate([(lowest - margin)[None], inner, (highest + margin)[None]])


def _parabola(
    at: Array, x: Float[Array, " points"], y: Float[Array, " points"], weight: Float[Array, " points"], n: Array,
    near: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Value and slope at `at` of the parabola through the `near` nearest points."""
    size = x.shape[0]
    # the nearest points are neighbours in x: of all runs of that length, the one that reaches least far
    end = jnp.minimum(jnp.arange(size) + near - 1, size - 1)
    reach = jnp.maximum(jnp.abs(x - at), jnp.abs(x[end] - at))
    fits = jnp.arange(size) + near <= n
    radius = jnp.min(jnp.where(fits, reach, jnp.inf))
    ok = jnp.isfinite(radius) & (radius > 0)
    radius = jnp.where(ok, radius, 1.0)
    t = (x - at) / radius
    inside = (jnp.abs(t) < 1) & (weight > 0)
    t = jnp.where(inside, t, 0.0)
    w = jnp.where(inside, (1 - jnp.abs(t) ** 3) ** 3, 0.0)
    # polynomials that are orthogonal under the weights: no ill-conditioned system
    total = w.sum()
    w = w / jnp.where(total > 0, total, 1.0)
    centre = (w * t).sum()
    p1 = t - centre
    s1 = (w * p1**2).sum()
    safe1 = jnp.where(s1 > FLAT**2, s1, 1.0)
    lean = jnp.where(s1 > FLAT**2, (w * p1**3).sum() / safe1, 0.0)
    p2 = p1**2 - lean * p1 - s1
    s2 = (w * p2**2).sum()
    safe2 = jnp.where(s2 > FLAT**2, s2, 1.0)
    c0 = (w * y).sum()
    c1 = jnp.where(s1 > FLAT**2, (w * p1 * y).sum() / safe1, 0.0)
    c2 = jnp.where(s2 > FLAT**2, (w * p2 * y).sum() / safe2, 0.0)
    value = c0 - c1 * centre + c2 * (centre**2 + lean * centre - s1)
    slope = (c1 + c2 * (-2 * centre - lean)) / radius
    return value, slope


def _join(
    x: Float[Array, " points"], vertices: Float[Array, " vertices"], values: Float[Array, " vertices"],
    slopes: Float[Array, " vertices"],
) -> Float[Array, " points"]:  # fmt: skip
    """Cubic polynomials between vertices, with their values and slopes there."""
    right = jnp.clip(jnp.searchsorted(jax.lax.stop_gradient(vertices), x, side="left"), 1, vertices.shape[0] - 1)
    left = right - 1
    width = vertices[right] - vertices[left]
    safe = jnp.where(width > 0, width, 1.0)
    h = (x - vertices[left]) / safe
    return (
        (1 - h) ** 2 * (1 + 2 * h) * values[left] + h**2 * (3 - 2 * h) * values[right]
        + (h * (1 - h) ** 2 * slopes[left] - h**2 * (1 - h) * slopes[right]) * width
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="span")
def standardized_variance(
    counts: Float[Array, "cells genes"], *, weight: Float[Array, " cells"] | None = None, span: float = 0.3
) -> Float[Array, " genes"]:
    """Variance of each gene's counts over the variance that its mean lets expect, outlying counts clipped.

    Stuart et al. 2019 (Seurat v3): a loess of log10 variance on log10 mean gives the expected variance; counts are
    clipped at sqrt(cells) expected standard deviations above the mean. Genes with equal counts, in any order, have
    equal scores to the last bit while their sums of squares are below 2^24 (2^53 in double precision). Constant genes
    have 0. Cost O(cells genes + genes log genes).

    Args:
        counts: as they are, not normalised.
        weight: 1 for the cells that take part, 0 for the others; None is all.
        span: of the loess.
    """
    n = jnp.asarray(counts.shape[0], counts.dtype) if weight is None else weight.sum()
    w = 1.0 if weight is None else weight[:, None]
    total, squares = (w * counts).sum(axis=0), (w * counts**2).sum(axis=0)
    mean = total / jnp.maximum(n, 1.0)
    # sums of whole numbers are exact, so that equal genes stay equal; what is left by rounding is no variance
    spread = n * squares - total**2
    varies = spread > 8 * jnp.finfo(counts.dtype).eps * n * squares
    variance = jnp.where(varies, spread, 1.0) / jnp.maximum(n * (n - 1.0), 1.0)
    log_mean = jnp.log10(jnp.where(varies, jnp.where(mean > 0, mean, 1.0), 1.0))
    trend = loess(log_mean, jnp.log10(variance), used=varies, span=span)
    expected = 10.0 ** jnp.where(varies, trend, 0.0)
    limit = mean + jnp.sqrt(n * expected)
    # sum (min(x, limit) - mean)² = (n - 1) variance - sum over clipped x of (x - limit) (x + limit - 2 mean)
    excess = (w * jnp.maximum(counts - limit, 0.0) * (counts + limit - 2 * mean)).sum(axis=0)
    score = (variance - excess / jnp.maximum(n - 1.0, 1.0)) / expected
    return jnp.where(varies, score, 0.0)
