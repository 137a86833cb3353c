"""`tl.switch_de`: genes that switch along pseudotime."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse, stats

from .. import slots
from ..data.transform import shifted_log
from ..errors import DataError, MissingKeyError
from ..math.switch import STRENGTH_UNIT, Limits, Nodes, log_largest, node_weights
from ..math.switch_dropout import SeenSums
from ..math.switch_fit import ZERO, fit_seen, fit_sums
from ..math.switch_null import levels_of, permutation_log_pvalues
from ..operators.singlecell import SwitchDEConfig
from ..recording import recorded

if TYPE_CHECKING:
    from anndata import AnnData

GENES_PER_CHUNK = 1024
NULL_FITS = 20_000  # at most, over all permutations
VALUE_NODES = 128  # along the logarithm of a gene's values
FEWEST_CELLS = 5


@recorded
def switch_de(
    adata: "AnnData",
    *,
    pseudotime_key: str = "diffbio_pseudotime",
    zero_inflated: bool = False,
    n_permutations: int = 20,
    n_nodes: int = 512,
    layer: str | None = None,
    random_state: int = 0,
    copy: bool = False,
) -> None:
    """Fits a sigmoid along pseudotime to every gene's log expression and tests it (`DifferentiableSwitchDE`).

    The cells' sums at `n_nodes` points along pseudotime are all that is kept dense: 20,000 genes of 50,000 cells fit.

    Args:
        adata: cells x genes with a pseudotime. Cells whose pseudotime is infinite are left out.
        pseudotime_key: column of `obs`.
        zero_inflated: whether zeros may be lost values, with probability exp(-lambda x^2).
        n_permutations: of the cells, for the reference of p-values; each takes a random part of the genes where all
            would be more than 20,000 fits. 0 is chi-squared with two degrees of freedom, as in switchde.
        n_nodes: points along pseudotime; fewer cells are taken as they are.
        layer: of the counts; None is X.
        random_state: seed of the permutations.
        copy: works on a copy and returns it.

    Adds `uns["diffbio_switch_de"]`, a DataFrame indexed by gene: `k`, the strength, above 0 where the gene switches on,
    `t0`, the time, `mu0`, half the level approached, `pvalue` and `qvalue` (Benjamini & Hochberg). P-values do not know
    that pseudotime was found from the same genes. Genes that do not vary have k = 0 and p = 1.

    Raises:
        ConfigError: a setting out of range.
        MissingKeyError: no such pseudotime.
        DataError: no counts, fewer than 5 cells, or a pseudotime that is missing or the same in all cells.
    """
    import pandas as pd

    config = SwitchDEConfig(
        n_genes=max(adata.n_vars, 1), zero_inflated=zero_inflated, n_permutations=n_permutations, n_nodes=n_nodes
    )
    if pseudotime_key not in adata.obs:
        msg = f"tl.switch_de: obs has no {pseudotime_key!r}; call tl.pseudotime(adata, root=...) first"
        raise MissingKeyError(msg)
    when = slots.times(adata, pseudotime_key, "tl.switch_de")
    reached = np.isfinite(when)
    when = when[reached]
    if len(when) < FEWEST_CELLS or not np.ptp(when) > 0:
        msg = f"tl.switch_de: obs[{pseudotime_key!r}] must differ between at least {FEWEST_CELLS} cells; "
        msg += f"{len(when)} cells have {len(np.unique(when))} different values"
        raise DataError(msg)
    low, span = float(when.min()), float(np.ptp(when))
    expression = sparse.csc_array(shifted_log(slots.counts(adata, layer))[reached])
    found = Fitter(expression, (when - low) / span, config).run(random_state)
    theta = found["theta"]
    mu0 = 0.5 * found["peak"] * np.exp(-np.asarray(jax.vmap(log_largest)(jnp.asarray(theta)), np.float64))
    adata.uns[slots.SWITCH_DE] = pd.DataFrame(
        {
            "k": STRENGTH_UNIT * theta[:, 0] / span,
            "t0": low + span * theta[:, 1],
            "mu0": mu0,
            "pvalue": found["pvalue"],
            "qvalue": stats.false_discovery_control(found["pvalue"]),
        },
        index=adata.var_names.astype(str),
        dtype=float,
    )


class Fitter:
    """Fits of all genes, a chunk of one shape at a time; times run from 0 to 1."""

    def __init__(self, expression: sparse.csc_array, times: np.ndarray, config: SwitchDEConfig) -> None:
        self.expression, self.config = expression, config
        self.limits = Limits(config.max_strength, config.margin)
        n_cells = len(times)
        if n_cells <= config.n_nodes:
            places, self.weights = times, sparse.eye_array(n_cells, format="csr")
        else:
            places = np.linspace(0, 1, config.n_nodes)
            numbers, corners = (np.asarray(x) for x in node_weights(jnp.asarray(times, jnp.float32), config.n_nodes))
            ends = (corners.ravel().astype(float), numbers.ravel(), np.arange(0, 4 * n_cells + 1, 4))
            self.weights = sparse.csr_array(ends, shape=(n_cells, config.n_nodes))
        self.cells: np.ndarray = np.asarray(self.weights.sum(axis=0)).ravel()
        self.nodes = Nodes(jnp.asarray(places, jnp.float32), jnp.asarray(self.cells, jnp.float32))
        self.mean = np.asarray(expression.mean(axis=0)).ravel().astype(float)
        square = np.asarray(expression.multiply(expression).sum(axis=0)).ravel()
        self.scatter = np.maximum(square - n_cells * self.mean**2, 0.0)
        self.levels = np.asarray(levels_of(jnp.asarray(self.mean), jnp.asarray(self.scatter / n_cells)))

    def run(self, seed: int) -> dict[str, np.ndarray]:
        """Parameters and p-values of all genes."""
        n_genes, config = len(self.mean), self.config
        fits = self.fit(np.arange(n_genes), self.weights)
        ratios = np.maximum(2 * (fits["log_likelihood"] - fits["null_log_likelihood"]), 0.0)
        if config.n_permutations == 0:
            return fits | {"pvalue": np.exp(-0.5 * ratios)}  # chi-squared with two degrees of freedom
        rng = np.random.default_rng(seed)
        varying = np.flatnonzero(self.scatter > 0)
        size = min(len(varying), max(NULL_FITS // config.n_permutations, 1))
        null_ratios, null_levels = [], []
        for _ in range(config.n_permutations):
            genes = np.sort(rng.choice(varying, size, replace=False))
            permuted = self.weights[rng.permutation(self.weights.shape[0])]
            null = self.fit(genes, permuted)
            null_ratios.append(np.maximum(2 * (null["log_likelihood"] - null["null_log_likelihood"]), 0.0))
            null_levels.append(self.levels[genes])
        if not size:
            return fits | {"pvalue": np.ones(n_genes)}
        found = permutation_log_pvalues(
            jnp.asarray(ratios), jnp.asarray(self.levels), jnp.asarray(np.concatenate(null_ratios)),
            jnp.asarray(np.concatenate(null_levels)),
        )  # fmt: skip
        return fits | {"pvalue": np.where(self.scatter > 0, np.exp(np.asarray(found, float)), 1.0)}

    def fit(self, genes: np.ndarray, weights: sparse.csr_array) -> dict[str, np.ndarray]:
        """Fits of some genes where cells are at the nodes that `weights` say."""
        parts = [self._fit_chunk(chunk, weights, len(kept)) for chunk, kept in _chunks(genes)]
        names = ("theta", "peak", "log_likelihood", "null_log_likelihood")
        if not parts:
            return {name: np.zeros((0, 2) if name == "theta" else 0) for name in names}
        return {name: np.concatenate([np.asarray(part[name], float) for part in parts]) for name in names}

    def _fit_chunk(self, genes: np.ndarray, weights: sparse.csr_array, kept: int) -> dict[str, np.ndarray]:
        values = self.expression[:, genes]
        n_nodes = weights.shape[1]
        if not self.config.zero_inflated:
            total = (values.T @ weights).toarray()
            off = total - self.mean[genes, None] * self.cells
            null = np.zeros((0, len(genes), n_nodes), np.float32)
            fit = fit_sums(
                _single(off), _single(self.mean[genes]), _single(self.scatter[genes]), jnp.asarray(null), self.nodes,
                limits=self.limits,
            )  # fmt: skip
        else:
            sums, unit = _seen_sums(values, weights)
            none = jnp.zeros((0, len(genes), n_nodes), jnp.float32)
            fit = fit_seen(sums, (none, none), unit, self.nodes, limits=self.limits)
        return {name: np.asarray(value)[:kept] for name, value in fit._asdict().items() if name != "null_ratios"}


def _chunks(genes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of one size, filled up with genes from the start, and the part of each that counts."""
    size = min(GENES_PER_CHUNK, 1 << max(len(genes) - 1, 0).bit_length())
    for start in range(0, len(genes), size):
        yield genes[np.arange(start, start + size) % len(genes)], genes[start : start + size]


