import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import sparse
from toy_cells import toy_cells

from diffbio import pl, pp
from diffbio.errors import ConfigError, DataError, DataWarning, MissingKeyError
from diffbio.operators.singlecell import DifferentiableDiffusionImputer, DiffusionImputerConfig


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_equals_the_operator_and_the_counts_at_t_0():
    adata = toy_cells(60, 30)
    pp.impute(adata, t=1.5)
    op = DifferentiableDiffusionImputer(DiffusionImputerConfig(diffusion_t=1.5, n_pca_components=30), rngs=_rngs())
    counts = np.asarray(adata.X.todense(), np.float32)
    np.testing.assert_allclose(
        adata.layers["diffbio_imputed"], op.apply({"counts": counts})[0]["imputed_counts"], rtol=2e-3, atol=1e-3
    )  # float32 components on the host and in the program
    pp.impute(adata, t=0)
    np.testing.assert_allclose(adata.layers["diffbio_imputed"], counts, rtol=1e-5, atol=1e-6)
    assert adata.uns["diffbio"]["impute"]["params"]["t"] == 0


def _rngs():
    from flax import nnx

    return nnx.Rngs(0)


def test_some_genes_and_blocks_of_genes_equal_all_at_once(monkeypatch):
    adata = toy_cells(50, 20)
    pp.impute(adata, t=2)
    names = [adata.var_names[k] for k in (7, 2, 11)]
    monkeypatch.setattr(sys.modules["diffbio.pp.impute"], "ENTRIES_PER_BLOCK", 100)  # two genes at a time, of three
    whole = adata.layers["diffbio_imputed"]
    pp.impute(adata, t=2, genes=names)
    table = adata.obsm["diffbio_imputed"]
    assert list(table.columns) == names
    np.testing.assert_allclose(table, whole[:, [7, 2, 11]], rtol=1e-5, atol=1e-6)
    with pytest.raises(MissingKeyError, match="no such gene"):
        pp.impute(adata, genes=["no such gene"])


def test_auto_stops_where_little_changes_and_learned_where_held_out_molecules_say():
    adata = toy_cells(90, 40)
    pp.impute(adata, t="auto", batch_key="batch")
    found = adata.uns["diffbio"]["diffbio_imputed"]
    assert found["t"].shape == adata.obs["batch"].unique().shape
    for t, curve in zip(found["t"], found["curve"], strict=True):
        curve = curve[: int(t)]
        assert np.isnan(curve[0])
        assert curve[-1] < 1e-3 or t == 20
        assert (curve[1:-1] >= 1e-3).all()
    assert pl.impute(adata).get_yscale() == "log"
    pp.impute(adata, t="learned", max_epochs=3, progress=False)
    found = adata.uns["diffbio"]["diffbio_imputed"]
    assert found["curve"].shape[0] == 1
    assert np.isfinite(found["curve"]).all()
    assert found["bandwidth"] != 1.0
    assert "learned" in pl.impute(adata).get_title()
    assert not adata.unwriteable()


def test_t_is_chosen_by_all_genes_whichever_are_wanted():
    adata = toy_cells(90, 40)
    pp.impute(adata, t="auto")
    everything, whole = adata.uns["diffbio"]["diffbio_imputed"], adata.layers["diffbio_imputed"]
    pp.impute(adata, t="auto", genes=[adata.var_names[4]])
    found = adata.uns["diffbio"]["diffbio_imputed"]
    np.testing.assert_array_equal(found["t"], everything["t"])
    np.testing.assert_array_equal(found["curve"], everything["curve"])
    np.testing.assert_allclose(adata.obsm["diffbio_imputed"], whole[:, [4]], rtol=1e-5, atol=1e-6)


def test_a_figure_shows_the_last_call():
    adata = toy_cells(30, 12)
    pair = list(adata.var_names[:2])

    def drawn():
        return np.asarray(pl.impute(adata, pair)[1].collections[0].get_offsets())

    pp.impute(adata, t=1, genes=pair)
    before = drawn()
    pp.impute(adata, t=20)
    assert "diffbio_imputed" not in adata.obsm
    after = drawn()
    assert np.abs(after - before).max() > 0.1
    pp.impute(adata, t=1, genes=pair)
    assert "diffbio_imputed" not in adata.layers
    np.testing.assert_allclose(drawn(), before)


def test_learning_t_with_a_representation_is_warned_of():
    adata = toy_cells(60, 20)
    adata.obsm["X_own"] = np.log1p(adata.X.toarray())[:, :5]
    with pytest.warns(DataWarning, match=r"'X_own'.*has seen the held-out molecules") as said:
        pp.impute(adata, t="learned", use_rep="X_own", max_epochs=1)
    assert said[0].filename == __file__


