"""tl.ot_trajectory and what it returns."""

import warnings

import anndata as ad
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import sparse

from diffbio import tl
from diffbio.errors import ConfigError, DataError, DataWarning, MissingKeyError
from diffbio.operators.singlecell import DifferentiableOTTrajectory, OTTrajectoryConfig

SETTINGS = {"n_components": 5}


def course(days=("0", "2", "5"), n=24, seed=0):
    """Two kinds of cells that drift; the first one's share grows with the days. Cells in no order."""
    rng = np.random.default_rng(seed)
    kind = np.concatenate([(np.arange(n) < n * share).astype(int) for share in np.linspace(0.4, 0.7, len(days))])
    step = np.repeat(np.arange(len(days)), n)
    means = np.where(kind[:, None] == np.repeat([1, 0], 10), 20.0, 3.0) * np.exp(
        0.4 * step[:, None] * np.linspace(-1, 1, 20)
    )
    order = rng.permutation(len(kind))
    adata = ad.AnnData(sparse.csr_matrix(rng.poisson(means)[order].astype(np.float32)))
    adata.obs["day"] = np.array(days)[step[order]]
    adata.obs["kind"] = np.array(["b", "a"])[kind[order]]
    adata.var["diffbio_highly_variable"] = True
    return adata


@pytest.fixture(scope="module")
def made():
    adata = course()
    return adata, tl.ot_trajectory(adata, "day", groupby="kind", **SETTINGS)


def test_couplings_are_those_of_the_operator(made):
    adata, found = made
    early, late = (jnp.asarray(adata[adata.obs["day"] == day].X.toarray()) for day in ("0", "2"))
    op = DifferentiableOTTrajectory(OTTrajectoryConfig(n_genes=20, **SETTINGS), rngs=nnx.Rngs(0))
    expected = op.apply({"counts_t1": early, "counts_t2": late}, {}, None)[0]
    plan = found.transport(0, 2)
    np.testing.assert_allclose(plan, 24 * expected["transport_plan"], atol=2e-4)
    assert list(plan.index) == list(adata.obs_names[adata.obs["day"] == "0"])
    np.testing.assert_allclose(plan.sum(axis=1), found.growth[adata.obs["day"] == "0"], rtol=1e-9)
    assert np.isnan(found.growth[adata.obs["day"] == "5"]).all()


def test_days_further_apart_are_products(made):
    _, found = made
    both = found.transport(0, 2).to_numpy() @ found.transport(2, 5).to_numpy()
    np.testing.assert_allclose(found.transport(0, 5), both, rtol=1e-9)


def test_descendants_and_ancestors_are_columns_and_rows_of_it(made):
    adata, found = made
    plan = found.transport(0, 5)
    some = plan.index[[1, 4]]
    later = found.descendants(some)
    np.testing.assert_allclose(later, plan.loc[some].sum() / plan.loc[some].to_numpy().sum(), rtol=1e-9)
    last = plan.columns[:3]
    earlier = found.ancestors(last)
    np.testing.assert_allclose(earlier, plan[last].sum(axis=1) / plan[last].to_numpy().sum(), rtol=1e-9)
    mask = np.isin(adata.obs_names, some)
    np.testing.assert_array_equal(found.descendants(mask), later)
    np.testing.assert_array_equal(found.descendants(np.flatnonzero(mask)), later)
    assert found.ancestors(last, 2).index[0] in adata.obs_names[adata.obs["day"] == "2"]


def test_fates_are_kinds(made):
    adata, found = made
    fates = found.fates(adata.obs["kind"])
    np.testing.assert_allclose(fates.sum(axis=1), 1, rtol=1e-9)
    own = adata.obs.loc[fates.index, "kind"]
    assert (fates.idxmax(axis=1) == own).all()
    mean = [np.nanmean(found.growth[adata.obs["kind"] == k]) for k in ("a", "b")]
    assert mean[0] > 1.2 > 0.9 > mean[1]  # a grows from 40 to 70 percent


