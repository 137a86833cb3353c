import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import median_abs_deviation
from sklearn.metrics import f1_score

import diffbio
from diffbio.errors import DataError, MissingKeyError
from diffbio.operators.singlecell import DifferentiableQualityFilter, QualityFilterConfig


def make(**settings):
    return DifferentiableQualityFilter(QualityFilterConfig(**settings), rngs=nnx.Rngs(0))


def metrics(n_intact=900, n_damaged=100, seed=0):
    """Intact cells, and damaged ones that kept 5-30 % of their cytoplasm."""
    rng = np.random.default_rng(seed)
    total = rng.lognormal(8, 0.4, n_intact + n_damaged)
    share = np.clip(rng.normal(0.03, 0.01, len(total)), 0.005, 1)
    kept = np.where(np.arange(len(total)) < n_intact, 1, rng.uniform(0.05, 0.3, len(total)))
    mitochondrial = rng.poisson(total * share)
    total = rng.poisson(total * (1 - share) * kept) + mitochondrial
    genes = 3 * total**0.75 * rng.lognormal(0, 0.05, len(total))
    truth = np.arange(len(total)) >= n_intact
    data = {"library_size": total, "detected_genes": genes.round(), "mitochondrial_share": mitochondrial / total}
    return {key: value.astype(np.float32) for key, value in data.items()}, truth


def by_mads(data):
    failed = np.zeros(len(data["library_size"]), bool)
    for key, k, low in (("library_size", 5, True), ("detected_genes", 5, True), ("mitochondrial_share", 3, False)):
        values = np.log1p(data[key]) if low else data[key]
        median, mad = np.median(values), median_abs_deviation(values)
        failed |= (values > median + k * mad) | (low & (values < median - k * mad))
    return failed


def test_the_start_is_mad_filtering_and_sharp_gates_are_it_too():
    data, _ = metrics()
    op = make()
    op.init_from(data)
    out = op.apply(data)[0]
    np.testing.assert_array_equal(np.asarray(out["passes"]) == 0, by_mads(data))
    sharp = make(softness=1e-4)
    sharp.init_from(data)
    np.testing.assert_allclose(sharp.apply(data)[0]["cell_weights"], out["passes"], atol=1e-3)


def test_thresholds_are_in_the_units_of_the_metrics():
    data, _ = metrics()
    op = make()
    op.init_from(data)
    limits = np.asarray(op.apply(data)[0]["thresholds"])
    logs = np.log1p(data["library_size"])
    np.testing.assert_allclose(limits[0], np.median(logs) - 5 * median_abs_deviation(logs), rtol=1e-5)
    share = data["mitochondrial_share"]
    np.testing.assert_allclose(limits[4], np.median(share) + 3 * median_abs_deviation(share), rtol=1e-5)


def test_learned_thresholds_find_damaged_cells_and_leave_clean_data_alone():
    data, truth = metrics()
    op = make()
    diffbio.fit(op, data, progress=False)
    failed = np.asarray(op.apply(data)[0]["passes"]) == 0
    assert f1_score(truth, failed) >= max(f1_score(truth, by_mads(data)), 0.95)
    clean, _ = metrics(n_damaged=0)
    op = make()
    diffbio.fit(op, clean, progress=False)
    assert (np.asarray(op.apply(clean)[0]["passes"]) == 0).mean() < 0.01


def test_counts_and_their_metrics_give_the_same():
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.lognormal(0, 1, 30), (50, 30)).astype(np.float32)
    genes = (np.arange(30) < 4).astype(np.float32)
    op = make()
    given = {"counts": counts, "mitochondrial_genes": genes}
    op.init_from(given)
    reduced = op.for_training(given)
    assert "counts" not in reduced
    np.testing.assert_allclose(reduced["detected_genes"], (counts > 0).sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(reduced["mitochondrial_share"], counts[:, :4].sum(1) / counts.sum(1), rtol=1e-5)
    a, b = op.apply(given)[0], op.apply(reduced)[0]
    np.testing.assert_allclose(a["cell_weights"], b["cell_weights"], atol=1e-4)
    np.testing.assert_allclose(op.objective(given)[0], op.objective(reduced)[0], rtol=1e-4)


def test_without_mitochondrial_genes_the_share_sets_no_limit():
    data, _ = metrics()
    op = make()
    op.init_from(data)
    del data["mitochondrial_share"]
    out = op.apply(data)[0]
    both = by_mads(data | {"mitochondrial_share": np.zeros_like(data["library_size"])})
    np.testing.assert_array_equal(np.asarray(out["passes"]) == 0, both)
    assert np.isfinite(op.objective(data)[0])
    with pytest.raises(MissingKeyError, match="library_size"):
        op.apply({"library_size": data["library_size"]})


def test_empty_cells_have_no_weight_never_pass_and_do_not_move_thresholds():
    data, _ = metrics(54, 6)
    empty = np.arange(160) >= 60
    more = {key: np.concatenate([value, np.zeros(100, np.float32)]) for key, value in data.items()}
    alone, op = make(), make()
    alone.init_from(data)
    op.init_from(more)
    out, expected = op.apply(more)[0], alone.apply(data)[0]
    assert not np.asarray(out["passes"])[empty].any()
    assert not np.asarray(out["cell_weights"])[empty].any()
    np.testing.assert_allclose(out["thresholds"], expected["thresholds"], rtol=1e-6)
    np.testing.assert_array_equal(out["passes"][:60], expected["passes"])
    np.testing.assert_allclose(op.objective(more)[0], alone.objective(data)[0], rtol=1e-5)
    for loss in (lambda d: op.apply(d)[0]["cell_weights"].sum(), lambda d: op.objective(d)[0]):
        assert all(np.isfinite(g).all() for g in jax.grad(loss)({k: jnp.asarray(v) for k, v in more.items()}).values())


def test_widely_spread_low_depth_lets_no_empty_cell_pass():
    rng = np.random.default_rng(0)
    total = rng.lognormal(1.5, 1.5, 200).round() * (np.arange(200) >= 20)
    data = {"library_size": total, "detected_genes": np.minimum(total, 50)}
    op = make()
    op.init_from(data)
    out = op.apply(data)[0]
    assert float(out["thresholds"][0]) < 0  # the lower limit alone would let them in
    np.testing.assert_array_equal(np.asarray(out["passes"])[total == 0], 0)


def test_cells_without_any_count_set_no_threshold():
    with pytest.raises(DataError, match="none of the cells has counts"):
        make().init_from({"counts": np.zeros((4, 5), np.float32)})


@pytest.mark.parametrize("wrong", [-1.0, np.nan])
@pytest.mark.parametrize("key", ["library_size", "detected_genes", "mitochondrial_share"])
def test_metrics_that_are_none_are_refused(key, wrong):
    data, _ = metrics(20, 0)
    data[key][3] = wrong
    op = make()
    for call in (op.apply, op.init_from, op.for_training):
        with pytest.raises(DataError, match=rf"DifferentiableQualityFilter: data\['{key}'\] .* row 3 holds"):
            call(data)
    counts = np.ones((4, 5), np.float32)
    counts[2, 1] = wrong
    for call in (op.apply, op.init_from, op.for_training):
        with pytest.raises(DataError, match=r"data\['counts'\] .* row 2, column 1"):
            call({"counts": counts})


def test_a_metric_that_does_not_vary_sets_a_wide_limit():
    data, _ = metrics(200, 0)
    data["mitochondrial_share"][:] = 0.02
    op = make()
    op.init_from(data)
    out = op.apply(data)[0]
    assert (np.asarray(out["passes"]) == 1).mean() > 0.9
