"""P-values of many tests at once."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def benjamini_hochberg(pvalues: Float[Array, " tests"]) -> Float[Array, " tests"]:
    """The smallest rate of false discoveries at which each test is one (Benjamini & Hochberg 1995).

    >>> [round(float(q), 3) for q in benjamini_hochberg(jnp.array([0.01, 0.04, 0.03, 0.5]))]
    [0.04, 0.053, 0.053, 0.5]
    """
    n = len(pvalues)
    order = jnp.argsort(-pvalues)
    scaled = pvalues[order] * n / jnp.arange(n, 0, -1)
    falling = jnp.minimum(jnp.minimum.accumulate(scaled), 1.0)
    return jnp.zeros_like(pvalues).at[order].set(falling)
