"""`tl.velocity`: where the expression of every cell moves."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from scipy import sparse

from .. import slots
from ..data.genes import highly_variable_genes
from ..data.matrix import library_sizes
from ..errors import DataError, MissingKeyError
from ..fitting import fit
from ..math.neighbors import knn
from ..math.velocity_graph import distinct_candidates
from ..operators.singlecell import DifferentiableVelocity, VelocityConfig
from ..recording import recorded

if TYPE_CHECKING:
    from anndata import AnnData

MODES = ("steady_state", "stochastic", "dynamical", "neural_ode")


@recorded
def velocity(
    adata: "AnnData",
    *,
    mode: str = "steady_state",
    spliced: str = "spliced",
    unspliced: str = "unspliced",
    n_top_genes: int | None = 2000,
    min_shared_counts: int = 20,
    n_neighbors: int = 30,
    use_rep: str | None = None,
    max_epochs: int | None = None,
    layer: str | None = None,
    random_state: int = 0,
    progress: bool = False,
    copy: bool = False,
) -> None:
    """Computes RNA velocities, the graph of where they point, and a latent time (`DifferentiableVelocity`).

    Counts of each layer are scaled to its median total, averaged over neighbours, and every gene's kinetics are fitted
    to these moments.

    Args:
        adata: cells x genes, changed in place.
        mode: "steady_state" (La Manno et al. 2018), "stochastic" (with second moments) and "dynamical" (transcription
            that is switched on and off) as in scVelo; "neural_ode" trains networks for it.
        spliced: layer of spliced counts.
        unspliced: layer of unspliced counts.
        n_top_genes: so many of the most variable genes are read; None takes all that pass `min_shared_counts`.
        min_shared_counts: spliced and unspliced counts that a gene has at least in cells that have both.
        n_neighbors: size of a neighbourhood, the cell itself counted.
        use_rep: key of `obsm` by which neighbours are found; None is the PCA of log-normalised counts.
        max_epochs: of "neural_ode"; None is 200.
        layer: of the counts that the PCA reads; None is X.
        random_state: seed.
        progress: whether to show how training goes.
        copy: works on a copy and returns it.

    Adds `layers["diffbio_velocity"]` (NaN in genes that were not read), `var["diffbio_velocity_gamma"]`, `_alpha` and
    `_beta` alike, `var["diffbio_velocity_genes"]`, genes that follow the model, which the graph is made of;
    `obs["diffbio_latent_time"]` (0 to 1), `obs["diffbio_velocity_confidence"]`; `obsp["diffbio_velocity_graph"]`, the
    cosines between velocities and the steps to cells nearby; `obsp["diffbio_velocity_transition"]`, their Markov chain.

    Raises:
        ConfigError: an unknown mode, or a setting that it does not have.
        MissingKeyError: no such layer or representation.
        DataError: values that are no counts, no gene with enough of both, or too few cells.
    """
    slots.choose(mode, MODES, "tl.velocity")
    slots.refuse("tl.velocity", mode, **({} if mode == "neural_ode" else {"max_epochs": max_epochs is not None}))
    mature, nascent = _layer(adata, spliced), _layer(adata, unspliced)
    genes = _genes(mature, nascent, n_top_genes, min_shared_counts)
    features = slots.representation(adata, use_rep, layer)
    config = VelocityConfig(n_genes=len(genes), kinetics_model=mode, n_neighbors=n_neighbors, normalize=False)
    data = {
        "spliced": _scaled(mature, genes),
        "unspliced": _scaled(nascent, genes),
        "neighbor_indices": np.asarray(knn(features, n_neighbors - 1).indices),
    }
    op = DifferentiableVelocity(config, rngs=nnx.Rngs(random_state))
    if mode == "neural_ode":
        epochs: dict[str, Any] = {} if max_epochs is None else {"max_epochs": max_epochs}
        fit(op, data, seed=random_state, progress=progress, **epochs)
    graph, state = nnx.split(op)
    data["candidate_indices"] = distinct_candidates(data["neighbor_indices"])
    run = jax.jit(lambda state, data: nnx.merge(graph, state).apply(data)[0])
    found: dict[str, Any] = jax.device_get(run(state, data))
    adata.layers[slots.VELOCITY] = slots.all_genes(found["velocity"], genes, adata.n_vars)
    for name in ("alpha", "beta", "gamma"):
        adata.var[f"{slots.VELOCITY}_{name}"] = slots.all_genes(found[name][None], genes, adata.n_vars)[0]
    adata.var[slots.VELOCITY_GENES] = np.isin(np.arange(adata.n_vars), genes[found["velocity_genes"] > 0])
    adata.obs[slots.LATENT_TIME] = found["latent_time"]
    adata.obs[slots.VELOCITY_CONFIDENCE] = found["velocity_confidence"]
    adata.obsp[slots.VELOCITY_GRAPH] = _matrix(found, "transition_cosines")
    adata.obsp[slots.VELOCITY_TRANSITION] = _matrix(found, "transition_weights")


def _layer(adata: "AnnData", name: str) -> Any:
    if name not in adata.layers:
        has = ", ".join(map(str, adata.layers)) or "none"
        msg = f"tl.velocity: there is no layer {name!r}; there are {has}. Name the layers with spliced= and unspliced=."
        raise MissingKeyError(msg)
    return sparse.csr_matrix(slots.counts(adata, name))


def _genes(spliced: Any, unspliced: Any, n_top: int | None, least: int) -> np.ndarray:
    """Column numbers of the genes that are read."""
    both = spliced.astype(bool).multiply(unspliced.astype(bool))
    shared = np.asarray((spliced + unspliced).multiply(both).sum(axis=0)).ravel()
    enough = np.flatnonzero((shared >= least) & (shared > 0))
    if not len(enough):
        msg = f"tl.velocity: no gene has {least} counts in cells that have both spliced and unspliced ones; lower "
        msg += "min_shared_counts, or look whether the layers are what they should be."
        raise DataError(msg)
    if n_top is None or n_top >= len(enough):
        return enough
    chosen = highly_variable_genes(spliced[:, enough], n_top_genes=n_top)["highly_variable"].to_numpy()
    return enough[chosen]


def _scaled(counts: Any, genes: np.ndarray) -> np.ndarray:
    """Counts of some genes, cells scaled to the median total over all genes."""
    total = library_sizes(counts)
    middle = np.median(total[total > 0])
    factor = np.where(total > 0, middle / np.where(total > 0, total, 1.0), 0.0)
    return np.asarray(counts[:, genes].multiply(factor[:, None]).toarray(), np.float32)


def _matrix(found: dict[str, Any], key: str) -> sparse.csr_matrix:
    n = len(found["latent_time"])
    weights, real = found[key], found[key] != 0
    ends = (found["transition_rows"][real], found["transition_columns"][real])
    return sparse.csr_matrix((weights[real].astype(np.float32), ends), shape=(n, n))
