"""`tl.ligand_receptor`, `tl.communication` and their figures on few cells, and on LIANA's stored table."""

import os
import warnings
from pathlib import Path

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from diffbio import pl, tl
from diffbio.errors import DataError, MissingKeyError

REFERENCE = Path(os.environ.get("DIFFBIO_REFERENCES", Path(__file__).parents[3] / "shared" / "peers" / "ref"))
PAIRS = [("g0", "g1"), ("g2", "g3_g4"), ("g5", "g1"), ("absent", "g1")]


def few_cells():
    rng = np.random.default_rng(0)
    kind = np.arange(90) % 3
    level = rng.gamma(1.0, 2.0, (3, 12))
    counts = rng.poisson(level[kind] + 0.3).astype(np.float32)
    adata = anndata.AnnData(sparse.csr_matrix(counts))
    adata.var_names = [f"g{k}" for k in range(12)]
    adata.obs_names = [f"c{k}" for k in range(90)]
    adata.obs["type"] = pd.Categorical(np.array(["a", "b", "c"])[kind])
    adata.obsm["spatial"] = rng.uniform(size=(90, 2))
    return adata


@pytest.fixture(scope="module")
def done():
    adata = few_cells()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tl.ligand_receptor(adata, "type", PAIRS, n_permutations=50)
        tl.communication(adata, "type", PAIRS, n_neighbors=4, max_epochs=3, n_pathways=2, hidden_dim=8)
    return adata


def test_the_table_holds_means_of_the_groups(done):
    table = done.uns["diffbio_lr"]
    assert list(table.columns[:7]) == ["source", "target", "ligand", "receptor", "mean", "specificity", "pvalue"]
    assert done.uns["diffbio"]["diffbio_lr"]["left_out"] == 1
    counts = done.X.toarray()
    values = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    mean = pd.DataFrame(values, columns=done.var_names).groupby(done.obs["type"].to_numpy()).mean()
    for row in table.itertuples():
        low = min(mean.loc[row.target, gene] for gene in row.receptor.split("_"))
        assert row.mean == pytest.approx((mean.loc[row.source, row.ligand] + low) / 2, rel=1e-5)
    assert (table["magnitude_rank"].diff().dropna() >= 0).all()


def test_soft_groups_stand_in_obsm(done):
    adata = few_cells()
    adata.obsm["soft"] = pd.DataFrame(np.eye(3)[np.arange(90) % 3], index=adata.obs_names, columns=list("abc"))
    tl.ligand_receptor(adata, "soft", PAIRS, n_permutations=50)
    columns = ["source", "target", "ligand", "mean", "pvalue"]
    pd.testing.assert_frame_equal(adata.uns["diffbio_lr"][columns], done.uns["diffbio_lr"][columns])
    adata.obsm["soft"] *= 0.5
    with pytest.raises(DataError, match="sum to 1"):
        tl.ligand_receptor(adata, "soft", PAIRS)


def test_what_is_refused():
    adata = few_cells()
    with pytest.raises(MissingKeyError, match="no 'kind' in obs"):
        tl.ligand_receptor(adata, "kind", PAIRS)
    adata.obs["type"] = ["rare" if k < 3 else "common" for k in range(90)]
    with pytest.raises(DataError, match=r"rare \(3\)"):
        tl.ligand_receptor(adata, "type", PAIRS)
    with pytest.raises(DataError, match="none of its 1 pairs"):
        tl.communication(adata, resource=[("x", "y")])
    with pytest.raises(DataError, match="in 91 cells"):
        tl.communication(adata, resource=PAIRS, min_cells=91)
    with pytest.raises(DataError, match="only 90 cells"):
        tl.communication(adata, resource=PAIRS, n_neighbors=90)
    with pytest.raises(MissingKeyError, match=r"tl\.ligand_receptor"):
        pl.ligand_receptor(adata)
    with pytest.raises(MissingKeyError, match=r"tl\.communication"):
        pl.communication(adata)


def test_communication_is_written_in_parts_that_agree(done):
    found = done.uns["diffbio_communication"]
    assert set(found) == {"pairs", "pathways", "groups", "activity"}
    assert list(found["pairs"].columns) == ["ligand", "receptor", "strength", "pathway", "response"]
    assert done.obsm["diffbio_signaling_activity"].shape == (90, 2)
    graph = done.obsp["diffbio_communication"]
    kinds = np.eye(3)[np.arange(90) % 3]
    total = (kinds.T @ (graph @ kinds)) / 30  # per receiver
    table = found["groups"]
    for s, source in enumerate("abc"):
        for t, target in enumerate("abc"):
            some = table[(table["source"] == source) & (table["target"] == target)]
            assert some["score"].sum() == pytest.approx(total[s, t], rel=1e-4, abs=1e-9)


def test_figures(done):
    ax = pl.ligand_receptor(done, max_pvalue=1.0, sources=["a", "b"])
    assert len(ax.get_yticklabels()) <= 3
    assert all(label.get_text()[0] in "ab" for label in ax.get_xticklabels())
    axes = pl.communication(done)
    assert [ax.get_title() for ax in axes] == ["pairs", "signals between groups", "activity received"]
    with pytest.raises(MissingKeyError, match="no source 'z'"):
        pl.ligand_receptor(done, sources=["z"])
    with pytest.raises(MissingKeyError, match="no 'pathway 9'"):
        pl.communication(done, pathways=["pathway 9"])
    with pytest.raises(DataError, match="p-value"):
        pl.ligand_receptor(done, max_pvalue=-1.0)
    plt.close("all")


@pytest.mark.skipif(not (REFERENCE / "liana_cpdb_top500.csv").exists(), reason="LIANA's stored table is not here")
def test_means_are_liana_s(data_dir):
    adata = anndata.read_h5ad(data_dir / "pbmc3k.h5ad")
    stored = pd.read_csv(REFERENCE / "liana_cpdb_top500.csv")
    pairs = data_dir / "ligand_receptor_pairs.csv"
    tl.ligand_receptor(adata, "cell_type", pairs, species="human", n_permutations=0)
    ours = adata.uns["diffbio_lr"].astype({"source": str, "target": str})
    keys = ["source", "target", "ligand_complex", "receptor_complex"]
    both = stored.merge(ours, left_on=keys, right_on=["source", "target", "ligand", "receptor"], suffixes=("_l", ""))
    assert len(both) == len(stored)
    np.testing.assert_allclose(both["mean"], both["lr_means"], atol=1e-5)
    assert len(ours) == 4174  # all rows of LIANA's table


def test_one_group_is_refused():
    adata = few_cells()
    adata.obs["all"] = pd.Categorical(["everything"] * adata.n_obs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match="has one group, 'everything'"):
            tl.ligand_receptor(adata, "all", PAIRS)
