"""`tl.pseudotime`: how far each cell is along a process."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
from flax import nnx

from .. import slots
from ..data.matrix import library_sizes
from ..errors import ConfigError, DataError, MissingKeyError
from ..fitting import fit
from ..math.spectrum import scale_of
from ..operators.singlecell import DifferentiablePseudotime, PseudotimeConfig
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
    root_group: str | None = None,
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
            diffusion distance, from the cell that is farthest from the group's middle.
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
        time_key: numeric column of `obs` with times that are known of some cells (missing or negative: not known): the
            distance is then trained so that pseudotime goes with them.
        learn_metric: what is trained: "weights" of the representation's columns (None), or a "linear" map of it.
        max_epochs: steps of that training; None is 60.
        layer: of the counts that PCA and depth read; None is X.
        random_state: recorded only; nothing is drawn at random.
        progress: whether to show how training goes.
        copy: works on a copy and returns it.

    Adds `obs["diffbio_pseudotime"]`, 0 to 1, infinite in parts of the graph that the root is not connected with;
    `obsm["X_diffbio_diffmap"]`, the diffusion components, of which the first is constant (for DPT up to the cells'
    degree); with n_branchings `obs["diffbio_branch"]`, categories numbered from the root; and
    `uns["diffbio"]["diffbio_pseudotime"]`: the root's row number and name, the method, the eigenvalues.

    Raises:
        ConfigError: none or both of root and root_group, an unknown method, a setting that the method does not have.
        MissingKeyError: no such cell, group or column.
        DataError: a column that is no number, too few cells.
    """
    slots.choose(method, METHODS, "tl.pseudotime")
    slots.refuse("tl.pseudotime", method, **({"n_waypoints": n_waypoints is not None} if method == "dpt" else {}))
    without_time = {"learn_metric": learn_metric is not None, "max_epochs": max_epochs is not None}
    if time_key is None:
        slots.refuse("tl.pseudotime", "without time_key", **without_time)
    start = _start(adata, root, root_group, groupby)
    features = slots.representation(adata, use_rep, layer)
    if regress_out is not None:
        columns = [regress_out] if isinstance(regress_out, str) else list(regress_out)
        features = _without(features, _covariates(adata, columns, layer))
    learned = "none" if time_key is None else learn_metric or "weights"
    config = PseudotimeConfig(
        method=method,
        n_neighbors=n_neighbors,
        n_diffusion_components=n_components,
        metric=metric,
        n_branchings=n_branchings,
        n_waypoints=n_waypoints,
        learn_metric=learned,
        n_features=features.shape[1],
    )
    op = DifferentiablePseudotime(config, rngs=nnx.Rngs(random_state))
    data: dict[str, Any] = {"embeddings": features, "root_cell_index": np.asarray(start[0])}
    if time_key is not None:
        times = _numbers(adata, time_key)
        fit(
            op,
            {**data, "time": times.astype(np.float32)},
            seed=random_state,
            progress=progress,
            max_epochs=max_epochs or op.fit_defaults["max_epochs"],
        )
    found = op.apply(data)[0]
    if len(start) > 1:
        data["root_cell_index"] = np.asarray(_farthest(found, start))
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


def _start(adata: "AnnData", root: str | int | None, group: str | None, groupby: str) -> np.ndarray:
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
        cells = np.flatnonzero(adata.obs[groupby].astype(str).to_numpy() == group)
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
    if not 0 <= int(root or 0) < adata.n_obs:
        msg = f"tl.pseudotime: root is {root}, but row numbers of {adata.n_obs} cells are 0 to {adata.n_obs - 1}."
        raise ConfigError(msg)
    return np.array([int(root or 0)])


def _farthest(found: dict[str, Any], cells: np.ndarray) -> int:
    """Of some cells, that farthest by diffusion distance from the cell that is farthest from their middle."""
    points = np.asarray(found["diffusion_components"], float) * scale_of(1.0 - np.asarray(found["eigenvalues"], float))
    near = np.isfinite(np.asarray(found["pseudotime"]))
    own = cells[near[cells]]

    def apart(cell: int) -> np.ndarray:
        return np.where(near, ((points - points[cell]) ** 2).sum(axis=1), 0.0)

    middle = int(own[((points[own] - points[own].mean(axis=0)) ** 2).sum(axis=1).argmin()])
    return int(own[apart(int(apart(middle).argmax()))[own].argmax()])


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
