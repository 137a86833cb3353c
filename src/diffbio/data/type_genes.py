"""Genes that tell given cell types apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, DataError
from .transform import shifted_log

if TYPE_CHECKING:
    from numpy.typing import NDArray


def type_genes(counts: Any, labels: NDArray[np.integer], n_genes: int) -> NDArray[np.intp]:
    """Columns of the `n_genes` genes whose log expression varies most between types, in ascending order.

    By the F statistic of log(1 + 1e4 counts / library): variance between the means of the types over variance
    within the types. All genes where there are fewer.

    counts: (cells, genes), array or CSR, over all genes. labels: codes; a negative one is an unlabelled cell, which
    is not read.

    Raises:
        ConfigError: n_genes is below 1.
        DataError: labels do not fit the cells, or none is labelled.
    """
    if n_genes < 1:
        msg = f"type_genes: n_genes must be at least 1, got {n_genes}"
        raise ConfigError(msg)
    labels = np.asarray(labels)
    if labels.shape != (counts.shape[0],):
        msg = f"type_genes: labels of shape {labels.shape} for {counts.shape[0]} cells; give one code for each cell"
        raise DataError(msg)
    rows = np.flatnonzero(labels >= 0)
    if not len(rows):
        msg = "type_genes: no cell is labelled"
        raise DataError(msg)
    score = f_statistic(shifted_log(counts[rows], total=1e4), labels[rows])
    best = np.argsort(-score, kind="stable")[:n_genes]
    return np.sort(best)


def f_statistic(x: Any, labels: NDArray[np.integer]) -> NDArray[np.float64]:
    """(genes,): of a one-way analysis of variance; 0 for genes that do not vary.

    x: (cells, genes), array or sparse. labels: codes from 0.
    """
    types, codes = np.unique(labels, return_inverse=True)
    member = np.eye(len(types))[codes]
    cells = member.sum(0)
    squares = x**2 if isinstance(x, np.ndarray) else x.power(2)
    means = np.asarray(x.T @ member).T / cells[:, None]
    center = (cells[:, None] * means).sum(0) / len(codes)
    total = np.asarray(squares.sum(axis=0, dtype=np.float64)).ravel() - len(codes) * center**2
    between = (cells[:, None] * (means - center) ** 2).sum(0)
    within = np.maximum(total - between, 1e-9 * np.maximum(total, 1e-12))
    freedom = max(len(codes) - len(types), 1) / max(len(types) - 1, 1)
    return np.where(total > 1e-9, between / within * freedom, 0.0)
