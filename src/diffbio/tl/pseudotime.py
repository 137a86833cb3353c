"""`tl.pseudotime`: how far each cell is along a process."""

import dataclasses
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
from flax import nnx
from scipy import sparse

from .. import slots
from ..data.matrix import library_sizes
from ..errors import ConfigError, DataError, MissingKeyError
from ..fitting import fit
from ..math.spectrum import scale_of
from ..operators.singlecell import DifferentiablePseudotime, PseudotimeConfig
from ..operators.singlecell.pseudotime import NEIGHBORS
from ..recording import recorded

if TYPE_CHECKING:
    from anndata import AnnData

METHODS = ("dpt", "palantir")
DEPTH = "depth"


@recorded
def pseudotime(
    adata: "AnnData",
    *,
    root: str | int | None = None,
    root_group: str | int | None = None,
    groupby: str = "cell_type",
    method: str = "dpt",
    use_rep: str | None = None,
    n_neighbors: int | None = None,
    n_components: int = 10,
    metric: str = "euclidean",
    n_branchings: int = 0,
    n_waypoints: int | None = None,
    regress_out: str | Sequence[str] | None = None,
    time_key: str | None = None,
    learn_metric: str | None = None,
    max_epochs: int | None = None,
    layer: str | None = None,
    random_state: int = 0,
    progress: bool = False,
    copy: bool = False,
) -> None:
    """Orders cells along a process from a root cell (`DifferentiablePseudotime`).

    Args:
        adata: cells x genes, changed in place.
        root: name or row number of the cell that the process starts from.
        root_group: instead of it, a group of cells, such as "Ductal": of these the cell is taken that is farthest, by
            diffusion distance, from the cell that is farthest from the group's middle. Where the graph falls into
            parts, only that part counts which holds most cells of the group.
        groupby: column of `obs` that names the groups.
        method: "dpt", diffusion pseudotime as scanpy's; "palantir", for a time that is more even along long branches.
        use_rep: key of `obsm`; None is the PCA of log-normalised counts of the variable genes.
        n_neighbors: size of a neighbourhood, the cell itself counted; None is 15 for DPT and 30 for Palantir.
        n_components: diffusion components, the constant one among them.
        metric: between cells, such as "euclidean" or "cosine".
        n_branchings: how often the trajectory is divided at a branching point.
        n_waypoints: of Palantir: cells that paths start from; None is 1200.
        regress_out: numeric columns of `obs` whose linear effect is taken out of the representation first, such as
            ["S_score", "G2M_score"]; "depth" is the logarithm of the cell's total counts. Where cells of different
            stages were sequenced to different depth, that may be most of what the graph sees.
        time_key: numeric column of `obs` with times that are known of some cells (missing, infinite or negative: not
            known): the distance is then trained so that pseudotime goes with them. A root that is looked for in a
            group is found before that, and once more in the trained distance.
        learn_metric: what is trained: "weights" of the representation's columns (None), or a "linear" map of it.
        max_epochs: steps of that training, 1 or more; None is 60.
        layer: of the counts that PCA and depth read; None is X.
        random_state: recorded only; nothing is drawn at random.
        progress: whether to show how training goes.
        copy: works on a copy and returns it.

    Adds `obs["diffbio_pseudotime"]`, 0 to 1, infinite in parts of the graph that the root is not connected with;
    `obsm["X_diffbio_diffmap"]`, the diffusion components, of which the first is constant (for DPT up to the cells'
    degree); with n_branchings `obs["diffbio_branch"]`, categories numbered from the root; and
    `uns["diffbio"]["diffbio_pseudotime"]`: the root's row number and name, the method, the eigenvalues.

    Raises:
        ConfigError: none or both of root and root_group, an unknown method, a setting that the method does not have or
            that is out of range, an empty list of columns to regress out.
        MissingKeyError: no such cell, group or column.
        DataError: a column that is no number, fewer cells than n_neighbors or n_components, fewer than two different
            times to train on.
    """
    slots.choose(method, METHODS, "tl.pseudotime")
    slots.refuse("tl.pseudotime", method, **({"n_waypoints": n_waypoints is not None} if method == "dpt" else {}))
    without_time = {"learn_metric": learn_metric is not None, "max_epochs": max_epochs is not None}
    if time_key is None:
        slots.refuse("tl.pseudotime", "without time_key", **without_time)
    if max_epochs is not None and not (_is_integer(max_epochs) and max_epochs >= 1):
        msg = f"tl.pseudotime: max_epochs must be an integer >= 1, or None for the default, got {max_epochs!r}."
        raise ConfigError(msg)
    columns = [regress_out] if isinstance(regress_out, str) else list(() if regress_out is None else regress_out)
    if regress_out is not None and not columns:
        msg = "tl.pseudotime: regress_out names no column; name one at least, or leave it None."
        raise ConfigError(msg)
    config = PseudotimeConfig(
        method=method,
        n_neighbors=n_neighbors,
        n_diffusion_components=n_components,
        metric=metric,
        n_branchings=n_branchings,
        n_waypoints=n_waypoints,
    )
    _check_cells(adata.n_obs, config)
    start = _start(adata, root, root_group, groupby)
    times = None if time_key is None else _times(adata, time_key)
    features = slots.representation(adata, use_rep, layer)
    if columns:
        features = _without(features, _covariates(adata, columns, layer))
    learned = "none" if times is None else learn_metric or "weights"
    config = dataclasses.replace(config, learn_metric=learned, n_features=features.shape[1])
    op = DifferentiablePseudotime(config, rngs=nnx.Rngs(random_state))
    data: dict[str, Any] = {"embeddings": features, "root_cell_index": np.asarray(start[0])}
    if times is not None:
        if len(start) > 1:  # the training needs a root, and the first row of a group may be anywhere in it
            data["root_cell_index"] = np.asarray(_farthest(op.apply(data)[0], start))
        epochs: dict[str, Any] = {} if max_epochs is None else {"max_epochs": max_epochs}
        fit(op, {**data, "time": times}, seed=random_state, progress=progress, **epochs)
    found = op.apply(data)[0]
    if len(start) > 1:
        cell = _farthest(found, start)
        if cell != int(data["root_cell_index"]):
            data["root_cell_index"] = np.asarray(cell)
            found = op.apply(data)[0]
    cell = int(data["root_cell_index"])
    adata.obs[slots.PSEUDOTIME] = np.asarray(found["pseudotime"])
    adata.obsm[slots.DIFFMAP] = np.asarray(found["diffusion_components"])
    if n_branchings:
        codes = np.asarray(found["branches"])
        names = pd.Index([str(k) for k in range(codes.max() + 1)])
        adata.obs[slots.BRANCH] = pd.Categorical.from_codes(codes.tolist(), categories=names)
    elif slots.BRANCH in adata.obs:
        adata.obs = cast("pd.DataFrame", adata.obs).drop(columns=slots.BRANCH)  # of an earlier call
    record = {
        "root": cell,
        "root_name": str(adata.obs_names[cell]),
        "method": method,
        "eigenvalues": np.asarray(found["eigenvalues"]),
    }
    if op.learned is not None:
        record["metric"] = np.asarray(op.learned[...])
    slots.note(adata, slots.PSEUDOTIME, record)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_cells(n_cells: int, config: PseudotimeConfig) -> None:
    size = config.n_neighbors or NEIGHBORS[config.method]
    needed = max(size, config.n_diffusion_components)
    if n_cells < needed:
        msg = (
            f"tl.pseudotime: n_neighbors {size} and n_components {config.n_diffusion_components} need at least "
            f"{needed} cells; there are {n_cells}."
        )
        raise DataError(msg)


