"""The unfiltered matrix of all droplets beside the cells: its soup, by the names of the cells' genes."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from ..errors import DataError, DataWarning
from ..math.droplets import LOWER, soup_profile
from .read import read
from .source import counts_of
from .validate import check_counts


class Soup(NamedTuple):
    """What the droplets without a cell hold."""

    profile: np.ndarray  # (genes,) fractions that sum to 1
    counts: np.ndarray  # (genes,) molecules seen
    n_droplets: int


def droplet_counts(raw: AnnData) -> Any:
    """Counts of all droplets (droplets, genes) as CSR, checked; most droplets have none.

    Raises:
        DataError: they are no counts.
    """
    matrix = counts_of(raw)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* no count", DataWarning)
        check_counts(matrix, name="raw X", var_names=raw.var_names, uns=raw.uns)
    return cast("Any", sparse.csr_array)(matrix)


def soup_of(
    raw: AnnData | str | Path,
    genes: Sequence[str] | pd.Index,
    cells: Sequence[str] | pd.Index,
    *,
    lower: float | int = LOWER,
    batch: tuple[str, Any] | None = None,
) -> Soup:
    """The soup from the droplets of 1 to `lower` counts in `raw`, leaving out any that are called cells.

    Args:
        raw: all droplets, or their file.
        genes: names of those whose fractions are asked for; all must be in `raw`, which may have more.
        cells: names of the droplets that hold cells.
        lower: counts up to which a droplet is taken for empty, over all genes of `raw`.
        batch: (column of raw.obs, value): droplets of that batch only.

    Raises:
        DataError: a gene is missing in `raw`, or it has no empty droplets.
    """
    raw = read(raw) if isinstance(raw, str | Path) else raw
    place = raw.var_names.get_indexer(pd.Index(genes))
    if (place < 0).any():
        first = pd.Index(genes)[place < 0][0]
        msg = f"raw has other genes than the cells: {int((place < 0).sum()):,} of {len(place):,} are missing there, "
        msg += f"{first!r} the first; give the unfiltered matrix of the same run"
        raise DataError(msg)
    droplets = droplet_counts(raw)
    totals = np.asarray(droplets.sum(axis=1)).ravel()
    totals = np.where(raw.obs_names.isin(pd.Index(cells)), 0, totals)
    if batch is not None:
        column, value = batch
        if column not in raw.obs:
            msg = f"raw.obs has no column {column!r}; it tells which droplets are of which batch"
            raise DataError(msg)
        totals = np.where((raw.obs[column] == value).to_numpy(), totals, 0)
    counts, empty = soup_profile(droplets, totals, lower=lower)
    counts = counts[place]
    if counts.sum() == 0:
        msg = "the empty droplets of raw hold no molecule of the cells' genes; give the unfiltered matrix of that run"
        raise DataError(msg)
    return Soup(counts / counts.sum(), counts, int(empty.sum()))
