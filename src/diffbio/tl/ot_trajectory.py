"""`tl.ot_trajectory`: descendants, ancestors and fates over a time course."""

import itertools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import slots
from ..data.provenance import provenance
from ..data.transform import shifted_log
from ..data.write import add_results
from ..errors import ConfigError, DataError, DataWarning, MissingKeyError
from ..math.couplings import couple
from ..math.growth import growth_per_day, mean_z_score
from ..math.linalg import pca
from ..math.ot import CONVERGED, LARGEST
from ..operators.singlecell import OTTrajectoryConfig
from ..recording import recording
from .ot_maps import OTTrajectory, logs, shares_of

if TYPE_CHECKING:
    from anndata import AnnData

WHO = "tl.ot_trajectory"
LOG_TOTAL = 1e4


def ot_trajectory(
    adata: "AnnData",
    time_key: str,
    *,
    growth_rate: str | None = None,
    proliferation: str | Sequence[str] | None = None,
    apoptosis: str | Sequence[str] | None = None,
    groupby: str | None = None,
    use_rep: str | None = None,
    n_components: int = 30,
    sinkhorn_epsilon: float = 0.05,
    lambda1: float = 1.0,
    lambda2: float = 50.0,
    growth_iterations: int = 3,
    n_landmarks: int = 2000,
    layer: str | None = None,
    random_state: int = 0,
    copy: bool = False,
) -> Any:
    """Couples each time point with the next one by Waddington-OT (see `DifferentiableOTTrajectory`).

    Cost: the squared Euclidean distance, over its median, in principal components of each pair of time points; genes
    are log-normalised, of unit variance over the pair, cut 10 standard deviations above their mean. Plans of more than
    25 million pairs of cells go through landmarks (see `math.couplings`).

    Args:
        adata: cells x genes, changed in place; counts.
        time_key: column of `obs`, numbers such as days.
        growth_rate: column of `obs`: by what a cell's descendants multiply in a unit of time, above 0. None is 1, or
            what the scores say.
        proliferation: column of `obs` with a score, or names of genes, whose mean z-score is taken: growth is then
            exp(births - deaths) a day with wot's logistic functions (see `math.growth`).
        apoptosis: the same, for deaths; only together with proliferation.
        groupby: column of `obs`, such as cell types: for it flows, fates and ancestors are kept for the figure.
        use_rep: key of `obsm`; None is the principal components of each pair.
        n_components: how many of them.
        sinkhorn_epsilon: entropy, in units of the median cost.
        lambda1: how strongly cells keep to their expected growth.
        lambda2: how strongly the cells of the later day keep to equal masses.
        growth_iterations: solves, each after the first with the growth of the one before.
        n_landmarks: of each day, where there are too many pairs.
        layer: of the counts; None is X.
        random_state: seed of the landmarks.
        copy: works on a copy and returns (copy, trajectory).

    Adds `uns["diffbio_ot"]`: `days`, `growth` (cells,) to the next day (NaN on the last), `error` and `exact` of each
    plan, `settings`; with groupby what `between_groups` says: `groups`, `share`, `flow`, `fates` and `ancestors`.

    Returns:
        An `OTTrajectory`: `transport(t0, t1)`, `descendants`, `ancestors`, `fates`, `interpolate`.

    Raises:
        ConfigError: a setting out of its range, two sources of growth, or a list of no genes.
        DataError: less than two time points, times that are no numbers, growth of 0 or less, a groupby column without
            a value, or no counts.
        MissingKeyError: a column, gene or representation is not there.
    """
    config = OTTrajectoryConfig(
        sinkhorn_epsilon=sinkhorn_epsilon, lambda1=lambda1, lambda2=lambda2, growth_iterations=growth_iterations,
        n_components=n_components,
    )  # fmt: skip
    if n_landmarks < 2:
        msg = f"{WHO}: n_landmarks must be at least 2, got {n_landmarks}."
        raise ConfigError(msg)
    settings = {
        "time_key": time_key, "growth_rate": growth_rate, "proliferation": proliferation, "apoptosis": apoptosis,
        "groupby": groupby, "use_rep": use_rep, "n_components": n_components, "sinkhorn_epsilon": sinkhorn_epsilon,
        "lambda1": lambda1, "lambda2": lambda2, "growth_iterations": growth_iterations, "n_landmarks": n_landmarks,
        "layer": layer, "random_state": random_state,
    }  # fmt: skip
    target = slots.target_of(adata, copy=copy)
    with recording() as record:
        days, cells = _time_points(target, time_key)
        if groupby is not None and groupby not in target.obs:
            msg = f"{WHO}: obs has no column {groupby!r}; it has {', '.join(map(str, target.obs.columns))}."
            raise MissingKeyError(msg)
        if groupby is not None and target.obs[groupby].isna().all():
            msg = f"{WHO}: obs[{groupby!r}] holds nothing but missing values; groupby needs cells with a group."
            raise DataError(msg)
        rates = _rates(target, growth_rate, proliferation, apoptosis, layer)
        points = None if use_rep is None else slots.representation(target, use_rep)
        matrix = None if use_rep is not None else _variable(target, layer)
        growth, steps = np.full(target.n_obs, np.nan), []
        for k, (early, late) in enumerate(itertools.pairwise(cells)):
            x, y = (
                (points[early], points[late]) if points is not None else _components(matrix, early, late, n_components)
            )
            step, growth[early] = couple(
                x, y, rates[early] ** (days[k + 1] - days[k]), epsilon=config.sinkhorn_epsilon, lambda1=config.lambda1,
                lambda2=config.lambda2, growth_iterations=config.growth_iterations, n_landmarks=n_landmarks,
                seed=random_state,
            )  # fmt: skip
            if not step.error <= CONVERGED["float64"]:
                msg = f"{WHO}: the plan from day {days[k]:g} did not converge, {step.error:.1e} of its mass misses the "
                msg += "marginals; a larger sinkhorn_epsilon converges faster."
                warnings.warn(msg, DataWarning, stacklevel=2)
            lost = int((growth[early] == 0).sum())
            if lost:
                msg = f"{WHO}: {lost} of the {len(early)} cells of day {days[k]:g} are so far from those of day "
                msg += f"{days[k + 1]:g} that their growth is 0 in double precision; their fates are those of the "
                msg += "nearest cells. Leave out such cells if they are artefacts."
                warnings.warn(msg, DataWarning, stacklevel=2)
            steps.append(step)
        trajectory = OTTrajectory(target.obs_names, days, cells, steps, growth)
        result = {
            "time_key": time_key, "days": np.asarray(days), "growth": growth,
            "error": np.array([step.error for step in steps]), "exact": np.array([step.exact for step in steps]),
            "settings": {name: value for name, value in settings.items() if isinstance(value, int | float)},
        }  # fmt: skip
        if groupby is not None:
            result |= {"groupby": groupby, **between_groups(trajectory, target.obs[groupby])}
        target.uns[slots.OT] = result
    entry = provenance(params=settings, seed=random_state, data=target, **record)
    add_results(target, {"uns/diffbio/ot_trajectory": entry})
    return (target, trajectory) if copy else trajectory


