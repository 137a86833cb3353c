"""How two distributions differ: a comparison of mixture models of two conditions (the patterns of scDD).

Korthauer et al. 2016, Genome Biology 17:222 fit mixtures to each condition and compare numbers and means of their
components. Here every pattern is a model of both conditions at once, normal mixtures of one or two components that
share what the pattern says they share, and Schwarz's criterion weighs them:

    DE  one component each with another mean, or two each, shifted together
    DP  the same two components in other proportions
    DM  one component in one condition, this and another in the other
    DB  one component in one condition, two others in the other
    DV  one component each with the same mean and another spread
    DZ  the same components, another share of zeros

Values come as weights of both conditions at nodes along the range of a gene (`math.switch.node_weights`), so that the
cost does not grow with the cells.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .batched_newton import minimize
from .blocks import mapped_in_blocks
from .switch import node_weights

PATTERNS = ("DE", "DP", "DM", "DB", "DV", "DZ")
EM_ROUNDS, NEWTON_STEPS = 30, 12
SHARP = 0.1  # least standard deviation of a component, of that of all cells
N_NODES, GENES_PER_BLOCK = 128, 128
ONE = 30.0  # logit of a proportion that is 1


class Model(NamedTuple):
    """An affine map from free parameters to (m1, m2, log s, logit proportion of m1) of both conditions."""

    pattern: str  # "" is the model of no difference
    matrix: np.ndarray  # (8, 5)
    offset: np.ndarray  # (8,)
    n_free: int


def _model(pattern: str, means: str, spread: str, proportions: str) -> Model:
    """`means`: a letter for each of A1, A2, B1, B2; s is the mean in A plus a shift; `-`: no such component."""
    letters = sorted({x for x in means if x not in "-s"})
    columns = letters + ([] if "s" not in means else ["s"]) + sorted({*spread}) + sorted({*proportions} - {"-"})
    matrix, offset = np.zeros((8, 5)), np.zeros(8)
    for condition in (0, 1):
        for component in (0, 1):
            row, name = 4 * condition + component, means[2 * condition + component]
            matrix[row, columns.index(name if name in letters else letters[0])] = 1.0
            if "s" in means and condition == 1:  # a shift of both components
                matrix[row] = 0.0
                matrix[row, [columns.index(means[component]), columns.index("s")]] = 1.0
        matrix[4 * condition + 2, columns.index(spread[condition])] = 1.0
        if proportions[condition] == "-":
            offset[4 * condition + 3] = ONE
        else:
            matrix[4 * condition + 3, columns.index(proportions[condition])] = 1.0
    return Model(pattern, matrix, offset, len(columns))


# spreads are x, y; proportions p, q
MODELS = (
    _model("", "a-a-", "xx", "--"),
    _model("", "abab", "xx", "pp"),
    _model("DE", "a-b-", "xx", "--"),
    _model("DE", "a-b-", "xy", "--"),
    _model("DE", "abss", "xx", "pp"),
    _model("DP", "abab", "xx", "pq"),
    _model("DM", "a-ab", "xx", "-q"),
    _model("DM", "aba-", "xx", "p-"),
    _model("DB", "c-ab", "xx", "-q"),
    _model("DB", "abc-", "xx", "p-"),
    _model("DV", "a-a-", "xy", "--"),
)


class Sample(NamedTuple):
    """One gene's values that are not 0, over their spread, at nodes (vmapped over genes)."""

    values: Float[Array, " nodes"]
    weights: Float[Array, "2 nodes"]  # of both conditions


def mixture_loss(free: Float[Array, " p"], data: tuple[Sample, Array, Array]) -> Float[Array, ""]:
    """Minus the log-likelihood per cell of a model."""
    sample, matrix, offset = data
    m1, m2, log_s, logit = (matrix @ free + offset).reshape(2, 4).T
    x = sample.values[:, None]
    near = jax.nn.log_sigmoid(logit) - 0.5 * ((x - m1) * jnp.exp(-log_s)) ** 2
    far = jax.nn.log_sigmoid(-logit) - 0.5 * ((x - m2) * jnp.exp(-log_s)) ** 2
    density = jnp.logaddexp(near, far) - log_s - 0.5 * jnp.log(2 * jnp.pi)
    return -(sample.weights.T * density).sum() / sample.weights.sum()


