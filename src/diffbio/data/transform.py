"""Counts made comparable between cells: sparse stays sparse."""

from typing import Any, cast

import numpy as np
from scipy import sparse

from ..errors import DataError
from .matrix import checked_csr

VALUES_PER_BLOCK = 1 << 22


def per_cell(counts: Any, *, total: float | None = None) -> Any:
    """Counts x_ij * total / sum_j x_ij; `total` None is the median over the cells that have counts.

    Cells without a count stay zero. Returns float32, CSR if `counts` is sparse.
    """
    counts = _checked(counts)
    sizes = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    if total is None:
        total = float(np.median(sizes[sizes > 0])) if (sizes > 0).any() else 1.0
    factors = np.where(sizes > 0, total / np.where(sizes > 0, sizes, 1.0), 0.0).astype(np.float32)
    if isinstance(counts, np.ndarray):
        return counts.astype(np.float32) * factors[:, None]
    values = counts.data.astype(np.float32) * np.repeat(factors, np.diff(counts.indptr))
    return _like(counts, values)


def shifted_log(counts: Any, *, total: float | None = None) -> Any:
    """log(1 + x_ij * total / sum_j x_ij), scanpy's normalize_total and log1p (Ahlmann-Eltze & Huber 2023)."""
    scaled = per_cell(counts, total=total)
    return np.log1p(scaled) if isinstance(scaled, np.ndarray) else _like(scaled, np.log1p(scaled.data))


def pearson_residuals(counts: Any, *, theta: float = 100.0) -> np.ndarray:
    """(x - mu) / sqrt(mu + mu² / theta) clipped at ±sqrt(cells), mu_ij = row sum i * column sum j / total.

    Lause, Berens & Kobak 2021, eq. 4 and 5. Dense float32; genes without a count are 0.
    """
    counts = _checked(counts)
    rows = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    columns = np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()
    share = (columns / max(columns.sum(), 1.0)).astype(np.float32)
    limit = np.float32(np.sqrt(len(rows)))
    result = np.empty(counts.shape, np.float32)
    step = max(1, VALUES_PER_BLOCK // max(len(share), 1))
    means, sds = (np.empty((step, len(share)), np.float32) for _ in range(2))  # used again: fresh memory costs time
    for start in range(0, len(rows), step):
        block, out = counts[start : start + step], result[start : start + step]
        mean, sd = means[: len(out)], sds[: len(out)]
        np.multiply(rows[start : start + step, None].astype(np.float32), share, out=mean)
        np.multiply(mean, mean, out=sd)
        sd *= np.float32(1.0 / theta)
        sd += mean
        np.sqrt(sd, out=sd)
        sd[mean == 0] = 1.0
        out[:] = block if isinstance(block, np.ndarray) else block.toarray()
        out -= mean
        out /= sd
        np.clip(out, -limit, limit, out=out)
    return result


def _checked(counts: Any) -> Any:
    counts = checked_csr(counts, "counts") if sparse.issparse(counts) else np.asarray(counts)
    values = counts if isinstance(counts, np.ndarray) else counts.data
    if values.size and not (np.isfinite(values).all() and values.min() >= 0):
        msg = "counts hold NaN, infinite or negative values; pass raw counts, with layer= if X is scaled"
        raise DataError(msg)
    return counts


def _like(matrix: Any, values: np.ndarray) -> Any:
    return cast("Any", sparse.csr_array)((values, matrix.indices, matrix.indptr), shape=matrix.shape)