def between_groups(trajectory: OTTrajectory, groups: Any) -> dict[str, Any]:
    """Flow between groups of cells over each step, their fates on the last day, and the ancestors of those.

    Returns:
        `groups` (names), `share` (days, groups) of the cells, `flow` (steps, groups, groups; sums to 1 at each
        step), `fates` (days, groups, groups of the last day; rows sum to 1, or are 0 where a day has no such cells) and
        `ancestors` (days, groups of the last day, groups; likewise). Cells without a group are left out; what belongs
        to a day on which no cell has one is 0, and a DataWarning names such days.
    """
    import pandas as pd

    found = pd.Categorical(groups)
    names = [str(name) for name in found.categories]
    member = (np.asarray(found.codes)[:, None] == np.arange(len(names))).astype(float)
    of_day = [member[own] for own in trajectory.cells]
    last = len(of_day) - 1
    empty = [f"{day:g}" for day, own in zip(trajectory.days, of_day, strict=True) if not own.any()]
    if empty:
        msg = f"{WHO}: no cell of day {', '.join(empty)} has a group; flow, fates and ancestors are 0 there."
        warnings.warn(msg, DataWarning, stacklevel=3)
    flow = [early.T @ trajectory.carried(late, k + 1, k) for k, (early, late) in enumerate(itertools.pairwise(of_day))]
    fates, ancestors = zip(*(_fates(trajectory, own, of_day[last], k) for k, own in enumerate(of_day)), strict=True)
    return {
        "groups": np.array(names, dtype=object),
        "share": np.stack([own.mean(axis=0) for own in of_day]),
        "flow": np.stack([_rows_to_one(part.reshape(1, -1)).reshape(part.shape) for part in flow]),
        "fates": np.stack(fates),
        "ancestors": np.stack(ancestors),
    }


