"""`tl.integrate`: batch effects out of an embedding."""

from typing import TYPE_CHECKING, Any

import numpy as np
from flax import nnx

from .. import slots
from ..errors import DataError
from ..fitting import fit
from ..models import SCVI
from ..operators.base import Operator
from ..operators.singlecell import (
    BatchCorrectionConfig,
    DifferentiableHarmony,
    DifferentiableMMDBatchCorrection,
    DifferentiableWGANBatchCorrection,
    MMDBatchCorrectionConfig,
    WGANBatchCorrectionConfig,
)
from ..recording import recorded
from .applying import applied, at_most_cells

if TYPE_CHECKING:
    from anndata import AnnData


@recorded
def integrate(
    adata: "AnnData",
    *,
    batch_key: str,
    method: str = "harmony",
    n_clusters: int | None = None,
    theta: float | None = None,
    n_latent: int | None = None,
    max_epochs: int | None = None,
    use_rep: str | None = None,
    layer: str | None = None,
    random_state: int = 0,
    progress: bool = False,
    copy: bool = False,
) -> None:
    """Removes batch effects from an embedding.

    Args:
        adata: cells x genes, changed in place.
        batch_key: column of `obs`.
        method: "harmony" shifts soft clusters (`DifferentiableHarmony`); "mmd" and "wgan" train an autoencoder whose
            latent space is alike in all batches, by the maximum mean discrepancy or by an adversary, for effects that
            are not linear; "scvi" trains `diffbio.models.SCVI` on the counts of the variable genes.
        n_clusters: of Harmony; None is one for every 30 cells, 100 at most, as published.
        theta: of Harmony: weight of the diversity penalty; None is 2.
        n_latent: width of the result of the other methods; None is what the method prefers.
        max_epochs: of the methods that train; None is what the method prefers.
        use_rep: key of `obsm`; None is the PCA of log-normalised counts of the variable genes. "scvi" reads counts.
        layer: of the counts; None is X.
        random_state: seed; Harmony draws nothing at random.
        progress: whether to show how training goes.
        copy: works on a copy and returns it.

    Adds `obsm["X_diffbio_integrated"]`.

    Raises:
        ConfigError: an unknown method, or a setting that the method does not have.
        DataError: less than two batches, or a representation that is not finite.
    """
    slots.choose(method, ["harmony", "mmd", "wgan", "scvi"], "tl.integrate")
    if method == "harmony":
        unused: dict[str, Any] = {"n_latent": n_latent, "max_epochs": max_epochs}
    else:
        unused = {"n_clusters": n_clusters, "theta": theta, "use_rep": use_rep if method == "scvi" else None}
    slots.refuse("tl.integrate", method, **{name: value is not None for name, value in unused.items()})
    labels, names = slots.batches(adata, batch_key)
    if len(names) < 2 and method in ("mmd", "wgan"):
        msg = f"tl.integrate: {method!r} compares batches, and obs[{batch_key!r}] holds one: nothing to correct"
        raise DataError(msg)
    how: dict[str, Any] = {} if max_epochs is None else {"max_epochs": max_epochs}
    if method == "scvi":
        found = _by_scvi(adata, batch_key, layer, n_latent, random_state, progress=progress, **how)
        adata.obsm[slots.INTEGRATED] = found
        return
    embeddings = slots.representation(adata, use_rep, layer)
    if method == "harmony":
        at_most_cells(n_clusters, adata, "tl.integrate")
        config = BatchCorrectionConfig(
            n_clusters=max(1, min(100, round(len(embeddings) / 30))) if n_clusters is None else n_clusters,
            n_features=embeddings.shape[1],
            n_batches=len(names),
            theta=2.0 if theta is None else theta,
        )
        op: Operator = DifferentiableHarmony(config, rngs=nnx.Rngs(random_state))
        data = {"embeddings": embeddings, "batch_labels": labels}
    else:
        op = _autoencoder(method, embeddings.shape[1], n_latent, len(names), random_state)
        data = {"expression": embeddings, "batch_labels": labels}
    fit(op, data, seed=random_state, progress=progress, **how)
    adata.obsm[slots.INTEGRATED] = applied(op, data, "corrected_embeddings")["corrected_embeddings"]


def _autoencoder(method: str, width: int, n_latent: int | None, n_batches: int, seed: int) -> Operator:
    preferred = MMDBatchCorrectionConfig.latent_dim
    sizes: dict[str, Any] = {"n_genes": width, "n_batches": n_batches}
    sizes["latent_dim"] = min(preferred, width) if n_latent is None else n_latent
    if method == "mmd":
        return DifferentiableMMDBatchCorrection(MMDBatchCorrectionConfig(**sizes), rngs=nnx.Rngs(seed))
    return DifferentiableWGANBatchCorrection(WGANBatchCorrectionConfig(**sizes), rngs=nnx.Rngs(seed))


def _by_scvi(
    adata: "AnnData", batch_key: str, layer: str | None, n_latent: int | None, seed: int, **how: Any
) -> np.ndarray:
    matrix = slots.counts(adata, layer)
    genes = slots.variable_genes(adata, matrix, batch_key=batch_key)
    part = adata[:, genes].copy()
    SCVI.setup_anndata(part, layer=layer, batch_key=batch_key)
    model = SCVI(part, n_latent=10 if n_latent is None else n_latent, seed=seed)
    model.train(**how)
    return np.asarray(model.get_latent_representation(), np.float32)
