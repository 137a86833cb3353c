"""Ligand-receptor scores as LIANA has them, and what the operator refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import TypeCheckError
from scipy.stats import rankdata

from diffbio.errors import ConfigError, DataError
from diffbio.operators.singlecell import DifferentiableLigandReceptor, LRScoringConfig


def operator(**settings):
    return DifferentiableLigandReceptor(LRScoringConfig(**{"n_permutations": 10} | settings), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def data():
    soft = DifferentiableLigandReceptor.examples()["soft"][1]
    return soft | {"cluster_assignments": jax.nn.one_hot(jnp.arange(17) % 3, 3)}


def test_pairs_of_single_genes_may_be_two_columns(data):
    op = operator()
    flat = data | {"lr_pairs": np.array([[0, 1], [2, 3]])}
    found = op.apply(flat)[0]["lr_scores"]
    groups, counts = np.asarray(data["cluster_assignments"]), np.asarray(data["counts"])
    mean = groups.T @ counts / groups.sum(0)[:, None]
    np.testing.assert_allclose(found[1], (mean[:, None, 2] + mean[None, :, 3]) / 2, rtol=1e-5)


def test_given_permutations_and_none(data):
    orders = jnp.stack([jnp.roll(jnp.arange(17), k) for k in range(10)])
    given = operator().apply(data | {"permutations": orders})[0]
    assert float(given["lr_pvalues"].min()) >= 0.1 - 1e-6  # one of them leaves every cell in its group
    with pytest.raises(DataError, match="permutations"):
        operator().apply(data | {"permutations": orders[:5]})
    none = operator(n_permutations=0).apply(data)[0]
    np.testing.assert_array_equal(none["lr_pvalues"], none["lr_analytic_pvalues"])


def test_the_product_ranked_twice_is_turned_around(data):
    once, twice = (operator(product_twice=flag, expr_prop=0.0).apply(data)[0] for flag in (False, True))
    assert not np.allclose(once["lr_magnitude_rank"], twice["lr_magnitude_rank"])
    np.testing.assert_array_equal(once["lr_specificity_rank"], twice["lr_specificity_rank"])
    # of the consensus, a higher mean and a higher product are never worse: only the honest ranks keep to that
    product = operator(metric="product", expr_prop=0.0).apply(data)[0]["lr_scores"].ravel()
    mean = once["lr_scores"].ravel()
    both = np.maximum(rankdata(-np.asarray(mean)), rankdata(-np.asarray(product)))
    best, worst = int(np.argmin(both)), int(np.argmin(np.minimum(mean, product)))
    assert once["lr_magnitude_rank"].ravel()[best] < once["lr_magnitude_rank"].ravel()[worst]
    log = operator(metric="consensus", expr_prop=0.0).apply(data)[0]["lr_scores"]
    np.testing.assert_allclose(log, -np.log10(once["lr_magnitude_rank"]), rtol=1e-4, atol=1e-5)


def test_bad_data_is_refused(data):
    op = operator()
    for change, message in (
        ({"counts": jnp.round(10 * data["counts"]) + 1}, "log-normalised.*whole numbers"),
        ({"counts": 100 * data["counts"] + 0.5}, "log-normalised.*values up to"),
        ({"counts": data["counts"].at[0, 0].set(-1.0)}, ">= 0"),
        ({"lr_pairs": np.array([[0, 7]])}, "column 7 in pair 0"),
        ({"lr_pairs": np.array([[[0], [-1]]])}, "no gene for the ligand or the receptor of pair 0"),
        ({"lr_pairs": np.array([["A", "B"]])}, "takes names"),
        ({"cluster_assignments": data["cluster_assignments"] * 0.5}, "sum to 1"),
        ({"cluster_assignments": jax.nn.one_hot(jnp.minimum(jnp.arange(17), 1), 2)}, "group 0 .* has 1 cells"),
    ):
        with pytest.raises(DataError, match=message):
            op.apply(data | change)


def test_settings_of_one_metric():
    with pytest.raises(ConfigError, match="kh is for metric 'hill'"):
        LRScoringConfig(kh=1.0)
    with pytest.raises((ConfigError, TypeCheckError), match="expr_prop"):
        LRScoringConfig(expr_prop=1.5)
