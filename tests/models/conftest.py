"""Small trained models that many tests ask."""

import numpy as np
import pytest
from toy_cells import toy_cells

from diffbio.models import SCANVI, SCVI

N_CELLS, N_GENES = 300, 40


def cells(seed=0, n_cells=N_CELLS):
    adata = toy_cells(n_cells, N_GENES, seed=seed)
    kind = adata.obs["cell_type"].astype(str)
    adata.obs["known"] = kind.where(np.arange(n_cells) % 4 != 0, "Unknown").astype("category")
    adata.obs["site"] = np.where(np.arange(n_cells) % 5 < 2, "north", "south")
    adata.obs["age"] = np.linspace(-1, 1, n_cells)
    return adata


@pytest.fixture(scope="session")
def trained():
    adata = cells()
    SCVI.setup_anndata(adata, batch_key="batch", labels_key="known")
    model = SCVI(adata, n_hidden=24, n_latent=4, gene_likelihood="nb")
    model.train(max_epochs=12, batch_size=32, plan_kwargs={"lr": 5e-3}, progress=False)
    return model


@pytest.fixture(scope="session")
def annotated(trained):
    model = SCANVI.from_scvi_model(trained, "Unknown")
    model.train(max_epochs=8, batch_size=32, train_size=0.6, plan_kwargs={"lr": 5e-3}, progress=False)
    return model
