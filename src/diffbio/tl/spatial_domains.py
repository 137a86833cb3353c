"""`tl.spatial_domains`: regions of tissue."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from scipy import sparse

from .. import slots
from ..data.matrix import library_sizes
from ..errors import ConfigError, MissingKeyError
from ..fitting import fit
from ..operators.singlecell import DifferentiableSpatialDomain, SpatialDomainConfig
from ..recording import recorded

if TYPE_CHECKING:
    from anndata import AnnData


@recorded
def spatial_domains(
    adata: "AnnData",
    n_domains: int,
    *,
    batch_key: str | None = None,
    alpha: float = 0.8,
    n_neighbors: int = 15,
    n_top_genes: int | None = 2000,
    smoothness: float = 1.0,
    temperature: float = 1.0,
    spatial_key: str = "spatial",
    max_epochs: int | None = None,
    layer: str | None = None,
    random_state: int = 0,
    progress: bool = False,
    copy: bool = False,
) -> None:
    """Finds domains of tissue by a graph attention autoencoder (`DifferentiableSpatialDomain`), which it trains.

    Args:
        adata: spots or cells x genes, changed in place; counts, and coordinates in `obsm[spatial_key]`.
        n_domains: how many to find.
        batch_key: column of `obs` of the slice; spots have neighbours in their own slice, slices share domains.
        alpha: share of the neighbours in each of two rounds of averaging; 0 is expression alone.
        n_neighbors: nearest spots.
        n_top_genes: so many of the most variable genes are read, those in `var["highly_variable"]` if that is there;
            None reads all.
        smoothness: how strongly neighbours want the same domain, in units of log likelihood.
        temperature: of the memberships; near 0 they are hard.
        spatial_key: coordinates, 2 or 3 columns, of any unit.
        max_epochs: of the training of the attention; None is the operator's 50.
        layer: of the counts; None is X.
        random_state: seed.
        progress: whether to show how training goes.
        copy: works on a copy and returns it.

    Adds `obs["diffbio_domain"]` (categorical strings), `obsm["diffbio_domain_prob"]` (rows sum to 1),
    `obsm["X_diffbio_spatial"]`, and `obsp["diffbio_spatial_attention"]` (sparse): row i says how much each neighbour
    tells of spot i; rows sum to 1.

    Raises:
        ConfigError: more domains than spots, or a setting out of range.
        MissingKeyError: no coordinates, no such column or layer.
        DataError: values that are no counts; coordinates missing or the same twice; n_neighbors spots or fewer in a
            slice.
    """
    import pandas as pd

    if n_domains > adata.n_obs:
        msg = f"tl.spatial_domains: n_domains is {n_domains}, but there are {adata.n_obs} spots; pass fewer."
        raise ConfigError(msg)
    if spatial_key not in adata.obsm:
        has = ", ".join(map(str, adata.obsm)) or "nothing"
        msg = f"tl.spatial_domains: obsm has no {spatial_key!r}; it has {has}. Name the coordinates by spatial_key=."
        raise MissingKeyError(msg)
    matrix = slots.counts(adata, layer)
    genes = np.arange(adata.n_vars)
    if n_top_genes is not None and n_top_genes < adata.n_vars:
        genes = slots.variable_genes(adata, matrix, n_top_genes=n_top_genes, batch_key=batch_key)
    places = np.asarray(adata.obsm[spatial_key], float)
    data: dict[str, Any] = {
        "counts": np.asarray(sparse.csr_matrix(matrix)[:, genes].toarray(), np.float32),
        # in units of their spread: float32 of large coordinates could make two places one
        "spatial_coords": ((places - places.mean(axis=0)) / max(float(places.std()), 1e-30)).astype(np.float32),
        "library_size": np.asarray(library_sizes(matrix), np.float32),
    }
    n_batches = 1
    if batch_key is not None:
        data["batch_labels"], names = slots.batches(adata, batch_key)
        n_batches = len(names)
    config = SpatialDomainConfig(
        n_genes=len(genes), n_domains=n_domains, alpha=alpha, n_neighbors=n_neighbors, n_batches=n_batches,
        smoothness=smoothness, temperature=temperature,
    )  # fmt: skip
    op = DifferentiableSpatialDomain(config, rngs=nnx.Rngs(random_state))
    epochs: dict[str, Any] = {} if max_epochs is None else {"max_epochs": max_epochs}
    fit(op, data, seed=random_state, progress=progress, **epochs)
    found: dict[str, Any] = jax.device_get(op.apply(data)[0])
    named = [str(k) for k in range(n_domains)]
    adata.obs[slots.DOMAIN] = pd.Categorical([named[k] for k in found["domain_labels"]], categories=named)
    adata.obsm[slots.DOMAIN_PROB] = found["domain_assignments"]
    adata.obsm[slots.SPATIAL_EMBEDDING] = found["spatial_embeddings"]
    n, k = found["attention"].shape
    ends = (found["attention"].ravel(), found["neighbor_indices"].ravel(), np.arange(0, n * k + 1, k))
    adata.obsp[slots.SPATIAL_ATTENTION] = sparse.csr_matrix(ends, shape=(n, n))
    slots.note(adata, slots.DOMAIN, {"spatial_key": spatial_key, "batch_key": batch_key or ""})
