"""Molecular cross-validation: some of every cell's molecules are held out, the others have to predict them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

LEAST_EXPECTED = 1e-8  # molecules: the log of a gene that a prediction rules out must be finite


def split_molecules(
    counts: Float[Array, "cells genes"], share: float, key: PRNGKeyArray
) -> tuple[Float[Array, "cells genes"], Float[Array, "cells genes"]]:
    """Binomial thinning: each molecule is kept with probability `share`, else held out (Batson et al. 2019).

    For Poisson counts the two parts are independent given the cell's rates. Of a count that is not whole, the
    fraction stays with the kept part. No gradient flows through the choice; the parts sum to the counts.

    Args:
        counts: molecules, >= 0.
        share: in (0, 1), of the molecules to keep.
        key: which molecules.

    Returns:
        (kept, held_out)
    """
    whole = jnp.floor(jax.lax.stop_gradient(counts))
    held_out = jax.random.binomial(key, whole, 1.0 - share, dtype=counts.dtype)
    return counts - held_out, held_out


def poisson_loss(predicted: Float[Array, "cells genes"], held_out: Float[Array, "cells genes"]) -> Float[Array, ""]:
    """Mean over entries of mu - x log mu for held-out counts x, with mu the cell's held-out total times its profile.

    It is the negative Poisson log-likelihood up to a term of the counts alone, in nats per cell and gene; only the
    shares of genes in a cell matter, so that methods with outputs on different scales compare.

    Args:
        predicted: expected expression >= 0 on any scale (counts, rates, fractions); each row is divided by its sum.
        held_out: molecules that the prediction has not seen.
    """
    total = predicted.sum(axis=1, keepdims=True)
    profile = predicted / jnp.where(total > 0, total, 1.0)
    expected = jnp.maximum(profile * held_out.sum(axis=1, keepdims=True), LEAST_EXPECTED)
    return (expected - held_out * jnp.log(expected)).mean()
