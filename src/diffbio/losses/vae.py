"""Reconstruction and KL divergence of a count VAE, from the outputs of a pipeline."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..errors import ConfigError, DataError
from ..math.distributions import gaussian_kl
from ..nn.count_vae import CountDistribution, count_log_prob, log_positive

NEEDS: dict[str, tuple[str, ...]] = {
    "poisson": (),
    "nb": ("log_theta",),
    "zinb": ("log_theta", "pi_logit"),
    "mse": (),
}


@dataclasses.dataclass(frozen=True)
class VAELoss:
    """-log p(counts | library * normalized) + kl_weight * KL(q(z) || N(0, I)), mean over cells, in nats.

    kl_weight: >= 0; at 1, with the likelihood that the VAE was built with, it is the negative ELBO.
    reconstruction_type: 'poisson', 'nb', 'zinb', or 'mse' (squared error of the expected counts, summed over
        genes).

    Raises:
        ConfigError: kl_weight is negative, or reconstruction_type is another word.
    """

    kl_weight: float = 1.0
    reconstruction_type: str = "poisson"

    def __post_init__(self) -> None:
        if self.reconstruction_type not in NEEDS:
            words = ", ".join(map(repr, NEEDS))
            msg = f"VAELoss: reconstruction_type must be one of {words}, got {self.reconstruction_type!r}."
            raise ConfigError(msg)
        if not self.kl_weight >= 0:
            msg = f"VAELoss: kl_weight must be >= 0, got {self.kl_weight!r}."
            raise ConfigError(msg)

    def __call__(
        self,
        normalized: Float[Array, "cells genes"],
        counts: Float[Array, "cells genes"],
        latent_mean: Float[Array, "cells latent"],
        latent_logvar: Float[Array, "cells latent"],
        log_theta: Float[Array, "*#theta"] | None = None,
        pi_logit: Float[Array, "*#pi"] | None = None,
    ) -> Float[Array, ""]:
        """The loss of `normalized` gene fractions (rows sum to 1) for `counts`.

        log_theta: log inverse dispersion, (genes,) or (cells, genes); 'nb' and 'zinb' need it.
        pi_logit: logit of the extra zeros, (cells, genes); 'zinb' needs it.

        Raises:
            DataError: an argument that the reconstruction type needs is missing.
        """
        given = {"log_theta": log_theta, "pi_logit": pi_logit}
        for name in NEEDS[self.reconstruction_type]:
            if given[name] is None:
                msg = f"VAELoss: reconstruction_type {self.reconstruction_type!r} needs {name}, got None."
                raise DataError(msg)
        reconstruction = self._reconstruction(normalized, counts, log_theta, pi_logit)
        return (reconstruction + self.kl_weight * gaussian_kl(latent_mean, latent_logvar)).mean()

    def _reconstruction(
        self,
        normalized: jax.Array,
        counts: jax.Array,
        log_theta: jax.Array | None,
        pi_logit: jax.Array | None,
    ) -> jax.Array:
        log_library = log_positive(counts.sum(-1))
        if self.reconstruction_type == "mse":
            return ((jnp.exp(log_library)[:, None] * normalized - counts) ** 2).sum(-1)
        # a softmax may round to 0, where the log has no gradient
        tiny = jnp.finfo(normalized.dtype).tiny
        log_rate = jnp.log(jnp.maximum(normalized, tiny)) + log_library[:, None]
        unused = jnp.zeros((), log_rate.dtype)
        p = CountDistribution(
            log_rate, unused if log_theta is None else log_theta, unused if pi_logit is None else pi_logit
        )
        return -count_log_prob(self.reconstruction_type, counts, p)
