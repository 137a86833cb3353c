import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from diffbio.errors import ConfigError, DataError, DataWarning
from diffbio.models import SCVI
from diffbio.models.differential import expected_discoveries, highest_density, least_change, pseudocount

VANILLA = ["proba_m1", "proba_m2", "bayes_factor", "scale1", "scale2"]
CHANGE = [
    "proba_de", "proba_not_de", "bayes_factor", "scale1", "scale2", "pseudocounts", "delta",
    "lfc_mean", "lfc_median", "lfc_std", "lfc_min", "lfc_max",
]  # fmt: skip
RAW = [
    "raw_mean1", "raw_mean2", "non_zeros_proportion1", "non_zeros_proportion2",
    "raw_normalized_mean1", "raw_normalized_mean2",
]  # fmt: skip
GROUPS = ["comparison", "group1", "group2"]


def simulated(n=600, n_genes=300, n_changed=40, seed=0):
    """Two groups in two batches; 40 genes change by 0.8 to 2.5 log2 units."""
    rng = np.random.default_rng(seed)
    group, batch = np.arange(n) % 2, rng.integers(2, size=n)
    change = np.zeros(n_genes)
    changed = rng.choice(n_genes, n_changed, replace=False)
    change[changed] = rng.choice([-1, 1], n_changed) * rng.uniform(0.8, 2.5, n_changed)
    log_mean = rng.normal(-1, 1.5, n_genes) + np.outer(group, change) * np.log(2)
    log_mean = log_mean + 0.2 * rng.normal(size=(2, n_genes))[batch]
    mean = np.exp(log_mean) / np.exp(log_mean).sum(1, keepdims=True) * rng.lognormal(np.log(600), 0.3, n)[:, None]
    counts = rng.poisson(mean * rng.standard_gamma(3, mean.shape) / 3).astype(np.float32)
    obs = pd.DataFrame(
        {"group": np.array(["a", "b"])[group], "batch": batch.astype(str)}, index=[f"cell{i}" for i in range(n)]
    )
    var = pd.DataFrame({"change": change}, index=[f"gene{i}" for i in range(n_genes)])
    seen = counts.any(axis=0)
    return ad.AnnData(sparse.csr_matrix(counts[:, seen]), obs=obs, var=var[seen])


@pytest.fixture(scope="module")
def model():
    adata = simulated()
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata, n_hidden=64, gene_likelihood="nb")
    model.train(max_epochs=60, progress=False)
    return model


@pytest.mark.parametrize("arguments", [{}, {"batch_correction": True}, {"test_mode": "two"}])
def test_changed_genes_are_found_and_false_discoveries_are_few(model, arguments):
    found = model.differential_expression(groupby="group", group1="b", group2="a", mode="change", **arguments)
    found = found.loc[model.adata.var_names]
    changed = model.adata.var["change"].to_numpy() != 0
    called = found["is_de_fdr_0.05"].to_numpy()
    assert called.sum() >= 10
    assert (called & ~changed).sum() <= 0.1 * called.sum() + 1
    assert np.corrcoef(found["lfc_mean"], model.adata.var["change"])[0, 1] > 0.85
    likely = found["proba_de"].to_numpy()
    assert (likely[changed][:, None] > likely[~changed]).mean() > 0.85  # AUROC
    same_way = found["lfc_median"].to_numpy() * model.adata.var["change"].to_numpy() > 0
    assert same_way[called & changed].all()


def test_no_difference_between_halves_of_a_group(model):
    one = np.flatnonzero(model.adata.obs["group"] == "a")
    found = model.differential_expression(idx1=one[::2], idx2=one[1::2], mode="change")
    assert list(found.columns) == [*CHANGE, *RAW, "is_de_fdr_0.05"]
    assert found["is_de_fdr_0.05"].sum() <= 3
    assert np.abs(found["lfc_mean"]).median() < 0.2


def test_vanilla(model):
    found = model.differential_expression(groupby="group", group1="b", group2="a", n_samples_overall=1000)
    assert list(found.columns) == [*VANILLA, *RAW, *GROUPS]
    assert found["bayes_factor"].is_monotonic_decreasing
    np.testing.assert_allclose(found["proba_m1"] + found["proba_m2"], 1)
    change = model.adata.var["change"].loc[found.index]
    assert change.iloc[:10].mean() > 0.5 > -0.5 > change.iloc[-10:].mean()


def test_raw_statistics_are_those_of_the_counts(model):
    found = model.differential_expression(idx1="group == 'a' and batch == '0'", n_samples_overall=20)
    found = found.loc[model.adata.var_names]
    obs, x = model.adata.obs, model.adata.X.toarray()
    first = ((obs["group"] == "a") & (obs["batch"] == "0")).to_numpy()
    fraction = x / x.sum(1, keepdims=True) * 1e4
    for end, mask in (("1", first), ("2", ~first)):
        np.testing.assert_allclose(found[f"raw_mean{end}"], x[mask].mean(0), rtol=1e-5)
        np.testing.assert_allclose(found[f"non_zeros_proportion{end}"], (x[mask] > 0).mean(0), rtol=1e-6)
        np.testing.assert_allclose(found[f"raw_normalized_mean{end}"], fraction[mask].mean(0), rtol=1e-4)


