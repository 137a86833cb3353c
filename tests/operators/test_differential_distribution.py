"""Differential distributions: power, names of patterns, level, soft conditions, refusals."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffbio.errors import DataError, MissingKeyError
from diffbio.math.distribution_patterns import PATTERNS
from diffbio.operators.singlecell import DifferentiableDifferentialDistribution, DifferentialDistributionConfig

RNG = np.random.default_rng(0)
N = 100
LABELS = np.repeat([0, 1], N)


def run(counts, statistic="wasserstein", **data):
    config = DifferentialDistributionConfig(n_genes=counts.shape[1], n_permutations=200, statistic=statistic)
    op = DifferentiableDifferentialDistribution(config, rngs=nnx.Rngs(0))
    data = {"counts": jnp.asarray(counts, jnp.float32)} | {key: jnp.asarray(value) for key, value in data.items()}
    return {key: np.asarray(value) for key, value in op.apply(data)[0].items() if key not in data}


def gene(kind):
    a, b = 5 + RNG.normal(size=(2, N))
    half = np.arange(N) < N // 2
    if kind == "DE":
        b = b + 1.0
    if kind == "DP":
        a, b = a + 5 * (np.arange(N) < 30), b + 5 * (np.arange(N) < 70)
    if kind == "DM":
        b = b + 5 * half
    if kind == "DB":
        b = b + np.where(half, 2.2, -2.2)
    if kind == "DV":
        b = 5 + 2.5 * (b - 5)
    if kind == "DZ":
        b = np.where(half, 0.0, b)
    return np.concatenate([a, b])


@pytest.fixture(scope="module")
def found():
    counts = np.stack([gene(kind) for kind in PATTERNS * 4] + [gene("null") for _ in range(40)] + [np.full(2 * N, 2.0)])
    return counts.T, run(counts.T, condition_labels=LABELS)


def test_every_alternative_is_found_and_named(found):
    _, out = found
    assert (out["p_values"][:24] < 0.02).all()
    right = out["pattern_labels"][:24] == np.tile(np.arange(6), 4)
    assert right.mean() > 0.9
    assert (out["q_values"] >= out["p_values"]).all()


def test_level_and_constant_genes(found):
    _, out = found
    assert (out["p_values"][24:64] < 0.05).mean() < 0.16  # 40 genes
    assert out["p_values"][64] == 1
    assert out["zero_p_values"][PATTERNS.index("DZ")] < 1e-10
    assert np.isfinite(out["pattern_logits"]).all()


def test_soft_conditions_of_zero_and_one_are_labels(found):
    counts, out = found
    soft = run(counts, condition_weights=np.stack([1 - LABELS, LABELS], axis=1).astype(np.float32))
    for key, value in out.items():
        np.testing.assert_allclose(soft[key], value, rtol=1e-4, atol=1e-4, err_msg=key)


def test_depth_is_no_difference_where_it_is_known():
    depth = np.exp(RNG.normal(0, 0.3, 2 * N)) * (1 + LABELS)
    counts = RNG.poisson(np.exp(RNG.uniform(-0.5, 2.0, 65)) * depth[:, None])
    total = counts.sum(axis=1)
    logs = np.log1p(counts * np.median(total) / total[:, None])
    plain = run(logs, condition_labels=LABELS)
    known = run(logs, condition_labels=LABELS, library_size=total.astype(np.float32))
    assert (plain["p_values"] < 0.05).mean() > 0.3
    assert (known["p_values"] < 0.05).mean() < 0.16
    assert (known["zero_p_values"] < 0.05).mean() < 0.16


def test_refusals():
    counts = RNG.random((12, 2))
    with pytest.raises(MissingKeyError, match="condition_labels"):
        run(counts)
    with pytest.raises(DataError, match="two at a time"):
        run(counts, condition_labels=np.arange(12) % 3)
    with pytest.raises(DataError, match="5 at least"):
        run(counts, condition_labels=(np.arange(12) < 4).astype(int))
    with pytest.raises(DataError, match="pass one"):
        run(counts, condition_labels=np.arange(12) % 2, condition_weights=np.ones((12, 2), np.float32))
    with pytest.raises(DataError, match="library_size"):
        run(counts, condition_labels=np.arange(12) % 2, library_size=np.zeros(12, np.float32))
