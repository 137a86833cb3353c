"""Doublets by nearest neighbours among simulated ones (Scrublet); `DifferentiableSoloDetector` is re-exported here."""

import dataclasses
import functools
import math
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ...errors import DataError
from ...math.doublets import (
    LEAST_COUNT,
    bayesian_error,
    bayesian_score,
    content_order,
    doublet_positions,
    draw_pairs,
    minimum_between_modes,
    most_variable,
    simulated_share,
    smoothed_share,
)
from ...math.principal import principal_components
from ..base import Config, Data, Operator, checked_counts, nonnegative, positive, setting
from .solo_detection import DifferentiableSoloDetector as DifferentiableSoloDetector
from .solo_detection import SoloDetectorConfig as SoloDetectorConfig

FEWEST_CELLS = 30  # below, not even three observed cells are counted as neighbours
REFERENCE_CELLS = 20_000  # more cells are scored against a random part: k = 0.5 sqrt(n) would make the cost n^1.5
MOST_CALLED = 3.0  # times the expected rate; a threshold that calls more lies beside the valley it looked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoubletScorerConfig(Config):
    """Settings of `DifferentiableDoubletScorer`; the defaults are Scrublet's, but for the rate and the temperatures.

    n_genes: width of the counts.
    n_neighbors: observed cells among the neighbours counted; 0 is 0.5 sqrt(cells). With the simulated doublets
        (1 + sim_doublet_ratio) times as many are counted.
    expected_doublet_rate: share of doublets among the cells, in (0, 0.5).
    doublet_rate_sd: uncertainty of that rate (standard deviation); it enters `doublet_errors`.
    sim_doublet_ratio: simulated doublets for each cell.
    n_pca_components: dimensions in which neighbours are sought.
    gene_percentile: genes whose v-score is below this percentile are left out; 0 keeps all that vary.
    neighbor_temperature: how softly neighbours are counted, in units of the gap between the distance of the last one
        counted and that of the last one looked at; 0+ is Scrublet's count.
    threshold_temperature: of `predicted_doublets`, in units of the score; 0+ is the hard call.
    """

    n_genes: int = positive(2000)
    n_neighbors: int = nonnegative(0)
    expected_doublet_rate: float = setting(0.06, "in (0, 0.5)", lambda v: 0 < v < 0.5)
    doublet_rate_sd: float = positive(0.02)
    sim_doublet_ratio: float = positive(2.0)
    n_pca_components: int = positive(30)
    gene_percentile: float = setting(85.0, "in [0, 100)", lambda v: 0 <= v < 100)
    neighbor_temperature: float = positive(0.25)
    threshold_temperature: float = positive(0.02)


class DoubletScores(TypedDict):
    """What `DifferentiableDoubletScorer` adds."""

    doublet_scores: Float[Array, " cells"]  # in (0, 1)
    predicted_doublets: Float[Array, " cells"]  # sigmoid((score - threshold) / threshold_temperature)
    doublet_errors: Float[Array, " cells"]  # standard errors of the scores
    simulated_doublet_scores: Float[Array, " doublets"]
    doublet_threshold: Float[Array, ""]
    threshold_found: Bool[Array, ""]  # False: the threshold is a quantile, see the class