def test_interpolation_ends_at_the_days_and_meets_in_between(made):
    adata, found = made
    values = np.log1p(adata.X.toarray())
    days = {day: values[adata.obs["day"] == str(day)] for day in (0, 2, 5)}
    for day in (0, 2, 5):
        for smooth in (False, True):
            there = found.interpolate(values, day, smooth=smooth)
            own = there.weights > 0  # the cells of the other day have no weight
            assert own.sum() == 24
            np.testing.assert_allclose(np.sort(there.values[own], axis=0), np.sort(days[day], axis=0), atol=1e-9)
    middle = found.interpolate(values, 1.0, smooth=False)
    assert middle.weights.sum() == pytest.approx(1)
    sampled = found.interpolate(values, 1.0, form="sampled", n_cells=4000)
    np.testing.assert_allclose(middle.weights @ middle.values, sampled.values.mean(axis=0), atol=0.05)
    far = found.interpolate(values, 2.0, between=(0, 5))
    assert len(far.values) == 48
    from_true = [((m - days[2].mean(axis=0)) ** 2).mean() for m in (far.weights @ far.values, days[0].mean(axis=0))]
    assert from_true[0] < from_true[1] / 1.5


def test_cells_far_from_all_others_and_days_without_groups():
    adata = course(n=12)
    values = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    values[:, 0] += np.where(adata.obs["kind"] == "a", 3.0, -3.0)
    first = np.flatnonzero(adata.obs["day"] == "0")
    values[first[0]] = 1e4, 0.0
    adata.obsm["place"] = values
    adata.obs["late"] = adata.obs["kind"].where(adata.obs["day"] != "2")
    with pytest.warns(DataWarning) as told:
        found = tl.ot_trajectory(adata, "day", use_rep="place", groupby="late")
    messages = " ".join(str(warning.message) for warning in told)
    assert "1 of the 12 cells of day 0 are so far from those of day 2" in messages
    assert "no cell of day 2 has a group" in messages
    kept = adata.uns["diffbio_ot"]
    assert (kept["error"] < 1e-9).all()
    assert found.growth[first[0]] == 0
    np.testing.assert_array_equal(kept["flow"], 0)
    np.testing.assert_allclose(kept["fates"].sum(axis=2), [[1, 1], [0, 0], [1, 1]], rtol=1e-9)
    fates = found.fates(adata.obs["kind"])
    np.testing.assert_allclose(fates.sum(axis=1), 1, rtol=1e-9)
    assert fates["a"].iloc[0] > 0.99  # the side on which it stands
    for day in (2, 5):
        after = found.descendants([first[0]], day)
        assert after.sum() == pytest.approx(1)
        assert (after[adata.obs.loc[after.index, "kind"] == "a"]).sum() > 0.99
    for settings in ({}, {"smooth": False}, {"form": "sampled"}):
        between = found.interpolate(values, 1.0, **settings)
        assert np.isfinite(between.values).all()
        assert between.weights.sum() == pytest.approx(1)
    with pytest.raises(DataError, match="none of the 12 cells of the last day, 5, has a group"):
        found.fates(adata.obs["kind"].where(adata.obs["day"] != "5"))


def test_results_are_written_and_readable(made, tmp_path):
    adata, found = made
    adata.write_h5ad(tmp_path / "course.h5ad")
    again = ad.read_h5ad(tmp_path / "course.h5ad").uns["diffbio_ot"]
    np.testing.assert_array_equal(again["growth"], found.growth)
    np.testing.assert_array_equal(again["days"], [0, 2, 5])
    assert list(again["groups"]) == ["a", "b"]
    assert (again["error"] < 1e-9).all()
    for part in ("fates", "ancestors"):
        np.testing.assert_allclose(again[part].sum(axis=2), 1, rtol=1e-9)
    np.testing.assert_allclose(again["ancestors"][2], np.eye(2), atol=1e-12)
    assert adata.uns["diffbio"]["ot_trajectory"]["params"]["time_key"] == "day"


