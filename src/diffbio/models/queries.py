"""What a trained model is asked about cells, in scvi-tools' words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy import sparse

from ..chunks import CHUNK_CELLS, Chunk, joined
from ..errors import ConfigError
from . import posterior
from .base import Model, rows_of
from .cells import CellSource
from .differential import Comparison, compare_groups

if TYPE_CHECKING:
    from anndata import AnnData

CORRELATIONS = ("spearman", "pearson")


class Queries(Model):
    """The methods that read cells and change nothing.

    All take `adata` (None: the model's; another one needs no setup, its genes are found by name), `indices` (row
    numbers or a mask; None: all cells) and `batch_size` (cells in a chunk). What draws takes `seed`: the same
    seed, indices and batch_size give the same draws.
    """

    def get_latent_representation(
        self,
        adata: "AnnData | None" = None,
        indices: Any = None,
        give_mean: bool = True,  # noqa: FBT001, FBT002 - scvi-tools' signature
        mc_samples: int = 1,
        batch_size: int | None = None,
        return_dist: bool = False,  # noqa: FBT001, FBT002
        *,
        seed: int = 0,
    ) -> Any:
        """Mean of q(z | x), (cells, latent).

        give_mean: False gives the mean of mc_samples draws instead (one draw by default).
        return_dist: gives mean and variance.
        """
        q = joined(self.evaluate(posterior.latents, adata, indices, batch_size))
        if return_dist:
            return q["mean"], q["var"]
        if give_mean:
            return q["mean"]
        rng = np.random.default_rng(seed)
        sd = np.sqrt(q["var"] / mc_samples)  # of the mean of that many draws
        return q["mean"] + sd * rng.standard_normal(sd.shape, np.float32)

    def get_elbo(
        self,
        adata: "AnnData | None" = None,
        indices: Any = None,
        batch_size: int | None = None,
        return_mean: bool = True,  # noqa: FBT001, FBT002
        *,
        seed: int = 0,
    ) -> Any:
        """Evidence lower bound of log p(x) by one draw of z, in nats (higher is better): its mean, or per cell."""
        parts = self.evaluate(posterior.elbo, adata, indices, batch_size, seed=seed, needs_counts="get_elbo")
        return _mean_of(joined(parts)["elbo"], return_mean)

    def get_reconstruction_error(
        self,
        adata: "AnnData | None" = None,
        indices: Any = None,
        batch_size: int | None = None,
        return_mean: bool = True,  # noqa: FBT001, FBT002
        *,
        seed: int = 0,
    ) -> Any:
        """-log p(x | z) at a draw of z, in nats: its mean over cells, or per cell."""
        who = "get_reconstruction_error"
        parts = self.evaluate(posterior.reconstruction, adata, indices, batch_size, seed=seed, needs_counts=who)
        return _mean_of(joined(parts)["error"], return_mean)

    def get_marginal_ll(
        self,
        adata: "AnnData | None" = None,
        indices: Any = None,
        n_mc_samples: int = 1000,
        batch_size: int | None = None,
        return_mean: bool = True,  # noqa: FBT001, FBT002
        *,
        n_mc_samples_per_pass: int = 1,
        seed: int = 0,
    ) -> Any:
        """Log p(x) by importance sampling from the posterior, in nats: its mean over cells, or per cell.

        A lower bound on average, which rises to log p(x) with n_mc_samples; those are rounded up to whole passes.
        n_mc_samples_per_pass: draws at a time; more take more memory.
        """
        passes = -(-n_mc_samples // n_mc_samples_per_pass)
        parts = self.evaluate(
            posterior.marginal, adata, indices, batch_size, seed=seed, needs_counts="get_marginal_ll",
            passes=passes, per_pass=n_mc_samples_per_pass,
        )
        return _mean_of(joined(parts)["log_likelihood"], return_mean)

    def get_normalized_expression(
        self,
        adata: "AnnData | CellSource | None" = None,
        indices: Any = None,
        transform_batch: Any = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | str = 1,
        n_samples: int = 1,
        n_samples_overall: int | None = None,
        batch_size: int | None = None,
        return_mean: bool = True,  # noqa: FBT001, FBT002
        return_numpy: bool | None = None,  # noqa: FBT001
        *,
        seed: int = 0,
    ) -> Any:
        """Decoded gene expression at draws of z: a table (cells, genes).

        transform_batch: name of a batch (or several, then averaged over) to decode all cells as.
        gene_list: names of the genes to give.
        library_size: gene fractions are multiplied by it; 'latent' gives expected counts at each cell's library.
        n_samples: draws of z per cell.
        n_samples_overall: gives that many draws in all, of cells drawn with replacement: (draws, genes).
        return_mean: over the draws; otherwise (draws, cells, genes).
        return_numpy: an array in place of a table.
        """
        if isinstance(library_size, str) and library_size != "latent":
            msg = f"get_normalized_expression: library_size must be a number or 'latent', got {library_size!r}."
            raise ConfigError(msg)
        cells = self.cells(adata)
        rows = rows_of(indices, cells.n_cells)
        if n_samples_overall is not None:
            rows = np.random.default_rng(seed).choice(rows, n_samples_overall)
            n_samples = 1
        genes = self.registry.gene_columns(gene_list)
        stacked = n_samples > 1 and not return_mean
        arrays = {
            "genes": jnp.asarray(genes),
            "batches": None if transform_batch is None else jnp.asarray(self.registry.batch_codes(transform_batch)),
            "library_size": None if library_size == "latent" else jnp.asarray(float(library_size)),
        }
        chunk = batch_size or max(1, CHUNK_CELLS // (n_samples if stacked else 1))
        parts = self.evaluate(
            posterior.expression, adata, rows, chunk, seed=seed, arrays=arrays,
            n_samples=n_samples, mean=return_mean,
        )
        values = joined(parts)["expression"]
        if stacked:
            return np.moveaxis(values, 1, 0)
        if return_numpy or n_samples_overall is not None:
            return values
        if isinstance(adata, CellSource):
            return values
        names = self._names(adata).obs_names[rows]
        return pd.DataFrame(values, index=names, columns=np.array(self.registry.var_names, dtype=object)[genes])

    def get_likelihood_parameters(
        self,
        adata: "AnnData | None" = None,
        indices: Any = None,
        n_samples: int = 1,
        give_mean: bool = False,  # noqa: FBT001, FBT002
        batch_size: int | None = None,
        *,
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        """Parameters of p(x | z) at draws of z: `mean`, `dispersions` (not poisson), `dropout` (zinb).

        Each (cells, genes), or (draws, cells, genes) with n_samples > 1; give_mean averages over the draws.
        dropout: probability of an extra zero.
        """
        found = joined(self._likelihood(adata, indices, batch_size, None, n_samples=n_samples, seed=seed))
        if n_samples == 1:
            return {name: value[:, 0] for name, value in found.items()}
        return {name: value.mean(1) if give_mean else np.moveaxis(value, 1, 0) for name, value in found.items()}

    def posterior_predictive_sample(
        self,
        adata: "AnnData | None" = None,
        indices: Any = None,
        transform_batch: Any = None,
        n_samples: int = 1,
        gene_list: Sequence[str] | None = None,
        batch_size: int | None = None,
        *,
        seed: int = 0,
    ) -> Any:
        """Counts drawn from p(x' | z) at draws of z from q(z | x).

        Returns:
            csr_matrix (cells, genes); with n_samples > 1 a sparse coo_array (cells, genes, draws).
        """
        genes, code = self.registry.gene_columns(gene_list), self._one_batch(transform_batch)
        rng = np.random.default_rng(seed)
        parts: list[list[sparse.coo_array]] = [[] for _ in range(n_samples)]
        for chunk in self._likelihood(adata, indices, batch_size, code, n_samples=n_samples, seed=seed, genes=genes):
            for i in range(n_samples):
                drawn = _counts_like({name: value[:, i] for name, value in chunk.items()}, rng)
                parts[i].append(sparse.coo_array(drawn))
        draws = [sparse.vstack(part, format="coo") for part in parts]
        if n_samples == 1:
            return sparse.csr_matrix(draws[0])
        where = [np.concatenate([draw.coords[axis] for draw in draws]) for axis in (0, 1)]
        number = np.repeat(np.arange(n_samples), [draw.nnz for draw in draws])
        values = np.concatenate([draw.data for draw in draws])
        return sparse.coo_array((values, (*where, number)), shape=(*draws[0].shape, n_samples))

    def get_feature_correlation_matrix(
        self,
        adata: "AnnData | None" = None,
        indices: Any = None,
        n_samples: int = 10,
        batch_size: int | None = None,
        rna_size_factor: float = 1000,
        transform_batch: Any = None,
        correlation_type: str = "spearman",
        *,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Correlation of genes over cells and draws of denoised expression, (genes, genes).

        Denoised: Gamma-distributed rates, without the Poisson noise, at a library of rna_size_factor.
        transform_batch: decode all cells as that batch; correlations of several are averaged.
        correlation_type: 'spearman' | 'pearson'.
        """
        if correlation_type not in CORRELATIONS:
            msg = f"correlation_type must be one of {CORRELATIONS}, got {correlation_type!r}."
            raise ConfigError(msg)
        codes = [None] if transform_batch is None else list(self.registry.batch_codes(transform_batch))
        matrices = []
        for code in codes:
            rng = np.random.default_rng(seed)
            chunks = self._likelihood(
                adata, indices, batch_size, code, n_samples=n_samples, seed=seed, size=float(rna_size_factor)
            )
            drawn = [_rates_like(chunk, rng) for chunk in chunks]
            rates = np.concatenate([part.reshape(-1, part.shape[-1]) for part in drawn])
            if correlation_type == "spearman":
                rates = rates.argsort(0).argsort(0)  # ranks: the rates are continuous, so that none are equal
            with np.errstate(invalid="ignore"):  # a gene that never varies has no correlation: NaN
                matrices.append(np.corrcoef(rates, rowvar=False))
        names = list(self.registry.var_names)
        return pd.DataFrame(np.mean(matrices, axis=0), index=names, columns=names)

    def get_latent_library_size(
        self,
        adata: "AnnData | None" = None,
        indices: Any = None,
        give_mean: bool = True,  # noqa: FBT001, FBT002
        batch_size: int | None = None,
        *,
        seed: int = 0,
    ) -> np.ndarray:
        """Library sizes, (cells, 1): their mean under q(l | x), or a draw; the sum of the counts if observed."""
        found = joined(self.evaluate(posterior.library, adata, indices, batch_size, seed=seed))
        return found["mean" if give_mean else "sample"][:, None]

    def differential_expression(
        self,
        adata: "AnnData | None" = None,
        groupby: str | None = None,
        group1: Any = None,
        group2: Any = None,
        idx1: Any = None,
        idx2: Any = None,
        mode: str = "vanilla",
        delta: float | None = 0.25,
        batch_size: int | None = None,
        all_stats: bool = True,  # noqa: FBT001, FBT002
        batch_correction: bool = False,  # noqa: FBT001, FBT002
        batchid1: Any = None,
        batchid2: Any = None,
        fdr_target: float = 0.05,
        *,
        n_samples_overall: int = 5000,
        use_permutation: bool = False,
        m_permutation: int = 10_000,
        pseudocounts: float | None = None,
        test_mode: str = "three",
        cred_interval_lvls: Sequence[float] = (),
        seed: int = 0,
    ) -> pd.DataFrame:
        """Genes expressed differently between groups of cells (Lopez et al. 2018, Boyeau et al. 2019).

        Draws of cells of either group, and of z for each, are decoded to gene fractions f1 and f2. Mode 'vanilla'
        compares P(f1 > f2) with its complement. Mode 'change' asks how likely |log2 (f1 + c) / (f2 + c)| reaches
        delta, and calls the genes whose expected share of false discoveries is at most fdr_target.

        Args:
            adata: None is the model's.
            groupby: column of obs.
            group1: its value or values to compare; None takes all.
            group2: the value to compare with; None takes all other cells.
            idx1: in place of groupby: cells, as a mask, row numbers, or a query of obs.
            idx2: the cells to compare with; None takes all others.
            mode: 'vanilla' | 'change'.
            delta: least log2 fold change of interest; None finds it from the data.
            batch_size: cells in a chunk.
            all_stats: adds statistics of the raw counts.
            batch_correction: decodes both groups as the same batches.
            batchid1: with batch_correction, batches to decode group 1 as; None takes all.
            batchid2: the same of group 2.
            fdr_target: see above.
            n_samples_overall: draws per group, shared by the batches.
            use_permutation: pairs the draws at random, m_permutation times.
            m_permutation: see above.
            pseudocounts: c above; None finds it from the fractions of genes that a group does not express.
            test_mode: 'three' takes the likelier direction, 'two' adds both.
            cred_interval_lvls: levels of highest-density intervals of the fold change to report.
            seed: of the draws.

        Returns:
            A table with one row per gene and comparison: of 'vanilla' proba_m1, proba_m2, bayes_factor, scale1,
            scale2; of 'change' proba_de, proba_not_de, bayes_factor, scale1, scale2, pseudocounts, delta, lfc_mean,
            lfc_median, lfc_std, lfc_min, lfc_max and is_de_fdr_<target>; with all_stats raw_mean1, raw_mean2,
            non_zeros_proportion1, non_zeros_proportion2, raw_normalized_mean1, raw_normalized_mean2; with groupby
            comparison, group1, group2.

        Raises:
            ConfigError: arguments contradict each other or are out of range.
            DataError: a group has no cells, or the counts are needed and minified.
        """
        how = Comparison(
            mode=mode, delta=delta, batch_correction=batch_correction, batchid1=batchid1, batchid2=batchid2,
            fdr_target=fdr_target, n_samples_overall=n_samples_overall, use_permutation=use_permutation,
            m_permutation=m_permutation, pseudocounts=pseudocounts, test_mode=test_mode,
            cred_interval_lvls=tuple(cred_interval_lvls), all_stats=all_stats, batch_size=batch_size, seed=seed,
        )
        groups = (groupby, group1, group2, idx1, idx2)
        return compare_groups(self, self._names(adata), self.cells(adata), groups, how)

    def _likelihood(
        self, adata: Any, indices: Any, batch_size: int | None, code: Any, *,
        n_samples: int, seed: int, genes: np.ndarray | None = None, size: float | None = None,
    ) -> Any:
        genes = np.arange(len(self.registry.var_names)) if genes is None else genes
        arrays = {"genes": jnp.asarray(genes), "code": None if code is None else jnp.asarray(code)}
        chunk = batch_size or max(1, CHUNK_CELLS // n_samples)
        return self.evaluate(
            posterior.likelihood, adata, indices, chunk, seed=seed, arrays=arrays, n_samples=n_samples, size=size
        )

    def _one_batch(self, transform_batch: Any) -> Any:
        if transform_batch is None:
            return None
        codes = self.registry.batch_codes(transform_batch)
        if len(codes) != 1:
            msg = "posterior_predictive_sample: give one transform_batch: the mean of counts of several is no count."
            raise ConfigError(msg)
        return codes[0]

    def _names(self, adata: "AnnData | None") -> "AnnData":
        self.cells(adata)  # says what is wrong if there is none
        found = self.adata if adata is None else adata
        assert found is not None
        return found


def _mean_of(values: np.ndarray, mean: bool) -> Any:  # noqa: FBT001
    return float(values.mean(dtype=np.float64)) if mean else values


def _rates_like(chunk: Chunk, rng: np.random.Generator) -> np.ndarray:
    """Rates of the Poisson, Gamma-distributed around the mean; numpy draws Gammas 40 times faster than XLA's CPU."""
    mean = chunk["mean"]
    if "dispersions" not in chunk:
        return mean
    theta = np.maximum(chunk["dispersions"], 1e-6)
    return mean * (rng.standard_gamma(theta, dtype=np.float32) / theta)


def _counts_like(chunk: Chunk, rng: np.random.Generator) -> np.ndarray:
    counts = rng.poisson(np.minimum(_rates_like(chunk, rng), 1e8)).astype(np.float32)
    if "dropout" in chunk:
        counts[rng.random(counts.shape, np.float32) < chunk["dropout"]] = 0
    return counts