class DifferentiableDoubletScorer(Operator):
    """Scores a cell by the share of simulated doublets among its neighbours (Scrublet; Wolock et al. 2019).

    Sums of two random cells are simulated doublets. Counts are divided by the cell's total; the genes of highest
    v-score are standardised and projected on principal components of the observed cells. The share q of simulated
    doublets among the nearest neighbours gives by Bayes' rule the score, a probability at the expected rate. As
    `neighbor_temperature` -> 0 the score is Scrublet's for the same pairs. Gradients flow from scores and threshold to
    the counts; genes, pairs and candidates for neighbours are chosen outside the gradient.

    The threshold is the valley between the two modes of the simulated doublets' scores (embedded and neotypic ones).
    Where there are not two modes, or the valley would call more than three times the expected rate,
    `threshold_found` is False and the threshold is the quantile of the observed scores that calls the expected rate.

    library_size: counts of a cell over all genes, where `counts` holds some; by default the sum.
    doublet_pairs: rows of the two cells of each simulated doublet; by default drawn at random, in an order given by
    the counts, so that cells in another order get the same scores. In train mode each call draws new pairs.

    Differences from Scrublet: neighbours are exact up to 20,000 points; beyond 20,000 cells, 20,000 of them and two
    simulated doublets for each (`sim_doublet_ratio`), of pairs of any cells, are the reference for all. Which cells
    are in it a hash of their counts decides: neither seed nor mode. Doublets of two alike cells cannot be seen by any
    of this.
    """

    config: DoubletScorerConfig
    graph_of_cells = True
    cell_numbers = frozenset({"doublet_pairs"})

    def __init__(self, config: DoubletScorerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.pair_seed = nnx.BatchStat(jax.random.randint(rngs.params(), (), 0, 2**31 - 1))
        self.noise = rngs.noise.fork()

    def __call__(
        self,
        counts: Float[Array, "cells genes"],
        library_size: Float[Array, " cells"] | None = None,
        doublet_pairs: Int[Array, "doublets parents"] | None = None,
    ) -> DoubletScores:
        """Scores all cells; a doublet detector needs all cells of one experiment, and those alone.

        Raises:
            DataError: fewer than 30 cells; too few genes or cells for the components; and, where values are known (not
                under jit): cells without counts, negative or missing values, no gene that varies, pairs out of range.
        """
        n, config = len(counts), self.config
        library = counts.sum(1) if library_size is None else library_size
        self._check(counts, library, doublet_pairs)
        n_reference = min(n, REFERENCE_CELLS)
        reference = None
        if doublet_pairs is None or n > REFERENCE_CELLS:
            key = self.noise() if self.training else jax.random.key(self.pair_seed[...])
            drawn, reference = _draw(key, counts, n_reference, max(1, int(n_reference * config.sim_doublet_ratio)))
            doublet_pairs = drawn if doublet_pairs is None else doublet_pairs
        observed = self._positions(counts, library)
        simulated = doublet_positions(observed, library, doublet_pairs)
        k = round(0.5 * math.sqrt(n_reference)) if config.n_neighbors == 0 else config.n_neighbors
        ratio = len(doublet_pairs) / n_reference
        k = max(1, min(round(k * (1 + ratio)), n_reference + len(doublet_pairs) - 2))
        shares = simulated_share(
            observed, simulated, reference if n > n_reference else None, k=k, temperature=config.neighbor_temperature
        )
        return _scored(*shares, k=k, ratio=ratio, config=config)

    def _positions(self, counts: jax.Array, library: jax.Array) -> jax.Array:
        """Principal components of standardised counts of the variable genes, of cells of one library size."""
        n_kept = self._n_kept()
        factor = library.mean() / jnp.where(library > 0, library, 1.0)
        found = _choose(*jax.lax.stop_gradient((counts, factor)), self.config.gene_percentile, n_kept)
        if not isinstance(found, jax.core.Tracer) and not found.any():
            msg = (
                "DifferentiableDoubletScorer: no gene in data['counts'] varies between cells and has 3 normalised "
                "counts or more in at least 3 of them; pass raw counts of one experiment."
            )
            raise DataError(msg)
        return _projected(counts, factor, found, n_kept, self.config.n_pca_components)

    def _n_kept(self) -> int:
        """The most genes that can lie at or above the percentile, but for ties; of those no more are used."""
        return self.config.n_genes - math.floor((self.config.n_genes - 1) * self.config.gene_percentile / 100)

    def _check(self, counts: jax.Array, library: jax.Array, pairs: jax.Array | None) -> None:
        who, n, n_components = "DifferentiableDoubletScorer", len(counts), self.config.n_pca_components
        if n < FEWEST_CELLS:
            msg = f"{who}: data['counts'] has {n} cells; doublets need at least {FEWEST_CELLS}."
            raise DataError(msg)
        if n_components > min(n, self._n_kept()):
            msg = (
                f"{who}: n_pca_components is {n_components}, but there are {n} cells and {self._n_kept()} genes above "
                f"gene_percentile; lower one of the two."
            )
            raise DataError(msg)
        if pairs is not None and pairs.shape[1] != 2:
            msg = f"{who}: data['doublet_pairs'] must have 2 columns, the cells of each doublet; got {pairs.shape[1]}."
            raise DataError(msg)
        if any(isinstance(a, jax.core.Tracer) for a in (counts, library, pairs)):
            return
        checked_counts(who, counts)
        empty = np.flatnonzero(~(np.asarray(library) > 0))
        if empty.size:
            rows = ", ".join(map(str, empty[:5])) + (", ..." if empty.size > 5 else "")
            msg = f"{who}: {empty.size} of {n} cells have no counts (rows {rows}); leave them out."
            raise DataError(msg)
        if pairs is not None and not bool(((pairs >= 0) & (pairs < n)).all()):
            msg = f"{who}: data['doublet_pairs'] must hold rows from 0 to {n - 1}."
            raise DataError(msg)

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableDoubletScorer", Data]]:
        """Pairs of its own; and given pairs and totals, with few genes chosen."""
        keys = jax.random.split(jax.random.key(0), 4)
        rate = jnp.where(jax.random.bernoulli(keys[0], 0.5, (30, 1)), jnp.arange(1.0, 11.0), jnp.arange(10.0, 0.0, -1))
        counts = 1.0 + jax.random.poisson(keys[1], rate).astype(jnp.float32)
        pairs = jax.random.randint(keys[2], (45, 2), 0, 30)
        library = counts.sum(1) * jax.random.uniform(keys[3], (30,), minval=1.5, maxval=2.5)

        def op(**settings: Any) -> DifferentiableDoubletScorer:
            settings = {"n_genes": 10, "gene_percentile": 0.0, "n_pca_components": 3, **settings}
            return cls(DoubletScorerConfig(**settings), rngs=nnx.Rngs(0))

        chosen = op(gene_percentile=40.0, n_neighbors=4, neighbor_temperature=1.0)
        given = {"counts": counts, "library_size": library, "doublet_pairs": pairs}
        return {"drawn pairs": (op(), {"counts": counts}), "given pairs, chosen genes": (chosen, given)}


@functools.partial(jax.jit, static_argnames=("percentile", "most"))
def _choose(counts: jax.Array, factor: jax.Array, percentile: float, most: int) -> jax.Array:
    """Which genes are variable, (genes,) of bool; of the counts only sums over cells are made."""
    x = counts * factor[:, None]
    mean = x.mean(0)
    variance = ((x - mean) ** 2).mean(0)
    detected = (x >= LEAST_COUNT).sum(0)

    def chosen(mean: Any, variance: Any, detected: Any) -> np.ndarray:
        return most_variable(np.asarray(mean), np.asarray(variance), np.asarray(detected), percentile, most=most)

    shape = jax.ShapeDtypeStruct(mean.shape, jnp.bool_)
    return jax.pure_callback(chosen, shape, mean, variance, detected)


@functools.partial(jax.jit, static_argnames=("n_kept", "n_components"))
def _projected(counts: jax.Array, factor: jax.Array, found: jax.Array, n_kept: int, n_components: int) -> jax.Array:
    """Principal components of the standardised genes that were found."""
    genes = jnp.argsort(~found, stable=True)[:n_kept]  # as many as any data may have, for one shape under jit
    x = counts[:, genes] * factor[:, None]
    centred = x - x.mean(0)
    variance = (centred**2).mean(0)
    used = found[genes] & (variance > 0)
    z = centred * jnp.where(used, jax.lax.rsqrt(jnp.where(used, variance, 1.0)), 0.0)
    return principal_components(z, n_components).scores


@functools.partial(jax.jit, static_argnames=("n_reference", "n_pairs"))
def _draw(key: jax.Array, counts: jax.Array, n_reference: int, n_pairs: int) -> tuple[jax.Array, jax.Array]:
    """Pairs of any cells, by the key; and the cells that are a reference, by their counts alone."""
    order = content_order(counts)
    return draw_pairs(key, order, n_pairs), order[:n_reference]


@functools.partial(jax.jit, static_argnames=("k", "ratio", "config"))
def _scored(
    of_cells: jax.Array, of_doublets: jax.Array, *, k: int, ratio: float, config: DoubletScorerConfig
) -> DoubletScores:
    """Scores, errors and threshold from the shares of simulated doublets among neighbours."""
    of_cells, of_doublets = smoothed_share(of_cells, k=k), smoothed_share(of_doublets, k=k)
    prior = {"ratio": ratio, "expected_rate": config.expected_doublet_rate}
    scores, simulated_scores = bayesian_score(of_cells, **prior), bayesian_score(of_doublets, **prior)
    valley = minimum_between_modes(simulated_scores)
    called = (scores > valley.value).mean()
    found = valley.found & (called <= MOST_CALLED * config.expected_doublet_rate)
    threshold = jnp.where(found, valley.value, jnp.quantile(scores, 1 - config.expected_doublet_rate))
    return {
        "doublet_scores": scores,
        "predicted_doublets": jax.nn.sigmoid((scores - threshold) / config.threshold_temperature),
        "doublet_errors": bayesian_error(of_cells, k=k, rate_sd=config.doublet_rate_sd, **prior),
        "simulated_doublet_scores": simulated_scores,
        "doublet_threshold": threshold,
        "threshold_found": found,
    }
