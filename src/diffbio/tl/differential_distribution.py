"""`tl.differential_distribution`: genes whose distributions differ between two groups of cells, and how."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import sparse, stats

from .. import slots
from ..data.matrix import library_sizes
from ..data.transform import shifted_log
from ..errors import ConfigError, DataError, MissingKeyError
from ..math.distribution_patterns import PATTERNS
from ..operators.singlecell import DifferentiableDifferentialDistribution, DifferentialDistributionConfig
from ..recording import recorded

if TYPE_CHECKING:
    from anndata import AnnData

VALUES_PER_CHUNK = 4_000_000  # dense, of the expression
MOST_GENES = 512  # of a chunk
FEWEST = 5


@recorded
def differential_distribution(
    adata: "AnnData",
    groupby: str,
    *,
    groups: Sequence[str] | None = None,
    statistic: str = "wasserstein",
    n_permutations: int = 1000,
    adjust_library_size: bool = True,
    level: float = 0.05,
    layer: str | None = None,
    random_state: int = 0,
    copy: bool = False,
) -> None:
    """Tests every gene's distribution between two groups of cells (`DifferentiableDifferentialDistribution`).

    Args:
        adata: cells x genes.
        groupby: column of `obs`.
        groups: two of its values, the reference first; None is both, where there are two.
        statistic: "wasserstein" (waddR's distance) or "mmd", of log-normalised expression.
        n_permutations: of the groups; smaller p-values come from an exponential tail.
        adjust_library_size: weights cells so that both groups have the same library sizes.
        level: of the false discovery rate up to which a pattern is named.
        layer: of the counts; None is X.
        random_state: seed of the permutations.
        copy: works on a copy and returns it.

    Adds `uns["diffbio_differential_distribution"]`, a DataFrame indexed by gene: `pvalue` and `qvalue` (Benjamini &
    Hochberg) of the whole distribution, zeros included, `pattern` ("DE" mean, "DP" proportions, "DM" modality, "DB"
    both, "DV" variance, "DZ" zeros; "" above `level`), `log_fold_change` (log2, of mean normalised counts, second group
    over first), `statistic`, and `zero_pvalue`, of the share of zeros beside library size.

    Raises:
        ConfigError: groups that are not two, or a setting out of range.
        MissingKeyError: no such column or group.
        DataError: no counts, or fewer than 5 cells in a group.
    """
    import pandas as pd

    who = "tl.differential_distribution"
    if not 0 < level <= 1:
        msg = f"{who}: level must be above 0 and at most 1, got {level}."
        raise ConfigError(msg)
    labels, wanted = group_labels(adata, groupby, groups, who)
    chosen = labels >= 0
    counts = slots.counts(adata, layer)
    totals = library_sizes(counts)
    expression: Any = shifted_log(counts)[chosen]
    expression = expression if isinstance(expression, np.ndarray) else sparse.csc_array(expression)
    labels, totals = labels[chosen], totals[chosen]
    data: dict[str, Any] = {"condition_labels": jnp.asarray(labels, jnp.int32)}
    if adjust_library_size:
        if not (totals > 0).all():
            msg = f"{who}: {int((totals == 0).sum())} cells have no counts; leave them out, or pass "
            msg += "adjust_library_size=False"
            raise DataError(msg)
        data["library_size"] = jnp.asarray(totals, jnp.float32)
    size = int(np.clip(VALUES_PER_CHUNK // len(labels), 1, min(MOST_GENES, adata.n_vars)))
    config = DifferentialDistributionConfig(n_genes=size, statistic=statistic, n_permutations=n_permutations)
    graph, state = nnx.split(DifferentiableDifferentialDistribution(config, rngs=nnx.Rngs(random_state)))
    run = jax.jit(lambda state, data: nnx.merge(graph, state).apply(data)[0])
    parts, fold = [], []
    for start in range(0, adata.n_vars, size):
        genes = np.arange(start, start + size) % adata.n_vars  # the last chunk is filled up from the start
        kept = min(size, adata.n_vars - start)
        values: Any = expression[:, genes]
        dense = np.asarray(values if isinstance(values, np.ndarray) else values.toarray(), np.float32)
        found = run(state, data | {"counts": jnp.asarray(dense)})
        names = ("p_values", "zero_p_values", "statistics", "pattern_labels")
        parts.append({name: np.asarray(found[name])[:kept] for name in names})
        means = [np.expm1(dense[labels == group][:, :kept]).mean(axis=0, dtype=float) for group in (0, 1)]
        fold.append(np.log2((means[1] + 1e-9) / (means[0] + 1e-9)))
    every = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    pvalue = every["p_values"].astype(float)
    qvalue = stats.false_discovery_control(pvalue)
    names = np.array(PATTERNS, dtype=object)[every["pattern_labels"]]
    adata.uns[slots.DIFFERENTIAL_DISTRIBUTION] = pd.DataFrame(
        {
            "pvalue": pvalue,
            "qvalue": qvalue,
            "pattern": np.where(qvalue <= level, names, "").astype(str).astype(object),
            "log_fold_change": np.concatenate(fold),
            "statistic": every["statistics"].astype(float),
            "zero_pvalue": every["zero_p_values"].astype(float),
        },
        index=adata.var_names.astype(str),
    )
    slots.note(adata, slots.DIFFERENTIAL_DISTRIBUTION, {"groupby": groupby, "groups": wanted, "layer": layer or "X"})


def group_labels(
    adata: "AnnData", groupby: str, groups: Sequence[str] | None, who: str
) -> tuple[np.ndarray, list[str]]:
    """0, 1 or -1 for each cell, and the names of the two groups.

    Raises:
        ConfigError, MissingKeyError, DataError: see `differential_distribution`.
    """
    import pandas as pd

    if groupby not in adata.obs:
        msg = f"obs has no column {groupby!r}; it has {', '.join(map(str, adata.obs.columns)) or 'none'}"
        raise MissingKeyError(msg)
    column = pd.Categorical(adata.obs[groupby].astype(object))
    there = [str(name) for name in column.categories]
    wanted = there if groups is None else [str(name) for name in groups]
    for name in wanted:
        if name not in there:
            msg = f"{who}: no cell has {groupby} {name!r}; there are {', '.join(there[:12])}"
            raise MissingKeyError(msg)
    if len(set(wanted)) != 2:
        msg = f"{who}: two groups are compared, got {len(set(wanted))} of {groupby!r} ({', '.join(wanted[:6])}); "
        msg += "name two with groups=."
        raise ConfigError(msg)
    number = np.full(len(there) + 1, -1)  # the last is that of cells without a value
    number[[there.index(name) for name in wanted]] = [0, 1]
    labels = number[np.asarray(column.codes)]
    for code, name in enumerate(wanted):
        if (labels == code).sum() < FEWEST:
            msg = f"{who}: {groupby} {name!r} has {int((labels == code).sum())} cells; {FEWEST} at least are needed"
            raise DataError(msg)
    return labels, wanted