def test_one_against_the_rest(model):
    found = model.differential_expression(groupby="group", mode="change", n_samples_overall=50, all_stats=False)
    assert list(found.columns) == [*CHANGE, "is_de_fdr_0.05", *GROUPS]
    assert list(found["comparison"].unique()) == ["a vs Rest", "b vs Rest"]
    assert len(found) == 2 * model.adata.n_vars


def test_seeds(model):
    how = {"groupby": "group", "group1": "a", "n_samples_overall": 50}
    first, same, other = (model.differential_expression(**how, seed=seed) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(first, same)
    assert not first["scale1"].equals(other["scale1"].loc[first.index])


def test_options(model):
    how = {"groupby": "group", "group1": "b", "mode": "change", "n_samples_overall": 400, "all_stats": False}
    options = {"delta": None, "pseudocounts": 1e-4, "cred_interval_lvls": [0.9], "fdr_target": 0.2}
    found = model.differential_expression(**how, **options)
    assert (found["pseudocounts"] == 1e-4).all()
    assert (found["delta"] >= 0.1).all()
    assert "is_de_fdr_0.2" in found
    low, high = found["lfc_confidence_interval_0.9_min"], found["lfc_confidence_interval_0.9_max"]
    assert ((low <= found["lfc_median"]) & (found["lfc_median"] <= high)).all()
    mixed = model.differential_expression(**how, use_permutation=True, m_permutation=3000, batch_correction=True)
    plain = model.differential_expression(**how, batch_correction=True)
    both = pd.concat([mixed["lfc_mean"], plain["lfc_mean"]], axis=1)
    assert both.corr().iloc[0, 1] > 0.95
    other = model.differential_expression(**how, batch_correction=True, batchid1=["0"], batchid2=["1"])
    assert not np.allclose(other["lfc_mean"].loc[plain.index], plain["lfc_mean"])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ConfigError, "pass groupby="),
        ({"groupby": "type"}, DataError, "no column 'type'"),
        ({"groupby": "group", "group1": "c"}, DataError, "no group 'c'"),
        ({"groupby": "group", "mode": "t-test"}, ConfigError, "'vanilla' or 'change'"),
        ({"groupby": "group", "delta": 0.0}, ConfigError, "delta must be above 0"),
        ({"groupby": "group", "batchid1": ["0"]}, ConfigError, "batchid1 must be None without batch_correction"),
        ({"idx1": np.zeros(600, bool)}, DataError, "the first group has no cells"),
        ({"idx1": np.zeros(5, bool)}, DataError, "5 entries for 600 cells"),
    ],
)
def test_bad_questions_are_refused(model, arguments, error, words):
    with pytest.raises(error, match=words):
        model.differential_expression(**arguments)


def test_shared_cells_are_told(model):
    with pytest.warns(DataWarning, match="share cells"):
        model.differential_expression(idx1=np.arange(10), idx2=np.arange(5, 20), n_samples_overall=20)


def test_expected_discoveries():
    p = np.array([0.2, 0.99, 0.9, 0.97, 0.5])
    # expected FDR of the likeliest 1, 2, 3, 4: 0.01, 0.02, 0.047, 0.16
    np.testing.assert_array_equal(expected_discoveries(p, 0.05), [False, True, True, True, False])
    assert expected_discoveries(np.full(4, 0.5), 0.05).sum() == 0


def test_highest_density_of_a_normal():
    samples = np.random.default_rng(0).normal(3, 2, (20_000, 1))
    low, high = highest_density(samples, 0.95)
    np.testing.assert_allclose([low[0], high[0]], [3 - 1.96 * 2, 3 + 1.96 * 2], atol=0.25)


def test_pseudocount_and_delta_from_the_data():
    f = np.full((10, 4), 0.2)
    f[:, 0] = np.linspace(0, 1e-3, 10)
    silent = np.array([True, False, False, False])
    np.testing.assert_allclose(pseudocount((f, f), (silent, ~silent & silent)), 1e-3 / 4)
    assert pseudocount((f, f), (silent & ~silent,) * 2) == 1e-10
    rng = np.random.default_rng(0)
    lfc = np.concatenate([rng.normal(m, 0.1, 100) for m in (-2, 0, 2)])
    np.testing.assert_allclose(least_change(lfc), 1.2, atol=0.05)


def test_interferon_genes_of_kang(data_dir):
    """Stimulated against control blood cells: the genes that interferon turns on come first."""
    adata = ad.read_h5ad(data_dir / "kang_pbmc_ifnb.h5ad")
    order = np.argsort(-np.asarray(adata.X.sum(0)).ravel())[:400]
    adata = adata[:, np.sort(order)].copy()
    SCVI.setup_anndata(adata)
    model = SCVI(adata, gene_likelihood="nb")
    model.train(max_epochs=40, progress=False)
    found = model.differential_expression(
        groupby="condition", group1="stim", group2="ctrl", mode="change", delta=0.5, n_samples_overall=2000
    )
    strong = [gene for gene in ("ISG15", "IFI6", "IFIT3", "ISG20", "LY6E") if gene in found.index]
    assert len(strong) >= 3
    rank = {gene: i for i, gene in enumerate(found.index)}
    assert np.median([rank[gene] for gene in strong]) < 20
    assert (found.loc[strong, "lfc_mean"] > 1).all()