def _seen_sums(values: sparse.csc_array, weights: sparse.csr_array) -> tuple[SeenSums, jax.Array]:
    """What `fit_seen` reads: sums over cells, and each gene's values spread over nodes along their logarithm."""
    values = values.copy()
    values.data = np.where(values.data > ZERO, values.data, 0.0)
    values.eliminate_zeros()
    n_genes = values.shape[1]
    gene = np.repeat(np.arange(n_genes), np.diff(values.indptr))
    count = np.diff(values.indptr).astype(float)
    square = np.bincount(gene, values.data.astype(float) ** 2, n_genes)
    unit = np.where(count > 0, np.sqrt(square / np.maximum(count, 1.0)), 1.0)
    there = values.copy()
    there.data = np.ones_like(there.data)
    total = (values.T @ weights).toarray() / unit[:, None]
    seen = (there.T @ weights).toarray()
    logs = np.log(values.data / unit[gene])
    low, high = np.full(n_genes, np.inf), np.full(n_genes, -np.inf)
    np.minimum.at(low, gene, logs)
    np.maximum.at(high, gene, logs)
    low, high = np.where(count > 0, low, 0.0), np.where(count > 0, high, 0.0)
    width = np.where(high > low, high - low, 1.0)
    places = jnp.asarray((logs - low[gene]) / width[gene], jnp.float32)
    numbers, corners = (np.asarray(x) for x in node_weights(places, VALUE_NODES))
    spread = np.bincount(
        (gene[:, None] * VALUE_NODES + numbers).ravel(), corners.ravel(), n_genes * VALUE_NODES
    ).reshape(n_genes, VALUE_NODES)
    knots = np.exp(low[:, None] + width[:, None] * np.linspace(0, 1, VALUE_NODES))
    return SeenSums(_single(total), _single(seen), _single(knots), _single(spread)), _single(unit)


def _single(values: Any) -> jax.Array:
    return jnp.asarray(values, jnp.float32)
