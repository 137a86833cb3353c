"""Bayesian differential expression between groups of cells (Lopez et al. 2018; Boyeau et al. 2019)."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy import sparse

from ..errors import ConfigError, DataError, DataWarning
from .cells import CellSource, counts_of_rows
from .registry import plain

if TYPE_CHECKING:
    from anndata import AnnData

    from .queries import Queries

EPS = 1e-8  # in the log odds, as in scvi-tools: they end at +-18.4
NOT_EXPRESSED = 0.01  # mean count of a group below which it does not express a gene


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
            "batchid1": (self.batchid1 is None or self.batch_correction, "None without batch_correction"),
            "batchid2": (self.batchid2 is None or self.batch_correction, "None without batch_correction"),
        }
        for name, (ok, wanted) in rules.items():
            if not ok:
                msg = f"differential_expression: {name} must be {wanted}, got {getattr(self, name)!r}."
                raise ConfigError(msg)


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
    draws = [
        _fractions(model, cells, rows, batches, how, np.random.SeedSequence([how.seed, number, group]))
        for group, (rows, batches) in enumerate(((pair.rows1, how.batchid1), (pair.rows2, how.batchid2)))
    ]
    scales = {f"scale{i + 1}": np.concatenate(parts).mean(0) for i, parts in enumerate(draws)}
    f1, f2 = _paired(draws, how, np.random.default_rng([how.seed, number, 2]))
    raw = [_raw(cells, rows) for rows in (pair.rows1, pair.rows2)] if _reads_counts(how) else []
    if how.mode == "vanilla":
        larger = np.asarray(_share_larger(f1, f2), np.float64)
        result = {
            "proba_m1": larger, "proba_m2": 1.0 - larger,
            "bayes_factor": np.log(larger + EPS) - np.log(1.0 - larger + EPS), **scales,
        }
    else:
        result = _change(f1, f2, scales, [group.mean < NOT_EXPRESSED for group in raw], how)
    if how.all_stats:
        for name, field in (("raw_mean", 0), ("non_zeros_proportion", 1), ("raw_normalized_mean", 2)):
            result |= {f"{name}{i + 1}": group[field] for i, group in enumerate(raw)}
    return result


def _change(
    f1: np.ndarray, f2: np.ndarray, scales: dict[str, Any], not_expressed: list[np.ndarray], how: Comparison
) -> dict[str, Any]:
    offset = pseudocount((f1, f2), not_expressed) if how.pseudocounts is None else how.pseudocounts
    delta = how.delta
    if delta is None:
        delta = least_change(np.asarray(_fold_changes(f1, f2, offset)).mean(0), seed=how.seed)
    up, down = (np.asarray(x, np.float64) for x in _shares_changed(f1, f2, offset, delta))
    likely = np.minimum(up + down, 1.0) if how.test_mode == "two" else np.maximum(up, down)
    lfc = np.asarray(_fold_changes(f1, f2, 1e-3 * offset))  # reported with less offset than it is tested with
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


def _fractions(
    model: "Queries", cells: CellSource, rows: np.ndarray, batches: Any, how: Comparison, seeds: np.random.SeedSequence
) -> list[np.ndarray]:
    """Gene fractions of draws, (draws, genes), for every batch they are decoded as."""
    chosen: list[Any] = [None]
    if how.batch_correction:
        n_batches = max(len(model.registry.batches), 1)
        chosen = list(range(n_batches) if batches is None else model.registry.batch_codes(batches))
    n = max(2, how.n_samples_overall // len(chosen))
    return [
        model.get_normalized_expression(
            cells, rows, transform_batch=None if code is None else int(code), n_samples_overall=n,
            batch_size=how.batch_size, seed=int(seed),
        )
        for code, seed in zip(chosen, seeds.generate_state(len(chosen)), strict=True)
    ]


def _paired(
    draws: list[list[np.ndarray]], how: Comparison, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws of the two groups side by side; where both are decoded as the same batches, batch by batch."""
    if [how.batchid1, how.batchid2] != [None, None] and how.batchid1 != how.batchid2:
        draws = [[np.concatenate(parts)] for parts in draws]
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
    wanted = names if group1 is None else group1 if isinstance(group1, list | tuple | np.ndarray) else [group1]
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
        rows = cast("pd.DataFrame", adata.obs).reset_index(drop=True).query(which).index.to_numpy()
    else:
        rows = np.asarray(which).ravel()
        if rows.dtype == bool and len(rows) != adata.n_obs:
            msg = f"differential_expression: {name} has {len(rows)} entries for {adata.n_obs} cells."
            raise DataError(msg)
    mask[rows] = True
    return mask


def _reads_counts(how: Comparison) -> bool:
    return how.all_stats or (how.mode == "change" and how.pseudocounts is None)


def _check_counts_are_there(cells: CellSource, how: Comparison) -> None:
    if cells.counts is None and _reads_counts(how):
        fix = "all_stats=False" + (" and pseudocounts=" if how.mode == "change" else "")
        msg = f"differential_expression needs the counts, but the data are minified; pass {fix}."
        raise DataError(msg)