def test_batches_do_not_mix():
    adata = toy_cells(60, 20)
    pp.impute(adata, t=3, batch_key="batch")
    together = adata.layers["diffbio_imputed"]
    for batch in adata.obs["batch"].unique():
        rows = np.flatnonzero(adata.obs["batch"] == batch)
        alone = adata[rows].copy()
        pp.impute(alone, t=3)
        np.testing.assert_allclose(together[rows], alone.layers["diffbio_imputed"], rtol=1e-4, atol=1e-4)


def test_a_representation_says_who_is_alike():
    adata = toy_cells(40, 10)
    adata.obsm["X_two"] = np.repeat(np.arange(2.0), 20)[:, None] * 100 + np.linspace(0, 1, 40)[:, None]
    pp.impute(adata, t=20, use_rep="X_two", n_neighbors=4)
    fraction = np.sqrt(adata.layers["diffbio_imputed"] / np.asarray(adata.X.sum(1)).reshape(-1, 1))
    assert np.abs(fraction[:20].mean(0) - fraction[20:].mean(0)).max() > 3 * fraction[:20].std(0).max()


def test_transformer_reads_variable_genes_and_those_named(monkeypatch):
    def number_of_column(matrix, read, seed, learning):  # in place of a network
        return np.tile(np.asarray(read, np.float32), (matrix.shape[0], 1))

    monkeypatch.setattr(sys.modules["diffbio.pp.impute"], "_by_transformer", number_of_column)
    adata = toy_cells(40, 30)
    adata.var["diffbio_highly_variable"] = np.arange(30) < 10
    pp.impute(adata, method="transformer", max_epochs=1, progress=False)
    layer = adata.layers["diffbio_imputed"]
    np.testing.assert_array_equal(layer[0, :10], np.arange(10))
    assert np.isnan(layer[:, 10:]).all()
    with pytest.raises(MissingKeyError, match="was not read"):
        pl.impute(adata, [adata.var_names[0], adata.var_names[20]])
    pp.impute(adata, method="transformer", genes=list(adata.var_names[[20, 3]]))
    assert "diffbio_imputed" not in adata.layers
    assert adata.obsm["diffbio_imputed"].iloc[0].tolist() == [20, 3]


@pytest.mark.filterwarnings("ignore::diffbio.errors.DataWarning")  # of the empty cell
def test_transformer_learns_and_empty_cells_stay_empty(capfd):
    adata = toy_cells(40, 30)
    matrix = adata.X.tolil()
    matrix[[7, 19]] = 0
    adata.X = matrix.tocsr()
    pp.impute(adata, method="transformer", max_epochs=1)
    layer, filled = adata.layers["diffbio_imputed"], np.setdiff1d(np.arange(40), [7, 19])
    assert (layer[[7, 19]] == 0).all()
    assert (layer[filled] > 0).all()
    total = np.asarray(adata.X.sum(axis=1)).ravel()
    np.testing.assert_allclose(layer[filled].sum(1), total[filled], rtol=0.3)
    assert capfd.readouterr().err == ""  # progress is not shown unless asked for


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "knn"}, "'diffusion', 'transformer'"),
        ({"t": "best"}, "'auto', 'learned' or a number"),
        ({"t": 21}, "from 0 to 20"),
        ({"t": True}, "True"),
        ({"t": 3, "max_epochs": 2}, "max_epochs does nothing"),
        ({"method": "transformer", "decay": 2.0}, "decay does nothing"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        pp.impute(toy_cells(), **settings)


def test_bad_cells_are_refused_by_name():
    with pytest.raises(DataError, match="n_neighbors is 5, but there are only 5 cells"):
        pp.impute(toy_cells(5, 10), t=1)
    uneven = toy_cells(20, 10)
    uneven.obs["lane"] = np.where(np.arange(20) < 5, "small", "large")
    with pytest.raises(DataError, match=r"batch 'small' has 5 cells.*n_neighbors=5"):
        pp.impute(uneven, t=1, batch_key="lane")
    normalised = toy_cells()
    normalised.X = np.log1p(normalised.X.toarray())
    with pytest.raises(DataError, match="log-transformed"):
        pp.impute(normalised)


def test_a_pair_of_genes_is_drawn_beside_itself():
    adata = toy_cells(30, 12)
    adata.X = sparse.csr_matrix(adata.X)
    pair = list(adata.var_names[:2])
    with pytest.raises(MissingKeyError, match=r"call pp\.impute"):
        pl.impute(adata, pair)
    pp.impute(adata, t=2)
    before, after = pl.impute(adata, pair, color="cell_type")
    assert (before.get_title(), after.get_title()) == ("counted", "imputed")
    assert before.get_xlim() == after.get_xlim()
    assert before.get_xlabel() == pair[0]
    with pytest.raises(ConfigError, match="two names"):
        pl.impute(adata, pair[0])
    with pytest.raises(MissingKeyError, match="no curve"):
        pl.impute(adata)
