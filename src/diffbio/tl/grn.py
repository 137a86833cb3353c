"""`tl.grn`: which regulators explain which genes."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .. import slots
from ..data.source import counts_of
from ..data.validate import check_counts
from ..errors import ConfigError, DataError, DataWarning, MissingKeyError
from ..fitting import fit
from ..math.attribution import TREES, lasso_path_importances, tree_importances
from ..math.regulation import (
    correlations,
    not_itself,
    partial_effects,
    rank_average,
    regulator_activity,
    standard_ranks,
    strongest_edges,
)
from ..math.velocity_moments import size_normalized
from ..operators.singlecell import DifferentiableGRN, GRNInferenceConfig
from ..recording import recorded

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

METHODS = ("attention", "combined", *TREES, "lasso")
MOST_REGULATORS = 1000  # that are taken without being named
STEPS = 200  # of training, at least


class Found(NamedTuple):
    """A network: weights, signs and what goes with them."""

    weights: np.ndarray  # (tfs, genes)
    signs: np.ndarray  # (tfs, genes), -1 to 1
    activity: np.ndarray  # (cells, tfs)
    explained: float | None


@recorded
def grn(
    adata: "AnnData",
    *,
    regulators: Sequence[str] | str | None = None,
    method: str = "attention",
    prior: "pd.DataFrame | None" = None,
    n_edges: int | None = None,
    n_resamples: int = 0,
    sparsity: float | None = None,
    normalize: bool = True,
    layer: str | None = None,
    random_state: int = 0,
    copy: bool = False,
) -> None:
    """Finds a gene regulatory network: how strongly each regulator explains each gene, and with which sign.

    Args:
        adata: cells x genes, changed in place. Take the genes that may be targets, some thousands, and the regulators.
        regulators: names of genes; or a column of `var` that is True for them; None is all genes, where they are not
            more than 1000.
        method: "attention" is `DifferentiableGRN`, trained on these cells; "extra_trees", "random_forest" (GENIE3) and
            "lasso" are simple networks to compare with (`math.attribution`), on the same ranks; "combined" is the mean
            of the ranks of the edges in "attention" and in "extra_trees".
        prior: of "attention": known edges, columns `regulator`, `target` and optionally `weight`, the odds of such an
            edge against an edge of another regulator and gene; without `weight` 10. 0 takes an edge out.
        n_edges: the strongest that are kept; None is all.
        n_resamples: fits again to so many random halves of the cells (Meinshausen and Buhlmann 2010). `confidence` is
            the share of them in which an edge is among the strongest, as many as are kept, or as there are genes.
        sparsity: of "attention": price of attention (`GRNInferenceConfig.sparsity_lambda`); None is 0.25.
        normalize: scales the counts of every cell to the median total first; False for expression without differences
            in depth, which need not be counts.
        layer: of the counts; None is X.
        random_state: of weights, minibatches, trees and halves.
        copy: works on a copy and returns it.

    Adds `uns["diffbio_grn"]`, a DataFrame `regulator`, `target`, `weight`, `sign` (and `confidence`), strongest first,
    and `obsm["diffbio_tf_activity"]`, a DataFrame (cells, regulators). Direction between two regulators is weak
    evidence: correlation alone does not tell it.

    Raises:
        ConfigError: an unknown method, a setting that does nothing with it, or too many regulators without names.
        MissingKeyError: a regulator that is no gene here.
        DataError: values that are no counts, or no regulator that varies.
    """
    slots.choose(method, METHODS, "tl.grn")
    if method not in ("attention", "combined"):
        slots.refuse("tl.grn", method, prior=prior is not None, sparsity=sparsity is not None)
    for name, value, least in (("n_resamples", n_resamples, 0), ("n_edges", n_edges, 1)):
        if value is not None and value < least:
            msg = f"tl.grn: {name} must be >= {least}, got {value}."
            raise ConfigError(msg)
    matrix = counts_of(adata, layer=layer) if not normalize else slots.counts(adata, layer)
    if not normalize:
        with warnings.catch_warnings():  # it need not be whole, by the user's own word
            warnings.filterwarnings("ignore", ".*not whole", DataWarning)
            check_counts(matrix, obs_names=adata.obs_names, var_names=adata.var_names, allow_non_integer=True)
    columns = _columns(adata, regulators)
    x = np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix, np.float32)
    constant = (x == x[:1]).all(axis=0)
    if constant[columns].all():
        msg = "tl.grn: no regulator has two different values, so that none can explain a gene; name others."
        raise DataError(msg)
    if constant.any():
        first = str(adata.var_names[int(np.flatnonzero(constant)[0])])
        msg = f"tl.grn: {int(constant.sum()):,} genes do not vary (first {first!r}, {int(constant[columns].sum())} of "
        msg += "them regulators) and have no edges"
        warnings.warn(msg, DataWarning, stacklevel=3)
    odds = None if prior is None else _odds(adata, prior, columns)
    settings: dict[str, Any] = {} if sparsity is None else {"sparsity_lambda": sparsity}
    asked: dict[str, Any] = {"method": method, "odds": odds, "settings": settings | {"normalize": normalize}}
    found = _network(x, columns, seed=random_state, **asked)
    possible = (columns[:, None] != np.arange(x.shape[1])) & ~constant & ~constant[columns][:, None]
    if odds is not None:
        possible &= odds > 0
    weights = np.where(possible, found.weights, 0.0)
    rows, targets = strongest_edges(weights, n_edges=n_edges)
    share = None
    if n_resamples:
        kept = len(rows) if n_edges is not None else x.shape[1]
        share = np.zeros(weights.shape)
        for seed in np.random.default_rng(random_state).integers(2**31, size=n_resamples):
            half = np.sort(np.random.default_rng(seed).permutation(len(x))[: (len(x) + 1) // 2])
            again = np.where(possible, _network(x[half], columns, seed=int(seed), **asked).weights, 0.0)
            share[strongest_edges(again, n_edges=kept)] += 1.0 / n_resamples
    _write(adata, columns, found, (rows, targets, weights), share)
    record: dict[str, Any] = {"method": method, "n_regulators": len(columns), "n_not_varying": int(constant.sum())}
    if found.explained is not None:
        record["explained_variance"] = found.explained
    slots.note(adata, slots.GRN, record)


def _write(
    adata: "AnnData", columns: np.ndarray, found: Found, edges: tuple[np.ndarray, ...], share: np.ndarray | None
) -> None:
    import pandas as pd

    rows, targets, weights = edges
    names = adata.var_names.astype(str)
    table = pd.DataFrame(
        {
            "regulator": pd.Categorical.from_codes(rows.tolist(), categories=names[columns]),
            "target": pd.Categorical.from_codes(targets.tolist(), categories=names),
            "weight": weights[rows, targets],
            "sign": np.where(found.signs[rows, targets] < 0, -1, 1),
        }
    )
    if share is not None:
        table["confidence"] = share[rows, targets]
    table.index = table.index.astype(str)  # as anndata wants it
    adata.uns[slots.GRN] = table
    activity = pd.DataFrame(found.activity, index=adata.obs_names, columns=names[columns])
    adata.obsm[slots.TF_ACTIVITY] = activity


def _columns(adata: "AnnData", regulators: Sequence[str] | str | None) -> np.ndarray:
    """Numbers of the genes that are regulators."""
    import pandas as pd

    if regulators is None:
        if adata.n_vars > MOST_REGULATORS:
            msg = f"tl.grn: there are {adata.n_vars:,} genes, too many to take all of them as regulators; name them "
            msg += f"(regulators=), or keep {MOST_REGULATORS} genes at most."
            raise ConfigError(msg)
        return np.arange(adata.n_vars)
    if isinstance(regulators, str):
        if regulators not in adata.var:
            there = ", ".join(map(str, adata.var.columns)) or "none"
            msg = f"tl.grn: var has no column {regulators!r}; it has {there}"
            raise MissingKeyError(msg)
        column = adata.var[regulators]
        if not pd.api.types.is_bool_dtype(column):
            msg = f"tl.grn: var[{regulators!r}] must be True for regulators and False for others; got {column.dtype}."
            raise DataError(msg)
        found = np.flatnonzero(column.to_numpy(bool))
    else:
        names = list(dict.fromkeys(map(str, regulators)))
        found = adata.var_names.get_indexer_for(pd.Index(names))
        if (found < 0).any():
            missing = [name for name, place in zip(names, found, strict=True) if place < 0]
            msg = f"tl.grn: {len(missing)} regulators are no genes here, such as {missing[0]!r}; leave them out"
            raise MissingKeyError(msg)
    if not len(found):
        msg = "tl.grn: no regulator is named."
        raise DataError(msg)
    return np.asarray(found)


def _odds(adata: "AnnData", prior: "pd.DataFrame", columns: np.ndarray) -> np.ndarray:
    import pandas as pd

    for name in ("regulator", "target"):
        if name not in prior:
            msg = f"tl.grn: prior has no column {name!r}; it needs regulator and target, and may have weight"
            raise MissingKeyError(msg)
    place = np.full(adata.n_vars, -1)
    place[columns] = np.arange(len(columns))
    sources = adata.var_names.get_indexer_for(pd.Index(prior["regulator"].astype(str)))
    targets = adata.var_names.get_indexer_for(pd.Index(prior["target"].astype(str)))
    rows = np.where(sources >= 0, place[sources], -1)
    known = (rows >= 0) & (targets >= 0)  # a database knows more genes than an experiment
    if not known.any():
        msg = "tl.grn: prior names no edge between a regulator and a gene that are here."
        raise DataError(msg)
    weight = prior["weight"].to_numpy(float) if "weight" in prior else np.full(len(prior), 10.0)
    if not (np.isfinite(weight) & (weight >= 0)).all():
        msg = "tl.grn: prior's weight must be finite and >= 0."
        raise DataError(msg)
    odds = np.ones((len(columns), adata.n_vars), np.float32)
    odds[rows[known], targets[known]] = weight[known]
    return odds


def _network(
    x: np.ndarray, columns: np.ndarray, *, method: str, odds: np.ndarray | None, settings: dict[str, Any], seed: int
) -> Found:
    if method == "attention":
        return _attention(x, columns, odds, settings, seed)
    config = GRNInferenceConfig(n_tfs=len(columns), n_genes=x.shape[1], **settings)
    first = _attention(x, columns, odds, settings, seed) if method == "combined" else None
    expression = size_normalized(jnp.asarray(x)) if config.normalize else jnp.asarray(x)
    z = standard_ranks(expression, config.rank_width)
    places = jnp.asarray(columns)
    signs = np.asarray(jnp.sign(partial_effects(correlations(z, places), places, config.ridge)))
    host = np.asarray(z)
    if method == "lasso":
        weights = lasso_path_importances(host, columns)
    else:
        kind = "extra_trees" if method == "combined" else method
        weights = tree_importances(host, columns, method=kind, seed=seed % 2**31)
    if first is not None:
        weights = rank_average(first.weights, weights, possible=np.asarray(not_itself(places, x.shape[1])))
    activity = regulator_activity(z, jnp.asarray(weights * signs, jnp.float32))
    return Found(weights, signs, np.asarray(activity), None if first is None else first.explained)


def _attention(
    x: np.ndarray, columns: np.ndarray, odds: np.ndarray | None, settings: dict[str, Any], seed: int
) -> Found:
    op = DifferentiableGRN(GRNInferenceConfig(n_tfs=len(columns), n_genes=x.shape[1], **settings), rngs=nnx.Rngs(seed))
    data: dict[str, Any] = {"counts": x, "tf_indices": columns}
    if odds is not None:
        data["prior_network"] = odds
    steps = -(-len(x) // int(op.fit_defaults["batch_size"]))
    with warnings.catch_warnings():  # the counts are looked over already
        warnings.filterwarnings("ignore", category=DataWarning)
        fit(op, data, max_epochs=-(-STEPS // steps), seed=seed, progress=False)
    graph, state = nnx.split(op)
    run = jax.jit(lambda state, data: nnx.merge(graph, state)(**data))
    out = run(state, {key: jnp.asarray(value) for key, value in data.items()})
    weights, signs, activity, explained = (
        np.asarray(out[key], np.float64) for key in ("grn_matrix", "grn_sign", "tf_activity", "explained_variance")
    )
    return Found(weights, signs, activity, float(explained[np.asarray(out["varying_genes"]) > 0].mean()))
