import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from diffbio.errors import DataError, DataWarning, MissingKeyError
from diffbio.models import SCANVI, SCVI
from diffbio.models.registry import SETUP, Registry

from .conftest import cells

EVERYTHING = {
    "batch_key": "batch",
    "labels_key": "cell_type",
    "categorical_covariate_keys": ["site"],
    "continuous_covariate_keys": ["age"],
    "size_factor_key": "depth",
}


def test_setup_notes_names_in_json_and_leaves_the_rest_alone():
    adata = cells()
    before = adata.obs.copy()
    SCVI.setup_anndata(adata, **EVERYTHING)
    noted = json.loads(adata.uns[SETUP]["SCVI"])
    assert noted["batches"] == ["donor 0", "donor 1"]
    assert noted["labels"] == ["type 0", "type 1", "type 2"]
    assert noted["categories"] == {"site": ["north", "south"]}
    assert noted["var_names"] == list(adata.var_names)
    pd.testing.assert_frame_equal(adata.obs, before)


def test_setup_survives_copies_and_files(tmp_path):
    adata = cells()
    SCVI.setup_anndata(adata, **EVERYTHING)
    adata[::2].copy().write_h5ad(tmp_path / "half.h5ad")
    back = ad.read_h5ad(tmp_path / "half.h5ad")
    assert Registry.read(back, "SCVI") == Registry.read(adata, "SCVI")
    assert SCVI(back, n_hidden=8).cells().n_cells == 150


def test_codes_follow_the_noted_names_whatever_the_order_of_other_data():
    adata = cells()
    SCVI.setup_anndata(adata, **EVERYTHING)
    other = adata[::-1].copy()
    other.obs["batch"] = other.obs["batch"].cat.reorder_categories(["donor 1", "donor 0"])
    registry = Registry.read(adata, "SCVI")
    for key, column in registry.columns(adata).items():
        np.testing.assert_array_equal(column[::-1], registry.columns(other)[key])


def test_numbers_are_names_too():
    adata = cells()
    adata.obs["lane"] = np.arange(300) % 3 + 7
    SCVI.setup_anndata(adata, batch_key="lane")
    registry = Registry.read(adata, "SCVI")
    assert registry.batches == (7, 8, 9)
    np.testing.assert_array_equal(registry.columns(adata)["batch_labels"], np.arange(300) % 3)
    np.testing.assert_array_equal(registry.batch_codes([9, 8]), [2, 1])


def test_the_unlabelled_category_is_no_cell_type():
    adata = cells()
    SCANVI.setup_anndata(adata, "known", "Unknown")
    registry = Registry.read(adata, "SCANVI")
    assert registry.labels == ("type 0", "type 1", "type 2")
    np.testing.assert_array_equal(registry.columns(adata)["labels"] == 3, adata.obs["known"] == "Unknown")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"batch_key": "plate"}, MissingKeyError, "no column 'plate'; it has batch"),
        ({"layer": "raw"}, MissingKeyError, "no layer 'raw'"),
        ({"continuous_covariate_keys": ["site"]}, DataError, "numbers are needed"),
        ({"size_factor_key": "age"}, DataError, "above 0"),
        ({"batch_key": "holes"}, DataError, "1 of 300 cells have no value .*cell 3"),
        ({"continuous_covariate_keys": ["gaps"]}, DataError, "NaN or infinite in cell 5"),
        ({"labels_key": "holes"}, DataError, "no value"),
    ],
)
def test_bad_columns_are_named(arguments, error, words):
    adata = cells()
    adata.obs["holes"] = adata.obs["site"].where(np.arange(300) != 3)
    adata.obs["gaps"] = np.where(np.arange(300) == 5, np.nan, 1.0)
    with pytest.raises(error, match=words):
        SCVI.setup_anndata(adata, **arguments)


@pytest.mark.parametrize(("value", "words"), [(-1.0, "negative"), (0.5, "not integers|log-transformed")])
def test_what_are_no_counts_is_refused(value, words):
    adata = cells()
    adata.X = sparse.csr_matrix(np.where(np.arange(N := 40) == 7, value, adata.X.toarray()))
    assert adata.n_vars == N
    with pytest.raises(DataError, match=words):
        SCVI.setup_anndata(adata)


def test_nan_labels_get_a_hint():
    adata = cells()
    adata.obs["known"] = adata.obs["known"].astype(object).where(np.arange(300) != 8)
    with pytest.raises(DataError, match="NaN"):
        SCANVI.setup_anndata(adata, "known", "Unknown")


def test_all_unlabelled_is_refused():
    adata = cells()
    adata.obs["known"] = "Unknown"
    with pytest.raises(DataError, match="label some cells"):
        SCANVI.setup_anndata(adata, "known", "Unknown")


def test_a_model_needs_the_setup():
    with pytest.raises(DataError, match=r"call SCVI\.setup_anndata"):
        SCVI(cells())


def test_unknown_batches_are_sent_to_query_mapping(trained):
    other = cells(1)
    other.obs["batch"] = "donor 9"
    with pytest.raises(DataError, match=r"'donor 9', not known .*load_query_data"):
        trained.get_latent_representation(other)


def test_unknown_labels_count_as_unlabelled(annotated):
    other = cells(1)
    other.obs["known"] = "type 7"
    with pytest.warns(DataWarning, match="'type 7' not known"):
        columns = annotated.registry.columns(other)
    assert (columns["labels"] == 3).all()


def test_backed_counts_train_as_those_in_memory(tmp_path):
    adata = cells()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    results = []
    for backed in (False, True):
        data = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r" if backed else None)
        SCVI.setup_anndata(data, batch_key="batch")
        model = SCVI(data, n_hidden=8, n_latent=2)
        model.train(max_epochs=1, progress=False)
        assert model.get_latent_representation().shape == (300, 2)
        results.append(model.get_elbo())
    # the order of minibatches differs: a file is read in blocks
    np.testing.assert_allclose(*results, rtol=0.05)
