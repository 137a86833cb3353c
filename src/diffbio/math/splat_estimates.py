"""Parameters of the simulator from counts, on the host: Splatter's own estimates, and one set for each gene."""

from typing import Any

import numpy as np
from scipy import optimize, special, stats

KNOTS = 64  # quantiles that describe the library sizes of a group
EMPTY = -30.0  # logit of a group that no cell is in: its weight, 1e-13, is never drawn
BCV_CELLS, BCV_GENES = 400, 2000  # enough for one common dispersion


def estimate_splat(counts: np.ndarray, *, lib_norm: bool | None = None) -> dict[str, Any]:
    """Estimates Splat's parameters as Splatter's splatEstimate does (Zappia 2017 and its R code), from counts alone.

    Gene means: a gamma law by least Cramér-von Mises distance to winsorised means of normalised counts. Library sizes:
    log-normal, or normal where a Shapiro-Wilk test finds p > 0.2. Outliers: genes whose log mean is more than two MADs
    above the median. BCV: 0.1 + 0.25 times the common dispersion of edgeR, here from a part of the cells and genes;
    degrees of freedom by the moments of log deviances, as in limma. Dropout: a logistic curve of zeros against log
    means.

    Args:
        counts: (cells, genes), no empty cell.
        lib_norm: says which library law; None decides by the test.

    Returns:
        Parameters by Splatter's names in snake case, and "lib_norm".
    """
    library = counts.sum(axis=1, dtype=float)
    scaled = _normalised(counts, library)
    means = scaled.mean(axis=0)
    shape, rate = _gamma_fit(np.clip(means, *np.quantile(means, [0.1, 0.9])))
    if lib_norm is None:
        some = library if len(library) <= 5000 else np.random.default_rng(0).choice(library, 5000, replace=False)
        lib_norm = bool(len(some) >= 3 and stats.shapiro(some).pvalue > 0.2)
    law = library if lib_norm else np.log(library)
    common, df = _dispersion(counts, library)
    mid, slope = _dropout_fit(np.log(means), (scaled == 0).mean(axis=0))
    return {
        "mean_shape": shape, "mean_rate": rate, "lib_norm": lib_norm, "lib_loc": float(law.mean()),
        "lib_scale": float(max(law.std(), 1e-3)), **_outliers(means), "bcv_common": 0.1 + 0.25 * common, "bcv_df": df,
        "dropout_mid": mid, "dropout_shape": slope,
    }  # fmt: skip


def estimate_kept(counts: np.ndarray, n_groups: int, n_programs: int, *, seed: int = 0) -> dict[str, Any]:
    """Estimates for each gene a mean, a dispersion, a factor in every group and loadings of continuous programmes.

    Groups are k-means clusters of the cells in 20 principal components of log(1 + counts per median library) of the
    1000 genes that vary most beyond Poisson noise. A gene's share in a group is shrunk to its share in all cells by a
    weight of one expected molecule. Where fewer cells differ than there are groups, the groups left over are not drawn.
    Loadings: leading eigenvectors of the genes' covariance about the group means, whose diagonal, counting noise, is
    replaced by what the vectors themselves explain (heteroskedastic PCA). The dispersion is what is left of the
    variance.

    Args:
        counts: (cells, genes), no empty cell.
        n_groups: clusters.
        n_programs: number of loadings per gene.
        seed: of k-means.
    """
    counts = np.asarray(counts, np.float32)
    library = counts.sum(axis=1, dtype=float)
    labels = _clusters(counts, library, n_groups, seed)
    sums = np.stack([counts[labels == k].sum(axis=0, dtype=float) for k in range(n_groups)])
    totals = np.maximum(sums.sum(axis=1, keepdims=True), 1.0)
    overall = (sums.sum(axis=0) + 1e-3) / (sums.sum() + 1e-3 * counts.shape[1])
    shares = (sums + totals * overall / np.maximum(totals * overall, 1.0)) / totals
    shares = np.where(totals * overall < 1.0, overall, shares)
    shares /= shares.sum(axis=1, keepdims=True)
    loadings = _loadings(counts, library, labels, shares, n_programs)
    sizes = np.bincount(labels, minlength=n_groups)
    libraries = [library[labels == k] if sizes[k] else library for k in range(n_groups)]
    return {
        "log_gene_means": np.log(overall * np.median(library)),
        "log_group_factors": np.log(shares / overall),
        "log_dispersions": np.log(_left_over(counts, library, labels, shares, loadings)),
        "log_libraries": np.stack([_log_quantiles(some) for some in libraries]),
        "group_logits": np.where(sizes > 0, np.log((sizes + 0.5) / len(labels)), EMPTY),
        "loadings": loadings,
    }


