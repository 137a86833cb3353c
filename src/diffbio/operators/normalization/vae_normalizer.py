"""scVI's variational autoencoder as a normaliser of counts."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...errors import DataError
from ...math.sparse import SparseRows
from ...nn.count_vae import CountVAE, log_positive, one_hot_batch
from ..base import Config, Data, Operator, checked_counts, fraction, one_of, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAENormalizerConfig(Config):
    """Settings of `VAENormalizer`.

    n_genes: width of the counts.
    latent_dim: width of the latent space; dimensions that the data do not need stay at the prior.
    hidden_dims: widths of the encoder's layers; the decoder has them in reverse.
    likelihood: 'zinb' (zero-inflated negative binomial), 'nb' or 'poisson'.
    n_batches: number of batches; if there are several, the decoder is told which, so that z need not know.
    dropout_rate: in the encoder, in training.
    """

    n_genes: int = positive(2000)
    latent_dim: int = positive(64)
    hidden_dims: tuple[int, ...] = positive((128, 64))
    likelihood: str = one_of("zinb", "nb", "poisson")
    n_batches: int = positive(1)
    dropout_rate: float = fraction(0.1)


class Normalized(TypedDict):
    """What `VAENormalizer` adds."""

    normalized: Float[Array, "cells genes"]  # gene fractions: rows sum to 1
    latent_z: Float[Array, "cells latent"]  # the mean in eval mode, a sample in train mode
    latent_mean: Float[Array, "cells latent"]
    latent_logvar: Float[Array, "cells latent"]
    log_rate: Float[Array, "cells genes"]  # log(library_size * normalized)
    log_theta: Float[Array, "genes"]  # log inverse dispersion; 30 for 'poisson'
    pi_logit: Float[Array, "cells genes"]  # extra zeros; -30 for 'nb' and 'poisson'


class VAENormalizer(Operator):
    """Gene fractions decoded from a latent position that explains the counts (scVI, Lopez et al. 2018).

    The encoder reads log(1 + counts); the decoder is told the cell's own batch, and `normalized` is decoded
    with it too, so that library_size * normalized is the expected count of this cell. Without
    `batch_labels`, or under jit for a label >= n_batches, cells are decoded as if no batch had an effect.
    library_size: counts of the cell over all its genes; by default the sum over the given ones.
    (log_rate, log_theta, pi_logit) are a ZINB for every likelihood: what 'nb' and 'poisson' lack is set to
    its limit.
    """

    config: VAENormalizerConfig
    init_cells: ClassVar[int | None] = 4096
    fit_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 400, "batch_size": 128, "learning_rate": 1e-3, "patience": 20
    }
    sparse_keys = frozenset({"counts"})
    schedules: ClassVar[Mapping[str, Any]] = {"kl_weight": lambda epoch: jnp.minimum(1.0, (epoch + 1) / 50)}

    def __init__(self, config: VAENormalizerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.fitted = False
        self.vae = CountVAE(
            config.n_genes,
            config.latent_dim,
            hidden_dims=config.hidden_dims,
            likelihood=config.likelihood,
            n_injected=config.n_batches if config.n_batches > 1 else 0,
            dropout_rate=config.dropout_rate,
            rngs=rngs,
        )

    def __call__(
        self,
        counts: Float[Array, "cells genes"],
        library_size: Float[Array, "cells"] | None = None,
        batch_labels: Int[Array, "cells"] | None = None,
    ) -> Normalized:
        """Encodes and decodes every cell."""
        counts = checked_counts("VAENormalizer", counts)
        batch = self._batch(batch_labels)
        q = self.vae.encode(counts, batch)
        z = self.vae.sample(q)
        log_library = log_positive(counts.sum(-1) if library_size is None else library_size)
        p = self.vae.decode(z, log_library, batch)
        return {
            "normalized": jnp.exp(p.log_rate - log_library[:, None]),
            "latent_z": z,
            "latent_mean": q.mean,
            "latent_logvar": q.logvar,
            "log_rate": p.log_rate,
            "log_theta": p.log_theta,
            "pi_logit": jnp.broadcast_to(p.pi_logit, counts.shape),
        }

    def objective(
        self, data: Data, *, kl_weight: jax.Array | float = 1.0
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """-log p(counts | z) + kl_weight * KL(q(z | counts) || N(0, I)), mean over cells.

        At weight 1 it is the negative ELBO, in nats.

        Raises:
            DataError: n_batches > 1, but data has no batch_labels.
        """
        inputs = self._inputs(data)
        counts, labels = inputs["counts"], inputs.get("batch_labels")
        if labels is None and self.config.n_batches > 1:
            n_batches = self.config.n_batches
            msg = f"VAENormalizer: n_batches is {n_batches}, but data has no 'batch_labels' to train with."
            raise DataError(msg)
        library = inputs.get("library_size", counts.sum(-1))
        given = data["counts"] if isinstance(data["counts"], SparseRows) else counts
        reconstruction, kl = self.vae.loss(given, library, self._batch(labels))
        return reconstruction + kl_weight * kl, {"reconstruction": reconstruction, "kl": kl}

    def init_from(self, data: Data) -> None:
        """Starts the decoder at the mean gene fractions and their dispersion."""
        counts = checked_counts("VAENormalizer", np.asarray(data["counts"]))
        library = data.get("library_size")
        self.vae.start_from(counts, counts.sum(-1) if library is None else np.asarray(library))

    def _batch(self, labels: jax.Array | None) -> jax.Array | None:
        batch = one_hot_batch(labels, self.config.n_batches, who="VAENormalizer")
        return None if self.config.n_batches == 1 else batch

    @classmethod
    def examples(cls) -> dict[str, tuple["VAENormalizer", Data]]:
        """One per likelihood, one with batches and a library size of its own."""
        keys = jax.random.split(jax.random.key(0), 2)
        counts = jax.random.poisson(keys[0], 2.0, (12, 8)).astype(jnp.float32)
        batch = jax.random.randint(keys[1], (12,), 0, 3)

        def op(**settings: Any) -> VAENormalizer:
            config = VAENormalizerConfig(n_genes=8, latent_dim=3, hidden_dims=(16, 12), **settings)
            return cls(config, rngs=nnx.Rngs(0))

        library = counts.sum(-1) * 1.5 + 1.0
        return {
            "zinb": (op(), {"counts": counts}),
            "nb, three batches": (
                op(likelihood="nb", n_batches=3),
                {"counts": counts, "library_size": library, "batch_labels": batch},
            ),
            "poisson": (op(likelihood="poisson"), {"counts": counts}),
        }
