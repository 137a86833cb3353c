"""Ligands of one group of cells and receptors of another: means, complexes, scores, what is expected by chance."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .rank_aggregation import robust_rank_aggregate, weighted_ranks

ABSENT = -1  # in place of a subunit, where a complex has fewer than the largest
VALUES_AT_ONCE = 1 << 24  # of one block of permutations, or of pairs

Score = Callable[[Array, Array], Array]


class GeneStatistics(NamedTuple):
    """Of every gene in every group."""

    mean: Float[Array, "groups genes"]
    expressed: Float[Array, "groups genes"]  # share of the group's cells that have any
    zscore: Float[Array, "groups genes"]  # mean of the values scaled to mean 0 and variance 1 over all cells
    log_fold: Float[Array, "groups genes"]  # log2 of 1 + mean of exp(x) - 1, against that of the other cells
    share: Float[Array, "groups genes"]  # of the sum of the groups' means


class Side(NamedTuple):
    """The ligands of all pairs in every group, or the receptors."""

    columns: Int[Array, "pairs subunits"]
    weights: Float[Array, "groups pairs subunits"]  # of the subunits: 1 for the lowest, as the temperature goes to 0
    gate: Float[Array, "groups pairs"]  # 1 where all subunits are expressed
    mean: Float[Array, "groups pairs"]
    zscore: Float[Array, "groups pairs"]
    log_fold: Float[Array, "groups pairs"]
    share: Float[Array, "groups pairs"]


class Ranks(NamedTuple):
    """Robust rank aggregates of several scores, 0-1: small is high in several of them."""

    magnitude: Float[Array, "pairs groups groups"]
    specificity: Float[Array, "pairs groups groups"]


def group_means(
    assignments: Float[Array, "cells groups"], values: Float[Array, "cells genes"]
) -> Float[Array, "groups genes"]:
    """Means of the groups, cells weighted by their memberships; an empty group has zeros."""
    size = assignments.sum(axis=0)
    return (assignments.T @ values) / jnp.where(size > 0, size, 1.0)[:, None]


@functools.partial(jax.jit, static_argnames="temperature")
def gene_statistics(
    values: Float[Array, "cells genes"], assignments: Float[Array, "cells groups"], *, temperature: float
) -> GeneStatistics:
    """What the scores need of log-normalised values.

    Args:
        values: log(1 + scaled counts).
        assignments: memberships, rows sum to 1.
        temperature: a value x counts as 1 - exp(-x / temperature) expressed; 0 is the indicator of x > 0.
    """
    n = len(values)
    size = assignments.sum(axis=0)[:, None]
    mean = group_means(assignments, values)
    some = -jnp.expm1(-values / temperature) if temperature > 0 else (values > 0).astype(values.dtype)
    center = values.mean(axis=0)
    variance = ((values - center) ** 2).sum(axis=0) / max(n - 1, 1)
    deviation = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 1.0)
    linear = jnp.expm1(values)
    own = group_means(assignments, linear)
    others = jnp.where(n - size > 0, n - size, 1.0)
    rest = jnp.maximum(linear.sum(axis=0) - own * size, 0.0) / others
    total = mean.sum(axis=0)
    return GeneStatistics(
        mean=mean,
        expressed=group_means(assignments, some),
        zscore=(mean - center) / deviation,
        log_fold=(jnp.log1p(own) - jnp.log1p(rest)) / jnp.log(2.0),
        share=mean / jnp.where(total > 0, total, 1.0),
    )


@functools.partial(jax.jit, static_argnames=("expr_prop", "temperature"))
def side_of(
    genes: GeneStatistics, columns: Int[Array, "pairs subunits"], *, expr_prop: float, temperature: float
) -> Side:
    """Complexes as their lowest subunit, with a soft minimum at temperature > 0.

    Args:
        genes: of every gene.
        columns: of the subunits; -1 where there is none.
        expr_prop: a subunit is expressed in a group where that share of the cells has it; the gate is the product over
            subunits of sigmoid((share / expr_prop - 1) / temperature), at temperature 0 of the indicators.
        temperature: of the gate in units of expr_prop, of the minimum in those of the values.
    """
    there = columns >= 0
    at = jnp.where(there, columns, 0)
    mean = genes.mean[:, at]
    weights = lowest(mean, there, temperature)
    share = genes.expressed[:, at]
    if expr_prop == 0:
        passed = jnp.ones_like(share)
    elif temperature > 0:
        passed = jax.nn.sigmoid((share / expr_prop - 1.0) / temperature)
    else:  # 1e-6: a share of exactly expr_prop passes, whatever rounding made of it
        passed = (share >= expr_prop * (1 - 1e-6)).astype(share.dtype)
    gate = jnp.where(there, passed, 1.0).prod(axis=-1)

    def chosen(values: Array) -> Array:
        return (weights * values[:, at]).sum(axis=-1)

    return Side(columns, weights, gate, *(chosen(x) for x in (genes.mean, genes.zscore, genes.log_fold, genes.share)))


def lowest(
    values: Float[Array, "groups pairs subunits"], there: Bool[Array, "pairs subunits"], temperature: float
) -> Float[Array, "groups pairs subunits"]:
    """Weights of the subunits: softmax(-value / temperature), at temperature 0 all on the first of the lowest."""
    fixed = jnp.where(there, values, jnp.inf)
    if temperature > 0:
        return jax.nn.softmax(jnp.where(there, -values / temperature, -jnp.inf), axis=-1)
    first = jnp.argmin(jax.lax.stop_gradient(fixed), axis=-1)
    return jax.nn.one_hot(first, values.shape[-1], dtype=values.dtype)


@functools.cache  # one function for the same settings, so that what is compiled for it is found again
def score_of(metric: str, *, kh: float, hill_n: float) -> Score:
    """The score of a ligand's and a receptor's mean.

    "mean": (L + R) / 2, CellPhoneDB's; "product": L R, NATMI's; "geometric": sqrt(L R); "hill": (L R)^n / (kh^n +
    (L R)^n), CellChat's law of mass action (Jin et al. 2021, eq. 1, without its agonists and antagonists).
    """

    def score(ligand: Array, receptor: Array) -> Array:
        if metric == "mean":
            return (ligand + receptor) / 2
        product = ligand * receptor
        both = product > 0
        safe = jnp.where(both, product, 1.0)
        if metric == "product":
            return product
        if metric == "geometric":
            return jnp.where(both, jnp.sqrt(safe), 0.0)
        power = jnp.where(both, safe**hill_n, 0.0)
        return power / (kh**hill_n + power)

    return score


def observed_scores(score: Score, ligand: Side, receptor: Side) -> Float[Array, "pairs groups groups"]:
    """Scores of the groups' means; 0 where ligand or receptor is in no cell, as CellPhoneDB."""
    both = between(jnp.multiply, ligand.mean, receptor.mean) > 0
    return jnp.where(both, between(score, ligand.mean, receptor.mean), 0.0)


