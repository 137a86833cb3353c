"""Bayesian differential expression between groups of cells (Lopez et al. 2018; Boyeau et al. 2019)."""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy import sparse

from ..chunks import joined
from ..errors import ConfigError, DataError, DataWarning
from . import posterior
from .base import rows_of
from .cells import CellSource, counts_of_rows
from .importance import Weighting
from .registry import plain

if TYPE_CHECKING:
    from anndata import AnnData

    from .queries import Queries

EPS = 1e-8  # in the log odds, as in scvi-tools: they end at +-18.4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """How to compare; the fields are arguments of `differential_expression`."""

    mode: str
    delta: float | None
    batch_correction: bool
    batchid1: Any
    batchid2: Any
    fdr_target: float
    n_samples_overall: int
    use_permutation: bool
    m_permutation: int
    pseudocounts: float | None
    test_mode: str
    cred_interval_lvls: tuple[float, ...]
    all_stats: bool
    batch_size: int | None
    seed: int
    weights: str | None
    weighting: dict[str, Any]
    change_fn: Any
    m1_domain_fn: Any
    threshold_counts: float
    filter_outlier_cells: bool

    def __post_init__(self) -> None:
        rules = {
            "mode": (self.mode in ("vanilla", "change"), "'vanilla' or 'change'"),
            "test_mode": (self.test_mode in ("two", "three"), "'two' or 'three'"),
            "delta": (self.delta is None or self.delta > 0, "above 0 or None"),
            "fdr_target": (0 < self.fdr_target < 1, "in (0, 1)"),
            "n_samples_overall": (self.n_samples_overall >= 2, "at least 2"),
            "m_permutation": (self.m_permutation >= 1, "at least 1"),
            "pseudocounts": (self.pseudocounts is None or self.pseudocounts > 0, "above 0 or None"),
            "cred_interval_lvls": (all(0 < level < 1 for level in self.cred_interval_lvls), "in (0, 1)"),
            "change_fn": (self.change_fn in (None, "log-fold") or callable(self.change_fn), "'log-fold' or a function"),
            "m1_domain_fn": (self.m1_domain_fn is None or callable(self.m1_domain_fn), "a function or None"),
            "threshold_counts": (self.threshold_counts >= 0, "at least 0"),
            "batchid1": (self.batchid1 is None or self.batch_correction, "None without batch_correction"),
            "batchid2": (self.batchid2 is None or self.batch_correction, "None without batch_correction"),
        }
        for name, (ok, wanted) in rules.items():
            if not ok:
                msg = f"differential_expression: {name} must be {wanted}, got {getattr(self, name)!r}."
                raise ConfigError(msg)
        if self.mode == "vanilla" and (self.change_fn is not None or self.m1_domain_fn is not None):
            msg = "differential_expression: change_fn and m1_domain_fn are read by mode='change', got mode='vanilla'."
            raise ConfigError(msg)
        Weighting.of(self.weights, self.weighting, "differential_expression")


class Pair(NamedTuple):
    """Two groups of cells by row number."""

    rows1: np.ndarray
    rows2: np.ndarray
    columns: dict[str, str]  # what names them in the table


class Group(NamedTuple):
    """What is known of a group from the counts."""

    mean: np.ndarray  # (genes,)
    non_zeros: np.ndarray
    normalized_mean: np.ndarray  # per 10,000


def compare_groups(
    model: "Queries", adata: "AnnData", cells: CellSource, groups: Sequence[Any], how: Comparison
) -> pd.DataFrame:
    """The table of `Queries.differential_expression`; groups: groupby, group1, group2, idx1, idx2."""
    _check_counts_are_there(cells, how)
    tables = []
    for number, pair in enumerate(_pairs(adata, *groups)):
        result = _compare(model, cells, pair, how, number)
        table = pd.DataFrame(result, index=pd.Index(list(model.registry.var_names), dtype=object))
        by = "proba_de" if how.mode == "change" else "bayes_factor"
        table = table.sort_values(by, ascending=False, kind="stable")
        if how.mode == "change":
            table[f"is_de_fdr_{how.fdr_target}"] = expected_discoveries(table["proba_de"].to_numpy(), how.fdr_target)
        tables.append(table.assign(**pair.columns))
    return pd.concat(tables)


def expected_discoveries(probabilities: np.ndarray, target: float) -> np.ndarray:
    """The largest set of likeliest genes whose mean of 1 - probability, the expected FDR, is at most `target`."""
    order = np.argsort(-probabilities, kind="stable")
    false = np.cumsum(1.0 - probabilities[order]) / np.arange(1, len(order) + 1)
    called = np.zeros(len(order), bool)
    called[order[: int((false <= target).sum())]] = True
    return called


