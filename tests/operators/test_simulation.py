"""The simulator: laws, limits, gradients, and fits to counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

import diffbio
from diffbio.data import read, simulated, write_simulated
from diffbio.errors import ConfigError, DataError
from diffbio.operators.base import mode_of
from diffbio.operators.singlecell import DifferentiableSimulator, SimulationConfig

SIZE = {"n_cells": 300, "n_genes": 300}  # the same everywhere: compiled once


def simulator(seed=0, **settings):
    return DifferentiableSimulator(SimulationConfig(**settings), rngs=nnx.Rngs(seed))


def drawn(seed=0, **settings):
    return {key: np.asarray(value) for key, value in simulator(seed, **settings)().items()}


def test_counts_are_whole_and_their_totals_are_the_library_sizes():
    out = drawn(**SIZE)
    assert out["counts"].dtype == np.int32
    assert (out["counts"] >= 0).all()
    assert np.log(out["library_size"]).mean() == pytest.approx(11, abs=0.05)
    np.testing.assert_allclose(out["expected_counts"].sum(axis=1), out["library_size"], rtol=1e-4)
    # BCV noise of the largest genes leaves totals within some ten percent
    assert stats.spearmanr(out["counts"].sum(axis=1), out["library_size"]).statistic > 0.5
    assert out["counts"].sum() == pytest.approx(out["library_size"].sum(), rel=0.05)


def test_groups_differ_in_the_genes_of_the_mask():
    # few genes would pull all shares along when one rises: many genes, strong factors
    out = drawn(**SIZE, n_groups=2, de_fac_loc=1.0, de_prob=0.05, out_prob=0.0, bcv_df=1000.0)
    share = out["counts"] / out["counts"].sum(axis=1, keepdims=True)
    first, second = (share[out["group_labels"] == k].mean(axis=0) for k in (0, 1))
    seen = out["counts"].mean(axis=0) > 20
    change = np.abs(np.log((first + 1e-9) / (second + 1e-9)))
    changed = out["de_mask"].any(axis=0)
    area = stats.mannwhitneyu(change[changed & seen], change[~changed & seen]).statistic
    assert area / ((changed & seen).sum() * (~changed & seen).sum()) > 0.95
    expected = np.log(out["de_factors"][0] / out["de_factors"][1])
    assert stats.pearsonr(np.log((first + 1e-9) / (second + 1e-9))[seen], expected[seen]).statistic > 0.9


def test_batches_have_an_effect_that_can_be_left_out():
    how = {**SIZE, "n_groups": 1, "n_batches": 2, "batch_fac_scale": 0.5, "out_prob": 0.0}
    with_effect, without = drawn(**how), drawn(**how, batch_rm_effect=True)
    np.testing.assert_array_equal(with_effect["batch_labels"], without["batch_labels"])
    np.testing.assert_array_equal(with_effect["gene_means"], without["gene_means"])

    def gap(out):
        log = np.log(out["cell_means"] + 1e-3)
        return np.abs(log[out["batch_labels"] == 0].mean(0) - log[out["batch_labels"] == 1].mean(0)).mean()

    assert gap(with_effect) > 2 * gap(without)
    np.testing.assert_allclose(without["batch_factors"], 1.0)


def test_dropout_takes_counts_of_low_means():
    out = drawn(**SIZE, n_groups=1, lib_loc=8.0, dropout_type="experiment", dropout_mid=2.0, out_prob=0.0)
    lost = (out["counts"] == 0) & (out["cell_means"] > 8)  # Poisson zeros are rare there
    low, high = out["cell_means"] < 20, out["cell_means"] > 60
    assert lost[low & (out["cell_means"] > 8)].mean() > 2 * lost[high].mean() > 0
    expected = 1 / (1 + np.exp(np.log(out["cell_means"][high]) - 2))
    assert lost[high].mean() == pytest.approx(expected.mean(), rel=0.2)


def test_paths_doublets_and_soup():
    how = {"path_from": (0, 1), "doublet_prob": 0.3, "ambient_fraction": 0.2, "out_prob": 0.0}
    out = drawn(**SIZE, n_groups=2, **how)
    assert stats.kstest(out["path_position"], "uniform").pvalue > 0.01
    np.testing.assert_allclose(out["doublets"].mean(), 0.3, atol=0.1)
    one, two = (np.median(out["counts"][out["doublets"] == d].sum(axis=1)) for d in (False, True))
    assert two / one == pytest.approx(2.0, rel=0.15)


def test_a_cell_is_its_number_and_train_mode_draws_anew():
    op = simulator(n_cells=20, n_genes=30, out_prob=0.0)
    all_of_them = op()["counts"]
    np.testing.assert_array_equal(op(cell_ids=jnp.array([7, 3]))["counts"], all_of_them[jnp.array([7, 3])])
    np.testing.assert_array_equal(all_of_them, op()["counts"])
    with mode_of(op, training=True):
        assert (op()["gene_means"] != op()["gene_means"]).any()
    twins = op(counts=jnp.full((5, 30), 4.0))
    np.testing.assert_allclose(twins["library_size"], 120.0)


def test_gradients_of_expected_counts_are_the_analytic_ones():
    """E[total] = exp(loc + scale² / 2) and E[gene mean] = shape / rate; derivatives within 2 %."""
    op = simulator(n_cells=20_000, n_genes=2, n_groups=1, out_prob=0.0, lib_loc=5.0)
    graph, params, rest = nnx.split(op, nnx.Param, ...)

    def total(params):
        return nnx.merge(graph, params, rest, copy=True)()["expected_counts"].sum(axis=1).mean()

    slope = jax.jit(jax.grad(total))(params)["raw"]
    analytic = np.exp(5 + 0.2**2 / 2)
    assert float(slope["lib_loc"][...]) == pytest.approx(analytic, rel=0.02)
    # a mean of normals times 1 / 0.2: noise of 1 / sqrt(20,000) / 0.2 = 3.5 %
    assert float(slope["lib_scale"][...]) / 0.2 == pytest.approx(0.2 * analytic, rel=0.1)
    op = simulator(n_cells=1, n_genes=40_000, n_groups=1, out_prob=0.0)
    graph, params, rest = nnx.split(op, nnx.Param, ...)
    key = jax.random.key(0)

    def average(params):
        return jnp.exp(nnx.merge(graph, params, rest, copy=True)._genes(key).means).mean()

    slope = jax.jit(jax.grad(average))(params)["raw"]
    # the parameters are logarithms
    assert float(slope["mean_shape"][...]) / 0.6 == pytest.approx(1 / 0.3, rel=0.02)
    assert float(slope["mean_rate"][...]) / 0.3 == pytest.approx(-0.6 / 0.3**2, rel=0.02)


def test_fit_brings_the_statistics_closer():
    real = simulator(1, n_cells=200, n_genes=120, lib_loc=7.0, n_groups=2, de_fac_loc=1.0, out_prob=0.0)()["counts"]
    real = np.asarray(real, np.float32)
    op = simulator(n_genes=120, n_groups=2, gene_values="kept", out_prob=0.0)
    op.init_from({"counts": real})
    before = float(op.objective({"counts": jnp.asarray(real)})[0])
    history = diffbio.fit(op, {"counts": real}, max_epochs=15, batch_size=200, validation=0.0, progress=False)
    assert op.fitted
    assert history is not None
    assert float(op.objective({"counts": jnp.asarray(real)})[0]) < before
    made = np.asarray(op(cell_ids=jnp.arange(200))["counts"])
    log = np.log1p(real.mean(axis=0)), np.log1p(made.mean(axis=0))
    assert stats.pearsonr(*log).statistic > 0.98  # gene j stands for gene j


def test_written_cells_are_those_in_memory(tmp_path):
    op = simulator(n_cells=50, n_genes=40, n_batches=2, out_prob=0.0)
    memory = simulated(op)
    assert list(memory.obs) == ["group", "batch", "doublet", "library_size"]
    np.testing.assert_array_equal(memory.X.toarray(), op()["counts"])
    for name in ("a.h5ad", "a.zarr"):
        disk = read(write_simulated(op, tmp_path / name, chunk=17, record={"seed": 0, "params": {"n_batches": 2}}))
        assert disk.uns["diffbio"]["simulate"]["seed"] == 0
        assert disk.uns["diffbio"]["simulate"]["params"]["n_batches"] == 2
        assert (disk.X != memory.X).nnz == 0
        assert (disk.obs["group"].astype(str).to_numpy() == memory.obs["group"].astype(str).to_numpy()).all()
    with pytest.raises(ConfigError, match="gene_names"):
        simulated(op, gene_names=["one"])


@pytest.mark.parametrize(
    "settings",
    [
        {"group_prob": (0.5, 0.6, 0.1)}, {"de_prob": (0.1, 0.2)}, {"dropout_mid": 1.0}, {"path_from": (1, 0, 0)},
        {"dropout_type": "batch"}, {"out_prob": 0.0, "out_fac_loc": 3.0}, {"mean_shape": -1.0}, {"path_skew": 0.3},
        {"path_from": (0, 0, 0), "gene_values": "kept"}, {"n_groups": 1, "de_prob": 0.2},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ConfigError, match="|".join(settings)):
        SimulationConfig(**settings)


def test_empty_counts_say_nothing():
    with pytest.raises(DataError, match="two cells"):
        simulator(n_genes=5).init_from({"counts": np.zeros((4, 5))})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -50.0])
def test_library_sizes_that_cannot_be_are_refused_and_end_under_jit(bad):
    op = simulator(n_cells=2, n_genes=4, n_groups=1, out_prob=0.0)
    library = jnp.asarray([100.0, bad])
    with pytest.raises(DataError, match=r"library_size.*row 1"):
        op.apply({"library_size": library}, {}, None)
    out = jax.jit(lambda library: op(library_size=library))(library)
    assert np.isfinite(out["cell_means"][0]).all()
    assert not np.isfinite(out["cell_means"][1]).any()


@pytest.mark.parametrize(
    "values",
    [{"bcv_df": -1.0}, {"mean_shape": np.nan}, {"de_prob": 1.0}, {"lib_loc": np.inf}, {"group_logits": np.zeros(5)}],
)
def test_values_out_of_range_are_refused(values):
    op = simulator(n_genes=4)
    before = op.values()
    with pytest.raises(ConfigError, match=next(iter(values))):
        op.set_values({"lib_scale": 0.5, **values})
    np.testing.assert_array_equal(op.values()["lib_scale"], before["lib_scale"])
    op.set_values({"lib_scale": 0.5, "unknown": -1.0})
    assert float(op.value("lib_scale")) == pytest.approx(0.5)


def test_like_fewer_cells_than_groups():
    real = np.random.default_rng(0).poisson(10.0, (6, 12)).astype(np.float32)
    op = simulator(n_genes=12, n_groups=8, gene_values="kept")
    op.init_from({"counts": real})
    out = next(op.pieces(100))
    assert (out["library_size"] >= real.sum(axis=1).min() * 0.99).all()
    assert len(np.unique(out["group_labels"])) <= 6
