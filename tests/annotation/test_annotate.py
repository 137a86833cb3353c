"""`tl.annotate`: what it writes, by names of genes and types, from labels, markers and saved models."""

import anndata as ad
import numpy as np
import pytest
from flax import nnx
from scipy import sparse
from sklearn.metrics import roc_auc_score
from toy_cells import toy_cells

from diffbio import models, tl
from diffbio.annotation import load
from diffbio.errors import ConfigError, DataError, DataWarning, MissingKeyError, ModelFileError
from diffbio.operators.singlecell import CellAnnotatorConfig, DifferentiableCellAnnotator

FAST = {"max_epochs": 3}


@pytest.fixture(scope="module")
def parts():
    """A reference and a query of the same types."""
    adata = toy_cells(240)
    return adata[:160].copy(), adata[160:].copy()


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory):
    reference, query = parts
    query = query.copy()
    model = tl.annotate(query, reference=reference, labels_key="cell_type", **FAST)
    folder = tmp_path_factory.mktemp("models") / "toy"
    model.save(folder)
    return query, model, folder


def markers_of(adata, n=5):
    """The genes that are highest in each type against the others."""
    dense = np.log1p(adata.X.toarray())
    kinds = adata.obs["cell_type"].to_numpy()
    best = {}
    for kind in np.unique(kinds):
        gap = dense[kinds == kind].mean(0) - dense[kinds != kind].mean(0)
        best[str(kind)] = [str(adata.var_names[g]) for g in np.argsort(-gap)[:n]]
    return best


def accuracy(adata, column="diffbio_cell_type"):
    return (adata.obs[column].astype(str) == adata.obs["cell_type"].astype(str)).mean()


def test_a_reference_annotates_a_query(trained):
    query, model, _ = trained
    assert accuracy(query) > 0.95
    p = query.obsm["diffbio_cell_type_prob"]
    assert p.dtype == np.float32
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    record = query.uns["diffbio"]["annotate"]
    assert list(record["types"]) == list(model.types) == ["type 0", "type 1", "type 2"]
    assert record["params"]["mode"] == "celltypist"
    assert record["scores"]["accuracy"] == accuracy(query)
    assert set(record["marker_types"]) == set(model.types)
    confidence = query.obs["diffbio_confidence"].to_numpy()
    assert confidence.min() >= 0
    assert confidence.max() <= 1


def test_results_survive_a_file(trained, tmp_path):
    query = trained[0]
    query.write_h5ad(tmp_path / "q.h5ad")
    again = ad.read_h5ad(tmp_path / "q.h5ad")
    assert list(again.obs["diffbio_cell_type"]) == list(query.obs["diffbio_cell_type"])


def test_a_saved_model_says_the_same_with_genes_in_another_order(trained, parts):
    query, _, folder = trained
    turned = parts[1][:, ::-1].copy()
    tl.annotate(turned, model=folder)
    np.testing.assert_allclose(
        turned.obsm["diffbio_cell_type_prob"], query.obsm["diffbio_cell_type_prob"], rtol=1e-3, atol=1e-5
    )
    assert load(folder).n_cells == 160


def test_missing_genes_count_as_zero_up_to_a_fifth(trained, parts):
    _, _, folder = trained
    fewer = parts[1][:, 5:].copy()
    with pytest.warns(DataWarning, match="5 of the model's 50 genes are missing"):
        tl.annotate(fewer, model=folder)
    assert accuracy(fewer) > 0.8
    with pytest.raises(DataError, match="20 of the model's 50 genes are missing"):
        tl.annotate(parts[1][:, 20:].copy(), model=folder)


def test_extra_genes_do_not_matter(trained, parts):
    query, _, folder = trained
    more = sparse.csr_matrix(np.random.default_rng(0).poisson(30.0, (80, 3)).astype(np.float32))
    nothing = ad.AnnData(more, obs=parts[1].obs[[]])
    nothing.var_names = ["a", "b", "c"]
    extra = ad.concat([nothing, parts[1]], axis=1, merge="first")
    tl.annotate(extra, model=folder)
    np.testing.assert_array_equal(extra.obs["diffbio_confidence"], query.obs["diffbio_confidence"])
    assert list(extra.obs["diffbio_cell_type"]) == list(query.obs["diffbio_cell_type"])


def test_the_labelled_cells_of_the_data_are_a_reference(parts):
    adata = parts[0].copy()
    known = np.arange(160) < 60
    adata.obs["partial"] = np.where(known, adata.obs["cell_type"].astype(str), "Unknown")
    tl.annotate(adata, labels_key="partial", **FAST)
    assert accuracy(adata) > 0.95
    assert "scores" not in adata.uns["diffbio"]["annotate"], "they are not those of unseen labels"


