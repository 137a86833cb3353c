"""Operators on a graph of all cells are trained on that graph, in whatever form the cells come."""

import numpy as np
from flax import nnx
from tissue_cells import tissue_cells

import diffbio
from diffbio.operators.singlecell import DifferentiableSpatialDomain, SpatialDomainConfig


def test_an_anndata_is_trained_like_a_dict():
    cells = tissue_cells(120)
    as_dict = {
        "counts": cells.X, "spatial_coords": cells.obsm["spatial"],
        "batch_labels": cells.obs["slice"].cat.codes.to_numpy(),
    }  # fmt: skip
    places = {"counts": "X", "spatial_coords": "obsm/spatial", "batch_labels": "obs/slice"}
    losses = []
    for data, keys in ((as_dict, None), (cells, places)):
        config = SpatialDomainConfig(n_genes=cells.n_vars, hidden_dim=8, n_latent=4, n_domains=3, n_batches=2)
        op = DifferentiableSpatialDomain(config, rngs=nnx.Rngs(0))
        history = diffbio.fit(op, data, keys=keys, max_epochs=2, batch_size=32, progress=False)
        losses.append(history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-6)