def least_change(lfc_means: np.ndarray, *, seed: int = 0) -> float:
    """A delta from the data: 0.6 of the mean distance from 0 of the outer two of three modes; 0.1 at least."""
    from sklearn.mixture import GaussianMixture

    modes = np.sort(GaussianMixture(3, random_state=seed).fit(lfc_means[:, None]).means_[:, 0])
    return float(max(0.1, 0.6 * np.abs(modes[[0, -1]]).mean()))


def pseudocount(fractions: Sequence[np.ndarray], not_expressed: Sequence[np.ndarray]) -> float:
    """scvi-tools' offset: what is decoded of genes that a group does not express, per gene; 1e-10 at least.

    fractions: (draws, genes) of both groups. not_expressed: masks (genes,).
    """
    largest = [
        np.quantile(group.max(0)[mask], 0.9) if mask.any() else 1e-10
        for group, mask in zip(fractions, not_expressed, strict=True)
    ]
    return float(max(1e-10, max(largest) / fractions[0].shape[1]))


def highest_density(samples: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the narrowest interval that holds `level` of the samples (samples, genes), for every gene."""
    ordered = np.sort(samples, axis=0)
    inside = int(np.floor(level * len(ordered)))
    start = np.argmin(ordered[inside:] - ordered[: len(ordered) - inside], axis=0)
    ends = [np.take_along_axis(ordered, (start + shift)[None], 0)[0] for shift in (0, inside)]
    return ends[0], ends[1]


def _compare(
    model: "Queries", cells: CellSource, pair: Pair, how: Comparison, number: int
) -> dict[str, Any]:
    # the generators of the two groups have to differ: the same noise in both would cancel
    chosen = [_batches(model, batches, how) for batches in (how.batchid1, how.batchid2)]
    draws = []
    for group, rows in enumerate((pair.rows1, pair.rows2)):
        rows = _without_outliers(model, cells, rows, how) if how.filter_outlier_cells else rows
        seeds = np.random.SeedSequence([how.seed, number, group])
        draws.append(_fractions(model, cells, rows, chosen[group], how, seeds))
    scales = {f"scale{i + 1}": np.concatenate(parts).mean(0) for i, parts in enumerate(draws)}
    if chosen[0] != chosen[1]:
        if set(chosen[0]) & set(chosen[1]):
            message = "differential_expression: batchid1 and batchid2 overlap in part: batches are not corrected for"
            warnings.warn(message, DataWarning, stacklevel=5)
        draws = [[np.concatenate(parts)] for parts in draws]
    f1, f2 = _paired(draws, how, np.random.default_rng([how.seed, number, 2]))
    raw = [_raw(cells, rows) for rows in (pair.rows1, pair.rows2)] if _reads_counts(how) else []
    if how.mode == "vanilla":
        larger = np.asarray(_share_larger(f1, f2), np.float64)
        result = {
            "proba_m1": larger, "proba_m2": 1.0 - larger,
            "bayes_factor": np.log(larger + EPS) - np.log(1.0 - larger + EPS), **scales,
        }
    else:
        result = _change(f1, f2, scales, [group.mean < how.threshold_counts for group in raw], how)
    if how.all_stats:
        for name, field in (("raw_mean", 0), ("non_zeros_proportion", 1), ("raw_normalized_mean", 2)):
            result |= {f"{name}{i + 1}": group[field] for i, group in enumerate(raw)}
    return result


def _change(
    f1: np.ndarray, f2: np.ndarray, scales: dict[str, Any], not_expressed: list[np.ndarray], how: Comparison
) -> dict[str, Any]:
    offset = pseudocount((f1, f2), not_expressed) if how.pseudocounts is None else how.pseudocounts
    own, change = callable(how.change_fn), how.change_fn if callable(how.change_fn) else _fold_changes
    delta = how.delta
    if delta is None:
        delta = least_change(_changes(change, f1, f2, offset).mean(0), seed=how.seed)
    if own or how.m1_domain_fn is not None:
        up, down = _shares_by(how, delta, _changes(change, f1, f2, offset))
    else:
        up, down = (np.asarray(x, np.float64) for x in _shares_changed(f1, f2, offset, delta))
    likely = np.minimum(up + down, 1.0) if how.test_mode == "two" else np.maximum(up, down)
    lfc = _changes(change, f1, f2, 1e-3 * offset)  # reported with less offset than it is tested with
    result = {
        "proba_de": likely, "proba_not_de": 1.0 - likely,
        "bayes_factor": np.log(likely + EPS) - np.log(1.0 - likely + EPS),
        **scales, "pseudocounts": offset, "delta": delta,
        "lfc_mean": lfc.mean(0), "lfc_median": np.median(lfc, axis=0), "lfc_std": lfc.std(0),
        "lfc_min": lfc.min(0), "lfc_max": lfc.max(0),
    }
    for level in how.cred_interval_lvls:
        low, high = highest_density(lfc, level)
        name = f"lfc_confidence_interval_{str(level)[:5]}"
        result |= {f"{name}_min": low, f"{name}_max": high}
    return result


def _changes(change: Any, f1: np.ndarray, f2: np.ndarray, offset: float) -> np.ndarray:
    """What `change` gives, (draws, genes).

    Raises:
        ConfigError: it gives another shape.
    """
    found = np.asarray(change(f1, f2, offset))
    if found.shape != f1.shape:
        msg = (
            f"differential_expression: change_fn(f1, f2, pseudocounts) must give {f1.shape}, as f1 and f2 are; "
            f"it gave {found.shape}."
        )
        raise ConfigError(msg)
    return found


def _shares_by(how: Comparison, delta: float, changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of draws that are changed up, and down, by m1_domain_fn or by delta.

    Raises:
        ConfigError: m1_domain_fn does not give two masks.
    """
    masks = (changes >= delta, changes < -delta) if how.m1_domain_fn is None else how.m1_domain_fn(changes)
    if not (isinstance(masks, tuple | list) and [np.shape(mask) for mask in masks] == [changes.shape] * 2):
        msg = "differential_expression: m1_domain_fn(changes) must give two masks of the shape of changes, up and down."
        raise ConfigError(msg)
    up, down = (np.asarray(mask, np.float64).mean(0) for mask in masks)
    return up, down


@jax.jit
def _share_larger(f1: jax.Array, f2: jax.Array) -> jax.Array:
    return (f1 > f2).mean(0)


@jax.jit
def _fold_changes(f1: jax.Array, f2: jax.Array, offset: jax.Array) -> jax.Array:
    return jnp.log2(f1 + offset) - jnp.log2(f2 + offset)


@jax.jit
def _shares_changed(f1: jax.Array, f2: jax.Array, offset: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
    lfc = _fold_changes(f1, f2, offset)
    return (lfc >= delta).mean(0), (lfc < -delta).mean(0)


def _batches(model: "Queries", batches: Any, how: Comparison) -> list[str | None]:
    """The batches that a group is decoded as, in the model's order; None is each cell's own."""
    if not how.batch_correction or not model.registry.batches:
        return [None]
    codes = range(len(model.registry.batches)) if batches is None else np.unique(model.registry.batch_codes(batches))
    return [model.registry.batches[code] for code in codes]


def _without_outliers(model: "Queries", cells: CellSource, rows: np.ndarray, how: Comparison) -> np.ndarray:
    """The nine tenths of the cells that an elliptic envelope of their latent means holds."""
    from sklearn.covariance import EllipticEnvelope

    z = joined(model.evaluate(posterior.latents, cells, rows, how.batch_size))["mean"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a covariance that is not of full rank: fewer cells than dimensions
            inside = EllipticEnvelope(random_state=how.seed).fit_predict(z) == 1
    except ValueError as error:
        message = f"differential_expression: no envelope of {len(rows)} cells ({error}); all of them are drawn from"
        warnings.warn(message, DataWarning, stacklevel=6)
        return rows
    return rows[inside] if inside.any() else rows


def _fractions(
    model: "Queries",
    cells: CellSource,
    rows: np.ndarray,
    chosen: Sequence[Any],
    how: Comparison,
    seeds: np.random.SeedSequence,
) -> list[np.ndarray]:
    """Gene fractions of draws, (draws, genes), for every batch they are decoded as."""
    n = max(2, how.n_samples_overall // len(chosen))
    return [
        model.get_normalized_expression(
            cells, rows, transform_batch=batch, n_samples_overall=n, batch_size=how.batch_size, seed=int(seed),
            weights=how.weights, **how.weighting,
        )
        for batch, seed in zip(chosen, seeds.generate_state(len(chosen)), strict=True)
    ]


def _paired(
    draws: list[list[np.ndarray]], how: Comparison, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws of the two groups side by side; where both are decoded as the same batches, batch by batch."""
    pairs = list(zip(*draws, strict=True))
    if how.use_permutation:
        m = max(1, how.m_permutation // len(pairs))
        pairs = [tuple(x[rng.integers(len(x), size=m)] for x in pair) for pair in pairs]
    else:
        pairs = [tuple(x[: min(map(len, pair))] for x in pair) for pair in pairs]
    return np.concatenate([pair[0] for pair in pairs]), np.concatenate([pair[1] for pair in pairs])


def _raw(cells: CellSource, rows: np.ndarray) -> Group:
    assert cells.counts is not None
    counts = sparse.csr_array(counts_of_rows(cells.counts, rows))
    size = np.asarray(counts.sum(axis=1), np.float64).ravel()
    weights = np.divide(1e4, size, out=np.zeros_like(size), where=size > 0)  # an empty cell stays 0
    n = len(rows)
    return Group(
        np.asarray(counts.sum(axis=0), np.float64).ravel() / n,
        np.bincount(counts.indices[counts.data != 0], minlength=counts.shape[1]) / n,
        np.asarray(weights @ counts).ravel() / n,
    )


def _pairs(adata: "AnnData", groupby: str | None, group1: Any, group2: Any, idx1: Any, idx2: Any) -> Iterator[Pair]:
    if idx1 is not None:
        first = _selected(adata, idx1, "idx1")
        second = ~first if idx2 is None else _selected(adata, idx2, "idx2")
        yield _pair(first, second, {})
        return
    if groupby is None:
        msg = "differential_expression: pass groupby=, or idx1= and idx2=."
        raise ConfigError(msg)
    if groupby not in adata.obs:
        listed = ", ".join(map(str, adata.obs.columns))
        msg = f"differential_expression: obs has no column {groupby!r}; it has {listed}."
        raise DataError(msg)
    column = pd.Categorical(adata.obs[groupby]).remove_unused_categories()
    names = list(map(plain, column.categories))
    if group1 is None and len(names) < 2:
        msg = f"differential_expression: obs[{groupby!r}] holds one group, {names}: there is nothing to compare."
        raise DataError(msg)
    several = isinstance(group1, Iterable) and not isinstance(group1, str)
    wanted = names if group1 is None else list(group1) if several else [group1]
    for group in [*map(plain, wanted), *([] if group2 is None else [plain(group2)])]:
        if group not in names:
            msg = f"differential_expression: obs[{groupby!r}] has no group {group!r}; it has {names}."
            raise DataError(msg)
    for group in map(plain, wanted):
        first = column.codes == names.index(group)
        second = ~first if group2 is None else column.codes == names.index(plain(group2))
        other = "Rest" if group2 is None else str(group2)
        yield _pair(first, second, {"comparison": f"{group} vs {other}", "group1": str(group), "group2": other})


def _pair(first: np.ndarray, second: np.ndarray, columns: dict[str, str]) -> Pair:
    for mask, name in ((first, "first"), (second, "second")):
        if not mask.any():
            msg = f"differential_expression: the {name} group has no cells ({columns or 'idx1, idx2'})."
            raise DataError(msg)
    if (first & second).any():
        warnings.warn("differential_expression: the groups share cells", DataWarning, stacklevel=5)
    return Pair(np.flatnonzero(first), np.flatnonzero(second), columns)


def _selected(adata: "AnnData", which: Any, name: str) -> np.ndarray:
    """A mask from a query of obs, a mask, or row numbers."""
    mask = np.zeros(adata.n_obs, bool)
    if isinstance(which, str):
        try:
            rows = cast("pd.DataFrame", adata.obs).reset_index(drop=True).query(which).index.to_numpy()
        except Exception as error:  # pandas raises whatever the parser and the names in the query make of it
            msg = f"differential_expression: {name}={which!r} is no query of obs: {error}."
            raise DataError(msg) from error
    else:
        rows = np.asarray(which).ravel()
        if rows.dtype == bool and len(rows) != adata.n_obs:
            msg = f"differential_expression: {name} has {len(rows)} entries for {adata.n_obs} cells."
            raise DataError(msg)
        if rows.dtype != bool and len(rows):
            rows = rows_of(rows, adata.n_obs)
    mask[rows] = True
    return mask


def _reads_counts(how: Comparison) -> bool:
    return how.all_stats or (how.mode == "change" and how.pseudocounts is None)


def _check_counts_are_there(cells: CellSource, how: Comparison) -> None:
    if cells.counts is None and _reads_counts(how):
        fix = "all_stats=False" + (" and pseudocounts=" if how.mode == "change" else "")
        msg = f"differential_expression needs the counts, but the data are minified; pass {fix}."
        raise DataError(msg)
