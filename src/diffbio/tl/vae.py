"""`tl.vae`: the latent space of a variational autoencoder."""

from typing import TYPE_CHECKING

from flax import nnx

from .. import slots
from ..fitting import fit
from ..operators.normalization import VAENormalizer, VAENormalizerConfig
from ..recording import recorded
from .applying import applied

if TYPE_CHECKING:
    from anndata import AnnData


@recorded
def vae(
    adata: "AnnData",
    *,
    batch_key: str | None = None,
    n_latent: int = 10,
    likelihood: str = "zinb",
    normalized: bool = False,
    max_epochs: int = 400,
    layer: str | None = None,
    random_state: int = 0,
    progress: bool = False,
    copy: bool = False,
) -> None:
    """Embeds cells by the variational autoencoder of scVI (`VAENormalizer`), trained on them.

    Reads the genes of `var["diffbio_highly_variable"]` if `pp.highly_variable` has run, else all.

    Adds `obsm["X_diffbio_latent"]` and, with `normalized=True`, `layers["diffbio_normalized"]`: gene
    fractions, NaN for genes that were not read.
    """
    genes = adata.var[slots.VARIABLE].to_numpy(bool) if slots.VARIABLE in adata.var else slice(None)
    data = {"counts": slots.counts(adata, layer)[:, genes]}
    n_batches = 1
    if batch_key is not None:
        data["batch_labels"], names = slots.batches(adata, batch_key)
        n_batches = len(names)
    config = VAENormalizerConfig(
        n_genes=data["counts"].shape[1], latent_dim=n_latent, likelihood=likelihood, n_batches=n_batches
    )
    op = VAENormalizer(config, rngs=nnx.Rngs(random_state))
    fit(op, data, max_epochs=max_epochs, seed=random_state, progress=progress)
    keys = ["latent_mean", "normalized"] if normalized else ["latent_mean"]
    result = applied(op, data, *keys)
    adata.obsm[slots.LATENT] = result["latent_mean"]
    if normalized:
        adata.layers[slots.NORMALIZED] = slots.all_genes(result["normalized"], genes, adata.n_vars)
