"""Distances between rows of matrices, and the lengths of rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def squared_euclidean(
    x: Float[Array, "rows features"], y: Float[Array, "others features"]
) -> Float[Array, "rows others"]:
    """Squared Euclidean distance of every row of `x` to every row of `y`.

    Expands |x|² - 2x·y + |y|², so that the largest temporary has one entry a pair. Both are first moved
    to the mean of `y`, which leaves the distance as it is and keeps float32 from cancelling far from the
    origin; what rounding still leaves below zero is cut off.
    """
    origin = jax.lax.stop_gradient(y.mean(axis=0, keepdims=True))
    x, y = x - origin, y - origin
    # "highest": an accelerator's default product has 10 bits of mantissa, too few for a difference
    cross = jnp.matmul(x, y.T, precision="highest")
    return jnp.maximum((x * x).sum(-1)[:, None] - 2 * cross + (y * y).sum(-1), 0)


def safe_norm(x: Float[Array, "rows features"]) -> Float[Array, " rows"]:
    """Euclidean length of every row, with gradient 0 (not NaN) where the row is zero."""
    return safe_sqrt((x * x).sum(-1))


def safe_sqrt(square: Float[Array, "..."]) -> Float[Array, "..."]:
    """Root of values of 0 or more, with gradient 0 (not NaN) at 0; below 0 it is 0."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def unit_rows(x: Float[Array, "rows features"]) -> Float[Array, "rows features"]:
    """Every row divided by its length; a zero row stays zero, with gradient 0.

    |a - b|² of two unit rows is 2 (1 - cos) of the angle between them.
    """
    length = safe_norm(x)[:, None]
    return jnp.where(length > 0, x / jnp.where(length > 0, length, 1.0), 0.0)
