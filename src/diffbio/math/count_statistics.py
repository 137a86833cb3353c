"""Statistics by which simulated counts are held against real ones, and the distance of their distributions."""

from typing import Any

import numpy as np
from scipy import sparse

TOP_GENES = 500  # whose correlations are taken
STATISTICS = ("mean", "variance", "mean-variance", "gene zeros", "cell zeros", "library", "correlation")


def count_statistics(counts: Any, *, trend: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Statistics of cells and genes.

    Of genes: log10 of mean and variance of the counts (of those with any), log10 variance less its trend over log10
    mean ("mean-variance"), fraction of zeros. Of cells: fraction of zeros, log10 library size. Correlation: Pearson's
    of log(1 + counts per median library), all pairs of the 500 genes of largest mean.

    Args:
        counts: (cells, genes), dense or sparse.
        trend: coefficients of a polynomial; None fits a cubic one to these counts. To compare two data sets, pass the
            "trend" of the first.

    Returns:
        The values by name, "trend", and "used", the genes (mask) that "mean" and "variance" are of.
    """
    x = sparse.csr_matrix(counts, dtype=np.float64, copy=True)
    x.sum_duplicates()
    x.eliminate_zeros()
    n = x.shape[0]
    library = np.asarray(x.sum(axis=1)).ravel()
    mean = np.asarray(x.mean(axis=0)).ravel()
    variance = np.asarray(x.multiply(x).mean(axis=0)).ravel() - mean**2
    used = (mean > 0) & (variance > 0)
    log_mean, log_variance = np.log10(mean[used]), np.log10(variance[used])
    if trend is None:
        trend = np.polyfit(log_mean, log_variance, 3) if used.sum() > 4 else np.zeros(4)
    top = np.sort(np.argsort(-mean, kind="stable")[: min(TOP_GENES, x.shape[1])])
    scale = np.median(library) / np.maximum(library, 1.0)
    logged = np.log1p(np.asarray(x[:, top].todense()) * scale[:, None])
    logged = logged[:, logged.std(axis=0) > 0]
    corr = np.corrcoef(logged.T) if logged.shape[1] > 1 else np.zeros((1, 1))
    return {
        "mean": log_mean,
        "variance": log_variance,
        "mean-variance": log_variance - np.polyval(trend, log_mean),
        "gene zeros": 1 - np.bincount(x.indices, minlength=x.shape[1]) / n,
        "cell zeros": 1 - np.diff(x.indptr) / x.shape[1],
        "library": np.log10(np.maximum(library, 1.0)),
        "correlation": np.atleast_1d(corr[np.triu_indices_from(corr, 1)]),
        "trend": trend,
        "used": used,
    }


def statistics_ks(real: Any, simulated: Any) -> dict[str, float]:
    """Kolmogorov-Smirnov distance of each statistic of `count_statistics`; genes need not match.

    Args:
        real: counts (cells, genes), whose mean-variance trend is taken for both, or their statistics.
        simulated: counts, or their statistics about that trend.
    """
    from scipy.stats import ks_2samp

    first = real if isinstance(real, dict) else count_statistics(real)
    second = simulated if isinstance(simulated, dict) else count_statistics(simulated, trend=first["trend"])
    return {name: float(ks_2samp(first[name], second[name]).statistic) for name in STATISTICS}
