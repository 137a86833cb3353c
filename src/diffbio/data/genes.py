"""Highly variable genes (seurat_v3), in two passes over chunks, so that the file may exceed the memory."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, DataError, DataWarning
from .matrix import row_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray


def highly_variable_genes(
    matrix: Any,
    *,
    n_top_genes: int = 2000,
    batch_labels: NDArray[np.integer] | None = None,
    span: float = 0.3,
    var_names: Sequence[str] | pd.Index | None = None,
) -> pd.DataFrame:
    """Rank genes by the variance of their standardised counts, per batch, and pick the top ones.

    Stuart et al. 2019 (Seurat v3): in each batch a loess of log10 variance on log10 mean gives the variance
    expected of a gene; counts are standardised with it and clipped at sqrt(cells); the variance of that ranks
    the genes. Genes are picked by their median rank over the batches in which they are among the top ones.
    The same method as `scanpy.pp.highly_variable_genes(flavor="seurat_v3")`, which needs the matrix in
    memory. With batches scanpy's sums carry rounding errors, which split ties at random; ours are exact, so
    the result does not depend on the order of cells, and a few picks in a thousand differ.

    Parameters
    ----------
    matrix
        Raw counts (cells, genes): array, scipy sparse matrix, or `DiskMatrix` (see `counts_of`).
    n_top_genes
        How many genes to pick; all of them where there are fewer.
    batch_labels
        Codes (cells,) from 0; None is one batch. Batches of fewer than 3 cells do not vote, with a warning.
    span
        Fraction of the genes in each local fit, in (0, 1]. Where the fit fails (a batch with few distinct
        means), wider spans up to 1 are tried, with a warning.
    var_names
        Index of the result.

    Returns
    -------
    DataFrame, one row per gene: `highly_variable`, `highly_variable_rank` (median rank, NaN where never among
    the top), `highly_variable_nbatches`, `means`, `variances` (over all cells), `variances_norm` (mean over
    batches).

    Raises
    ------
    ConfigError : n_top_genes below 1 or span outside (0, 1].
    DataError : labels do not fit the cells, or no batch can be used.
    """
    if n_top_genes < 1 or not 0 < span <= 1:
        msg = f"n_top_genes must be at least 1 and span in (0, 1], got {n_top_genes} and {span}"
        raise ConfigError(msg)
    n_cells, n_genes = matrix.shape
    labels = np.zeros(n_cells, np.int64) if batch_labels is None else np.asarray(batch_labels)
    if labels.shape != (n_cells,) or (n_cells and labels.min() < 0):
        msg = f"batch_labels: shape {labels.shape} for {n_cells} cells; give one code from 0 for each cell"
        raise DataError(msg)
    sizes = np.bincount(labels)
    sums, squares = _moments(matrix, labels, len(sizes))
    with np.errstate(divide="ignore", invalid="ignore"):
        means = sums / sizes[:, None]
        # sums of whole numbers are exact, so that genes with equal counts tie exactly, in any order of cells
        variances = (sizes[:, None] * squares - sums**2) / (sizes * (sizes - 1.0))[:, None]
    usable = np.flatnonzero(sizes > 2)
    if len(usable) < np.count_nonzero(sizes):
        _warn(
            f"{np.count_nonzero(sizes) - len(usable)} batches of fewer than 3 cells do not vote on the genes"
        )
    if not len(usable):
        msg = f"{n_cells} cells in {len(sizes)} batches: none has the 3 cells needed to find variable genes"
        raise DataError(msg)
    expected_sd = np.ones((len(sizes), n_genes))
    for batch in usable:
        expected_sd[batch] = _expected_sd(means[batch], variances[batch], span, int(batch))
    n_all = int(sizes.sum())
    overall = sums.sum(axis=0) / n_all
    overall_variance = (n_all * squares.sum(axis=0) - sums.sum(axis=0) ** 2) / (n_all * (n_all - 1.0))
    limit = expected_sd * np.sqrt(sizes)[:, None] + np.where(np.isfinite(means), means, 0.0)
    sums, squares = _moments(matrix, labels, len(sizes), limit)
    n, mean, sd = sizes[usable, None], means[usable], expected_sd[usable]
    normalised = (n * mean**2 + squares[usable] - 2 * sums[usable] * mean) / ((n - 1) * sd**2)
    return _table(normalised, overall, overall_variance, min(n_top_genes, n_genes), var_names)


def _moments(
    matrix: Any, labels: NDArray[np.integer], n_batches: int, limit: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return sums and sums of squares, each (batches, genes), of the counts clipped at `limit`."""
    n_genes = matrix.shape[1]
    size = n_batches * n_genes
    sums, squares = np.zeros(size), np.zeros(size)
    for start, rows in row_chunks(matrix, chunk_bytes=8 << 20):
        labels_here = labels[start : start + len(rows.starts) - 1]
        slot = np.repeat(labels_here * n_genes, np.diff(rows.starts)) + rows.columns
        values = rows.values.astype(np.float64)
        if limit is not None:
            np.minimum(values, limit.ravel()[slot], out=values)
        sums += np.bincount(slot, values, minlength=size)
        squares += np.bincount(slot, values * values, minlength=size)
    return sums.reshape(n_batches, n_genes), squares.reshape(n_batches, n_genes)


def _expected_sd(
    means: NDArray[np.float64], variances: NDArray[np.float64], span: float, batch: int
) -> NDArray[np.float64]:
    """Return the standard deviation (genes,) that the loess trend gives each mean; 1 for constant genes."""
    from skmisc.loess import loess

    varies = variances > 0
    expected = np.ones(len(means))
    if not varies.any():
        return expected
    x, y = np.log10(means[varies]), np.log10(variances[varies])
    for width in [span, *(wider for wider in (0.5, 0.75, 1.0) if wider > span)]:
        try:
            model = loess(x, y, span=width, degree=2)
            model.fit()
        except ValueError:  # too few distinct means inside the span
            continue
        if width != span:
            _warn(f"loess with span {span} failed in batch {batch}; span {width} was used")
        expected[varies] = np.sqrt(10.0**model.outputs.fitted_values)
        return expected
    _warn(f"loess failed in batch {batch}: genes are ranked by variance against a straight line")
    line = np.polyfit(x, y, min(1, len(np.unique(x)) - 1))
    expected[varies] = np.sqrt(10.0 ** np.polyval(line, x))
    return expected


def _table(
    normalised: NDArray[np.float64],
    means: NDArray[np.float64],
    variances: NDArray[np.float64],
    n_top: int,
    var_names: Sequence[str] | pd.Index | None,
) -> pd.DataFrame:
    import pandas as pd

    ranks = np.argsort(np.argsort(-normalised, axis=1, kind="stable"), axis=1).astype(np.float32)
    n_batches = (ranks < n_top).sum(axis=0)
    ranks[ranks >= n_top] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # genes that are never among the top: all NaN
        median = np.nanmedian(ranks, axis=0)
    order = np.lexsort((-n_batches, np.where(np.isnan(median), np.inf, median)))
    chosen = np.zeros(len(median), bool)
    chosen[order[:n_top]] = True
    return pd.DataFrame(
        {
            "highly_variable": chosen,
            "highly_variable_rank": median,
            "highly_variable_nbatches": n_batches.astype(np.int64),
            "means": means,
            "variances": variances,
            "variances_norm": normalised.mean(axis=0),
        },
        index=None if var_names is None else pd.Index(var_names),
    )


def _warn(message: str) -> None:
    warnings.warn(message, DataWarning, stacklevel=3)
