"""What a trained model is asked about cells, in scvi-tools' words."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy import sparse

from ..chunks import CHUNK_CELLS, Chunk, joined
from ..errors import ConfigError, DataWarning, MissingKeyError
from . import posterior
from .abundance import AggregatedPosterior
from .base import rows_of
from .cells import CellSource
from .described import Described
from .differential import Comparison, compare_groups
from .importance import Weighting, resampled
from .peer import refuse

if TYPE_CHECKING:
    from anndata import AnnData

CORRELATIONS = ("spearman", "pearson")


class Queries(Described):
    """The methods that read cells and change nothing.

    All take `adata` (None: the model's; another one needs no setup, its genes are found by name), `indices` (row
    numbers or a mask; None: all cells) and `batch_size` (cells in a chunk). What draws takes `seed`: the same
    seed, indices and batch_size give the same draws. Nothing shows progress: `silent` is accepted for the sake of
    scripts. `dataloader` and `data_loader_kwargs` of scvi-tools are refused with what takes their place.
    """

    def get_latent_representation(
        self,
        adata: "AnnData | None" = None,
        indices: Any = None,
        give_mean: bool = True,  # noqa: FBT001, FBT002 - scvi-tools' signature
        mc_samples: int = 1,
        batch_size: int | None = None,
        return_dist: bool = False,  # noqa: FBT001, FBT002
        dataloader: None = None,
        *,
        seed: int = 0,
    ) -> Any:
        """Mean of q(z | x), (cells, latent).

        give_mean: False gives the mean of mc_samples draws instead (one draw by default).
        return_dist: gives mean and variance, also where give_mean is False.
        """
        refuse("get_latent_representation", {"dataloader": dataloader})
        if mc_samples < 1:
            msg = f"get_latent_representation: mc_samples must be at least 1, got {mc_samples!r}."
            raise ConfigError(msg)
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
        dataloader: None = None,
        return_mean: bool = True,  # noqa: FBT001, FBT002
        data_loader_kwargs: None = None,
        *,
        seed: int = 0,
    ) -> Any:
        """Evidence lower bound of log p(x) by one draw of z, in nats (higher is better): its mean, or per cell."""
        refuse("get_elbo", {"dataloader": dataloader, "data_loader_kwargs": data_loader_kwargs})
        parts = self.evaluate(posterior.elbo, adata, indices, batch_size, seed=seed, needs_counts="get_elbo")
        return _mean_of(joined(parts)["elbo"], return_mean)

    def get_reconstruction_error(
        self,
        adata: "AnnData | None" = None,
        indices: Any = None,
        batch_size: int | None = None,
        dataloader: None = None,
        return_mean: bool = True,  # noqa: FBT001, FBT002
        data_loader_kwargs: None = None,
        *,
        seed: int = 0,
    ) -> Any:
        """-log p(x | z) at a draw of z, in nats: its mean over cells, or per cell."""
        refuse("get_reconstruction_error", {"dataloader": dataloader, "data_loader_kwargs": data_loader_kwargs})
        who = "get_reconstruction_error"
        parts = self.evaluate(posterior.reconstruction, adata, indices, batch_size, seed=seed, needs_counts=who)
        return _mean_of(joined(parts)["error"], return_mean)

    def get_marginal_ll(
        self,
        adata: "AnnData | CellSource | None" = None,
        indices: Any = None,
        n_mc_samples: int = 1000,
        batch_size: int | None = None,
        return_mean: bool = True,  # noqa: FBT001, FBT002
        dataloader: None = None,
        data_loader_kwargs: None = None,
        *,
        n_mc_samples_per_pass: int = 1,
        seed: int = 0,
    ) -> Any:
        """Log p(x) by importance sampling from the posterior, in nats: its mean over cells, or per cell.

        A lower bound on average, which rises to log p(x) with n_mc_samples; those are rounded up to whole passes.
        n_mc_samples_per_pass: draws at a time; more take more memory.
        """
        refuse("get_marginal_ll", {"dataloader": dataloader, "data_loader_kwargs": data_loader_kwargs})
        for name, value in (("n_mc_samples", n_mc_samples), ("n_mc_samples_per_pass", n_mc_samples_per_pass)):
            if value < 1:
                msg = f"get_marginal_ll: {name} must be at least 1, got {value!r}."
                raise ConfigError(msg)
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
        weights: str | None = None,
        batch_size: int | None = None,
        return_mean: bool = True,  # noqa: FBT001, FBT002
        return_numpy: bool | None = None,  # noqa: FBT001
        silent: bool = True,  # noqa: FBT001, FBT002
        dataloader: None = None,
        data_loader_kwargs: None = None,
        *,
        seed: int = 0,
        **importance_weighting_kwargs: Any,
    ) -> Any:
        """Decoded gene expression at draws of z: a table (cells, genes).

        transform_batch: name of a batch (or several, then averaged over) to decode all cells as.
        gene_list: names of the genes to give; their order is that of the model.
        library_size: gene fractions are multiplied by it; 'latent' gives expected counts at each cell's library.
        n_samples: draws of z per cell.
        n_samples_overall: gives that many draws in all, of cells drawn with replacement: (draws, genes).
        weights: with n_samples_overall: 'importance' draws them anew, by how many of the cells they explain
            (`models.importance`, which says what importance_weighting_kwargs there are).
        return_mean: over the draws; otherwise an array (draws, cells, genes).
        return_numpy: an array in place of a table; that of n_samples_overall is always an array.

        Raises:
            ConfigError: arguments contradict each other.
            DataError: a batch or gene is not the model's.
        """
        who = "get_normalized_expression"
        refuse(who, {"dataloader": dataloader, "data_loader_kwargs": data_loader_kwargs})
        weighting = Weighting.of(weights, importance_weighting_kwargs, who)
        if weights is not None and n_samples_overall is None:
            msg = f"{who}: weights={weights!r} needs n_samples_overall=, the number of draws."
            raise ConfigError(msg)
        for name, value in (("n_samples", n_samples), ("n_samples_overall", n_samples_overall)):
            if value is not None and value < 1:
                msg = f"{who}: {name} must be at least 1, got {value!r}."
                raise ConfigError(msg)
        if n_samples_overall is not None and n_samples != 1:
            msg = f"{who}: pass n_samples, draws per cell, or n_samples_overall, draws in all."
            raise ConfigError(msg)
        if isinstance(library_size, str) and library_size != "latent":
            msg = f"get_normalized_expression: library_size must be a number or 'latent', got {library_size!r}."
            raise ConfigError(msg)
        cells = self.cells(adata)
        rows = rows_of(indices, cells.n_cells)
        if n_samples_overall is not None:
            rows = np.random.default_rng(seed).choice(rows, n_samples_overall)
        genes = self.registry.gene_columns(gene_list)
        stacked = n_samples > 1 and not return_mean
        arrays = {
            "genes": jnp.asarray(genes),
            "batches": None if transform_batch is None else jnp.asarray(self.registry.batch_codes(transform_batch)),
            "library_size": None if library_size == "latent" else jnp.asarray(float(library_size)),
        }
        chunk = batch_size or max(1, CHUNK_CELLS // (n_samples if stacked else 1))
        if weighting is not None:
            of_pool = {"genes": arrays["genes"], "library_size": arrays["library_size"], "code": None}
            if arrays["batches"] is not None:
                if len(arrays["batches"]) > 1:
                    msg = f"{who}: weights='importance' takes one transform_batch, not the mean over several."
                    raise ConfigError(msg)
                of_pool["code"] = arrays["batches"][0]
            return resampled(self, cells, rows, weighting, arrays=of_pool, batch_size=chunk, seed=seed)
        parts = self.evaluate(
            posterior.expression, adata, rows, chunk, seed=seed, arrays=arrays,
            n_samples=n_samples, mean=return_mean,
        )
        values = joined(parts)["expression"]
        if stacked:
            if return_numpy is False:
                message = f"{who}: draws that are not averaged are an array, not a table: return_numpy=False is not met"
                warnings.warn(message, DataWarning, stacklevel=2)
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
        dataloader: None = None,
        *,
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        """Parameters of p(x | z) at draws of z: `mean`, `dispersions` (not poisson), `dropout` (zinb).

        Each (cells, genes), or (draws, cells, genes) with n_samples > 1; give_mean averages over the draws.
        dropout: probability of an extra zero.
        """
        refuse("get_likelihood_parameters", {"dataloader": dataloader})
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
        dataloader: None = None,
        silent: bool = True,  # noqa: FBT001, FBT002
        *,
        seed: int = 0,
    ) -> Any:
        """Counts drawn from p(x' | z) at draws of z from q(z | x).

        Returns:
            csr_matrix (cells, genes); with n_samples > 1 a sparse coo_array (cells, genes, draws).
        """
        refuse("posterior_predictive_sample", {"dataloader": dataloader})
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
        silent: bool = True,  # noqa: FBT001, FBT002
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
        dataloader: None = None,
        *,
        seed: int = 0,
    ) -> np.ndarray:
        """Library sizes, (cells, 1): their mean under q(l | x), or a draw; the sum of the counts if observed."""
        refuse("get_latent_library_size", {"dataloader": dataloader})
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
        silent: bool = False,  # noqa: FBT001, FBT002
        weights: str | None = "uniform",
        filter_outlier_cells: bool = False,  # noqa: FBT001, FBT002
        importance_weighting_kwargs: Mapping[str, Any] | None = None,
        *,
        n_samples_overall: int = 5000,
        use_permutation: bool = False,
        m_permutation: int = 10_000,
        change_fn: str | Callable[..., Any] | None = None,
        m1_domain_fn: Callable[..., Any] | None = None,
        pseudocounts: float | None = None,
        threshold_counts: float = 0.01,
        test_mode: str = "three",
        cred_interval_lvls: Sequence[float] | None = None,
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
            silent: there is no progress bar to silence.
            weights: 'uniform', or 'importance': draws count by how many cells of their group they explain
                (Boyeau et al. 2023); costs a likelihood for every pair of a draw and a cell, max_cells at most.
            filter_outlier_cells: leaves out, when cells are drawn, the tenth of each group that is farthest out in
                the latent space (an elliptic envelope); all_stats are of all cells.
            importance_weighting_kwargs: max_cells, truncation, n_mc_samples, n_mc_samples_per_pass, see
                `models.importance`.
            n_samples_overall: draws per group, shared by the batches.
            use_permutation: pairs the draws at random, m_permutation times.
            m_permutation: see above.
            change_fn: of (f1, f2, pseudocounts), in place of the log2 fold change (None, 'log-fold').
            m1_domain_fn: of the changes (draws, genes): where a gene is changed up, and where down, as two masks;
                in place of the comparison with delta.
            pseudocounts: c above; None finds it from the fractions of genes that a group does not express.
            threshold_counts: mean count of a group below which it does not express a gene.
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
            cred_interval_lvls=tuple(cred_interval_lvls or ()), all_stats=all_stats, batch_size=batch_size, seed=seed,
            weights=weights, weighting=dict(importance_weighting_kwargs or {}), change_fn=change_fn,
            m1_domain_fn=m1_domain_fn, threshold_counts=threshold_counts, filter_outlier_cells=filter_outlier_cells,
        )
        groups = (groupby, group1, group2, idx1, idx2)
        return compare_groups(self, self._names(adata), self.cells(adata), groups, how)

    def get_aggregated_posterior(
        self,
        adata: "AnnData | None" = None,
        indices: Any = None,
        batch_size: int | None = None,
        dof: float | None = 3.0,
    ) -> AggregatedPosterior:
        """The mixture of q(z | x) over cells, with `log_prob` and `sample`; dof: of Student's t, None is Gaussian."""
        if dof is not None and not dof > 0:
            msg = f"get_aggregated_posterior: dof must be above 0 or None, got {dof!r}."
            raise ConfigError(msg)
        mean, var = self.get_latent_representation(adata, indices, batch_size=batch_size, return_dist=True)
        return AggregatedPosterior(mean.astype(np.float64), np.sqrt(var.astype(np.float64)), dof)

    def differential_abundance(
        self,
        adata: "AnnData | None" = None,
        sample_key: str | None = None,
        batch_size: int | None = None,
        num_cells_posterior: int | None = None,
        dof: float | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """Log density of every cell's latent mean under the aggregated posterior of every sample.

        A table (cells, samples) in `adata.obsm["da_log_probs"]`: where a sample has more of its cells, its column is
        larger.

        Args:
            adata: None is the model's.
            sample_key: column of obs with the samples.
            batch_size: cells in a chunk.
            num_cells_posterior: cells per sample that its posterior is made of, at most; None takes all.
            dof: of Student's t in place of each Gaussian.
            seed: of the choice of cells.

        Raises:
            ConfigError: sample_key is missing, or an argument is out of range.
            MissingKeyError: obs has no such column.
        """
        names = self._names(adata)
        if sample_key is None:
            msg = "differential_abundance: pass sample_key=, the column of obs with the samples."
            raise ConfigError(msg)
        if sample_key not in names.obs:
            listed = ", ".join(map(str, names.obs.columns))
            msg = f"differential_abundance: obs has no column {sample_key!r}; it has {listed}."
            raise MissingKeyError(msg)
        if num_cells_posterior is not None and num_cells_posterior < 1:
            msg = f"differential_abundance: num_cells_posterior must be at least 1, got {num_cells_posterior!r}."
            raise ConfigError(msg)
        whole = self.get_aggregated_posterior(adata, batch_size=batch_size, dof=dof)
        rng, columns = np.random.default_rng(seed), {}
        samples = pd.Categorical(names.obs[sample_key])
        for code, sample in enumerate(samples.categories):
            rows = np.flatnonzero(samples.codes == code)
            if not len(rows):
                continue
            if num_cells_posterior is not None:
                rows = rng.permutation(rows)[:num_cells_posterior]
            part = AggregatedPosterior(whole.mean[rows], whole.sd[rows], dof)
            columns[sample] = part.log_prob(whole.mean)
        names.obsm["da_log_probs"] = pd.DataFrame(columns, index=names.obs_names)

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