def log_evidence(sample: Sample) -> Float[Array, " models"]:
    """Log-likelihood less half of Schwarz's penalty, of every model of `MODELS` at its maximum.

    The gradient is that of the likelihood at the maximum, which is the whole of it. The best of two starts is taken.
    """
    matrices, offsets = (jnp.asarray(np.stack(x), sample.values.dtype) for x in zip(*_maps(), strict=True))
    fixed = jax.lax.stop_gradient(sample)
    lower, upper = _box(sample.values.dtype)

    def best(matrix: Array, offset: Array) -> Array:
        data = (fixed, matrix, offset)
        first = jax.vmap(lambda wide: _climbed(fixed, matrix, offset, wide))(jnp.asarray([0.25, 0.1], lower.dtype))
        losses = jax.vmap(lambda free: mixture_loss(free, data))(first)
        start = first[jnp.argmin(losses)]
        return minimize(mixture_loss, start, data, lower=lower, upper=upper, n_steps=NEWTON_STEPS)

    free = jax.lax.stop_gradient(jax.vmap(best)(matrices, offsets))
    loss = jax.vmap(lambda f, m, o: mixture_loss(f, (sample, m, o)))(free, matrices, offsets)
    n = sample.weights.sum()
    penalty = 0.5 * jnp.asarray([model.n_free for model in MODELS], n.dtype) * jnp.log(jnp.maximum(n, 2.0))
    return -n * loss - penalty


def pattern_logits(evidence: Float[Array, " models"], zeros_gain: Float[Array, ""]) -> Float[Array, " patterns"]:
    """Log evidence of each of `PATTERNS` over that of no difference, whether or not zeros differ beside.

    DZ is no difference but of zeros, so that a gene with another mean and other zeros is DE, as in scDD.

    evidence: of `MODELS`, on values that are not 0.
    zeros_gain: of other shares of zeros over the same, penalty taken off.
    """
    of = [model.pattern for model in MODELS]
    each = [
        jax.nn.logsumexp(jnp.stack([evidence[i] for i, name in enumerate(of) if name == pattern]))
        for pattern in ("", *PATTERNS[:-1])
    ]
    either = jnp.logaddexp(zeros_gain, 0.0)
    return jnp.stack([*(x - each[0] + either for x in each[1:]), zeros_gain])


@jax.jit
def evidence_and_patterns(
    values: Float[Array, "genes cells"],
    weights: Float[Array, "genes 2 cells"],
    zeros_gains: Float[Array, " genes"],
) -> Float[Array, "genes patterns"]:
    """`pattern_logits` of many genes, some at a time; weights of both conditions, 0 where the value is a zero."""

    def of_gene(row: tuple[Array, Array, Array]) -> Array:
        return pattern_logits(log_evidence(sample_at_nodes(row[0], row[1])), row[2])

    return mapped_in_blocks(of_gene, (values, weights, zeros_gains), GENES_PER_BLOCK)


def sample_at_nodes(values: Float[Array, " cells"], weights: Float[Array, "2 cells"]) -> Sample:
    """Weighted values over their spread, in order, summed at `N_NODES` nodes where they are more."""
    total = weights.sum(axis=0)
    mass = jnp.maximum(total.sum(), 1e-12)
    mean = (total * values).sum() / mass
    square = (total * (values - mean) ** 2).sum() / mass
    spread = jnp.where(square > 1e-12, jnp.sqrt(jnp.where(square > 1e-12, square, 1.0)), 1.0)
    scaled = jnp.where(total > 0, (values - mean) / spread, 0.0)
    if len(values) <= N_NODES:
        order = jnp.argsort(jax.lax.stop_gradient(scaled))
        return Sample(scaled[order], weights[:, order])
    low, high = scaled.min(), scaled.max()
    width = jnp.where(high > low, high - low, 1.0)
    numbers, corners = node_weights((scaled - low) / width, N_NODES)
    summed = jnp.zeros((2, N_NODES), values.dtype)
    for corner in range(4):
        summed = summed.at[:, numbers[:, corner]].add(weights * corners[:, corner])
    return Sample(low + width * jnp.linspace(0, 1, N_NODES, dtype=values.dtype), summed)


