"""The count VAE (scVI, Lopez et al. 2018), in parts: encoder, reparameterised sample, decoder, likelihood.

    z ~ N(0, I),  fraction = softmax(f(z, batch)),  x_g ~ ZINB(library * fraction_g, theta_g, pi_g(z, batch))

with q(z | x) a Gaussian whose mean and variance a network reads off log(1 + x).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ..errors import DataError
from ..math.blocks import sum_in_blocks
from ..math.distributions import (
    gaussian_kl,
    nb_log_prob,
    nb_log_prob_of_zero,
    poisson_log_prob,
    zinb_log_prob,
    zinb_log_prob_of_zero,
)
from ..math.sparse import SparseRows
from .mlp import MLP

LIKELIHOODS = ("zinb", "nb", "poisson")
WHERE_NORMS = ("encoder", "decoder", "both", "none")
DISPERSIONS = ("gene", "gene-group", "gene-cell")

# Stand-ins where a likelihood lacks a parameter, so that (log_rate, log_theta, pi_logit) always says the
# fitted distribution as a ZINB, to float32 rounding: variance mu + mu² e^-30, and 1e-13 extra zeros.
POISSON_LOG_THETA = 30.0
NO_EXTRA_ZEROS = -30.0

LEAST_VARIANCE = 1e-4  # of q(z | x), as in scVI: keeps the KL divergence finite
SMALL = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's Linear, as in scVI


class Gaussian(NamedTuple):
    """A diagonal Gaussian for every cell."""

    mean: Float[Array, "cells latent"]
    logvar: Float[Array, "cells latent"]


class CountDistribution(NamedTuple):
    """A distribution of counts for every cell and gene; parameters that a likelihood lacks are its limits."""

    log_rate: Float[Array, "cells genes"]
    log_theta: Float[Array, "*genes"]  # (genes,), or (cells, genes)
    pi_logit: Float[Array, "*genes"]  # (cells, genes), or () where there are no extra zeros


class Encoder(nnx.Module):
    """q(. | x) = N(mean(h), least_variance + exp(logvar(h))) with h a network of x."""

    def __init__(
        self,
        n_inputs: int,
        latent_dim: int,
        *,
        hidden_dims: tuple[int, ...],
        n_covariates: int = 0,
        deep: bool = True,
        dropout_rate: float = 0.0,
        least_variance: float = LEAST_VARIANCE,
        batch_norm: bool = True,
        layer_norm: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.least_variance = least_variance
        self.network = MLP(
            n_inputs, hidden_dims, n_covariates=n_covariates, deep=deep, dropout_rate=dropout_rate,
            batch_norm=batch_norm, layer_norm=layer_norm, rngs=rngs,
        )
        self.mean = nnx.Linear(self.network.n_outputs, latent_dim, kernel_init=SMALL, rngs=rngs)
        self.logvar = nnx.Linear(self.network.n_outputs, latent_dim, kernel_init=SMALL, rngs=rngs)

    def __call__(
        self, x: Float[Array, "cells inputs"], covariates: Float[Array, "cells covariates"] | None = None
    ) -> Gaussian:
        """Mean and log variance for every cell."""
        h = self.network(x, covariates)
        logvar = self.logvar(h)
        if self.least_variance > 0:
            logvar = jnp.logaddexp(logvar, jnp.asarray(math.log(self.least_variance), h.dtype))
        return Gaussian(self.mean(h), logvar)


class GaussianSample(nnx.Module):
    """mean + sd * noise in train mode, from its own random stream; the mean in eval mode (as it is born)."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.noise = rngs.noise.fork()
        self.deterministic = True

    def __call__(self, q: Gaussian) -> Float[Array, "cells latent"]:
        """One position per cell."""
        if self.deterministic:
            return q.mean
        return q.mean + jnp.exp(0.5 * q.logvar) * jax.random.normal(self.noise(), q.mean.shape, q.mean.dtype)