def test_growth_given_from_scores_and_landmarks(monkeypatch):
    adata = course(("0", "2"))
    adata.obs["rate"] = np.where(adata.obs["kind"] == "a", 1.2, 0.9)
    adata.obs["divides"] = np.where(adata.obs["kind"] == "a", 1.0, -1.0)
    kept, held = tl.ot_trajectory(adata, "day", growth_rate="rate", lambda1=float("inf"), copy=True, **SETTINGS)
    early = adata.obs["day"] == "0"
    np.testing.assert_allclose(held.growth[early], adata.obs["rate"][early] ** 2, rtol=1e-6)
    assert "diffbio_ot" in kept.uns
    assert "diffbio_ot" not in adata.uns
    with pytest.warns(DataWarning, match="1 of the 3 genes of a score, such as 'not there'"):
        scored = tl.ot_trajectory(adata, "day", proliferation="divides", apoptosis=["0", "1", "not there"], **SETTINGS)
    assert (
        scored.growth[early & (adata.obs["kind"] == "a")].min()
        > scored.growth[early & (adata.obs["kind"] == "b")].max()
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"time_key": "hour"}, MissingKeyError, "no column 'hour'; it has day, kind"),
        ({"time_key": "kind"}, DataError, "must hold numbers"),
        ({"time_key": "once"}, DataError, "holds 1 time point"),
        ({"growth_rate": "dying"}, DataError, "must be above 0, but cell 0"),
        ({"growth_rate": "nowhere"}, MissingKeyError, "no column 'nowhere'"),
        ({"growth_rate": "day", "proliferation": "day"}, ConfigError, "pass one of them"),
        ({"apoptosis": "day"}, ConfigError, "does nothing without proliferation"),
        ({"proliferation": ["XYZ"]}, MissingKeyError, "none of the 1 genes"),
        ({"proliferation": []}, ConfigError, "got an empty list"),
        ({"groupby": "unknown"}, DataError, "nothing but missing values"),
        ({"groupby": "nowhere"}, MissingKeyError, "no column 'nowhere'"),
        ({"sinkhorn_epsilon": 0.0}, ConfigError, "sinkhorn_epsilon must be > 0"),
        ({"n_landmarks": 1}, ConfigError, "n_landmarks must be at least 2"),
        ({"use_rep": "X_none"}, MissingKeyError, "obsm has no 'X_none'"),
    ],
)
def test_bad_calls_are_refused(settings, error, message):
    adata = course(("0", "2"), n=4)
    adata.obs["once"], adata.obs["dying"], adata.obs["unknown"] = 1.0, -1.0, np.nan
    with pytest.raises(error, match=message):
        tl.ot_trajectory(adata, **{"time_key": "day", **settings})


def test_bad_questions_are_refused(made):
    adata, found = made
    values = np.zeros((adata.n_obs, 2))
    with pytest.raises(MissingKeyError, match="no day 3; there are 0, 2, 5"):
        found.transport(0, 3)
    with pytest.raises(ConfigError, match="before the second, got 5 and 0"):
        found.transport(5, 0)
    with pytest.raises(ConfigError, match="not after day 2"):
        found.descendants(adata.obs_names[adata.obs["day"] == "2"], 0)
    with pytest.raises(DataError, match="of days 0 and 2"):
        found.ancestors(np.ones(adata.n_obs, bool))
    with pytest.raises(MissingKeyError, match="no cell 'nobody'"):
        found.descendants(["nobody"])
    with pytest.raises(ConfigError, match="time must lie between"):
        found.interpolate(values, 7)
    with pytest.raises(DataError, match="values have 3 rows"):
        found.interpolate(values[:3], 1)


def test_fate_against_clones(data_dir):
    """LARRY, day 4 to 6, with default settings: above WOT's fate correlation and moscot's clone mass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        adata = ad.read_h5ad(data_dir / "larry_haematopoiesis_clones.h5ad")
        adata = adata[np.isin(adata.obs["day"].astype(str), ["4", "4.0", "6", "6.0"])].copy()
        adata.var["diffbio_highly_variable"] = True
        found = tl.ot_trajectory(adata, "day")
    names = [str(name) for name in adata.uns["clonal_fate_names"]]
    early = np.asarray(adata.obs["day"].astype(str).astype(float) == 4)
    truth = np.asarray(adata.obsm["clonal_fate"], float)[early]
    known = np.isfinite(truth).all(axis=1) & (np.nan_to_num(truth).sum(axis=1) > 0)
    fates = found.fates(adata.obs["cell_type"], 4)[names].to_numpy()[known]
    truth = truth[known] / truth[known].sum(axis=1, keepdims=True)
    assert known.sum() == 151
    assert np.corrcoef((fates / fates.sum(axis=1, keepdims=True)).ravel(), truth.ravel())[0, 1] > 0.594
    clone = adata.obs["clone"].astype(str).to_numpy()
    same = clone[early][:, None] == clone[~early]
    plan = found.transport(4, 6).to_numpy()
    mass = ((plan * same).sum(axis=1) / plan.sum(axis=1))[same.any(axis=1)].mean()
    assert mass > 0.0324