def _maps() -> list[tuple[np.ndarray, np.ndarray]]:
    return [(model.matrix, model.offset) for model in MODELS]


def _box(dtype: jnp.dtype) -> tuple[Array, Array]:
    """Of any free parameter; wide, but log s may not end in a spike, so it is held by `_climbed` and the nodes."""
    return jnp.full(5, -8.0, dtype), jnp.full(5, 8.0, dtype)


def _climbed(sample: Sample, matrix: Array, offset: Array, wide: Array) -> Float[Array, " p"]:
    """Rounds of expectation and conditional maximisation from quantiles of the conditions, as free parameters."""
    x, dtype = sample.values, sample.values.dtype
    total = jnp.maximum(sample.weights.sum(axis=1), 1e-6)
    rising = jnp.cumsum(sample.weights, axis=1) / total[:, None]
    low, high = (x[jnp.argmax(rising >= q, axis=1)] for q in (wide, 1 - wide))
    single = offset.reshape(2, 4)[:, 3] > 0
    middle = (sample.weights * x).sum(axis=1) / total
    start = jnp.stack([jnp.where(single, middle, low), jnp.where(single, middle, high)], axis=1)  # (2, components)
    means = matrix.reshape(2, 4, -1)[:, :2].reshape(4, -1)
    spreads, odds = matrix.reshape(2, 4, -1)[:, 2], matrix.reshape(2, 4, -1)[:, 3]
    weight = jnp.stack([total, jnp.where(single, 0.0, total)], axis=1).ravel()
    free = _least_squares(means, weight, start.ravel()) - 0.7 * (spreads.sum(axis=0) > 0)

    def again(_: Array, free: Array) -> Array:
        m1, m2, log_s, logit = (matrix @ free + offset).reshape(2, 4).T
        precision = jnp.exp(-2 * log_s)
        lead = logit - 0.5 * precision * ((x[:, None] - m1) ** 2 - (x[:, None] - m2) ** 2)
        share = jax.nn.sigmoid(lead).T * sample.weights  # (2, nodes)
        parts = jnp.stack([share, sample.weights - share], axis=1)  # (2, components, nodes)
        count, first, second = parts.sum(axis=2), (parts * x).sum(axis=2), (parts * x**2).sum(axis=2)
        count = jnp.maximum(count, 1e-6)
        centres = _least_squares(means, (count * precision[:, None]).ravel(), (first / count).ravel())
        at = (means @ centres).reshape(2, 2)
        square = (second - 2 * at * first + at**2 * count).sum(axis=1)
        squares, counts = spreads.T @ square, spreads.T @ total
        log_spread = 0.5 * jnp.log(jnp.maximum(squares / jnp.maximum(counts, 1e-6), SHARP**2))
        ahead, behind = odds.T @ count[:, 0], odds.T @ count[:, 1]
        log_odds = jnp.clip(jnp.log(jnp.maximum(ahead, 1e-6) / jnp.maximum(behind, 1e-6)), -7.0, 7.0)
        return centres + log_spread * (spreads.sum(axis=0) > 0) + log_odds * (odds.sum(axis=0) > 0)

    return jax.lax.fori_loop(0, EM_ROUNDS, again, free.astype(dtype))


def _least_squares(design: Array, weights: Array, target: Array) -> Array:
    """Weighted, of the columns that are in use; 0 in the others."""
    used = jnp.abs(design).sum(axis=0) > 0
    moment = (design * weights[:, None]).T @ design + jnp.diag(jnp.where(used, 1e-6, 1.0))
    return jnp.linalg.solve(moment, (design * weights[:, None]).T @ target)