def test_markers_annotate_without_labels(parts):
    reference, query = parts
    query = query.copy()
    model = tl.annotate(query, markers=markers_of(reference), **FAST)
    assert query.uns["diffbio"]["annotate"]["params"]["mode"] == "cellassign"
    assert accuracy(query) > 0.9
    again = ad.concat([parts[1], genes_swapped(parts[1])], index_unique="-")
    tl.annotate(again, model=model, min_confidence=0.5)
    called = again.obs["diffbio_cell_type"].astype(str).to_numpy()
    assert (called[:80] == query.obs["diffbio_cell_type"].astype(str)).mean() > 0.9
    assert (called[80:] == "unassigned").mean() > 0.6
    assert roc_auc_score(np.arange(160) >= 80, 1 - again.obs["diffbio_confidence"]) > 0.9


def genes_swapped(adata):
    """Cells of no known type."""
    strange = adata.copy()
    strange.X = np.random.default_rng(0).permutation(strange.X.toarray().T).T
    return strange


def test_a_model_cannot_call_a_type_whose_markers_are_gone(parts):
    genes = [str(name) for name in parts[1].var_names[:8]]
    config = CellAnnotatorConfig(annotation_mode="cellassign", n_cell_types=2, n_genes=8, marker_matrix_shape=(2, 8))
    model = DifferentiableCellAnnotator(config, rngs=nnx.Rngs(0))
    model.note(("a", "b"), tuple(genes), n_cells=1, labels_key=None)
    model.markers = (tuple(genes[:7]), (genes[7],))
    model.mark_fitted()
    query = parts[1][:, [name for name in parts[1].var_names if name != genes[7]]].copy()
    with pytest.warns(DataWarning, match="1 of the model's 8"), pytest.raises(DataError, match="of the type 'b'"):
        tl.annotate(query, model=model)


def test_scanvi_maps_a_query_onto_a_reference(parts, tmp_path):
    reference, query = parts
    query = query.copy()
    model = tl.annotate(query, mode="scanvi", reference=reference, labels_key="cell_type", max_epochs=10)
    assert accuracy(query) > 0.9
    assert type(model).__name__ == "SCANVI"
    model.save(tmp_path / "scanvi")
    again = parts[1].copy()
    tl.annotate(again, model=tmp_path / "scanvi", max_epochs=10)
    assert list(again.obs["diffbio_cell_type"]) == list(query.obs["diffbio_cell_type"])


def test_scanvi_keeps_the_labels_it_was_given(parts):
    adata = parts[0].copy()
    known = np.arange(160) % 4 == 0
    truth = adata.obs["cell_type"].astype(str).to_numpy()
    given = np.where(known, truth, "Unknown")
    given[0] = "type 2" if truth[0] != "type 2" else "type 1"  # a wrong label stays, too
    adata.obs["partial"] = given
    tl.annotate(adata, mode="scanvi", labels_key="partial", max_epochs=10)
    called = adata.obs["diffbio_cell_type"].astype(str).to_numpy()
    assert (called[known] == given[known]).all()
    assert (adata.obs["diffbio_confidence"].to_numpy()[known] == 1).all()
    assert (called == truth)[~known].mean() > 0.9
    by_hand = scanvi_by_hand(parts[0], given)  # no second implementation: the tutorial's numbers
    np.testing.assert_array_equal(adata.obsm["diffbio_cell_type_prob"][~known], by_hand[~known])


def scanvi_by_hand(adata, labels):
    """Probabilities by the tutorial of `diffbio.models`."""
    adata = ad.AnnData(adata.X.copy(), obs=adata.obs[[]].copy(), var=adata.var[[]].copy())
    adata.obs["labels"], adata.obs["batch"] = labels, "one"
    models.SCVI.setup_anndata(adata, batch_key="batch", labels_key="labels")
    scvi = models.SCVI(adata, seed=0)
    scvi.train(max_epochs=10, progress=False)
    scanvi = models.SCANVI.from_scvi_model(scvi, "Unknown")
    scanvi.train(progress=False)
    return scanvi.predict(soft=True).to_numpy(np.float32)


def test_cells_below_the_threshold_are_unassigned(trained, parts):
    query = parts[1].copy()
    both = ad.concat([query, genes_swapped(query)], index_unique="-")
    tl.annotate(both, model=trained[2], min_confidence=0.5)
    called = both.obs["diffbio_cell_type"].astype(str).to_numpy()
    n = query.n_obs
    assert (called[:n] == "unassigned").mean() < 0.1
    assert (called[n:] == "unassigned").mean() > 0.8
    assert both.uns["diffbio"]["annotate"]["n_unassigned"] == (called == "unassigned").sum()


def test_a_call_that_is_not_clear_is_not_made(trained, parts):
    query = parts[1].copy()
    tl.annotate(query, model=trained[2], min_probability=0.9)
    unclear = query.obsm["diffbio_cell_type_prob"].max(1) < 0.9
    np.testing.assert_array_equal(query.obs["diffbio_cell_type"] == "unassigned", unclear)
    np.testing.assert_array_equal(query.obs["diffbio_cell_type_max_prob"], query.obsm["diffbio_cell_type_prob"].max(1))


