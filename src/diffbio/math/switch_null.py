"""What the likelihood ratio of a switch is where there is none, and p-values.

Where expression is constant, the switching time means nothing, and Wilks' theorem does not hold. Chi-squared with two
degrees of freedom, which switchde uses, is near for genes whose mean is several times their noise, and too small for
genes of low mean. Ratios of permuted cells, pooled over genes of nearly the same mean over noise, have the right law.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

TAIL = 0.05  # share of the null ratios beyond which they are taken to be exponential
WINDOW = 2000  # null ratios that a gene is compared with, at most


def chi2_pvalues(ratios: Float[Array, " genes"]) -> Float[Array, " genes"]:
    """Of chi-squared with two degrees of freedom, as switchde."""
    return jnp.exp(-0.5 * jnp.maximum(ratios, 0.0))


def permutation_log_pvalues(
    ratios: Float[Array, " genes"],
    levels: Float[Array, " genes"],
    null_ratios: Float[Array, " draws"],
    null_levels: Float[Array, " draws"],
) -> Float[Array, " genes"]:
    """Log of the share of null ratios that are larger, of the `WINDOW` nearest in level, with an exponential tail.

    ratios: twice the log likelihood ratio.
    levels: mean over standard deviation.
    null_ratios: of permuted cells, of any of the genes.
    null_levels: of the same genes.
    """
    width = min(WINDOW, len(null_ratios))
    order = jnp.argsort(null_levels)
    null_levels, null_ratios = null_levels[order], null_ratios[order]
    middle = jnp.searchsorted(null_levels, levels)
    varying = jnp.isfinite(null_levels).sum()  # genes that do not vary stand last, and are nobody's null
    first = jnp.clip(middle - width // 2, 0, jnp.maximum(varying - width, 0))

    def pvalue(ratio: Array, first: Array) -> Array:
        near = jnp.sort(jax.lax.dynamic_slice(null_ratios, (first,), (width,)))
        begin = width - max(int(TAIL * width), 1)
        edge = near[begin]
        excess = jnp.maximum((near[begin:] - edge).mean(), 2.0)  # at least chi-squared's
        # from one null ratio to the next p falls evenly
        above = width - jnp.interp(ratio, near, jnp.arange(width, dtype=near.dtype))
        body = jnp.log(jnp.maximum(above, 1.0) / (width + 1.0))
        tail = jnp.log((width - begin) / (width + 1.0)) - (ratio - edge) / excess
        return jnp.where(ratio > edge, tail, jnp.where(ratio > near[0], body, 0.0))

    return jax.lax.map(lambda row: pvalue(*row), (ratios, first), batch_size=256)


def levels_of(mean: Float[Array, " genes"], variance: Float[Array, " genes"]) -> Float[Array, " genes"]:
    """Mean over standard deviation, by which genes are compared; infinite where nothing varies."""
    varies = variance > 0
    return jnp.where(varies, mean / jnp.sqrt(jnp.where(varies, variance, 1.0)), jnp.inf)
