"""`tl.switch_de`, `tl.differential_distribution` and their figures, on counts along a course in two conditions."""

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from flax import nnx
from scipy import sparse

from diffbio import pl, tl
from diffbio.data.transform import shifted_log
from diffbio.errors import ConfigError, DataError, DataWarning, MissingKeyError
from diffbio.operators.singlecell import DifferentiableSwitchDE, SwitchDEConfig

N_CELLS = 90


def course(seed=0):
    """Genes 0 and 1 switch on and off, gene 2 differs between conditions, the others do nothing; gene 7 is absent."""
    rng = np.random.default_rng(seed)
    t, treated = rng.random(N_CELLS), np.arange(N_CELLS) % 2
    on = 30 / (1 + np.exp(-12 * (t - 0.5)))
    rates = np.column_stack([on, 30 - on, 4 + 30 * treated, *[np.full(N_CELLS, 15.0)] * 4, np.zeros(N_CELLS)])
    rates = np.hstack([rates, np.full((N_CELLS, 4), 100.0)])
    adata = anndata.AnnData(sparse.csr_matrix(rng.poisson(rates).astype(np.float32)))
    adata.var_names = [f"gene{g}" for g in range(12)]
    adata.obs["diffbio_pseudotime"] = 2 * t
    adata.obs["condition"] = pd.Categorical(np.where(treated, "treated", "control"))
    return adata


@pytest.fixture(scope="module")
def tested():
    adata = course()
    with pytest.warns(DataWarning, match="no count in any cell"):
        tl.switch_de(adata, n_permutations=2, n_nodes=32)
    with pytest.warns(DataWarning, match="no count in any cell"):
        tl.differential_distribution(adata, "condition", groups=["control", "treated"], n_permutations=200)
    return adata


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def test_switches(tested):
    table = tested.uns["diffbio_switch_de"]
    assert list(table.columns) == ["k", "t0", "mu0", "pvalue", "qvalue"]
    assert table.loc["gene0", "k"] > 0 > table.loc["gene1", "k"]
    np.testing.assert_allclose(table.loc["gene0", "t0"], 1.0, atol=0.6)  # log expression rises before counts do
    assert (table.loc[["gene0", "gene1"], "qvalue"] < 1e-4).all()
    assert table.loc["gene7", ["k", "mu0"]].abs().max() == 0
    assert table.loc["gene7", "pvalue"] == 1
    with pytest.warns(DataWarning):
        axes = pl.switch_de(tested, n_genes=3)
    assert len(axes) == 3
    assert axes[0].get_title().startswith(("gene0", "gene1"))


def test_sums_on_the_host_are_those_of_the_operator(tested):
    op = DifferentiableSwitchDE(SwitchDEConfig(n_genes=12, n_nodes=32, n_permutations=0), rngs=nnx.Rngs(0))
    data = {"counts": shifted_log(tested.X).toarray(), "pseudotime": tested.obs["diffbio_pseudotime"].to_numpy()}
    found, table = op.apply(data)[0], tested.uns["diffbio_switch_de"]
    for column, key in (("k", "switch_strengths"), ("t0", "switch_times"), ("mu0", "mu0")):
        np.testing.assert_allclose(table[column][:2], found[key][:2], rtol=2e-3)


def test_zero_inflated_on_the_host():
    adata = course()[:, :2].copy()
    adata.obs.loc["0", "diffbio_pseudotime"] = np.inf
    with pytest.warns(UserWarning, match="infinite"):
        tl.switch_de(adata, zero_inflated=True, n_permutations=0)
    op = DifferentiableSwitchDE(SwitchDEConfig(n_genes=2, zero_inflated=True, n_permutations=0), rngs=nnx.Rngs(0))
    kept = slice(1, None)
    data = {"counts": shifted_log(adata.X).toarray()[kept]}
    found = op.apply(data | {"pseudotime": adata.obs["diffbio_pseudotime"].to_numpy()[kept]})[0]
    table = adata.uns["diffbio_switch_de"]
    np.testing.assert_allclose(table["k"], found["switch_strengths"], rtol=2e-2)
    np.testing.assert_allclose(table["t0"], found["switch_times"], rtol=2e-2)


def test_distributions(tested, tmp_path):
    table = tested.uns["diffbio_differential_distribution"]
    assert table.index[np.argmin(table["pvalue"])] == "gene2"
    assert table.loc["gene2", "pattern"] in ("DE", "DM", "DB", "DP")
    assert table.loc["gene2", "log_fold_change"] > 2
    assert table.loc["gene7", "pvalue"] == 1
    assert table.loc["gene7", "pattern"] == ""
    with pytest.warns(DataWarning):
        assert len(pl.differential_distribution(tested, genes=["gene2", "gene3"])) == 2
    tested.write_h5ad(tmp_path / "tested.h5ad")
    again = anndata.read_h5ad(tmp_path / "tested.h5ad")
    pd.testing.assert_frame_equal(again.uns["diffbio_switch_de"], tested.uns["diffbio_switch_de"], check_names=False)
    with pytest.warns(DataWarning):
        assert len(pl.differential_distribution(again, n_genes=1)) == 1
    with pytest.warns(DataWarning):
        assert len(pl.switch_de(again, genes=["gene1"])) == 1


def test_refusals():
    adata = course()[:, :7].copy()
    with pytest.raises(MissingKeyError, match=r"tl\.switch_de"):
        pl.switch_de(adata)
    with pytest.raises(MissingKeyError, match=r"tl\.differential_distribution"):
        pl.differential_distribution(adata)
    with pytest.raises(MissingKeyError, match="dpt"):
        tl.switch_de(adata, pseudotime_key="dpt")
    adata.obs["same"] = 1.0
    with pytest.raises(DataError, match="must differ"):
        tl.switch_de(adata, pseudotime_key="same")
    with pytest.raises(ConfigError, match="n_permutations"):
        tl.switch_de(adata, n_permutations=-1)
    with pytest.raises(MissingKeyError, match="other"):
        tl.differential_distribution(adata, "condition", groups=["control", "other"])
    with pytest.raises(ConfigError, match="two groups"):
        tl.differential_distribution(adata, "condition", groups=["control"])
    with pytest.raises(ConfigError, match="level"):
        tl.differential_distribution(adata, "condition", level=0.0)
    adata.obs["rare"] = ["a"] * 3 + ["b"] * (N_CELLS - 3)
    with pytest.raises(DataError, match="5 at least"):
        tl.differential_distribution(adata, "rare")
