"""`tl.grn` and its figure, on planted regulation and on a simulation with a known network."""

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score

from diffbio import pl, tl
from diffbio.errors import ConfigError, DataError, DataWarning, MissingKeyError

TRUE = np.array([0, 0, 1, 1])


def cells(n_cells=150):
    """Two regulators, four genes that follow one each (every other one downwards), one that does not vary."""
    random = np.random.default_rng(0)
    drive = random.normal(size=(n_cells, 2))
    signs = np.where(np.arange(4) % 2, -1.0, 1.0)
    rate = np.exp(3.0 + 0.5 * np.hstack([drive, drive[:, TRUE] * signs]))
    counts = np.hstack([random.poisson(rate), np.full((n_cells, 1), 2)]).astype(np.float32)
    adata = anndata.AnnData(counts)
    adata.var_names = ["tf_a", "tf_b", "up_a", "down_a", "up_b", "down_b", "still"]
    adata.var["is_regulator"] = [True, True] + [False] * 5
    return adata


@pytest.fixture(scope="module")
def found():
    adata = cells()
    with pytest.warns(DataWarning, match="1 genes do not vary"):
        tl.grn(adata, regulators="is_regulator", normalize=False, n_resamples=1, n_edges=6)
    return adata


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def test_table(found, tmp_path):
    table = found.uns["diffbio_grn"]
    assert list(table.columns) == ["regulator", "target", "weight", "sign", "confidence"]
    assert table["weight"].is_monotonic_decreasing
    best = table.iloc[:4]
    edges = {(str(e.regulator), str(e.target), int(e.sign)) for e in best.itertuples()}
    assert edges == {("tf_a", "up_a", 1), ("tf_a", "down_a", -1), ("tf_b", "up_b", 1), ("tf_b", "down_b", -1)}
    assert (best["confidence"] == 1).all()
    assert (table["regulator"].astype(str) != table["target"].astype(str)).all()
    assert list(found.obsm["diffbio_tf_activity"].columns) == ["tf_a", "tf_b"]
    record = found.uns["diffbio"]
    assert record["diffbio_grn"]["n_not_varying"] == 1
    assert record["grn"]["params"]["n_resamples"] == 1
    found.write_h5ad(tmp_path / "network.h5ad")


@pytest.mark.filterwarnings("ignore:1 genes do not vary", "ignore:tl.grn. 1 genes")
@pytest.mark.parametrize("method", ["extra_trees", "lasso"])
def test_simple_methods_find_the_same_edges(method):
    adata = tl.grn(cells(), regulators=["tf_a", "tf_b"], method=method, normalize=False, copy=True)
    table = adata.uns["diffbio_grn"].astype({"regulator": str, "target": str})
    best = table[~table["target"].str.startswith("tf")].drop_duplicates("target")
    assert {(e.regulator[-1], e.target[-1]) for e in best.itertuples()} == {("a", "a"), ("b", "b")}
    assert set(best["sign"]) == {1, -1}


@pytest.mark.filterwarnings("ignore:tl.grn. 1 genes")
def test_prior_takes_an_edge_out():
    prior = pd.DataFrame({"regulator": ["tf_a", "elsewhere"], "target": ["up_a", "up_b"], "weight": [0.0, 1.0]})
    adata = tl.grn(cells(60), regulators=["tf_a", "tf_b"], prior=prior, copy=True)
    table = adata.uns["diffbio_grn"].astype(str)
    assert not ((table["regulator"] == "tf_a") & (table["target"] == "up_a")).any()


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"regulators": ["nobody"]}, MissingKeyError, "nobody"),
        ({"regulators": "nobody"}, MissingKeyError, "no column"),
        ({"regulators": []}, DataError, "no regulator is named"),
        ({"regulators": ["still"]}, DataError, "no regulator has two"),
        ({"method": "magic"}, ConfigError, "magic"),
        ({"method": "lasso", "sparsity": 0.1}, ConfigError, "sparsity does nothing"),
        ({"n_edges": 0}, ConfigError, "n_edges"),
        ({"prior": pd.DataFrame({"regulator": ["tf_a"]})}, MissingKeyError, "target"),
        ({"prior": pd.DataFrame({"regulator": ["x"], "target": ["y"]})}, DataError, "names no edge"),
    ],
)
@pytest.mark.filterwarnings("ignore:tl.grn. 1 genes")
def test_refusals(settings, error, said):
    with pytest.raises(error, match=said):
        tl.grn(cells(20), **({"regulators": ["tf_a", "tf_b"]} | settings))


def test_too_many_genes_are_not_all_regulators():
    wide = anndata.AnnData(np.random.default_rng(0).poisson(9.0, (9, 1001)).astype(np.float32))
    with pytest.raises(ConfigError, match="1,001 genes"):
        tl.grn(wide)


def test_figure(found):
    network, table = pl.grn(found, n_edges=5)
    assert len(network.patches) == 5
    assert "5 strongest" in network.get_title()
    assert len(table.tables) == 1
    with pytest.raises(MissingKeyError, match="no edge from"):
        pl.grn(found, regulators=["up_a"])
    with pytest.raises(ConfigError, match="n_edges"):
        pl.grn(found, n_edges=0)
    with pytest.raises(MissingKeyError, match=r"tl\.grn"):
        pl.grn(cells(4))


def test_known_network(data_dir):
    """Of SERGIO's simulation the simplest network finds more than GENIE3; the attention is in benchmarks/quality."""
    adata = anndata.read_h5ad(data_dir / "grn_sergio_ds8.h5ad")
    network = adata.uns["reference_network"]
    true = set(zip(network["source"], network["target"], strict=True))
    tl.grn(adata, regulators=sorted({a for a, _ in true}), method="lasso", normalize=False, layer="spliced")
    table = adata.uns["diffbio_grn"].astype({"regulator": str, "target": str})
    hit = [(e.regulator, e.target) in true for e in table.itertuples()]
    assert average_precision_score(hit, table["weight"]) > 0.541
