"""SCVI (Lopez et al. 2018) as a module: arrays in, arrays out.

z ~ N(0, I), log l ~ N(l_mean[batch], l_var[batch]), or l is observed, and
x_g ~ ZINB(l * softmax(f(z, batch, covariates))_g, theta_g, pi_g(z, batch, covariates)).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ..errors import ConfigError, DataError
from ..math.distributions import gaussian_kl
from ..math.sparse import SparseRows
from .count_vae import (
    LIKELIHOODS,
    WHERE_NORMS,
    CountDistribution,
    CountVAE,
    Gaussian,
    count_log_prob,
    log_positive,
)

SCVI_DISPERSIONS = ("gene", "gene-batch", "gene-label", "gene-cell")

Counts = Float[Array, "cells genes"] | SparseRows


class Covariates(NamedTuple):
    """What is known of cells beside their counts, as the networks read it."""

    injected: jax.Array | None  # (cells, categories): batch and other categories, one-hot
    continuous: jax.Array | None  # (cells, covariates)
    groups: jax.Array | None  # (cells, groups): weights over the rows of the dispersion
    log_size: jax.Array | None  # (cells,): log of a given size factor, in place of the library


class Drawn(NamedTuple):
    """One draw of the latent variables of every cell, and what they were drawn from."""

    q: Gaussian
    z: jax.Array  # (cells, latent)
    q_library: Gaussian | None
    log_library: jax.Array  # (cells,)


class SCVI(nnx.Module):
    """A variational autoencoder of single-cell counts, with batches and covariates. Born in eval mode.

    In train mode the latent variables are samples from the module's own random stream; in eval mode they are
    the posterior means, unless a `key` is passed.

    n_input: number of genes.
    n_batch: number of batches; 0 and 1 mean one.
    n_labels: number of cell types, for dispersion 'gene-label'.
    n_hidden: width of the hidden layers of encoder and decoder; or of each, from the counts to z (n_layers is then not
        read), which the decoder has in reverse.
    n_latent: dimension of z.
    n_layers: number of hidden layers of encoder and decoder.
    dropout_rate: in the encoders.
    dispersion: 'gene' | 'gene-batch' | 'gene-label' | 'gene-cell': what the inverse dispersion depends on.
    log_variational: the encoders read log(1 + x).
    reconstruction_loss: 'zinb' | 'nb' | 'poisson'.
    use_observed_lib_size: the library size is the sum of the counts, not a latent variable with the prior that
        `forward` is given (the published model; the default of `diffbio.models` is the other).
    use_size_factor: cells come with a size factor; the decoder's softmax becomes a softplus.
    n_cats_per_cov: categories of every further categorical covariate.
    n_continuous_cov: number of continuous covariates.
    encode_covariates: the encoders read batch and covariates, too.
    deeply_inject_covariates: every layer is told batch and other categories, not the first alone.
    use_batch_norm, use_layer_norm: where the hidden layers have such a norm: 'encoder' | 'decoder' | 'both' | 'none'.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        n_input: int,
        n_batch: int = 0,
        n_labels: int = 0,
        n_hidden: int | Sequence[int] = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: str = "gene",
        log_variational: bool = True,  # noqa: FBT001, FBT002 - the published signature
        reconstruction_loss: str = "zinb",
        *,
        use_observed_lib_size: bool = False,
        use_size_factor: bool = False,
        n_cats_per_cov: Sequence[int] = (),
        n_continuous_cov: int = 0,
        encode_covariates: bool = False,
        deeply_inject_covariates: bool = True,
        use_batch_norm: str = "both",
        use_layer_norm: str = "none",
        rngs: nnx.Rngs,
    ) -> None:
        who = type(self).__name__
        for name, value, choices in (
            ("dispersion", dispersion, SCVI_DISPERSIONS),
            ("reconstruction_loss", reconstruction_loss, LIKELIHOODS),
            ("use_batch_norm", use_batch_norm, WHERE_NORMS),
            ("use_layer_norm", use_layer_norm, WHERE_NORMS),
        ):
            if value not in choices:
                msg = f"{who}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}."
                raise ConfigError(msg)
        for name, size, least in (
            ("n_input", n_input, 1), ("n_batch", n_batch, 0), ("n_labels", n_labels, 0),
            ("n_latent", n_latent, 1), ("n_layers", n_layers, 1), ("n_continuous_cov", n_continuous_cov, 0),
            *(("n_hidden", n, 1) for n in ([n_hidden] if not isinstance(n_hidden, Sequence) else n_hidden)),
            *(("n_cats_per_cov", n, 1) for n in n_cats_per_cov),
        ):
            if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < least:
                msg = f"{who}: {name} must be a whole number, at least {least}, got {size!r}."
                raise ConfigError(msg)
        if not isinstance(dropout_rate, int | float | np.floating) or not 0 <= dropout_rate < 1:
            msg = f"{who}: dropout_rate must be in [0, 1), got {dropout_rate!r}."
            raise ConfigError(msg)
        if dispersion == "gene-label" and n_labels == 0:
            msg = f"{who}: dispersion 'gene-label' needs n_labels, the number of cell types, got 0."
            raise ConfigError(msg)
        self.n_input, self.n_labels, self.n_latent = n_input, n_labels, n_latent
        self.n_batch = max(n_batch, 1)
        self.dispersion = dispersion
        self.n_cats_per_cov = tuple(int(n) for n in n_cats_per_cov)
        self.n_continuous_cov = n_continuous_cov
        self.use_size_factor = use_size_factor
        self.use_observed_lib_size = use_observed_lib_size or use_size_factor
        # what has one category alone tells nothing
        n_injected = sum(n for n in (self.n_batch, *self.n_cats_per_cov) if n > 1)
        groups = {"gene-batch": self.n_batch, "gene-label": n_labels}
        self.vae = CountVAE(
            n_input,
            n_latent,
            hidden_dims=widths(n_hidden, n_layers),
            likelihood=reconstruction_loss,
            n_injected=n_injected,
            n_continuous=n_continuous_cov,
            encode_covariates=encode_covariates,
            dispersion="gene-group" if dispersion in groups else dispersion,
            n_groups=groups.get(dispersion, 1),
            observed_library=self.use_observed_lib_size,
            log_counts=log_variational,
            scale="softplus" if use_size_factor else "softmax",
            dropout_rate=dropout_rate,
            deep=deeply_inject_covariates,
            batch_norm=use_batch_norm,
            layer_norm=use_layer_norm,
            rngs=rngs,
        )

    # -- the published interface -------------------------------------------------------------------------------

    def forward(
        self,
        x: Counts,
        local_l_mean: Float[Array, "..."] | None = None,
        local_l_var: Float[Array, "..."] | None = None,
        batch_index: Array | None = None,
        y: Array | None = None,
        *,
        cat_covs: Int[Array, "cells categorical"] | None = None,
        cont_covs: Float[Array, "cells continuous"] | None = None,
        size_factor: Float[Array, "cells"] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Reconstruction loss (with the library's KL divergence), KL divergence of z, and 0: (cells,) each, in nats.

        Their sum is the negative evidence lower bound, by one draw of the latent variables.

        x: counts, (cells, genes).
        local_l_mean, local_l_var: of the prior of the log library in each cell's batch, (cells,) or (cells, 1);
            needed where the library is latent, not read where it is observed.
        batch_index: (cells,) or (cells, 1), whole numbers; or one row of weights per cell, (cells, n_batch).
        y: cell types, in the same forms.
        cat_covs: codes of the further categorical covariates.
        cont_covs: the continuous covariates.
        size_factor: with use_size_factor.
        key: draws the latent variables in eval mode, too.

        Raises:
            DataError: an argument that the model needs is missing, or of another width than it was built for.
        """
        keys = two_keys(key)
        known = self.covariates(batch_index, y, cat_covs, cont_covs, size_factor)
        drawn = self.draw(x, known, keys[0])
        reconstruction = -self.log_prob(x, self.decode(drawn, known))
        kl_library = self.kl_library(drawn, local_l_mean, local_l_var)
        return reconstruction + kl_library, gaussian_kl(*drawn.q), jnp.zeros_like(reconstruction)

    def inference(
        self,
        x: Counts,
        batch_index: Array | None = None,
        y: Array | None = None,
        n_samples: int = 1,
        transform_batch: int | None = None,
        *,
        cat_covs: Int[Array, "cells categorical"] | None = None,
        cont_covs: Float[Array, "cells continuous"] | None = None,
        size_factor: Float[Array, "cells"] | None = None,
        key: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Posterior and decoded distribution of every cell, under scVI's names.

        px_scale: gene fractions. px_rate: expected counts. px_r: inverse dispersion. px_dropout: logits of the
        extra zeros. qz_m, qz_v, z: mean, variance and draw of the latent position. ql_m, ql_v, library: of the
        log library. With n_samples > 1 the draws, and what is decoded from them, have that leading axis.
        transform_batch: decode every cell as if it were of this batch.

        Raises:
            DataError: as `forward`, and for a transform_batch that the model does not know.
        """
        if transform_batch is not None and not 0 <= transform_batch < self.n_batch:
            who = type(self).__name__
            msg = f"{who}: transform_batch must be in 0..{self.n_batch - 1}, got {transform_batch}."
            raise DataError(msg)
        known = self.covariates(batch_index, y, cat_covs, cont_covs, size_factor)
        decoded_as = known
        if transform_batch is not None:
            cells = known.injected.shape[0] if known.injected is not None else x.shape[0]
            there = jnp.full(cells, transform_batch)
            decoded_as = self.covariates(there, y, cat_covs, cont_covs, size_factor)

        def once(key: jax.Array | None) -> dict[str, jax.Array]:
            drawn = self.draw(x, known, key)
            p = self.decode(drawn, decoded_as)
            size = log_size(drawn, known)
            return {
                "z": drawn.z,
                "library": drawn.log_library[:, None],
                "px_scale": jnp.exp(p.log_rate - size[:, None]),
                "px_rate": jnp.exp(p.log_rate),
                "px_r": jnp.exp(p.log_theta),
                "px_dropout": jnp.broadcast_to(p.pi_logit, p.log_rate.shape),
            }

        drawn = self.draw(x, known, None)
        ql = drawn.q_library
        library = drawn.log_library[:, None]
        same = {
            "qz_m": drawn.q.mean,
            "qz_v": jnp.exp(drawn.q.logvar),
            "ql_m": library if ql is None else ql.mean,
            "ql_v": jnp.zeros_like(library) if ql is None else jnp.exp(ql.logvar),
        }
        if n_samples == 1:
            return {**same, **once(key)}
        draws = [once(k) for k in jax.random.split(key if key is not None else self.vae.sample.noise(), n_samples)]
        return {**same, **{name: jnp.stack([draw[name] for draw in draws]) for name in draws[0]}}

    def get_sample_from_posterior_z(
        self,
        x: Counts,
        y: Array | None = None,
        give_mean: bool = False,  # noqa: FBT001, FBT002 - the published signature
        n_samples: int = 1,
        *,
        batch_index: Array | None = None,
        cat_covs: Int[Array, "cells categorical"] | None = None,
        cont_covs: Float[Array, "cells continuous"] | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "cells latent"]:
        """A draw from q(z | x) of every cell, the mean of n_samples draws, or with give_mean its mean.

        Covariates are read by models with encode_covariates alone; y by none.
        """
        known = self.covariates(batch_index, y, cat_covs, cont_covs, None, needed=self.vae.encode_covariates)
        q = self.vae.encode(x, known.injected, known.continuous)
        if give_mean:
            return q.mean
        key = self.vae.sample.noise() if key is None else key
        noise = jax.random.normal(key, (n_samples, *q.mean.shape), q.mean.dtype).mean(0)
        return q.mean + jnp.exp(0.5 * q.logvar) * noise

    sample_from_posterior_z = get_sample_from_posterior_z

    def sample_from_posterior_l(
        self,
        x: Counts,
        give_mean: bool = True,  # noqa: FBT001, FBT002 - the published signature
        *,
        batch_index: Array | None = None,
        cat_covs: Int[Array, "cells categorical"] | None = None,
        cont_covs: Float[Array, "cells continuous"] | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "cells 1"]:
        """The log library: observed, or from q(l | x) its mean or a draw.

        Covariates are read by models with encode_covariates alone.
        """
        known = self.covariates(batch_index, None, cat_covs, cont_covs, None, needed=self.vae.encode_covariates)
        key = None if give_mean else (self.vae.sample.noise() if key is None else key)
        q, log_library = self._draw_library(x, known, key)
        return log_library[:, None] if q is None or not give_mean else q.mean

    def get_latents(
        self,
        x: Counts,
        y: Array | None = None,
        *,
        batch_index: Array | None = None,
        cat_covs: Int[Array, "cells categorical"] | None = None,
        cont_covs: Float[Array, "cells continuous"] | None = None,
    ) -> list[jax.Array]:
        """[z] of every cell, a list of one array: a draw in train mode, the mean in eval mode.

        Covariates are read by models with encode_covariates alone; y by none.
        """
        known = self.covariates(batch_index, y, cat_covs, cont_covs, None, needed=self.vae.encode_covariates)
        return [draw_from(self.vae, self.vae.encode(x, known.injected, known.continuous), None)]

    def get_sample_scale(
        self, x: Counts, batch_index: Array | None = None, y: Array | None = None, **how: Any
    ) -> Float[Array, "cells genes"]:
        """Gene fractions, (cells, genes); further arguments as for `inference`."""
        return self.inference(x, batch_index, y, **how)["px_scale"]

    def get_sample_rate(
        self, x: Counts, batch_index: Array | None = None, y: Array | None = None, **how: Any
    ) -> Float[Array, "cells genes"]:
        """Expected counts, (cells, genes); further arguments as for `inference`."""
        return self.inference(x, batch_index, y, **how)["px_rate"]

    def get_reconstruction_loss(
        self, x: Counts, px_rate: jax.Array, px_r: jax.Array, px_dropout: jax.Array
    ) -> Float[Array, "cells"]:
        """-log p(x) of every cell under a decoded distribution; the arguments are those of `inference`."""
        return -self.log_prob(x, CountDistribution(jnp.log(px_rate), jnp.log(px_r), px_dropout))

    # -- what training and the AnnData models call ---------------------------------------------------------------

    def objective(
        self, data: Mapping[str, Any], *, kl_weight: jax.Array | float = 1.0
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Reconstruction + KL of the library + kl_weight * KL of z, mean over cells; at 1 the negative ELBO.

        data: counts, and as the model needs them batch_labels, labels, cat_covs, cont_covs, size_factor,
        local_l_mean and local_l_var.
        """
        x, given = data["counts"], forward_arguments(data)
        prior = [given.pop(name, None) for name in ("local_l_mean", "local_l_var")]
        known = self.covariates(*(given.get(name) for name in COVARIATES))
        drawn = self.draw(x, known, None)
        kl_library = self.kl_library(drawn, *prior).mean()
        reconstruction = kl_library - self.mean_log_prob(x, drawn, known)
        metrics = {"reconstruction": reconstruction, "kl": gaussian_kl(*drawn.q).mean()}
        return metrics["reconstruction"] + kl_weight * metrics["kl"], metrics

    sparse_keys = frozenset({"counts"})

    def covariates(
        self,
        batch_index: Array | None,
        y: Array | None,
        cat_covs: Array | None,
        cont_covs: Array | None,
        size_factor: Array | None,
        *,
        needed: bool = True,
    ) -> Covariates:
        """The given covariates as the networks read them.

        Raises:
            DataError: with `needed`, one that the model was built for is missing or of another width.
        """
        who = type(self).__name__
        if needed:
            for name, value, wanted in (
                ("batch_index", batch_index, self.n_batch > 1),
                ("cat_covs", cat_covs, len(self.n_cats_per_cov) > 0),
                ("cont_covs", cont_covs, self.n_continuous_cov > 0),
                ("size_factor", size_factor, self.use_size_factor),
            ):
                if wanted and value is None:
                    msg = f"{who}: {name} is None, but the model was built for it; pass it."
                    raise DataError(msg)
        for name, value, width in (
            ("cat_covs", cat_covs, len(self.n_cats_per_cov)), ("cont_covs", cont_covs, self.n_continuous_cov),
        ):
            if value is not None and value.shape[-1] != width:
                msg = f"{who}: {name} has {value.shape[-1]} columns, but the model was built for {width}."
                raise DataError(msg)
        batch = None if batch_index is None else one_hot(batch_index, self.n_batch, who=who, name="batch_index")
        parts = [] if batch is None or self.n_batch < 2 else [batch]
        if cat_covs is not None:
            parts += [
                one_hot(cat_covs[:, i], n, who=who, name=f"cat_covs[:, {i}]")
                for i, n in enumerate(self.n_cats_per_cov)
                if n > 1
            ]
        groups = {"gene-batch": batch, "gene-label": self._label_weights(y)}.get(self.dispersion)
        log_size = None if size_factor is None else jnp.log(size_factor.reshape(-1))
        complete = parts and sum(p.shape[-1] for p in parts) == self.vae.decoder.network.n_covariates
        return Covariates(jnp.concatenate(parts, -1) if complete else None, cont_covs, groups, log_size)

    def draw(self, x: Counts, known: Covariates, key: jax.Array | None) -> Drawn:
        """Latent position and log library of every cell: drawn with `key`, else as the module's mode says."""
        keys = two_keys(key)
        q = self.vae.encode(x, known.injected, known.continuous)
        q_library, log_library = self._draw_library(x, known, keys[1])
        return Drawn(q, draw_from(self.vae, q, keys[0]), q_library, log_library)

    def decode(self, drawn: Drawn, known: Covariates) -> CountDistribution:
        """p(x | z, library, covariates)."""
        size = log_size(drawn, known)
        return self.vae.decode(drawn.z, size, known.injected, known.continuous, known.groups)

    def log_prob(self, x: Counts, p: CountDistribution) -> Float[Array, "cells"]:
        """Log p(x) of every cell, summed over genes."""
        return count_log_prob(self.vae.decoder.likelihood, x, p)

    def mean_log_prob(self, x: Counts, drawn: Drawn, known: Covariates) -> Float[Array, ""]:
        """Log p(x) at a draw, mean over cells; for training on counts in blocks."""
        size = log_size(drawn, known)
        return self.vae.mean_log_prob(x, drawn.z, size, known.injected, known.continuous, known.groups)

    def log_prob_of_types(self, x: Counts, drawn: Drawn, known: Covariates) -> Float[Array, "cells labels"]:
        """Log p(x | z, c) of every cell under the dispersion of every cell type; only with 'gene-label'."""
        p = self.decode(drawn, known._replace(groups=None))
        log_theta = self.vae.decoder.log_theta
        if log_theta is None:  # a Poisson has none: all types are alike
            return jnp.repeat(self.log_prob(x, p)[:, None], self.n_labels, axis=1)
        rows = jnp.asarray(log_theta[...], p.log_rate.dtype)
        return jax.lax.map(lambda row: self.log_prob(x, p._replace(log_theta=row)), rows).T

    def kl_library(self, drawn: Drawn, mean: jax.Array | None, var: jax.Array | None) -> Float[Array, "cells"]:
        """KL(q(log l | x) || N(mean, var)) of every cell; 0 where the library is observed.

        Raises:
            DataError: the library is latent, and its prior is not given.
        """
        q = drawn.q_library
        if q is None:
            return jnp.zeros_like(drawn.log_library)
        if mean is None or var is None:
            msg = (
                f"{type(self).__name__}: the library size is latent; pass local_l_mean and local_l_var, "
                "or build the model with use_observed_lib_size=True."
            )
            raise DataError(msg)
        scale = jnp.sqrt(var.reshape(-1, 1))
        # the KL divergence does not change when both distributions are shifted and scaled
        return gaussian_kl((q.mean - mean.reshape(-1, 1)) / scale, q.logvar - 2.0 * jnp.log(scale))

    def start_from(self, counts: np.ndarray) -> None:
        """Starts the output at the mean gene fractions and their dispersion; counts: (cells, genes) on the host."""
        if not self.use_size_factor:
            self.vae.start_from(counts, counts.sum(-1))

    def _draw_library(
        self, x: Counts, known: Covariates, key: jax.Array | None
    ) -> tuple[Gaussian | None, Float[Array, "cells"]]:
        if self.use_observed_lib_size:
            return None, log_positive(row_sums(x))
        q = self.vae.encode_library(x, known.injected, known.continuous)
        return q, draw_from(self.vae, q, key)[:, 0]

    def _label_weights(self, y: Array | None) -> jax.Array | None:
        if y is None or self.n_labels == 0:
            return None
        return one_hot(y, self.n_labels, who=type(self).__name__, name="y")


def widths(n_hidden: int | Sequence[int], n_layers: int) -> tuple[int, ...]:
    """Of the hidden layers: n_layers alike, or as given."""
    return tuple(n_hidden) if isinstance(n_hidden, Sequence) else (n_hidden,) * n_layers


def row_sums(x: Counts) -> Float[Array, "cells"]:
    """Library sizes: sums over genes."""
    return x.row_sums(x.values) if isinstance(x, SparseRows) else x.sum(-1)


def one_hot(index: Array, n: int, *, who: str, name: str) -> Float[Array, "cells n"]:
    """One row of weights per cell: from codes (cells,) or (cells, 1), or rows of weights (cells, n) as they are.

    A code outside 0..n-1 gives a row of zeros: no category is known.

    Raises:
        DataError: `index` has another shape.
    """
    index = jnp.asarray(index)
    if index.ndim == 2 and index.shape[1] == n and (n > 1 or jnp.issubdtype(index.dtype, jnp.floating)):
        return index.astype(jnp.result_type(float))
    if index.ndim == 2 and index.shape[1] == 1:
        index = index[:, 0]
    if index.ndim != 1:
        msg = f"{who}: {name} must have shape (cells,), (cells, 1) or (cells, {n}), got {index.shape}."
        raise DataError(msg)
    return jax.nn.one_hot(index.astype(int), n)


def draw_from(vae: CountVAE, q: Gaussian, key: jax.Array | None) -> jax.Array:
    """A draw from q with `key`; without, a draw in train mode and the mean in eval mode."""
    if key is None:
        return vae.sample(q)
    return q.mean + jnp.exp(0.5 * q.logvar) * jax.random.normal(key, q.mean.shape, q.mean.dtype)


def log_size(drawn: Drawn, known: Covariates) -> Float[Array, "cells"]:
    """Log of what the gene fractions are multiplied by: the given size factor, else the library."""
    return drawn.log_library if known.log_size is None else known.log_size


def two_keys(key: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """Two independent keys out of one, or none out of none."""
    if key is None:
        return None, None
    first, second = jax.random.split(key)
    return first, second


COVARIATES = ("batch_index", "y", "cat_covs", "cont_covs", "size_factor")  # arguments of `covariates`


def forward_arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch under the names of `forward`."""
    names = {"batch_labels": "batch_index", "labels": "y"}
    kept = ("batch_labels", "labels", "cat_covs", "cont_covs", "size_factor", "local_l_mean", "local_l_var")
    return {names.get(key, key): data[key] for key in kept if data.get(key) is not None}
