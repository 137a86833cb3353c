"""`tl.embed`: a map of the cells."""

from typing import TYPE_CHECKING, Any

import numpy as np
from flax import nnx

from .. import slots
from ..fitting import fit
from ..operators.base import Operator
from ..operators.normalization import DifferentiablePHATE, DifferentiableUMAP, PHATEConfig, UMAPConfig
from ..recording import recorded
from .applying import applied

if TYPE_CHECKING:
    from anndata import AnnData


@recorded
def embed(
    adata: "AnnData",
    *,
    method: str = "umap",
    use_rep: str | None = None,
    n_components: int = 2,
    n_neighbors: int | None = None,
    metric: str = "euclidean",
    min_dist: float | None = None,
    t: int | None = None,
    gamma: float | None = None,
    decay: float | None = None,
    layer: str | None = None,
    random_state: int = 0,
    progress: bool = False,
    copy: bool = False,
) -> None:
    """Draws cells on a map, of neighbourhoods (`DifferentiableUMAP`) or diffusion distances (`DifferentiablePHATE`).

    Args:
        adata: cells x genes, changed in place.
        method: "umap", for groups; "phate", for transitions and branches.
        use_rep: key of `obsm`; None is the PCA of log-normalised counts of the variable genes.
        n_components: dimensions of the map.
        n_neighbors: size of a neighbourhood; None is 15 for UMAP, which counts the cell itself, and 5 for PHATE.
        metric: between cells, such as "euclidean" or "cosine".
        min_dist: of UMAP: distance on the map below which neighbours are not pulled closer; None is 0.1.
        t: of PHATE: steps of diffusion; None takes the knee of the von Neumann entropy.
        gamma: of PHATE: 1 for the log potential (None), 0 for the root, as in the paper's informational distance.
        decay: of PHATE: how steeply the kernel falls; None is 40.
        layer: of the counts that the PCA reads; None is X.
        random_state: seed.
        progress: whether to show how training goes.
        copy: works on a copy and returns it.

    Adds `obsm["X_diffbio_umap"]`, or `obsm["X_diffbio_phate"]` and `uns["diffbio"]["X_diffbio_phate"]`: the steps `t`
    that were taken, and the von Neumann entropy for 1, 2, ... steps.

    Raises:
        ConfigError: an unknown method, a setting that the method does not have, or more neighbours than cells.
    """
    slots.choose(method, slots.MAPS, "tl.embed")
    of_umap = {"min_dist": min_dist}
    of_phate = {"diffusion_t": t, "gamma": gamma, "decay": decay}
    unused = {"t" if k == "diffusion_t" else k: v for k, v in (of_phate if method == "umap" else of_umap).items()}
    slots.refuse("tl.embed", method, **{name: value is not None for name, value in unused.items()})
    features = slots.representation(adata, use_rep, layer)
    given = {"n_neighbors": n_neighbors, **(of_umap if method == "umap" else of_phate)}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings |= {"input_features": features.shape[1], "n_components": n_components, "metric": metric}
    rngs = nnx.Rngs(random_state)
    op: Operator
    if method == "umap":
        op = DifferentiableUMAP(UMAPConfig(**settings), rngs=rngs)
    else:
        op = DifferentiablePHATE(PHATEConfig(**settings), rngs=rngs)
    data = {"features": features}
    fit(op, data, seed=random_state, progress=progress)
    key = f"X_diffbio_{method}"
    adata.obsm[key] = applied(op, data, "embedding")["embedding"]
    if isinstance(op, DifferentiablePHATE) and op.reference is not None:
        chosen = {"t": int(op.reference.t), "entropy": np.asarray(op.reference.entropy)}
        slots.note(adata, key, chosen)
