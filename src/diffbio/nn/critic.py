"""The critic of a Wasserstein GAN over several batches of cells (Gulrajani et al. 2017, arXiv:1704.00028)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..math.distances import safe_norm
from ..math.mmd import mean_over_pairs


class Critic(nnx.Module):
    """One score per batch for every cell: large where it looks like a cell of that batch.

    Two smooth hidden layers: the gradient penalty takes a second derivative, of which a relu has none.
    """

    def __init__(self, n_inputs: int, hidden_dim: int, n_batches: int, *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(n_inputs, hidden_dim, rngs=rngs)
        self.second = nnx.Linear(hidden_dim, hidden_dim, rngs=rngs)
        # no bias: it would move the scores of all cells alike
        self.last = nnx.Linear(hidden_dim, n_batches, use_bias=False, rngs=rngs)

    def __call__(self, z: Float[Array, "cells latent"]) -> Float[Array, "cells batches"]:
        """Scores of every cell by itself."""
        return self.last(jax.nn.silu(self.second(jax.nn.silu(self.first(z)))))

    def frozen(self) -> "Critic":
        """A copy whose parameters get no gradient."""
        graph, state = nnx.split(self)
        return nnx.merge(graph, jax.tree.map(jax.lax.stop_gradient, state))

    def steepness(self, z: Float[Array, "cells latent"], contrast: Float[Array, "cells batches"]) -> Array:
        """Mean of (|gradient of scores·contrast| - 1)² over the points z with a contrast: 0 where that is 1-Lipschitz.

        contrast: 1 for one batch and -1 for another, whose difference of scores tells the two apart.
        """
        slope = jax.grad(lambda x: (self(x) * contrast).sum())(z)
        there = (contrast != 0).any(axis=1)
        return jnp.where(there, (safe_norm(slope) - 1) ** 2, 0).sum() / jnp.maximum(there.sum(), 1)


def separation(
    scores: Float[Array, "cells batches"],
    batch: Float[Array, "cells batches"],
    weights: Float[Array, "cells batches"] | None = None,
) -> Float[Array, ""]:
    """Mean over pairs of batches a, b of E_a[s_a - s_b] - E_b[s_a - s_b], with s the scores.

    Where the differences of scores are 1-Lipschitz, its largest possible value is the mean Wasserstein-1 distance of
    two batches.

    batch: a row of zeros and a one for every cell. weights: entry (i, b) is what cell i counts where its batch is
    compared with b.
    """
    weights = jnp.ones_like(batch) if weights is None else weights
    members = batch[:, :, None] * weights[:, None, :]  # cell, its batch, compared with
    total = members.sum(axis=0)
    own = (batch * scores).sum(axis=1)[:, None] - scores  # how much more like its own batch than like each other
    sums = batch.T @ (weights * own)
    mean = jnp.where(total > 0, sums / jnp.where(total > 0, total, 1.0), 0)
    return mean_over_pairs(mean + mean.T, batch, at_least=1)
