"""How far cells follow a batch correction, as a parameter that losses can train."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...errors import DataError
from ...losses.clustering import BatchMixingLoss
from ..base import Config, Data, Operator, nonnegative, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorrectionStrengthConfig(Config):
    """Settings of `CorrectionStrength`.

    n_batches: number of batches; labels are 0 ... n_batches - 1.
    strength: at the start; 0 leaves the cells as they were, 1 takes the correction as it is.
    n_neighbors: of a cell, among which the objective wants all batches.
    """

    n_batches: int = setting(2, ">= 2", lambda v: v >= 2)
    strength: float = nonnegative(1.0)
    n_neighbors: int = setting(15, ">= 1", lambda v: v >= 1)


class Blended(TypedDict):
    """What `CorrectionStrength` gives."""

    blended_embeddings: Float[Array, "cells features"]


class CorrectionStrength(Operator):
    """Moves cells along their batch correction by a learned share: x + s_b (corrected - x) for a cell of batch b.

    s = 0 is no correction and s = 1 the correction as it came, from Harmony, say; beyond 1 the shifts are extended.
    Harmony itself has no weights, so that without this part no loss could say how much of it is good. The gradient in
    s, in the embeddings and in the corrected ones is exact.
    """

    config: CorrectionStrengthConfig
    fit_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 256, "learning_rate": 1e-2, "max_epochs": 50}

    def __init__(self, config: CorrectionStrengthConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.strength = nnx.Param(jnp.full((config.n_batches,), config.strength))
        self.fitted = False

    def __call__(
        self,
        embeddings: Float[Array, "cells features"],
        corrected_embeddings: Float[Array, "cells features"],
        batch_labels: Int[Array, " cells"],
    ) -> Blended:
        """Cells between the two places, or beyond the second.

        A cell whose label is outside 0 ... n_batches - 1 raises DataError; where labels are traced and cannot be looked
        at (under `jax.jit`), it stays at `embeddings`.

        Raises:
            DataError: a label out of range.
        """
        n_batches = self.config.n_batches
        if not isinstance(batch_labels, jax.core.Tracer):
            labels = np.asarray(batch_labels)
            wrong = labels[(labels < 0) | (labels >= n_batches)]
            if len(wrong):
                msg = f"CorrectionStrength: batch_labels holds label {wrong[0]}, but n_batches is {n_batches}; "
                msg += f"labels must be 0 ... {n_batches - 1}."
                raise DataError(msg)
        place = jnp.where(batch_labels < 0, n_batches, batch_labels)
        strength = self.strength[...].at[place].get(mode="fill", fill_value=0)[:, None].astype(embeddings.dtype)
        return {"blended_embeddings": embeddings + strength * (corrected_embeddings - embeddings)}

    def objective(self, data: Data) -> tuple[Array, dict[str, Array]]:
        """1 minus the entropy of the batches around a cell, mean over cells: 1 apart, 0 mixed (`BatchMixingLoss`)."""
        inputs = self._inputs(data)
        blended = self(**inputs)["blended_embeddings"]
        loss = BatchMixingLoss(n_neighbors=self.config.n_neighbors, n_batches=self.config.n_batches)
        unmixed = 1 + loss(blended, inputs["batch_labels"])
        return unmixed, {"unmixed": unmixed}

    @classmethod
    def examples(cls) -> dict[str, tuple["CorrectionStrength", Data]]:
        """Half of a shift between two batches taken out, and a correction of three that goes too far."""

        def example(n_batches: int, strength: float, taken: float) -> tuple[CorrectionStrength, Data]:
            keys = jax.random.split(jax.random.key(n_batches), 2)
            labels = jnp.arange(18) % n_batches
            shift = 2 * jax.random.normal(keys[0], (n_batches, 4))[labels]
            cells = jax.random.normal(keys[1], (18, 4)) + shift
            config = CorrectionStrengthConfig(n_batches=n_batches, strength=strength, n_neighbors=4)
            data = {"embeddings": cells, "corrected_embeddings": cells - taken * shift, "batch_labels": labels}
            return cls(config, rngs=nnx.Rngs(0)), data

        return {"half a shift": example(2, 0.5, 1.0), "too far": example(3, 0.8, 2.0)}
