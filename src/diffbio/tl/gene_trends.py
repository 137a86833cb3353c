"""`tl.gene_trends`: expression along pseudotime, towards each fate."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .. import slots
from ..data.transform import shifted_log
from ..errors import ConfigError, DataError, MissingKeyError
from ..math.gene_trends import trends
from ..recording import recorded
from .fate import fate_table

if TYPE_CHECKING:
    from anndata import AnnData

BOUND = 0.5  # of the largest probability of a fate: cells above it are on their way there


@recorded
def gene_trends(
    adata: "AnnData",
    genes: Sequence[str],
    *,
    fates: Sequence[str] | None = None,
    pseudotime_key: str = "diffbio_pseudotime",
    n_points: int = 100,
    n_segments: int = 20,
    confidence: float = 0.95,
    layer: str | None = None,
    random_state: int = 0,
    copy: bool = False,
) -> None:
    """Fits smooth curves of log-normalised expression along pseudotime, cells weighted by their probability of a fate.

    Args:
        adata: cells with the results of `tl.fate` and a pseudotime. Cells whose pseudotime is infinite are left out.
        genes: names.
        fates: names; None is all.
        pseudotime_key: column of `obs`.
        n_points: of a curve. It runs from the first cell to the last that is bound for the fate (with at least half of
            the largest probability).
        n_segments: pieces of the penalised spline (`math.gene_trends.trends`).
        confidence: of the pointwise band.
        layer: of the counts; None is X.
        random_state: recorded only; nothing is drawn at random.
        copy: works on a copy and returns it.

    Adds `uns["diffbio_gene_trends"]`: `genes`, `fates`, `pseudotime` (fates, points), and `mean`, `low` and `high`
    (fates, genes, points).

    Raises:
        ConfigError: no genes, or fewer than 2 points.
        MissingKeyError: no fates or pseudotime yet, no such gene or fate.
        DataError: no counts, a pseudotime that is missing, or a fate with too few cells for a curve.
    """
    import pandas as pd

    names = [genes] if isinstance(genes, str) else list(genes)
    if not names or n_points < 2:
        msg = f"tl.gene_trends: at least one gene and 2 points are needed, got {len(names)} and {n_points}."
        raise ConfigError(msg)
    probabilities = fate_table(adata, fates, "tl.gene_trends")
    if pseudotime_key not in adata.obs:
        msg = f"tl.gene_trends: obs has no {pseudotime_key!r}; call tl.pseudotime(adata, root=...) first"
        raise MissingKeyError(msg)
    columns = adata.var_names.get_indexer_for(pd.Index(names))
    if (columns < 0).any():
        missing = names[int(np.flatnonzero(columns < 0)[0])]
        msg = f"tl.gene_trends: there is no gene {missing!r} in var_names"
        raise MissingKeyError(msg)
    if not adata.var_names.is_unique:
        msg = "tl.gene_trends: var_names holds names twice; call adata.var_names_make_unique() first"
        raise DataError(msg)
    when = slots.times(adata, pseudotime_key, "tl.gene_trends")
    reached = np.isfinite(when)
    chosen = shifted_log(slots.counts(adata, layer))[:, columns][reached]
    expression = np.asarray(chosen.toarray() if hasattr(chosen, "toarray") else chosen, float)
    when, weights = when[reached], probabilities.to_numpy(float)[reached]
    curves = []
    times = np.empty((weights.shape[1], n_points))
    for k, weight in enumerate(weights.T):
        bound = when[weight >= BOUND * weight.max()]
        times[k] = np.linspace(when.min(), bound.max(), n_points)
        curves.append(trends(when, expression, weight, times[k], n_segments=n_segments, confidence=confidence))
    adata.uns[slots.GENE_TRENDS] = {
        "genes": names,
        "fates": [str(name) for name in probabilities.columns],
        "pseudotime": times,
        "mean": np.stack([curve.mean.T for curve in curves]),
        "low": np.stack([curve.low.T for curve in curves]),
        "high": np.stack([curve.high.T for curve in curves]),
    }
