"""Importance weights of draws of a group of cells: lvm-DE (Boyeau et al. 2023)."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from ..chunks import Chunk, joined
from ..errors import ConfigError
from ..nn.count_vae import CountDistribution, count_log_prob
from . import posterior
from .cells import CellSource, counts_of_rows

if TYPE_CHECKING:
    from .queries import Queries

ANCHORS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighting:
    """How draws are weighted; the fields are scvi-tools' arguments.

    max_cells: cells of the group that the weights are estimated from, at most.
    truncation: caps a weight at the mean weight times the square root of the number of draws (Ionides 2008).
    n_mc_samples: draws for the log p(x) of those cells.
    n_mc_samples_per_pass: of these at a time.
    """

    max_cells: int = 1024
    truncation: bool = False
    n_mc_samples: int = 500
    n_mc_samples_per_pass: int = 1

    def __post_init__(self) -> None:
        for name in ("max_cells", "n_mc_samples", "n_mc_samples_per_pass"):
            if getattr(self, name) < 1:
                msg = f"importance weights: {name} must be at least 1, got {getattr(self, name)!r}."
                raise ConfigError(msg)

    @classmethod
    def of(cls, weights: str | None, given: dict[str, Any], who: str) -> "Weighting | None":
        """None for uniform weights.

        Raises:
            ConfigError: another name, or an argument that is unknown or of no use.
        """
        if weights not in (None, "uniform", "importance"):
            msg = f"{who}: weights must be 'uniform' or 'importance', got {weights!r}."
            raise ConfigError(msg)
        known = [field.name for field in dataclasses.fields(cls)]
        if odd := sorted(set(given) - set(known)):
            msg = f"{who}: unknown arguments {odd}; those of importance weights are {', '.join(known)}."
            raise ConfigError(msg)
        if weights != "importance":
            if given:
                msg = f"{who}: {', '.join(sorted(given))} concern weights='importance', got weights={weights!r}."
                raise ConfigError(msg)
            return None
        return cls(**given)


def resampled(
    model: "Queries", cells: CellSource, rows: np.ndarray, how: Weighting, *, arrays: Any, batch_size: int, seed: int
) -> np.ndarray:
    """Decoded expression (draws, genes) of as many draws as `rows` has entries, drawn anew by their weights.

    A draw z_i of a cell of the group has the weight p(z_i) sum_n p(x_n | z_i) / p(x_n) over sum_n q(z_i | x_n),
    n over cells of the group: those draws count that explain many of its cells.

    rows: cells, with repeats. arrays: those of `posterior.pool`.
    """
    who = "weights='importance'"
    pool = joined(model.evaluate(posterior.pool, cells, rows, batch_size, seed=seed, arrays=arrays, needs_counts=who))
    rng = np.random.default_rng([seed, 1])
    group = np.unique(rows)
    anchors = np.sort(rng.permutation(group)[: how.max_cells])
    log_weight = _log_weights(model, cells, pool, anchors, how, batch_size=batch_size, seed=seed)
    if how.truncation:
        log_weight = np.minimum(log_weight, logsumexp(log_weight) - 0.5 * np.log(len(log_weight)))
    probability = np.exp(log_weight - logsumexp(log_weight))
    chosen = rng.choice(len(rows), len(rows), p=probability / probability.sum())
    values: np.ndarray = pool["expression"][chosen]
    return values


def _log_weights(
    model: "Queries", cells: CellSource, pool: Chunk, anchors: np.ndarray, how: Weighting, *, batch_size: int, seed: int
) -> np.ndarray:
    log_px = model.get_marginal_ll(
        cells, anchors, how.n_mc_samples, batch_size, return_mean=False,
        n_mc_samples_per_pass=min(how.n_mc_samples_per_pass, how.n_mc_samples), seed=seed,
    )
    q = joined(model.evaluate(posterior.latents, cells, anchors, batch_size))
    mean, var = (q[name].astype(np.float64) for name in ("mean", "var"))
    size = joined(model.evaluate(posterior.log_size, cells, anchors, batch_size))["log_size"]
    p = CountDistribution(*(jnp.asarray(pool[name]) for name in ("log_fraction", "log_theta", "pi_logit")))
    z = pool["z"].astype(np.float64)
    explained, proposed = np.full(len(z), -np.inf), np.full(len(z), -np.inf)
    assert cells.counts is not None
    for start in range(0, len(anchors), ANCHORS_AT_ONCE):
        part = slice(start, start + ANCHORS_AT_ONCE)
        held = counts_of_rows(cells.counts, anchors[part])
        counts = np.asarray(held if isinstance(held, np.ndarray) else held.toarray(), np.float32)
        log_p = _log_prob_of_anchors(model.module.vae.decoder.likelihood, p, jnp.asarray(counts), size[part])
        explained = np.logaddexp(explained, logsumexp(np.asarray(log_p, np.float64) - log_px[part], axis=1))
        # (z - m)²/v, multiplied out: (draws, anchors) without an axis for the latent dimensions
        inverse = 1 / var[part]
        distance = z**2 @ inverse.T - 2 * z @ (mean[part] * inverse).T + (mean[part] ** 2 * inverse).sum(1)
        log_q = -0.5 * (distance + np.log(2 * np.pi * var[part]).sum(1))
        proposed = np.logaddexp(proposed, logsumexp(log_q, axis=1))
    found: np.ndarray = pool["log_prior"].astype(np.float64) + explained - proposed
    return found


@functools.partial(jax.jit, static_argnames="likelihood")
def _log_prob_of_anchors(likelihood: str, p: CountDistribution, counts: jax.Array, log_size: jax.Array) -> jax.Array:
    """Log p(x_n | z_i), (draws, anchors), for fractions p and the counts and log libraries of the anchors."""

    def of(anchor: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, size = anchor
        return count_log_prob(likelihood, jnp.broadcast_to(x, p.log_rate.shape), p._replace(log_rate=p.log_rate + size))

    return jax.lax.map(of, (counts, log_size)).T
