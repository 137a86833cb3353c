"""An autoencoder that is told the batch: principal components within batches, and networks that correct them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ..errors import DataError
from ..math.distributions import nb_log_prob, poisson_log_prob
from ..math.linalg import pca
from ..math.mmd import median_squared_distance

SMALL = nnx.initializers.variance_scaling(0.05**2, "fan_in", "normal")  # of last layers: starts at the components
WIDTH_MEMORY = 0.95  # of the running median of squared distances
STEPS_OF_AN_EPOCH = (10, 50)
COUNTS_PER_CELL = 1e4  # to which counts are scaled before the logarithm


class BatchNetwork(nnx.Module):
    """Two smooth hidden layers that read x and the batch, small at the start, and a shift per batch."""

    def __init__(self, n_inputs: int, hidden_dim: int, n_outputs: int, *, n_batches: int, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(n_inputs + n_batches, hidden_dim, rngs=rngs)
        self.second = nnx.Linear(hidden_dim, hidden_dim, rngs=rngs)
        self.last = nnx.Linear(hidden_dim, n_outputs, use_bias=False, kernel_init=SMALL, rngs=rngs)
        self.shift = nnx.Param(jnp.zeros((n_batches, n_outputs)))

    def __call__(self, x: Float[Array, "cells inputs"], batch: Float[Array, "cells batches"]) -> Array:
        """(cells, outputs)."""
        h = jax.nn.silu(self.first(jnp.concatenate([x, batch.astype(x.dtype)], axis=1)))
        return self.last(jax.nn.silu(self.second(h))) + batch.astype(x.dtype) @ self.shift[...].astype(x.dtype)


class BatchAutoencoder(nnx.Module):
    """z = A (x - m_b) + f(x, b), decoded as m_b + Aᵀ z + g(z, b): A are principal components within batches.

    f and g are networks that know the batch b, and start near 0: the latent space starts as the components of cells
    with the mean of their batch taken off, and training bends it. A distance of 1 in it is one of 1 in the input.
    A, the means m_b and one scale for all genes come from data (`start_from`) and are not trained.

    likelihood: 'expression' reads log-normalised values, principal components or a latent space, and the loss is
    the squared error; 'nb' and 'poisson' read counts, encode log(1 + 10⁴ x / library), and the decoded values are
    logits of the gene fractions.
    """

    def __init__(
        self, n_genes: int, *, n_batches: int, hidden_dim: int, latent_dim: int, likelihood: str, rngs: nnx.Rngs
    ) -> None:
        self.likelihood, self.n_batches = likelihood, n_batches
        start = jax.random.normal(rngs.params(), (n_genes, min(latent_dim, n_genes)))
        self.components = nnx.BatchStat(jnp.linalg.qr(start)[0].T)
        self.mean = nnx.BatchStat(jnp.zeros((n_batches, n_genes)))
        self.offset = nnx.BatchStat(jnp.zeros((n_batches, n_genes)))  # of what is decoded
        self.scale = nnx.BatchStat(jnp.ones(()))
        self.width = nnx.BatchStat(jnp.full((), 2.0 * latent_dim))  # typical squared distance of two cells in z
        self.encoder = BatchNetwork(n_genes, hidden_dim, latent_dim, n_batches=n_batches, rngs=rngs)
        self.decoder = BatchNetwork(latent_dim, hidden_dim, n_genes, n_batches=n_batches, rngs=rngs)
        self.log_theta = nnx.data(nnx.Param(jnp.zeros(n_genes)) if likelihood == "nb" else None)

    def encode(self, x: Float[Array, "cells genes"], batch: Float[Array, "cells batches"]) -> tuple[Array, Array]:
        """The latent position of every cell, and how far the network has moved it: each (cells, latent)."""
        scale = self.scale[...].astype(x.dtype)
        inputs = (self._readable(x) - batch @ self.mean[...].astype(x.dtype)) / scale
        moved = self.encoder(inputs, batch)
        return scale * (inputs @ self.components[...].astype(x.dtype).T + moved), scale * moved

    def decode(self, z: Float[Array, "cells latent"], batch: Float[Array, "cells batches"]) -> Array:
        """Values (cells, genes) as they would be in the given batch; of counts, log fractions."""
        scale = self.scale[...].astype(z.dtype)
        decoded = z @ self.components[...].astype(z.dtype) + scale * self.decoder(z / scale, batch)
        values = batch @ self.offset[...].astype(z.dtype) + decoded
        return values if self.likelihood == "expression" else jax.nn.log_softmax(values, axis=-1)

    def without_batch(self, z: Float[Array, "cells latent"], reference_batch: int | None) -> Array:
        """Decoded as a cell of the reference batch, or the mean over all batches; fractions where counts are read."""
        batches = jnp.eye(self.n_batches, dtype=z.dtype)
        batches = batches if reference_batch is None else batches[reference_batch][None]

        def add(total: Array, batch: Array) -> tuple[Array, None]:
            values = self.decode(z, jnp.broadcast_to(batch, (len(z), self.n_batches)))
            return total + (values if self.likelihood == "expression" else jnp.exp(values)), None

        start = jnp.zeros((len(z), self.components.shape[1]), z.dtype)
        return jax.lax.scan(add, start, batches)[0] / len(batches)

    def reconstruction_loss(self, x: Float[Array, "cells genes"], z: Array, batch: Array) -> Array:
        """Mean over cells and genes of the squared error in units of the variance within batches, or of -log p."""
        decoded = self.decode(z, batch)
        if self.likelihood == "expression":
            return (((decoded - x) / self.scale[...].astype(x.dtype)) ** 2).mean()
        library = x.sum(axis=1, keepdims=True)
        log_rate = jnp.log(jnp.where(library > 0, library, 1.0)) + decoded
        if self.log_theta is None:
            return -poisson_log_prob(x, log_rate).mean()
        return -nb_log_prob(x, log_rate, self.log_theta[...].astype(x.dtype)).mean()

    def displacement(self, moved: Float[Array, "cells latent"]) -> Array:
        """Mean squared movement of a cell, as a share of the variance within batches."""
        square = ((moved / self.scale[...].astype(moved.dtype)) ** 2).sum(axis=1)
        return square.mean() / self.components.shape[1]

    def follow(self, z: Float[Array, "cells latent"]) -> None:
        """Moves `width` towards the median squared distance of these cells: in training, once a minibatch."""
        now = median_squared_distance(z).astype(jnp.float32)
        self.width.set_value(WIDTH_MEMORY * self.width[...] + (1 - WIDTH_MEMORY) * now)

    def start_from(self, x: np.ndarray, labels: np.ndarray, *, who: str) -> None:
        """Takes means, components, scale and width from data, every batch counting the same.

        Raises:
            DataError: fewer cells than latent dimensions, or a batch of fewer than two cells.
        """
        latent_dim, n_genes = self.components.shape
        sizes = np.bincount(labels, minlength=self.n_batches)
        if (sizes < 2).any():
            batch = int(np.flatnonzero(sizes < 2)[0])
            msg = f"{who}: batch {batch} has {sizes[batch]} cells; at least 2 are needed; leave the batch out."
            raise DataError(msg)
        if len(x) < latent_dim:
            msg = f"{who}: latent_dim is {latent_dim}, but there are only {len(x)} cells; pass {len(x)} or fewer."
            raise DataError(msg)
        read = np.asarray(self._readable(jnp.asarray(x)), np.float64)
        mean = np.stack([read[labels == b].mean(axis=0) for b in range(self.n_batches)])
        centred = read - mean[labels]
        share = 1 / np.sqrt(sizes[labels] - 1)[:, None]
        variance = float(((centred * share) ** 2).sum() / self.n_batches / n_genes)
        components = pca((centred * share).astype(np.float32), latent_dim).components
        offset = mean
        if self.likelihood != "expression":
            fractions = np.stack([x[labels == b].sum(axis=0, dtype=np.float64) + 0.5 for b in range(self.n_batches)])
            offset = np.log(fractions / fractions.sum(axis=1, keepdims=True))
        rows = np.random.default_rng(0).permutation(len(x))  # the median looks at evenly spaced ones
        found: dict[str, Any] = {
            "components": components,
            "mean": mean,
            "offset": offset,
            "scale": np.sqrt(variance) if variance > 0 else 1.0,
            "width": median_squared_distance(jnp.asarray(centred[rows] @ components.T, jnp.float32)),
        }
        for name, value in found.items():
            getattr(self, name).set_value(jnp.asarray(value, jnp.float32))

    def _readable(self, x: Array) -> Array:
        if self.likelihood == "expression":
            return x
        library = x.sum(axis=1, keepdims=True)
        return jnp.log1p(COUNTS_PER_CELL * x / jnp.where(library > 0, library, 1.0))


class EqualBatches:
    """Minibatches that hold every batch in equal parts, whatever its size; an epoch has ten to fifty of them.

    So the work of an epoch, and what a small batch counts, do not depend on the number of cells. A batch with fewer
    cells than its part of a minibatch comes up in it more than once.

    times: how often that many minibatches, where only every so-manieth one trains the encoder.
    """

    def __init__(self, labels: np.ndarray, *, times: int = 1) -> None:
        self.times = times
        self.rows = [np.flatnonzero(labels == b) for b in np.unique(labels)]

    def order(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """Row numbers of one epoch: int (steps, batch_size)."""
        steps = self.times * int(np.clip(sum(map(len, self.rows)) // batch_size, *STEPS_OF_AN_EPOCH))
        parts = np.diff(np.linspace(0, batch_size, len(self.rows) + 1).astype(int))
        drawn = []
        for b, part in zip(rng.permutation(len(self.rows)), parts, strict=True):  # which one gets the odd cell
            rows = self.rows[b]
            passes = -(-steps * part // len(rows))
            every = np.concatenate([rng.permutation(rows) for _ in range(passes)] or [rows])
            drawn.append(every[: steps * part].reshape(steps, part))
        return np.concatenate(drawn, axis=1)