class Decoder(nnx.Module):
    """From a latent position to log gene fractions (rows sum to 1), dispersion and extra zeros.

    likelihood: 'zinb' | 'nb' | 'poisson'.
    dispersion: of theta: 'gene', 'gene-group' (a row for each of n_groups batches or labels), 'gene-cell'.
    scale: 'softmax', or 'softplus' for rates of a given size factor, whose rows need not sum to 1.
    """

    def __init__(
        self,
        latent_dim: int,
        n_genes: int,
        *,
        hidden_dims: tuple[int, ...],
        n_covariates: int = 0,
        deep: bool = True,
        likelihood: str = "zinb",
        dispersion: str = "gene",
        n_groups: int = 1,
        scale: str = "softmax",
        batch_norm: bool = True,
        layer_norm: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.likelihood = likelihood
        self.dispersion = dispersion
        self.scale = scale
        self.network = MLP(
            latent_dim, hidden_dims, n_covariates=n_covariates, deep=deep,
            batch_norm=batch_norm, layer_norm=layer_norm, rngs=rngs,
        )

        def head() -> nnx.Linear:
            return nnx.Linear(self.network.n_outputs, n_genes, kernel_init=SMALL, rngs=rngs)

        self.fraction = head()
        self.extra_zeros = nnx.data(head() if likelihood == "zinb" else None)
        self.cell_theta = nnx.data(head() if likelihood != "poisson" and dispersion == "gene-cell" else None)
        shape = (n_genes,) if dispersion == "gene" else (n_groups, n_genes)
        has_theta = likelihood != "poisson" and dispersion != "gene-cell"
        self.log_theta = nnx.data(nnx.Param(jnp.zeros(shape)) if has_theta else None)

    def __call__(
        self,
        z: Float[Array, "cells latent"],
        log_library: Float[Array, "cells"],
        covariates: Float[Array, "cells covariates"] | None = None,
        groups: Float[Array, "cells groups"] | None = None,
    ) -> CountDistribution:
        """Decodes. groups: one row of weights (one-hot) for the dispersion 'gene-group'."""
        return self.heads(self.network(z, covariates), log_library, groups)

    def heads(
        self,
        h: Float[Array, "cells hidden"],
        log_library: Float[Array, "cells"],
        groups: Float[Array, "cells groups"] | None = None,
    ) -> CountDistribution:
        """From the last hidden layer to the distribution, of every cell by itself."""
        # the barrier keeps XLA from fusing the matrix product with the softmax's maximum, which runs it twice
        scores = jax.lax.optimization_barrier(self.fraction(h))
        log_fraction = jax.nn.log_softmax(scores, axis=-1) if self.scale == "softmax" else _log_softplus(scores)
        none = jnp.asarray(NO_EXTRA_ZEROS, h.dtype)
        pi_logit = none if self.extra_zeros is None else self.extra_zeros(h)
        return CountDistribution(log_fraction + log_library[:, None], self._log_theta(h, groups), pi_logit)

    def start_at(self, fraction: np.ndarray, theta: np.ndarray) -> None:
        """Makes `fraction` and `theta`, (genes,) on the host, what an average cell is decoded to."""
        starts = [(self.fraction.bias, fraction), (self.log_theta, theta)]
        if self.cell_theta is not None:
            starts.append((self.cell_theta.bias, theta))
        for param, start in starts:
            if param is not None:
                value = jnp.asarray(np.log(start), param[...].dtype)
                param.set_value(jnp.broadcast_to(value, param[...].shape))

    def _log_theta(self, h: jax.Array, groups: jax.Array | None) -> jax.Array:
        if self.cell_theta is not None:
            return self.cell_theta(h)
        if self.log_theta is None:
            return jnp.full((self.fraction.out_features,), POISSON_LOG_THETA, h.dtype)
        log_theta = jnp.asarray(self.log_theta[...], h.dtype)
        if self.dispersion == "gene":
            return log_theta
        # cells of an unknown group take the groups' mean
        known = jnp.zeros((h.shape[0], log_theta.shape[0]), h.dtype) if groups is None else groups
        return known @ log_theta + (1.0 - known.sum(-1, keepdims=True)) * log_theta.mean(0)


class CountVAE(nnx.Module):
    """A variational autoencoder of counts. Born in eval mode.

    n_genes: width of the counts.
    latent_dim: width of z.
    hidden_dims: of the encoder; the decoder has them in reverse.
    likelihood: 'zinb' | 'nb' | 'poisson'.
    n_injected: width of what every decoder layer is told beside z: batch and other categories, one-hot.
    n_continuous: width of what the decoder is told beside z in its first layer: continuous covariates.
    encode_covariates: tell the encoder, too.
    dispersion: 'gene', 'gene-group' (a row for each of n_groups) or 'gene-cell'.
    observed_library: the library size is data; otherwise it is a second latent variable with its own encoder.
    log_counts: the encoders read log(1 + counts), not the counts.
    scale: 'softmax', or 'softplus' where the library is a size factor.
    dropout_rate: in the encoders.
    deep: every layer is told the injected covariates, not the first alone.
    batch_norm, layer_norm: where the hidden layers have such a norm: 'encoder' | 'decoder' | 'both' | 'none'.
    """

    def __init__(
        self,
        n_genes: int,
        latent_dim: int,
        *,
        hidden_dims: tuple[int, ...],
        likelihood: str = "zinb",
        n_injected: int = 0,
        n_continuous: int = 0,
        encode_covariates: bool = False,
        dispersion: str = "gene",
        n_groups: int = 1,
        observed_library: bool = True,
        log_counts: bool = True,
        scale: str = "softmax",
        dropout_rate: float = 0.1,
        deep: bool = True,
        batch_norm: str = "both",
        layer_norm: str = "none",
        rngs: nnx.Rngs,
    ) -> None:
        self.encode_covariates = encode_covariates
        self.log_counts = log_counts
        n_read = n_genes + (n_continuous if encode_covariates else 0)

        def encoder(width: int, hidden_dims: tuple[int, ...]) -> Encoder:
            n_covariates = n_injected if encode_covariates else 0
            return Encoder(
                n_read, width, hidden_dims=hidden_dims, n_covariates=n_covariates, deep=deep,
                dropout_rate=dropout_rate, batch_norm=batch_norm in {"encoder", "both"},
                layer_norm=layer_norm in {"encoder", "both"}, rngs=rngs,
            )

        self.encoder = encoder(latent_dim, hidden_dims)
        self.library_encoder = nnx.data(None if observed_library else encoder(1, hidden_dims[:1]))
        self.sample = GaussianSample(rngs=rngs)
        self.decoder = Decoder(
            latent_dim + n_continuous,
            n_genes,
            hidden_dims=hidden_dims[::-1],
            n_covariates=n_injected,
            likelihood=likelihood,
            dispersion=dispersion,
            n_groups=n_groups,
            scale=scale,
            deep=deep,
            batch_norm=batch_norm in {"decoder", "both"},
            layer_norm=layer_norm in {"decoder", "both"},
            rngs=rngs,
        )

    def encode(
        self,
        counts: Float[Array, "cells genes"] | SparseRows,
        injected: Float[Array, "cells injected"] | None = None,
        continuous: Float[Array, "cells continuous"] | None = None,
    ) -> Gaussian:
        """q(z | counts, covariates)."""
        return self.encoder(*self._read(counts, injected, continuous))

    def encode_library(
        self,
        counts: Float[Array, "cells genes"] | SparseRows,
        injected: Float[Array, "cells injected"] | None = None,
        continuous: Float[Array, "cells continuous"] | None = None,
    ) -> Gaussian:
        """q(log library | counts, covariates), (cells, 1); only without an observed library."""
        assert self.library_encoder is not None
        return self.library_encoder(*self._read(counts, injected, continuous))

    def decode(
        self,
        z: Float[Array, "cells latent"],
        log_library: Float[Array, "cells"],
        injected: Float[Array, "cells injected"] | None = None,
        continuous: Float[Array, "cells continuous"] | None = None,
        groups: Float[Array, "cells groups"] | None = None,
    ) -> CountDistribution:
        """p(counts | z, library, covariates); without `injected`, as if no category had an effect.

        groups: rows of weights (one-hot) over the groups of the dispersion.
        """
        return self.decoder(_beside(z, continuous), log_library, injected, groups)

    def mean_log_prob(
        self,
        counts: Float[Array, "cells genes"] | SparseRows,
        z: Float[Array, "cells latent"],
        log_library: Float[Array, "cells"],
        injected: Float[Array, "cells injected"] | None = None,
        continuous: Float[Array, "cells continuous"] | None = None,
        groups: Float[Array, "cells groups"] | None = None,
    ) -> Float[Array, ""]:
        """Log p(counts | z, library, covariates), mean over cells; the arguments are those of `decode`.

        Of counts in blocks that come in turn, arrays of (cells, genes) exist for one block at a time.
        """
        decoder = self.decoder
        if not (isinstance(counts, SparseRows) and counts.in_turn):
            p = self.decode(z, log_library, injected, continuous, groups)
            return count_log_prob(decoder.likelihood, counts, p).mean()
        h = decoder.network(_beside(z, continuous), injected)  # batch norm is over all cells
        parts: tuple[Any, ...] = nnx.split(decoder, nnx.Param, ...)
        graph, params, rest = parts

        def log_prob(params: Any, block: Any) -> Float[Array, ""]:
            counts, h, log_library, groups = block
            p = nnx.merge(graph, params, rest).heads(h, log_library, groups)
            return count_log_prob(decoder.likelihood, counts, p).sum()

        blocks = counts.blocks()
        cut = (None if x is None else x.reshape(-1, blocks.shape[0], *x.shape[1:]) for x in (h, log_library, groups))
        return sum_in_blocks(log_prob, params, (blocks, *cut)) / h.shape[0]

    def loss(
        self,
        counts: Float[Array, "cells genes"] | SparseRows,
        library: Float[Array, "cells"],
        injected: Float[Array, "cells injected"] | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """-log p(counts | z) and KL(q(z | counts) || N(0, I)), means over cells, in nats; their sum: -ELBO.

        The library is observed. Sparse counts cost less, and have no gradient by the counts where these are 0.
        """
        q = self.encode(counts, injected)
        log_prob = self.mean_log_prob(counts, self.sample(q), log_positive(library), injected, groups=injected)
        return -log_prob, gaussian_kl(q.mean, q.logvar).mean()

    def start_from(self, counts: np.ndarray, library: np.ndarray) -> None:
        """Starts the output at the mean gene fractions and, by moments, theta: saves the first epochs.

        counts: (cells, genes) on the host. library: (cells,).
        """
        self.decoder.start_at(*moments(counts, library))

    def _read(
        self, counts: jax.Array | SparseRows, injected: jax.Array | None, continuous: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """What an encoder reads: (log) counts beside continuous covariates, and what is injected."""
        if isinstance(counts, SparseRows):
            x = (counts.map(jnp.log1p) if self.log_counts else counts).dense()
        else:
            x = jnp.log1p(counts) if self.log_counts else counts
        if not self.encode_covariates:
            return x, None
        return _beside(x, continuous), injected


def _beside(x: jax.Array, continuous: jax.Array | None) -> jax.Array:
    return x if continuous is None else jnp.concatenate([x, continuous.astype(x.dtype)], axis=-1)


def _log_softplus(x: jax.Array) -> jax.Array:
    # log softplus(x) is x for very negative x, where softplus underflows
    low = x < -15.0
    return jnp.where(low, x, jnp.log(jax.nn.softplus(jnp.where(low, 0.0, x))))


def count_log_prob(
    likelihood: str, counts: Float[Array, "cells genes"] | SparseRows, p: CountDistribution
) -> Float[Array, "cells"]:
    """Log p(counts) of every cell, summed over genes. likelihood: 'zinb' | 'nb' | 'poisson'.

    Of sparse counts, all genes are taken as 0 in one cheap pass, and the difference is added where they are not.
    """
    parameters = {"poisson": p[:1], "nb": p[:2], "zinb": p}[likelihood]
    log_prob, of_zero = LOG_PROBS[likelihood]
    if not isinstance(counts, SparseRows):
        return log_prob(counts, *parameters).sum(-1)
    zeros = of_zero(*parameters)
    there = [counts.at_entries(x) for x in parameters]
    return zeros.sum(-1) + counts.row_sums(log_prob(counts.values, *there) - of_zero(*there))


LOG_PROBS: dict[str, tuple[Callable[..., jax.Array], Callable[..., jax.Array]]] = {
    "zinb": (zinb_log_prob, zinb_log_prob_of_zero),
    "nb": (nb_log_prob, nb_log_prob_of_zero),
    "poisson": (poisson_log_prob, lambda log_rate: -jnp.exp(log_rate)),
}


def log_positive(library: Float[Array, "cells"]) -> Float[Array, "cells"]:
    """Log of the library size; an empty cell counts as a library of 1, so that its rates stay finite."""
    return jnp.log(jnp.where(library > 0, library, 1.0))


def one_hot_batch(
    batch_labels: Int[Array, "cells"] | None, n_batches: int, *, who: str
) -> Float[Array, "cells batches"] | None:
    """One row per cell, all zeros for a batch that is not known; None without labels.

    Raises:
        DataError: a label is not in 0..n_batches-1 (under jit, where it cannot raise, that row is zeros).
    """
    if batch_labels is None:
        return None
    if not isinstance(batch_labels, jax.core.Tracer):
        labels = np.asarray(batch_labels)
        odd = labels[(labels < 0) | (labels >= n_batches)]
        if odd.size:
            label = int(odd.max() if odd.max() >= n_batches else odd.min())
            fix = f"pass n_batches={label + 1}" if label >= n_batches else "labels start at 0"
            msg = f"{who}: batch_labels holds label {label}, but n_batches is {n_batches}; {fix}."
            raise DataError(msg)
    return jax.nn.one_hot(batch_labels, n_batches)


def moments(counts: np.ndarray, library: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean gene fractions and inverse dispersion by moments, over cells that differ in library size alone.

    theta = sum mu² / sum((x - mu)² - mu), kept in 0.1 to 100: cell types make the variance too large, few
    cells make it noisy. Genes without counts get half a count.
    """
    total = max(float(library.sum()), 1.0)
    fraction = (counts.sum(0, dtype=np.float64) + 0.5) / total
    fraction /= fraction.sum()
    mu = np.outer(library, fraction)
    excess = ((counts - mu) ** 2 - mu).sum(0)
    theta = np.where(excess > 0, (mu**2).sum(0) / np.maximum(excess, 1e-12), 100.0)
    return fraction, np.clip(theta, 0.1, 100.0)