def between(score: Score, ligand: Array, receptor: Array) -> Float[Array, "pairs groups groups"]:
    """The score of every pair from every source to every target, of values (groups, pairs)."""
    return score(ligand.T[:, :, None], receptor.T[:, None, :])


@functools.partial(jax.jit, static_argnames="score")
def permutation_pvalues(
    values: Float[Array, "cells genes"],
    assignments: Float[Array, "cells groups"],
    permutations: Int[Array, "permutations cells"],
    ligand: Side,
    receptor: Side,
    score: Score,
) -> Float[Array, "pairs groups groups"]:
    """How often a score is as high when cells exchange their groups: #{permuted >= observed} / permutations.

    As LIANA does, a complex stays the subunit that is lowest in the groups themselves. Cost cells x genes x groups for
    each permutation, some at a time.

    Args:
        values: log-normalised.
        assignments: memberships.
        permutations: cell i gets the memberships of cell permutations[b, i].
        ligand: of all pairs.
        receptor: of all pairs.
        score: as of `score_of`.
    """
    observed = between(score, ligand.mean, receptor.mean)
    n_groups, n_cells = assignments.shape[1], len(values)
    size = assignments.sum(axis=0)
    # a sum in another order may round otherwise: equal scores stay equal
    slack = 1e-6 * jnp.abs(observed)

    def one(order: Array) -> Array:
        mean = (assignments[order].T @ values) / jnp.where(size > 0, size, 1.0)[:, None]
        sides = [(s.weights * mean[:, jnp.maximum(s.columns, 0)]).sum(axis=-1) for s in (ligand, receptor)]
        return between(score, *sides) >= observed - slack

    at_once = max(1, VALUES_AT_ONCE // max(observed.size + n_groups * n_cells, 1))

    def add(total: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        orders, counts = block
        high = jax.vmap(one)(orders) & counts[:, None, None, None]
        return total + high.sum(axis=0, dtype=jnp.int32), None

    n = len(permutations)
    blocks = -(-n // at_once)
    rows = jnp.arange(blocks * at_once)
    orders = permutations[rows % n].reshape(blocks, at_once, n_cells)
    total, _ = jax.lax.scan(add, jnp.zeros(observed.shape, jnp.int32), (orders, (rows < n).reshape(blocks, at_once)))
    return total.astype(observed.dtype) / n


@functools.partial(jax.jit, static_argnames="score")
def analytic_pvalues(
    values: Float[Array, "cells genes"],
    assignments: Float[Array, "cells groups"],
    ligand: Side,
    receptor: Side,
    score: Score,
) -> Float[Array, "pairs groups groups"]:
    """The same by a normal distribution with the permutations' mean and variance, which has a gradient.

    Exchanging the memberships a of cells, the mean of gene x in group g has expectation mean(x), and the covariance of
    two of them is S_xy S_gh / ((cells - 1) n_g n_h), S_xy = sum (x - mean)(y - mean), S_gh the same of memberships.
    This is exact; scores that are not linear in the means take their derivatives there (delta method).
    """
    n = len(values)
    size = assignments.sum(axis=0)
    size = jnp.where(size > 0, size, 1.0)
    off = assignments - assignments.mean(axis=0)
    membership = (off.T @ off) / (max(n - 1, 1) * size[:, None] * size[None, :])
    center = values.mean(axis=0)
    columns = jnp.concatenate([ligand.columns, receptor.columns], axis=1)
    n_pairs, n_columns = columns.shape
    per_block = min(n_pairs, max(1, VALUES_AT_ONCE // max(n * n_columns, 1)))
    blocks = -(-n_pairs // per_block)

    @jax.checkpoint  # else a gradient keeps the columns of all pairs
    def products(block: Array) -> Array:
        taken = values[:, block] - center[block]
        return jnp.einsum("nbi,nbj->bij", taken, taken)

    padded = jnp.maximum(columns, 0)[jnp.arange(blocks * per_block) % n_pairs]
    gram = jax.lax.map(products, padded.reshape(blocks, per_block, n_columns))
    gram = gram.reshape(-1, n_columns, n_columns)[:n_pairs]
    half = n_columns // 2
    own = jnp.diagonal(membership)
    spread_l = jnp.einsum("gps,pst,gpt->gp", ligand.weights, gram[:, :half, :half], ligand.weights) * own[:, None]
    spread_r = jnp.einsum("gps,pst,gpt->gp", receptor.weights, gram[:, half:, half:], receptor.weights) * own[:, None]
    cross = jnp.einsum("gps,pst,hpt->pgh", ligand.weights, gram[:, :half, half:], receptor.weights) * membership
    expected = [(s.weights * center[jnp.maximum(s.columns, 0)]).sum(axis=-1) for s in (ligand, receptor)]
    left, right = expected[0].T[:, :, None], expected[1].T[:, None, :]
    left, right = jnp.broadcast_arrays(left, right)
    one, none = jnp.ones_like(left), jnp.zeros_like(left)
    middle, by_left = jax.jvp(score, (left, right), (one, none))
    _, by_right = jax.jvp(score, (left, right), (none, one))
    variance = by_left**2 * spread_l.T[:, :, None] + by_right**2 * spread_r.T[:, None, :]
    variance = variance + 2 * by_left * by_right * cross
    observed = between(score, ligand.mean, receptor.mean)
    # less than rounding leaves: all memberships are equal, or the genes vary nowhere
    some = variance > 1e-10 * (middle**2 + 1e-10)
    z = jnp.where(some, (observed - middle) / jnp.sqrt(jnp.where(some, variance, 1.0)), 0.0)
    return jax.scipy.stats.norm.sf(z)


@functools.partial(jax.jit, static_argnames=("temperature", "product_twice"))
def consensus(
    ligand: Side,
    receptor: Side,
    pvalues: Float[Array, "pairs groups groups"],
    *,
    temperature: float,
    mean_value: Array,
    product_twice: bool = False,
) -> Ranks:
    """LIANA's consensus: robust rank aggregation of what several methods say (Dimitrov et al. 2022).

    Magnitude: CellPhoneDB's mean, NATMI's product, SingleCellSignalR's sqrt(LR) / (sqrt(LR) + mean of all values).
    Specificity: CellPhoneDB's p-value, Connectome's mean z-score, the mean log2 fold change, NATMI's product of shares.
    Pairs are ranked among those whose genes are expressed in both groups; others have 1.

    Args:
        ligand: of all pairs.
        receptor: of all pairs.
        pvalues: of the means.
        temperature: width of a soft rank, in standard deviations of the score; 0 is the mean rank of equal scores.
        mean_value: of all values, of SingleCellSignalR.
        product_twice: ranks the product by its ranks once more, as LIANA 1.10 does, which turns that list around.
    """
    gate = between(jnp.multiply, ligand.gate, receptor.gate)
    mean, product = score_of("mean", kh=1.0, hill_n=1.0), score_of("product", kh=1.0, hill_n=1.0)
    root = between(score_of("geometric", kh=1.0, hill_n=1.0), ligand.mean, receptor.mean)
    base = root + mean_value

    def half(a: Array, b: Array) -> Array:
        return (a + b) / 2

    magnitude = (
        observed_scores(mean, ligand, receptor),
        between(product, ligand.mean, receptor.mean),
        root / jnp.where(base > 0, base, 1.0),
    )
    specificity = (
        -pvalues,
        between(half, ligand.zscore, receptor.zscore),
        between(half, ligand.log_fold, receptor.log_fold),
        between(jnp.multiply, ligand.share, receptor.share),
    )

    def aggregate(scores: tuple[Array, ...]) -> Array:
        def ranked(values: Array) -> Array:
            return weighted_ranks(values, gate.ravel(), temperature)

        ranks = jax.vmap(ranked)(jnp.stack([s.ravel() for s in scores]))
        if product_twice and scores is magnitude:
            ranks = ranks.at[1].set(ranked(ranks[1]))
        return robust_rank_aggregate(ranks.T, gate.ravel()).reshape(gate.shape)

    # written so that small ranks keep their digits
    return Ranks(*((1.0 - gate) + gate * aggregate(scores) for scores in (magnitude, specificity)))


@functools.partial(jax.jit, static_argnames="number")
def drawn_permutations(
    values: Float[Array, "cells genes"], assignments: Float[Array, "cells groups"], key: Array, *, number: int
) -> Int[Array, "permutations cells"]:
    """Permutations that pair cells with memberships, both sorted along random directions.

    They are as good as any, and the same whatever order the cells come in.

    Args:
        values: of the cells.
        assignments: of the cells.
        key: random.
        number: of permutations.
    """
    kinds = jax.random.split(key, 3)
    by_values, by_groups = (
        jnp.argsort(x @ jax.random.normal(kind, (x.shape[1],), x.dtype))
        for x, kind in zip((values, assignments), kinds, strict=False)
    )
    shuffled = jax.lax.map(
        lambda k: jax.random.permutation(k, len(values)), jax.random.split(kinds[2], number), batch_size=16
    )
    return jnp.zeros_like(shuffled).at[:, by_values].set(by_groups[shuffled])
