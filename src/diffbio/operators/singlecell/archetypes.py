"""Archetypal analysis: cells as mixtures of a few extreme profiles."""

import dataclasses
from typing import ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ...math.archetypes import learn_archetypes, mixture_weights
from ..base import Config, Data, Operator, checked_finite, nonnegative, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArchetypalAnalysisConfig(Config):
    """Settings of `DifferentiableArchetypalAnalysis`.

    n_archetypes: how many; `math.archetypes.elbow` finds a number.
    n_features: width of the embedding.
    temperature: draws weights to equal shares; in units of the mean squared distance of the archetypes from their
        centre. 0+ gives the nearest point of the hull, with weights that are exactly 0.
    n_rounds: of the search for archetypes at most; it stops earlier where nothing is gained. 0 leaves them at cells
        far from each other.
    """

    n_archetypes: int = positive(5)
    n_features: int = positive(50)
    temperature: float = positive(1e-4)
    n_rounds: int = nonnegative(300)


class Mixtures(TypedDict):
    """What `DifferentiableArchetypalAnalysis` adds."""

    archetype_weights: Float[Array, "cells archetypes"]  # rows on the simplex
    archetypes: Float[Array, "archetypes features"]
    reconstructed: Float[Array, "cells features"]  # weights @ archetypes


class DifferentiableArchetypalAnalysis(Operator):
    """Describes each cell as a mixture of archetypes, corners of the cloud that are mixtures of cells themselves.

    Minimises |X - A B X|² with the rows of A and B on the simplex (Cutler & Breiman 1994; Mørup & Hansen 2012, PCHA).
    `init_from` finds the archetypes B X and stores them; `apply` gives any cells, in chunks of any size, the weights
    of the nearest point of the archetypes' hull. The weights solve a small quadratic programme exactly, and so their
    gradient with respect to the embeddings is exact too; at the corners, where a cell stays the same archetype, it is
    0. Before `init_from` the archetypes are random points and the outputs are marked as unfitted.
    """

    config: ArchetypalAnalysisConfig
    init_cells: ClassVar[int | None] = None  # corners are rare cells

    def __init__(self, config: ArchetypalAnalysisConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.found = nnx.BatchStat(jax.random.normal(rngs.params(), (config.n_archetypes, config.n_features)))
        self.fitted = False

    def __call__(self, embeddings: Float[Array, "cells features"]) -> Mixtures:
        """Weights of the cells, and where they put them.

        Raises:
            DataError: NaN or infinity among values that are known (not under jit).
        """
        checked_finite(type(self).__name__, embeddings, key="embeddings")
        archetypes = jnp.asarray(self.found[...], embeddings.dtype)
        weights = mixture_weights(embeddings, archetypes, temperature=self.config.temperature)
        return {
            "archetype_weights": weights,
            "archetypes": archetypes,
            "reconstructed": jnp.matmul(weights, archetypes, precision="highest"),
        }

    def init_from(self, data: Data) -> None:
        """Finds the archetypes of `data["embeddings"]`.

        Raises:
            DataError: fewer different cells than archetypes, no variance, or values that are not finite.
        """
        cells = np.asarray(self._inputs(data)["embeddings"])
        found = learn_archetypes(cells, self.config.n_archetypes, n_rounds=self.config.n_rounds)
        self.found[...] = jnp.asarray(found.archetypes, self.found[...].dtype)
        self.fitted = True

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableArchetypalAnalysis", Data]]:
        """Archetypes of other cells, a little warm."""
        corners, mixing, noise, others = jax.random.split(jax.random.key(0), 4)
        profiles = 3.0 * jax.random.normal(corners, (3, 4))

        def cells(key: Array, n: int) -> Array:
            weights = jax.random.dirichlet(key, jnp.full(3, 0.5), (n,))
            return weights @ profiles + 0.3 * jax.random.normal(noise, (n, 4))

        config = ArchetypalAnalysisConfig(n_archetypes=3, n_features=4, temperature=0.1, n_rounds=3)
        op = cls(config, rngs=nnx.Rngs(0))
        op.init_from({"embeddings": cells(others, 24)})
        return {"stored": (op, {"embeddings": cells(mixing, 12)})}