def test_an_earlier_vote_does_not_stay(trained, parts):
    query = parts[1].copy()
    tl.annotate(query, model=trained[2], majority_voting=True, multi_label=True)
    tl.annotate(query, model=trained[2])
    assert "diffbio_cell_type_voted" not in query.obs
    assert "diffbio_cell_type_independent_prob" not in query.obsm


def test_votes_of_a_given_clustering(trained, parts):
    query = parts[1].copy()
    query.obs["groups"] = query.obs["cell_type"].astype(str).to_numpy()
    tl.annotate(query, model=trained[2], majority_voting=True, over_clustering="groups")
    assert accuracy(query, "diffbio_cell_type_voted") == 1.0
    tl.annotate(query, model=trained[2], majority_voting=True)
    assert accuracy(query, "diffbio_cell_type_voted") > 0.9


def test_a_cell_may_be_called_several_types(trained, parts):
    query = parts[1].copy()
    tl.annotate(query, model=trained[2], multi_label=True, min_probability=1e-9)
    assert query.obs["diffbio_cell_type"].astype(str).str.contains("|", regex=False).any()
    assert query.obsm["diffbio_cell_type_independent_prob"].shape == (80, 3)
    tl.annotate(query, model=trained[2], multi_label=True)
    assert accuracy(query) > 0.8


def test_a_copy_leaves_the_data_alone(trained, parts):
    before = list(parts[1].obs.columns)
    copied, model = tl.annotate(parts[1], model=trained[2], copy=True)
    assert list(parts[1].obs.columns) == before
    assert "diffbio_cell_type" in copied.obs
    assert model.types == trained[1].types


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "pass labels_key"),
        ({"mode": "cellassign"}, "needs markers"),
        ({"mode": "azimuth", "labels_key": "cell_type"}, "'celltypist', 'cellassign', 'scanvi'"),
        ({"markers": {"a": ["gene1"]}, "model": "x"}, "model and markers"),
        ({"markers": {"a": ["gene1"], "b": ["gene2"]}, "mode": "scanvi"}, "markers are for mode 'cellassign'"),
        ({"markers": {"a": ["gene1"], "b": ["gene2"]}, "n_top_genes": 5}, "n_top_genes is for training with labels"),
        ({"labels_key": "cell_type", "mode": "scanvi", "multi_label": True}, "multi_label is for mode 'celltypist'"),
        ({"labels_key": "cell_type", "other": "rest"}, "other is for markers="),
        ({"labels_key": "cell_type", "batch_key": "batch"}, "batch_key is for mode 'scanvi'"),
        ({"labels_key": "cell_type", "over_clustering": "batch"}, "over_clustering is for majority_voting"),
        ({"labels_key": "cell_type", "unlabeled_category": "zzz"}, "'zzz' is not a value of obs"),
        ({"model": {}}, "model must be what tl.annotate returned"),
        ({"labels_key": "cell_type", "min_confidence": 2.0}, r"min_confidence must be in \[0, 1\]"),
    ],
)
def test_what_does_not_go_together_is_said(parts, arguments, said):
    with pytest.raises(ConfigError, match=said):
        tl.annotate(parts[1].copy(), **FAST, **arguments)


def test_wrong_columns_files_and_names_are_named(parts, tmp_path, trained):
    query = parts[1].copy()
    with pytest.raises(MissingKeyError, match="no column 'celltype'; it has batch, cell_type"):
        tl.annotate(query, labels_key="celltype")
    with pytest.raises(MissingKeyError, match="no column 'typo'"):
        tl.annotate(query, model=trained[2], labels_key="typo")
    query.obs["groups"] = [np.nan, *["a"] * 79]
    with pytest.raises(DataError, match=r"obs\['groups'\] has no value for 1 of 80 cells"):
        tl.annotate(query, model=trained[2], majority_voting=True, over_clustering="groups")
    with pytest.raises(MissingKeyError, match="no column 'leiden'"):
        tl.annotate(query, model=trained[2], majority_voting=True, over_clustering="leiden")
    with pytest.raises(ConfigError, match="the model is of mode 'celltypist', not 'scanvi'"):
        tl.annotate(query, model=trained[2], mode="scanvi")
    with pytest.raises(ModelFileError, match="no model folder"):
        tl.annotate(query, model=tmp_path / "nothing")
    with pytest.raises(DataError, match="type 'x' has"):
        tl.annotate(query, markers={"x": ["nogene"], "y": ["gene1"]})
    other = parts[0].copy()
    other.var_names = [f"ENSG{i}" for i in range(50)]
    with pytest.raises(DataError, match="0 names in common"):
        tl.annotate(query, reference=other, labels_key="cell_type")
    with pytest.raises(DataError, match="one class, 'same'") as said:
        tl.annotate(query, reference=parts[0], labels_key="one")
    assert said.value.__notes__ == ["This is about the reference."]
