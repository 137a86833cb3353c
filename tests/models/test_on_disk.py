"""Counts that an AnnData holds unread: in a zarr store, sparse or dense."""

import anndata
import numpy as np
import pytest
import zarr
from anndata.io import read_elem, sparse_dataset
from scipy import sparse

from diffbio.data.file_source import FileSource
from diffbio.errors import DataError
from diffbio.models import SCVI
from diffbio.models.cells import cells_of

from .conftest import cells


@pytest.fixture(params=["sparse", "dense"])
def unread(request, tmp_path):
    adata = cells()
    del adata.uns
    adata.X = sparse.csr_matrix(adata.X) if request.param == "sparse" else sparse.csr_matrix(adata.X).toarray()
    adata.write_zarr(tmp_path / "cells.zarr")
    store = zarr.open(tmp_path / "cells.zarr", mode="r")
    counts = sparse_dataset(store["X"]) if request.param == "sparse" else store["X"]
    return anndata.AnnData(counts, obs=read_elem(store["obs"]), var=read_elem(store["var"]))


def test_a_zarr_store_is_trained_on_from_disk(unread, tmp_path):
    SCVI.setup_anndata(unread, batch_key="batch")
    model = SCVI(unread, n_hidden=8, n_latent=2)
    assert isinstance(cells_of(unread, model.registry).counts, FileSource)
    rows = model.train(max_epochs=3, batch_size=32, progress=False).rows
    assert rows[-1]["loss"] < rows[0]["loss"]
    z = model.get_latent_representation()
    np.testing.assert_allclose(model.get_latent_representation(cells()), z, atol=1e-5)
    np.testing.assert_allclose(model.get_latent_representation(unread[:50]), z[:50], atol=1e-5)
    again = SCVI.load(model.save(tmp_path / "model"), adata=unread)
    np.testing.assert_array_equal(again.get_latent_representation(), z)


def test_genes_of_a_store_are_found_by_name(unread):
    memory = cells()[:, 5:30].copy()
    SCVI.setup_anndata(memory, batch_key="batch")
    model = SCVI(memory, n_hidden=8, n_latent=2)
    model.train(max_epochs=1, progress=False)
    z = model.get_latent_representation()
    np.testing.assert_allclose(model.get_latent_representation(unread), z, atol=1e-5)
    with pytest.raises(DataError, match="to_memory"):
        SCVI.prepare_query_anndata(unread, model)
