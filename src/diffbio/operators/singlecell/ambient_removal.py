"""Removal of ambient RNA by a model of the two sources of a droplet's counts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ...errors import DataError
from ...math.contamination import (
    contaminated_log_prob,
    contamination_posterior,
    native_share,
    soft_round,
)
from ...math.distributions import gaussian_kl
from ...math.droplets import LOWER, soup_profile
from ...nn.count_vae import Decoder, Encoder, Gaussian, GaussianSample, log_positive, moments
from ..base import Config, Data, Operator, checked_counts, fraction, positive, setting

SUM_TOLERANCE = 1e-3  # of the ambient profile: float32 sums of thousands of genes
# start of theta: what cell types explain must not look like noise, in which the soup could hide
FIRST_THETA = 10.0
LEAST_PROFILE = 1e-12  # a gene that the soup lacks; its log must be finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class AmbientRemovalConfig(Config):
    """Settings of `DifferentiableAmbientRemoval`.

    n_genes: width of the counts.
    latent_dim: width of the cells' latent space.
    hidden_dims: widths of the encoder's layers; the decoder has them in reverse.
    ambient_prior: the fraction of a cell's counts that is expected to be ambient (median of its prior).
    ambient_spread: standard deviation of that prior on the logit scale; 0.6 at a median of 0.1 puts 95 % of
        the cells between 0.03 and 0.26.
    temperature: how sharply ambient counts are rounded, in counts: 0+ removes whole molecules (the nearest
        whole number to the expected ambient count), large removes the expectation itself.
    dropout_rate: in the encoder, in training.
    """

    n_genes: int = positive(2000)
    latent_dim: int = positive(10)
    hidden_dims: tuple[int, ...] = positive((128,))
    ambient_prior: float = setting(0.1, "in (0, 1)", lambda v: 0 < v < 1)
    ambient_spread: float = positive(0.6)
    temperature: float = positive(0.1)
    dropout_rate: float = fraction(0.1)


class Decontaminated(TypedDict):
    """What `DifferentiableAmbientRemoval` adds."""

    decontaminated_counts: Float[Array, "cells genes"]  # between 0 and the counts
    contamination_fraction: Float[Array, " cells"]  # ambient share of the cell's counts, in (0, 1)
    latent: Float[Array, "cells latent"]
    reconstructed: Float[Array, "cells genes"]  # expected native counts: denoised, without the soup


class DifferentiableAmbientRemoval(Operator):
    """Splits counts into native molecules and ambient ones of a known profile (as CellBender, Fleming 2022).

    A cell with library size N and latent position z has

        x_g = native_g + ambient_g
        native_g ~ NB(N (1 - rho) fraction_g(z), theta_g),  ambient_g ~ Poisson(N rho a_g)

    with z ~ N(0, I) and logit rho ~ N(logit ambient_prior, ambient_spread²). `ambient_profile` a: expected
    share of each gene among ambient molecules (from empty droplets), non-negative, sum 1. Of each entry the
    expected ambient molecules given x are removed, rounded by `temperature`; rho -> 0 returns the counts. A
    common level of rho that the decoder could mimic is held by the prior.

    Differences from CellBender: empty droplets enter through their profile alone; the posterior of rho is
    solved for each cell, given z, and not read off by a second encoder; the likelihood of the sum is that of
    its first two moments.
    """

    config: AmbientRemovalConfig
    init_cells: ClassVar[int | None] = 4096
    fit_defaults: ClassVar[Mapping[str, Any]] = {"max_epochs": 400, "batch_size": 128, "learning_rate": 2e-3}
    schedules: ClassVar[Mapping[str, Any]] = {"kl_weight": lambda epoch: jnp.minimum(1.0, (epoch + 1) / 20)}

    def __init__(self, config: AmbientRemovalConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.fitted = False
        self.encoder = Encoder(
            config.n_genes,
            config.latent_dim,
            hidden_dims=config.hidden_dims,
            dropout_rate=config.dropout_rate,
            rngs=rngs,
        )
        self.decoder = Decoder(
            config.latent_dim,
            config.n_genes,
            hidden_dims=config.hidden_dims[::-1],
            likelihood="nb",
            rngs=rngs,
        )
        self.sample = GaussianSample(rngs=rngs)
        self.sample_logit = GaussianSample(rngs=rngs)

    def __call__(
        self, counts: Float[Array, "cells genes"], ambient_profile: Float[Array, " genes"]
    ) -> Decontaminated:
        """Splits every cell."""
        counts = checked_counts("DifferentiableAmbientRemoval", counts)
        z = self.sample(self._encode(counts))
        sources = self._sources(z, counts, ambient_profile)
        native, log_theta, ambient = sources.rates
        removed = counts * (1.0 - native_share(counts, native, log_theta, ambient))
        removed = soft_round(removed, temperature=self.config.temperature)
        return {
            # of a count that is not whole, rounding up could remove more than there is
            "decontaminated_counts": counts - jnp.minimum(removed, counts),
            "contamination_fraction": jax.nn.sigmoid(sources.logit),
            "latent": z,
            "reconstructed": jnp.exp(native),
        }

    def objective(
        self, data: Data, *, kl_weight: jax.Array | float = 1.0
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """-log p(counts | z, rho) + kl_weight * (KL of z + KL of rho), mean over cells; at 1 the -ELBO."""
        inputs = self._inputs(data)
        counts = inputs["counts"]
        q = self._encode(counts)
        sources = self._sources(self.sample(q), counts, inputs["ambient_profile"])
        reconstruction = -contaminated_log_prob(counts, *sources.rates).sum(-1).mean()
        kl = (gaussian_kl(q.mean, q.logvar) + sources.kl).mean()
        return reconstruction + kl_weight * kl, {"reconstruction": reconstruction, "kl": kl}

    def init_from(self, data: Data) -> None:
        """Starts the native profile at the mean counts less the ambient ones that the prior expects."""
        counts = checked_counts("DifferentiableAmbientRemoval", np.asarray(data["counts"]))
        check_profile(np.asarray(data["ambient_profile"]))
        observed, _ = moments(counts, counts.sum(-1))
        native = observed - self.config.ambient_prior * np.asarray(data["ambient_profile"])
        native = np.maximum(native, 0.05 * observed)  # no gene starts switched off
        self.decoder.start_at(native / native.sum(), np.full(len(native), FIRST_THETA))

    @staticmethod
    def profile_from(droplets: Any, *, lower: float | int = LOWER) -> np.ndarray:
        """The `ambient_profile` of an experiment: gene fractions of its droplets of 1 to `lower` counts, float32.

        droplets: (droplets, genes) unfiltered counts, dense or scipy sparse. `math.droplets.call_cells` finds those
        that hold a cell; `diffbio.pp.call_cells` does both for an AnnData.

        Raises:
            DataError: there are no droplets of so few counts, or entries that are no counts of molecules.
        """
        entries = droplets.data if hasattr(droplets, "tocsr") else np.asarray(droplets)
        wrong = ~(np.isfinite(entries) & (entries >= 0) & (np.floor(entries) == entries))
        if wrong.any():
            msg = (
                f"DifferentiableAmbientRemoval.profile_from: droplets must hold whole numbers >= 0, but {wrong.sum()} "
                f"entries do not, such as {float(entries[wrong][0]):g}; pass the raw counts of all droplets."
            )
            raise DataError(msg)
        counts, _ = soup_profile(droplets, np.asarray(droplets.sum(axis=1)).ravel(), lower=lower)
        return (counts / counts.sum()).astype(np.float32)

    def _encode(self, counts: jax.Array) -> Gaussian:
        return self.encoder(jnp.log1p(counts))

    def _sources(self, z: jax.Array, counts: jax.Array, profile: jax.Array) -> "Sources":
        check_profile(profile)
        p = self.decoder(z, jnp.zeros(counts.shape[:1], counts.dtype))
        prior_mean = math.log(self.config.ambient_prior) - math.log1p(-self.config.ambient_prior)
        spread = self.config.ambient_spread
        mean, variance = contamination_posterior(
            counts, jnp.exp(p.log_rate), jnp.exp(p.log_theta), profile, prior_mean=prior_mean, prior_sd=spread
        )
        logit = self.sample_logit(Gaussian(mean[:, None], jnp.log(variance)[:, None]))[:, 0]
        kl = gaussian_kl((mean - prior_mean)[:, None] / spread, jnp.log(variance / spread**2)[:, None])
        log_library = log_positive(counts.sum(-1))
        log_native = p.log_rate + (log_library - jax.nn.softplus(logit))[:, None]
        log_profile = jnp.log(jnp.maximum(profile, LEAST_PROFILE))
        log_ambient = log_profile + (log_library - jax.nn.softplus(-logit))[:, None]
        return Sources((log_native, p.log_theta, log_ambient), logit, kl)

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableAmbientRemoval", Data]]:
        """Whole molecules, and expected ones under a stronger prior."""
        keys = jax.random.split(jax.random.key(0), 2)
        profile = jax.random.dirichlet(keys[0], jnp.full(8, 5.0))
        counts = jax.random.poisson(keys[1], 4.0, (12, 8)).astype(jnp.float32)
        data = {"counts": counts, "ambient_profile": profile}

        def op(**settings: Any) -> DifferentiableAmbientRemoval:
            config = AmbientRemovalConfig(n_genes=8, latent_dim=3, hidden_dims=(16,), **settings)
            return cls(config, rngs=nnx.Rngs(0))

        return {"whole": (op(), data), "expected": (op(temperature=5.0, ambient_prior=0.3), data)}


class Sources(NamedTuple):
    """The two sources of every cell's counts."""

    rates: tuple[jax.Array, jax.Array, jax.Array]  # log native rate, log theta, log ambient rate
    logit: jax.Array  # of rho, (cells,)
    kl: jax.Array  # of rho's posterior from its prior, (cells,)


def check_profile(profile: jax.Array | np.ndarray) -> None:
    """Whether an ambient profile is one; under jit, where values are not known, it passes.

    Raises:
        DataError: an entry is negative or not finite, or the sum is not 1.
    """
    if isinstance(profile, jax.core.Tracer):
        return
    values = np.asarray(profile, np.float64)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        gene = int(np.flatnonzero(~(values >= 0) | ~np.isfinite(values))[0])
        msg = (
            "DifferentiableAmbientRemoval: ambient_profile must be >= 0, "
            f"but entry {gene} is {values[gene]:g}."
        )
        raise DataError(msg)
    if abs(values.sum() - 1.0) > SUM_TOLERANCE:
        msg = (
            f"DifferentiableAmbientRemoval: ambient_profile must sum to 1, but sums to {values.sum():.6g}; "
            "divide it by its sum."
        )
        raise DataError(msg)