def _fates(trajectory: OTTrajectory, own: np.ndarray, late: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Fates of the groups of one day, and ancestors there of the groups of the last one."""
    fates = np.zeros((own.shape[1], late.shape[1]))
    if not late.any():
        return fates, fates.copy()
    shares, log_mass = trajectory.averaged(late, logs(late.any(axis=1)), len(trajectory.days) - 1, number)
    for group, member in enumerate(own.T > 0):
        if np.isfinite(log_mass[member]).any():
            fates[group] = shares_of(log_mass[member]) @ shares[member]
    mass = np.exp(log_mass - log_mass.max())
    return fates, _rows_to_one((mass[:, None] * shares).T @ own)


def _rows_to_one(values: np.ndarray) -> np.ndarray:
    total = values.sum(axis=1, keepdims=True)
    return np.divide(values, total, out=np.zeros_like(values), where=total > 0)


def _time_points(adata: "AnnData", time_key: str) -> tuple[list[float], list[np.ndarray]]:
    """Times in order, and the row numbers of the cells of each."""
    import pandas as pd

    if time_key not in adata.obs:
        msg = f"{WHO}: obs has no column {time_key!r}; it has {', '.join(map(str, adata.obs.columns)) or 'none'}."
        raise MissingKeyError(msg)
    times = pd.to_numeric(adata.obs[time_key].astype(str), errors="coerce").to_numpy(float)
    if not np.isfinite(times).all():
        row = int(np.flatnonzero(~np.isfinite(times))[0])
        msg = f"{WHO}: obs[{time_key!r}] must hold numbers, but cell {row} ({adata.obs_names[row]}) holds "
        msg += f"{adata.obs[time_key].iloc[row]!r}; leave such cells out."
        raise DataError(msg)
    days = sorted(set(times.tolist()))
    if len(days) < 2:
        msg = f"{WHO}: obs[{time_key!r}] holds {len(days)} time point; a trajectory needs at least two."
        raise DataError(msg)
    return days, [np.flatnonzero(times == day) for day in days]


def _rates(
    adata: "AnnData", growth_rate: str | None, proliferation: Any, apoptosis: Any, layer: str | None
) -> np.ndarray:
    """Growth of each cell in a unit of time."""
    if growth_rate is not None and proliferation is not None:
        msg = f"{WHO}: growth_rate and proliferation both say how cells grow; pass one of them."
        raise ConfigError(msg)
    if apoptosis is not None and proliferation is None:
        msg = f"{WHO}: apoptosis does nothing without proliferation."
        raise ConfigError(msg)
    if proliferation is not None:
        deaths = None if apoptosis is None else _score(adata, apoptosis, layer)
        return growth_per_day(_score(adata, proliferation, layer), deaths)
    if growth_rate is None:
        return np.ones(adata.n_obs)
    rates = _column(adata, growth_rate)
    if (rates <= 0).any():
        row = int(np.flatnonzero(rates <= 0)[0])
        msg = f"{WHO}: obs[{growth_rate!r}] must be above 0, but cell {row} ({adata.obs_names[row]}) holds "
        msg += f"{rates[row]:g}; growth is a number of descendants in a unit of time, 1 where cells only live on."
        raise DataError(msg)
    return rates


def _column(adata: "AnnData", key: str) -> np.ndarray:
    import pandas as pd

    if key not in adata.obs:
        msg = f"{WHO}: obs has no column {key!r}; it has {', '.join(map(str, adata.obs.columns)) or 'none'}."
        raise MissingKeyError(msg)
    values = pd.to_numeric(adata.obs[key], errors="coerce").to_numpy(float)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        msg = f"{WHO}: obs[{key!r}] must hold finite numbers, but cell {row} ({adata.obs_names[row]}) holds "
        msg += f"{adata.obs[key].iloc[row]!r}."
        raise DataError(msg)
    return values


def _score(adata: "AnnData", wanted: str | Sequence[str], layer: str | None) -> np.ndarray:
    """A column of `obs`, or the mean z-score of genes."""
    import pandas as pd

    if isinstance(wanted, str):
        return _column(adata, wanted)
    wanted = list(wanted)
    if not wanted:
        msg = f"{WHO}: proliferation and apoptosis must name a column of obs or at least one gene, got an empty list."
        raise ConfigError(msg)
    genes = adata.var_names.get_indexer(pd.Index(wanted))
    if (genes < 0).all():
        msg = f"{WHO}: none of the {len(genes)} genes, such as {wanted[0]!r}, is in var_names."
        raise MissingKeyError(msg)
    if (genes < 0).any():
        msg = f"{WHO}: {(genes < 0).sum()} of the {len(genes)} genes of a score, such as "
        msg += f"{wanted[int(np.argmin(genes))]!r}, are not in var_names; the score is the mean of the others."
        warnings.warn(msg, DataWarning, stacklevel=4)
    values = shifted_log(slots.counts(adata, layer), total=LOG_TOTAL)[:, genes[genes >= 0]]
    return mean_z_score(np.asarray(values.toarray() if hasattr(values, "toarray") else values, float))


def _variable(adata: "AnnData", layer: str | None) -> Any:
    """Log-normalised variable genes, sparse if the counts are."""
    matrix = slots.counts(adata, layer)
    return shifted_log(matrix, total=LOG_TOTAL)[:, slots.variable_genes(adata, matrix)]


def _components(matrix: Any, early: np.ndarray, late: np.ndarray, n_components: int) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of two time points together, of genes of unit variance, as `math.ot.local_components`."""
    both = matrix[np.concatenate([early, late])]
    sparse = hasattr(both, "tocsr")
    mean = np.asarray(both.mean(axis=0), float).ravel()
    square = np.asarray((both.multiply(both) if sparse else both * both).mean(axis=0), float).ravel()
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    kept = np.flatnonzero(spread > 1e-6)
    both, mean, spread = both[:, kept], mean[kept], spread[kept]
    limit = mean / spread + LARGEST
    if sparse:
        both = both.tocsr().copy()
        both.data = np.minimum(both.data / spread[both.indices], limit[both.indices]).astype(np.float32)
    else:
        both = np.minimum(both / spread, limit).astype(np.float32)
    if not len(kept):
        return np.zeros((len(early), 1)), np.zeros((len(late), 1))
    scores = pca(both, min(n_components, *both.shape)).scores
    return scores[: len(early)], scores[len(early) :]
