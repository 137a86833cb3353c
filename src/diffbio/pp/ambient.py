"""Ambient RNA on AnnData."""

from typing import TYPE_CHECKING, Any, cast

import numpy as np
from flax import nnx
from scipy import sparse

from .. import slots
from ..data.droplets import soup_of
from ..data.source import ArraySource
from ..data.validate import check_ambient_profile
from ..errors import MissingKeyError
from ..fitting import fit
from ..operators.singlecell import AmbientRemovalConfig, DifferentiableAmbientRemoval
from ..pipelines.inference import apply_in_chunks
from ..recording import recorded

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

@recorded
def ambient(
    adata: "AnnData",
    *,
    ambient_profile: Any = None,
    raw: "AnnData | str | Path | None" = None,
    batch_key: str | None = None,
    max_epochs: int | None = None,
    layer: str | None = None,
    random_state: int = 0,
    progress: bool = False,
    copy: bool = False,
) -> None:
    """Removes the counts that come from the soup around the cells (`DifferentiableAmbientRemoval`).

    Args:
        adata: cells x genes, changed in place.
        ambient_profile: gene fractions of the soup, an array or a column of `var`; None takes `raw`, or the
            column "ambient_profile".
        raw: all droplets of the experiment, or their file, with these genes among its own; those with 1 to 100 counts
            that are no cells of `adata` are the soup.
        batch_key: column of `obs` (and of `raw.obs`): each batch is fitted by itself, with its own soup.
        max_epochs: passes over the cells at most; None is what the operator prefers.
        layer: of the counts; None is X.
        random_state: seed.
        progress: whether to show how training goes.
        copy: works on a copy and returns it.

    `pp.call_cells` finds the cells of an unfiltered matrix.

    Adds `layers["diffbio_decontaminated"]` (sparse; never negative, never above the counts) and
    `obs["diffbio_ambient_fraction"]`, the share of a cell's counts ascribed to the soup.
    """
    matrix = cast("Any", sparse.csr_array)(slots.counts(adata, layer))
    batch = slots.labels(adata, batch_key)
    groups = (
        [np.arange(adata.n_obs)] if batch is None else [np.flatnonzero(batch == b) for b in np.unique(batch)]
    )
    settings: dict[str, Any] = {} if max_epochs is None else {"max_epochs": max_epochs}
    clean, fraction = [], np.zeros(adata.n_obs, np.float32)
    for rows in groups:
        soup = _soup(
            adata,
            ambient_profile,
            raw,
            None if batch is None else (batch_key, adata.obs[batch_key].iloc[rows[0]]),
        )
        source = ArraySource({"counts": matrix[rows]}, {"ambient_profile": soup})
        op = DifferentiableAmbientRemoval(
            AmbientRemovalConfig(n_genes=adata.n_vars), rngs=nnx.Rngs(random_state)
        )
        fit(op, source, seed=random_state, progress=progress, **settings)
        parts = list(apply_in_chunks(op, source, ["decontaminated_counts", "contamination_fraction"]))
        clean += [sparse.csr_matrix(part["decontaminated_counts"]) for part in parts]
        fraction[rows] = np.concatenate([part["contamination_fraction"] for part in parts])
    back = np.argsort(np.concatenate(groups))
    adata.layers[slots.DECONTAMINATED] = sparse.vstack(clean, format="csr")[back]
    adata.obs[slots.AMBIENT_FRACTION] = fraction


def _soup(
    adata: "AnnData", profile: Any, raw: "AnnData | str | Path | None", batch: "tuple[Any, Any] | None"
) -> np.ndarray:
    """Gene fractions of the soup: an array, a column of `var`, or the sum of droplets without a cell."""
    if profile is None and raw is not None:
        return soup_of(raw, adata.var_names, adata.obs_names, batch=batch).profile
    if profile is None or isinstance(profile, str):
        name = profile or slots.AMBIENT_PROFILE
        if name not in adata.var:
            msg = f"pp.ambient: var has no column {name!r}; pass ambient_profile= (gene fractions) or raw="
            raise MissingKeyError(msg)
        profile = adata.var[name].to_numpy()
    return check_ambient_profile(profile, adata.n_vars)