def _normalised(counts: np.ndarray, library: np.ndarray) -> np.ndarray:
    """Genes with a count in two cells, scaled to the median library."""
    used = (counts > 0).sum(axis=0) > 1
    if used.sum() < 2:
        used = (counts > 0).any(axis=0)
    return counts[:, used] / library[:, None] * np.median(library)


def _gamma_fit(means: np.ndarray) -> tuple[float, float]:
    """Shape and rate by least Cramér-von Mises distance, from the moments on."""
    ordered = np.sort(means)
    ideal = (2 * np.arange(1, len(ordered) + 1) - 1) / (2 * len(ordered))
    average, variance = float(ordered.mean()), float(max(ordered.var(), 1e-12 + 1e-6 * ordered.mean() ** 2))
    start = np.log([average**2 / variance, average / variance])

    def distance(free: np.ndarray) -> float:
        shape, rate = np.exp(np.clip(free, -15, 15))
        return float(((special.gammainc(shape, ordered * rate) - ideal) ** 2).mean())

    best = optimize.minimize(distance, start, method="Nelder-Mead", options={"xatol": 1e-5, "fatol": 1e-12}).x
    shape, rate = np.exp(np.clip(best, -4, 12))
    return float(shape), float(rate)


def _outliers(means: np.ndarray) -> dict[str, float]:
    logs = np.log(means)
    centre = np.median(logs)
    spread = 1.4826 * np.median(np.abs(logs - centre))
    out = logs > centre + 2 * spread
    found = {"out_prob": float(np.clip(out.mean(), 1e-4, 0.5))}
    if out.sum() > 1:
        factors = logs[out] - np.log(np.median(means))
        found |= {"out_fac_loc": float(factors.mean()), "out_fac_scale": float(max(factors.std(), 1e-2))}
    return found


def _dispersion(counts: np.ndarray, library: np.ndarray) -> tuple[float, float]:
    """Common negative binomial dispersion by adjusted profile likelihood (edgeR), and prior degrees of freedom."""
    rng = np.random.default_rng(0)
    genes = np.flatnonzero(counts.sum(axis=0) >= 5)
    if len(genes) < 2 or len(counts) < 3:
        return 0.0, 60.0
    genes = rng.choice(genes, min(len(genes), BCV_GENES), replace=False)
    cells = rng.choice(len(counts), min(len(counts), BCV_CELLS), replace=False)
    x, size = counts[np.ix_(cells, genes)].astype(float), library[cells, None]
    mean = size * np.maximum(counts[:, genes].sum(axis=0, dtype=float) / library.sum(), 1e-12)
    found = x > 0
    seen = x[found]

    def adjusted(log2: float) -> float:
        phi = 0.1 * 2.0**log2
        r = 1 / phi
        at_zero = -r * np.log1p(phi * mean).sum()
        rest = special.gammaln(seen + r) - special.gammaln(r) + seen * np.log(mean[found] / (r + mean[found]))
        information = (mean / (1 + phi * mean)).sum(axis=0)
        return float(-(at_zero + rest.sum() - 0.5 * np.log(information).sum()))

    common = 0.1 * 2.0 ** float(optimize.minimize_scalar(adjusted, bounds=(-10, 10), method="bounded").x)
    r = 1 / common
    part = np.where(found, x * np.log(np.where(found, x, 1.0) / mean), 0.0)
    deviance = 2 * (part - (x + r) * np.log((x + r) / (mean + r))).sum(axis=0)
    d = len(cells) - 1
    log_s2 = np.log(np.maximum(deviance / d, 1e-8))
    trend = np.polyval(np.polyfit(np.log(mean.mean(axis=0)), log_s2, 3), np.log(mean.mean(axis=0)))
    extra = float((log_s2 - trend).var() - special.polygamma(1, d / 2))
    return float(common), float(np.clip(_inverse_trigamma(extra) * 2, 1.0, 1e3)) if extra > 1e-3 else 1e3


def _inverse_trigamma(value: float) -> float:
    return float(optimize.brentq(lambda x: float(special.polygamma(1, x)) - value, 1e-4, 1e6))