def _start(adata: "AnnData", root: str | int | None, group: str | int | None, groupby: str) -> np.ndarray:
    """Row numbers of the cells that may be the root."""
    if (root is None) == (group is None):
        given = "neither" if root is None else "both"
        msg = (
            f"tl.pseudotime: name the cell that the process starts from (root) or its group (root_group); got {given}."
        )
        raise ConfigError(msg)
    if group is not None:
        if groupby not in adata.obs:
            has = ", ".join(map(str, adata.obs.columns)) or "nothing"
            msg = f"tl.pseudotime: obs has no column {groupby!r} (groupby); it has {has}."
            raise MissingKeyError(msg)
        column = adata.obs[groupby]  # clusters may be numbers; a missing value is no group named "nan"
        cells = np.flatnonzero((column.astype(str) == str(group)).to_numpy() & column.notna().to_numpy())
        if not len(cells):
            names = ", ".join(sorted(map(str, adata.obs[groupby].dropna().unique()))[:12])
            msg = f"tl.pseudotime: no cell has {groupby} {group!r} (root_group); there are {names}."
            raise MissingKeyError(msg)
        return cells
    if isinstance(root, str):
        places = np.flatnonzero(adata.obs_names == root)
        if len(places) != 1:
            msg = f"tl.pseudotime: {len(places)} cells are named {root!r} (root); name one, or give its row number."
            raise MissingKeyError(msg)
        return places
    if not _is_integer(root):
        msg = f"tl.pseudotime: root must be a cell's name or its row number, an integer; got {root!r}."
        raise ConfigError(msg)
    row = int(cast("int", root))
    if not 0 <= row < adata.n_obs:
        msg = f"tl.pseudotime: root is {row}, but row numbers of {adata.n_obs} cells are 0 to {adata.n_obs - 1}."
        raise ConfigError(msg)
    return np.array([row])


