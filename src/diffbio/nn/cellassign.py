"""CellAssign (Zhang et al. 2019, Nature Methods 16:1007): types of cells from their counts and a list of markers.

Given its type c, the count of gene g in a cell of size factor s and covariates x is negative binomial with

    log mean = log s + base_g + x · beta_g + rho_cg delta_cg + (1 - rho_cg) sd e_cg,

rho the marker matrix and delta > a least log fold change. The last term is not in the paper, which is the case
sd = 0: there all types that do not list a gene have the same mean of it, so that monocytes, which have more HLA-DR
than T cells have, are drawn to B cells, who list it. e_cg ~ N(0, 1) says how far a type may lie off the base.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from scipy.optimize import minimize

from ..errors import ConfigError
from ..math.distributions import nb_log_prob, poisson_log_prob, zinb_log_prob
from .count_vae import LIKELIHOODS, log_positive

N_BASES = 10
LOWEST_MEAN, HIGHEST_MEAN = 1e-3, 1e4  # counts of a cell of size factor 1, where the first and last basis lie
LOG_WIDTH = (np.log(HIGHEST_MEAN) - np.log(LOWEST_MEAN)) / (N_BASES - 1)

# Priors. The published ones of the markers' effects and of the types; the others are weak, and keep finite what no
# cell tells of: genes without counts, means that no gene has, the spread of a single marker.
CONCENTRATION = 0.01  # of the Dirichlet distribution of the types' proportions, as published
EFFECT_MEAN_SD = 2.0
EFFECT_LOG_SD, EFFECT_LOG_SD_SD = float(np.log(0.5)), 0.5
BASE_SD = 5.0
COVARIATE_SD = 1.0
DISPERSION_SD, DISPERSION_STEP_SD = 3.0, 1.0
DROPOUT_LOGIT, DROPOUT_LOGIT_SD = -3.0, 1.5

START_CELLS = 5_000  # that `start_from` fits at most
FIRST_DESCENT, DESCENT = 60, 30  # rounds of L-BFGS at most, to the types by the markers and in every later M step
# Later rounds raise the likelihood, and turn types that hardly differ into other parts of their neighbours, the model
# being too simple for cells: accuracy after 0, 2, 11 rounds on a half of pbmc3k 0.839, 0.838, 0.821, of pbmc4k_ambient
# 0.862, 0.836, 0.748, of kang_pbmc_ifnb 0.898, 0.906, 0.902, on pbmc3k with 14 markers 0.754, 0.796, 0.806.
EM_ROUNDS = 2
OF_GENES = ("base", "log_effect", "deviation", "covariate_weights", "dropout_logit")  # last axis


class CellAssign(nnx.Module):
    """A mixture of one count distribution per cell type, whose markers say which is which. Born in eval mode.

    What differs from the paper: the term of the module's docstring; a marker's least effect is 0.2 nats, not log 2,
    since lists made by rank tests hold genes that are raised by less than twofold; the dispersion is a function of
    the log mean at size factor 1, so that it does not change with depth, and its radial bases are normalised, so
    that it is flat beyond them; log(delta - least) is normal, not log(delta); the Dirichlet prior is taken in the
    basis of the logits.

    n_genes, n_types: of the marker matrix; a row of zeros is a type without markers, "other".
    n_covariates: width of the covariates.
    min_log_fold_change: the least effect of a marker, in nats.
    type_sd: how far off its base a gene may be in a type that does not list it, in nats; 0 is the published model.
    likelihood: 'nb' | 'poisson' | 'zinb'; the last adds zeros, with a probability for every gene.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        n_genes: int,
        n_types: int,
        *,
        n_covariates: int = 0,
        min_log_fold_change: float = 0.2,
        type_sd: float = 0.3,
        likelihood: str = "nb",
        rngs: nnx.Rngs,
    ) -> None:
        for name, size, least in (("n_genes", n_genes, 1), ("n_types", n_types, 1), ("n_covariates", n_covariates, 0)):
            if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < least:
                msg = f"CellAssign: {name} must be a whole number, at least {least}, got {size!r}."
                raise ConfigError(msg)
        for name, value in (("min_log_fold_change", min_log_fold_change), ("type_sd", type_sd)):
            if not isinstance(value, int | float | np.floating) or not 0 <= value < np.inf:
                msg = f"CellAssign: {name} must be a finite number, at least 0, got {value!r}."
                raise ConfigError(msg)
        if likelihood not in LIKELIHOODS:
            msg = f"CellAssign: likelihood must be one of {', '.join(map(repr, LIKELIHOODS))}, got {likelihood!r}."
            raise ConfigError(msg)
        self.n_genes, self.n_types, self.n_covariates = int(n_genes), int(n_types), int(n_covariates)
        self.min_log_fold_change, self.type_sd, self.likelihood = float(min_log_fold_change), float(type_sd), likelihood
        self.base = nnx.Param(jnp.zeros(n_genes))
        self.log_effect = nnx.Param(0.1 * jax.random.normal(rngs.params(), (n_types, n_genes)))
        self.effect_mean = nnx.Param(jnp.zeros(()))
        self.effect_log_sd = nnx.Param(jnp.full((), EFFECT_LOG_SD))
        self.type_logits = nnx.Param(jnp.zeros(n_types))
        if type_sd > 0:
            self.deviation = nnx.Param(0.1 * jax.random.normal(rngs.params(), (n_types, n_genes)))
        if n_covariates:
            self.covariate_weights = nnx.Param(0.1 * jax.random.normal(rngs.params(), (n_covariates, n_genes)))
        if likelihood != "poisson":
            self.dispersion_weights = nnx.Param(jnp.zeros(N_BASES))
        if likelihood == "zinb":
            self.dropout_logit = nnx.Param(jnp.full(n_genes, DROPOUT_LOGIT))

    @property
    def log_fold_change(self) -> Float[Array, "types genes"]:
        """Effect of a marker, delta; without meaning where a gene is none."""
        return self.min_log_fold_change + jnp.exp(self.log_effect[...])

    @property
    def log_proportions(self) -> Float[Array, "types"]:
        """Log prior probability of every type."""
        return jax.nn.log_softmax(self.type_logits[...])

    def log_mean(self, marker_matrix: Float[Array, "types genes"]) -> Float[Array, "types genes"]:
        """Log mean count of every type in a cell of size factor 1 and covariates 0."""
        log_mean = self.base[...] + marker_matrix * self.log_fold_change
        if self.type_sd > 0:
            # a gene that no type lists is to tell nothing of types
            listed = 1.0 - jnp.prod(1.0 - marker_matrix, axis=0)
            log_mean += self.type_sd * listed * (1.0 - marker_matrix) * self.deviation[...]
        return log_mean

    def log_dispersion(self, log_mean: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Log inverse dispersion at a mean: weights of normalised Gaussian bases that are evenly spaced in its log."""
        low, weights = float(np.log(LOWEST_MEAN)), self.dispersion_weights[...]
        # exp(-(x - k)² / 2) without exp(-x² / 2), which cancels; the largest exponent is taken out by softmax
        step = (log_mean - low) / LOG_WIDTH
        k = jnp.arange(N_BASES, dtype=log_mean.dtype)
        return jax.nn.softmax(step[..., None] * k - 0.5 * k**2, axis=-1) @ weights

    def log_joint(
        self,
        counts: Float[Array, "cells genes"],
        marker_matrix: Float[Array, "types genes"],
        size_factor: Float[Array, "cells"],
        covariates: Float[Array, "cells covariates"] | None = None,
    ) -> Float[Array, "cells types"]:
        """Log p(type) + log p(counts | type) of every cell and type.

        Types are taken one after the other, so that memory is of the order cells x genes.
        counts: whole numbers >= 0, or decontaminated ones.
        marker_matrix: 1 where a gene is a marker of a type, 0 elsewhere; what lies between is a part of the effect.
        size_factor: depth of a cell by all genes, in units of the average cell's; 0 counts as 1.
        covariates: needed with n_covariates.
        """
        offset = self._offset(size_factor, covariates)
        log_mean = self.log_mean(marker_matrix)
        of_type = (log_mean,) if self.likelihood == "poisson" else (log_mean, self.log_dispersion(log_mean))
        dropout = self.dropout_logit[...] if self.likelihood == "zinb" else jnp.zeros(())

        def log_prob(of_type: Any) -> jax.Array:
            rate = of_type[0] + offset
            if self.likelihood == "poisson":
                return poisson_log_prob(counts, rate).sum(-1)
            if self.likelihood == "nb":
                return nb_log_prob(counts, rate, of_type[1]).sum(-1)
            return zinb_log_prob(counts, rate, of_type[1], dropout).sum(-1)

        return self.log_proportions + jax.lax.map(jax.checkpoint(log_prob), of_type).T

    def log_probabilities(
        self,
        counts: Float[Array, "cells genes"],
        marker_matrix: Float[Array, "types genes"],
        size_factor: Float[Array, "cells"],
        covariates: Float[Array, "cells covariates"] | None = None,
    ) -> Float[Array, "cells types"]:
        """Log p(type | counts) of every cell; arguments as for `log_joint`."""
        return jax.nn.log_softmax(self.log_joint(counts, marker_matrix, size_factor, covariates), axis=1)

    def surprise(
        self,
        counts: Float[Array, "cells genes"],
        marker_matrix: Float[Array, "types genes"],
        size_factor: Float[Array, "cells"],
        covariates: Float[Array, "cells covariates"] | None = None,
    ) -> Float[Array, "cells types"]:
        """Mean over genes of (count - mean)² / variance under every type: about 1 for a cell that is of it.

        Extra zeros of 'zinb' are not in mean and variance. Arguments as for `log_joint`.
        """
        offset = self._offset(size_factor, covariates)
        log_mean = self.log_mean(marker_matrix)
        poisson = self.likelihood == "poisson"
        over = jnp.zeros_like(log_mean) if poisson else jnp.exp(-self.log_dispersion(log_mean))

        def of_type(of_type: Any) -> jax.Array:
            mean = jnp.exp(of_type[0] + offset)
            return ((counts - mean) ** 2 / (mean + mean**2 * of_type[1])).mean(-1)

        return jax.lax.map(of_type, (log_mean, over)).T

    def loss(
        self,
        counts: Float[Array, "cells genes"],
        marker_matrix: Float[Array, "types genes"],
        size_factor: Float[Array, "cells"],
        covariates: Float[Array, "cells covariates"] | None = None,
        n_cells: Float[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Negative log posterior density of the parameters per cell, up to a constant; types are summed out.

        n_cells: of all data, when these are a minibatch; None: these are all.
        Its parts: "negative_log_likelihood" and "negative_log_prior", per cell.
        """
        log_joint = self.log_joint(counts, marker_matrix, size_factor, covariates)
        fit = -jax.nn.logsumexp(log_joint, axis=1).mean()
        prior = -self.log_prior(marker_matrix) / (len(counts) if n_cells is None else n_cells)
        return fit + prior, {"negative_log_likelihood": fit, "negative_log_prior": prior}

    def log_prior(self, marker_matrix: Float[Array, "types genes"]) -> Float[Array, ""]:
        """Log prior density of the parameters, up to a constant."""
        mean, log_sd = self.effect_mean[...], self.effect_log_sd[...]
        effects = _log_normal(self.log_effect[...] - mean, jnp.exp(log_sd)) - log_sd
        total = (marker_matrix * effects).sum()
        total += _log_normal(mean, EFFECT_MEAN_SD) + _log_normal(log_sd - EFFECT_LOG_SD, EFFECT_LOG_SD_SD)
        total += CONCENTRATION * self.log_proportions.sum() + _log_normal(self.base[...], BASE_SD).sum()
        if self.type_sd > 0:
            total += _log_normal(self.deviation[...], 1.0).sum()
        if self.n_covariates:
            total += _log_normal(self.covariate_weights[...], COVARIATE_SD).sum()
        if self.likelihood != "poisson":
            weights = self.dispersion_weights[...]
            total += _log_normal(weights, DISPERSION_SD).sum()
            total += _log_normal(jnp.diff(weights), DISPERSION_STEP_SD).sum()
        if self.likelihood == "zinb":
            total += _log_normal(self.dropout_logit[...] - DROPOUT_LOGIT, DROPOUT_LOGIT_SD).sum()
        return total

    def start_from(
        self,
        counts: np.ndarray,
        marker_matrix: np.ndarray,
        size_factor: np.ndarray,
        covariates: np.ndarray | None = None,
        *,
        em_rounds: int = EM_ROUNDS,
        seed: int = 0,
    ) -> None:
        """Fits all parameters to these cells, on the host, by few rounds of expectation maximisation.

        Every cell is first given to the type whose markers are highest in it, and the model is fitted to that; a
        round gives it to the types by their probabilities and fits again. At most START_CELLS cells, drawn by `seed`,
        take part. Of genes that are no markers only the base is fitted.
        """
        counts, rho = np.asarray(counts, np.float32), np.asarray(marker_matrix, np.float32)
        size = np.asarray(size_factor, np.float32).reshape(-1)
        size = np.where(size > 0, size, np.float32(1.0))
        base = np.log((counts.sum(0) + 0.5 * counts.mean() + 1e-3) / size.sum())
        self.base[...] = jnp.asarray(base, self.base[...].dtype)
        listed = np.flatnonzero(rho.any(0))
        if not len(listed) or not len(counts):
            return
        cells = np.sort(np.random.default_rng(seed).permutation(len(counts))[:START_CELLS])
        y, rho, s = counts[np.ix_(cells, listed)], rho[:, listed], size[cells]
        x = None if covariates is None else jnp.asarray(np.asarray(covariates, np.float32)[cells])
        members = np.eye(self.n_types, dtype=np.float32)[highest_markers(y, rho, s)]
        small = CellAssign(
            len(listed),
            self.n_types,
            n_covariates=self.n_covariates,
            min_log_fold_change=self.min_log_fold_change,
            type_sd=self.type_sd,
            likelihood=self.likelihood,
            rngs=nnx.Rngs(seed),
        )
        small._start_at(y, rho, s, members)
        data = jnp.asarray(y), jnp.asarray(rho), jnp.asarray(s), x

        _descend(small, data, jnp.asarray(members), FIRST_DESCENT)
        for _ in range(em_rounds):
            _descend(small, data, jnp.exp(small.log_probabilities(*data)), DESCENT)
        for name, param in nnx.state(small, nnx.Param).items():
            mine = getattr(self, name)
            value = param[...].astype(mine[...].dtype)
            mine[...] = mine[...].at[..., listed].set(value) if name in OF_GENES else value

    def _offset(self, size_factor: jax.Array, covariates: jax.Array | None) -> jax.Array:
        """What all types' log means of a cell have in common."""
        offset = log_positive(size_factor)[:, None]
        if not self.n_covariates:
            return offset
        if covariates is None:
            msg = f"CellAssign: it has n_covariates={self.n_covariates}, but covariates is None."
            raise ConfigError(msg)
        return offset + covariates @ self.covariate_weights[...]

    def _start_at(self, counts: np.ndarray, rho: np.ndarray, size: np.ndarray, members: np.ndarray) -> None:
        """Base and effects by the ratios of mean counts, with half an average cell added to every type."""
        depth = members.T @ size + 0.5
        mean = (members.T @ counts + 0.5 * counts.sum(0) / size.sum()) / depth[:, None]
        others = (1.0 - rho) * depth[:, None]
        base = np.log(((others * mean).sum(0) + 1e-6) / (others.sum(0) + 1e-3) + 1e-4)
        effect = np.log(mean + 1e-4) - base - self.min_log_fold_change
        self.base[...] = jnp.asarray(base, jnp.float32)
        self.log_effect[...] = jnp.asarray(np.log(np.clip(effect, 0.05, 6.0)), jnp.float32)
        self.type_logits[...] = jnp.asarray(np.log((members.sum(0) + 1.0) / (len(counts) + self.n_types)), jnp.float32)
        if self.type_sd > 0:
            self.deviation[...] = jnp.zeros_like(self.deviation[...])


def highest_markers(counts: np.ndarray, marker_matrix: np.ndarray, size_factor: np.ndarray) -> np.ndarray:
    """The type of every cell whose markers have the highest mean z-score; without markers it scores 0, the average.

    Of square roots of rates, whose z-scores do not change with depth. (cells,) codes.
    """
    root = np.sqrt(counts / size_factor[:, None])
    z = (root - root.mean(0)) / np.maximum(root.std(0), 1e-6)
    best: np.ndarray = (z @ (marker_matrix / np.maximum(marker_matrix.sum(1, keepdims=True), 1e-6)).T).argmax(1)
    return best


def _descend(model: CellAssign, data: Any, members: jax.Array, rounds: int) -> None:
    """An M step: at most that many rounds of L-BFGS on all parameters, given the cells' types (cells, types)."""
    graphdef, params = nnx.split(model)
    start, back = ravel_pytree(params)

    def on_host(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = _value_and_grad(graphdef, params, jnp.asarray(flat, start.dtype), data, members)
        return float(value), np.asarray(grad, np.float64)

    x0 = np.asarray(start, np.float64).reshape(-1)
    found = minimize(on_host, x0, jac=True, method="L-BFGS-B", options={"maxiter": rounds, "maxcor": 20})
    nnx.update(model, back(jnp.asarray(found.x, start.dtype)))


@partial(jax.jit, static_argnums=0)
def _value_and_grad(graphdef: Any, like: Any, flat: jax.Array, data: Any, members: jax.Array) -> Any:
    back = ravel_pytree(like)[1]

    def loss(flat: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, back(flat))
        joint = (members * model.log_joint(*data)).sum(1).mean()
        return -joint - model.log_prior(data[1]) / len(members)

    return jax.value_and_grad(loss)(flat)


def _log_normal(x: jax.Array, sd: Any) -> jax.Array:
    return -0.5 * (x / sd) ** 2