def _dropout_fit(log_means: np.ndarray, zeros: np.ndarray) -> tuple[float, float]:
    """Midpoint and slope of zeros = 1 / (1 + exp(-slope (log mean - mid))) by least squares."""
    middle = (zeros > 0.2) & (zeros < 0.8)
    start = float(np.median(log_means[middle] if middle.any() else log_means))

    def residuals(free: np.ndarray) -> np.ndarray:
        return special.expit(free[1] * (log_means - free[0])) - zeros

    found = optimize.least_squares(residuals, [start, -1.0]).x
    mid = np.clip(found[0], log_means.min() - 3, log_means.max() + 3)
    return float(mid), float(np.clip(found[1], -20, 20))


def _log_quantiles(library: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.quantile(np.log(library), (np.arange(KNOTS) + 0.5) / KNOTS)
    return found


def _clusters(counts: np.ndarray, library: np.ndarray, n_groups: int, seed: int) -> np.ndarray:
    if n_groups == 1:
        return np.zeros(len(counts), int)
    from sklearn.cluster import KMeans
    from sklearn.utils.extmath import randomized_svd

    share = counts.sum(axis=0, dtype=float) / library.sum()
    excess = ((counts - library[:, None] * share) ** 2).mean(axis=0) / np.maximum(library.mean() * share, 1e-9)
    top = np.argsort(-np.where(counts.sum(axis=0) >= 10, excess, 0))[:1000]
    logged = np.log1p(counts[:, top] / library[:, None] * np.median(library))
    logged = logged - logged.mean(axis=0)
    width = min(20, *logged.shape)
    u, s, _ = randomized_svd(logged, width, random_state=seed)
    n_groups = min(n_groups, len(np.unique(logged, axis=0)))
    labels: np.ndarray = KMeans(n_groups, n_init=4, random_state=seed).fit_predict(u * s)
    return labels.astype(int)


def _loadings(
    counts: np.ndarray, library: np.ndarray, labels: np.ndarray, shares: np.ndarray, n_programs: int
) -> np.ndarray:
    """(programmes, genes): W with Cov(log rates of g, h) = W_g W_h, from Pearson residuals about the groups."""
    n, g = counts.shape
    found = np.zeros((n_programs, g))
    expected = library @ shares[labels] / n  # mean of every gene
    top = np.argsort(-expected)[: min(g, 2000)]
    top = top[expected[top] * n >= 50]
    if n_programs == 0 or len(top) <= n_programs or n < 10:
        return found
    scale = np.sqrt(expected[top])
    residual = (counts[:, top] - library[:, None] * shares[labels][:, top]) / scale
    covariance = residual.T @ residual / n
    np.fill_diagonal(covariance, 0.0)
    size = float((library**2).mean() / library.mean() ** 2)  # means of cells vary with the library
    diagonal = np.zeros(len(top))
    values, vectors = np.zeros(n_programs), np.zeros((len(top), n_programs))
    from scipy.linalg import eigh

    for _ in range(5):
        np.fill_diagonal(covariance, diagonal)
        values, vectors = eigh(covariance, subset_by_index=[len(top) - n_programs, len(top) - 1])
        values = np.maximum(values, 0.0)
        diagonal = (vectors**2 * values).sum(axis=1)
    # noise alone has eigenvalues up to about 2 sqrt(p / n) + p / n off the diagonal
    ratio = len(top) / n
    values = np.where(values > 2 * np.sqrt(ratio) + ratio, values, 0.0)
    found[:, top] = (vectors * np.sqrt(values)).T / scale / np.sqrt(size)
    return np.clip(found, -1.5, 1.5)


def _left_over(
    counts: np.ndarray, library: np.ndarray, labels: np.ndarray, shares: np.ndarray, loadings: np.ndarray
) -> np.ndarray:
    """Dispersion of every gene: (variance about the cells' means - mean) / mean², less what programmes explain."""
    second, noise = np.zeros(counts.shape[1]), np.zeros(counts.shape[1])
    for start in range(0, len(counts), 512):
        mean = library[start : start + 512, None] * shares[labels[start : start + 512]]
        x = counts[start : start + 512]
        noise += ((x - mean) ** 2 - mean).sum(axis=0)
        second += (mean**2).sum(axis=0)
    total = noise / np.maximum(second, 1e-12)
    explained = np.expm1((loadings**2).sum(axis=0))
    phi = (total - explained) / (1 + explained)
    # a gene of few counts says little: towards the typical dispersion, as if by 20 more counts
    weight = counts.sum(axis=0, dtype=float)
    typical = float(np.median(phi[weight >= np.quantile(weight, 0.5)]))
    phi = (weight * phi + 20 * max(typical, 0.01)) / (weight + 20)
    return np.clip(phi, 1e-3, 1e2)