def _farthest(found: dict[str, Any], cells: np.ndarray) -> int:
    """Of some cells, that farthest by diffusion distance from the cell that is farthest from their middle.

    All within that part of the graph which holds most of the cells: there is no distance between parts. Neither parts
    nor components depend on the root that `found` was computed from.
    """
    points = np.asarray(found["diffusion_components"], float) * scale_of(1.0 - np.asarray(found["eigenvalues"], float))
    parts = _parts(found, len(points))
    near = parts == np.bincount(parts[cells]).argmax()
    own = cells[near[cells]]

    def apart(cell: int) -> np.ndarray:
        return np.where(near, ((points - points[cell]) ** 2).sum(axis=1), 0.0)

    middle = int(own[((points[own] - points[own].mean(axis=0)) ** 2).sum(axis=1).argmin()])
    return int(own[apart(int(apart(middle).argmax()))[own].argmax()])


def _parts(found: dict[str, Any], n_cells: int) -> np.ndarray:
    """Number of each cell's connected part of the graph, (cells,)."""
    rows, columns, weights = (np.asarray(found[f"transition_{part}"]) for part in ("rows", "columns", "weights"))
    real = weights > 0
    graph = sparse.csr_array((weights[real], (rows[real], columns[real])), shape=(n_cells, n_cells))
    return np.asarray(sparse.csgraph.connected_components(graph, directed=False)[1])


def _times(adata: "AnnData", name: str) -> np.ndarray:
    """Times (cells,) to train on, float32; NaN where they are not known."""
    values = _numbers(adata, name).astype(np.float32)
    values = np.where(np.isfinite(values) & (values >= 0), values, np.float32(np.nan))
    distinct = len(np.unique(values[np.isfinite(values)]))
    if distinct < 2:
        msg = (
            f"tl.pseudotime: obs[{name!r}] (time_key) must hold at least two different known times, finite and 0 or "
            f"more; it holds {distinct}."
        )
        raise DataError(msg)
    return values


def _covariates(adata: "AnnData", columns: Sequence[str], layer: str | None) -> np.ndarray:
    found = []
    for name in columns:
        if name == DEPTH and name not in adata.obs:
            found.append(np.log(np.maximum(library_sizes(slots.counts(adata, layer)), 1.0)))
            continue
        values = _numbers(adata, name)
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            msg = f"tl.pseudotime: obs[{name!r}] is missing or infinite in cell {row} ({adata.obs_names[row]})."
            raise DataError(msg)
        found.append(values)
    return np.column_stack(found)


def _numbers(adata: "AnnData", name: str) -> np.ndarray:
    if name not in adata.obs:
        msg = (
            f"tl.pseudotime: obs has no column {name!r}; it has {', '.join(map(str, adata.obs.columns)) or 'nothing'}."
        )
        raise MissingKeyError(msg)
    try:  # days are often stored as categories of text
        return np.asarray(pd.to_numeric(adata.obs[name].astype(object)), float)
    except (TypeError, ValueError) as error:
        msg = f"tl.pseudotime: obs[{name!r}] must hold numbers; got {adata.obs[name].iloc[0]!r}."
        raise DataError(msg) from error


def _without(features: np.ndarray, covariates: np.ndarray) -> np.ndarray:
    """What is left of the features after a linear regression on the covariates."""
    design = np.column_stack([np.ones(len(covariates)), covariates]).astype(float)
    return (features - design @ np.linalg.lstsq(design, features.astype(float), rcond=None)[0]).astype(np.float32)
