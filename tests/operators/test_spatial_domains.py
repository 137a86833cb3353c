"""Spatial domains: stripes of tissue, several slices, limits."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

import diffbio
from diffbio.errors import ConfigError, DataError
from diffbio.operators.singlecell import DifferentiableSpatialDomain, SpatialDomainConfig


def stripes(n=240, *, slices=1, seed=0):
    """Three stripes of faint genes; in each slice the genes are seen with another strength."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(size=(n, 2)).astype(np.float32)
    domain = (places[:, 0] * 3).astype(int)
    labels = np.arange(n) % slices
    rates = 0.5 * np.exp(0.6 * rng.normal(size=(3, 30)))[domain] * np.exp(rng.normal(size=(slices, 30)))[labels]
    data = {"counts": rng.poisson(rates).astype(np.float32), "spatial_coords": places}
    return (data | {"batch_labels": labels} if slices > 1 else data), domain


def make(**settings):
    config = {"n_genes": 30, "hidden_dim": 8, "num_heads": 2, "n_domains": 3, "n_latent": 3} | settings
    return DifferentiableSpatialDomain(SpatialDomainConfig(**config), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def trained():
    data, domain = stripes()
    op = make()
    sparse_counts = data | {"counts": sparse.csr_matrix(data["counts"])}
    diffbio.fit(op, sparse_counts, max_epochs=6, batch_size=64, progress=False)
    return op, data, domain, op.apply(data)[0]


def test_finds_stripes_and_needs_the_places(trained):
    op, data, domain, out = trained
    assert adjusted_rand_score(domain, out["domain_labels"]) > 0.7
    start = make()
    start.init_from(data)
    assert op.objective(data)[0] < start.objective(data)[0]
    attention = np.asarray(out["attention"])
    np.testing.assert_allclose(attention.sum(axis=1), 1, rtol=1e-5)
    assert attention.std() > 0
    elsewhere = data | {"spatial_coords": data["spatial_coords"][np.random.default_rng(1).permutation(240)]}
    op = make()
    op.init_from(elsewhere)
    assert adjusted_rand_score(domain, op.apply(elsewhere)[0]["domain_labels"]) < 0.35


def test_linear_layers_stay_where_they_start(trained):
    op = trained[0]
    np.testing.assert_array_equal(op.encoder[...], np.eye(8, 3))
    np.testing.assert_array_equal(op.attention.sender.kernel[...].reshape(8, 8), np.eye(8))
    assert np.abs(op.attention.edge.kernel[...] - make().attention.edge.kernel[...]).max() > 0


def test_a_minibatch_knows_what_all_cells_know(trained):
    op, data = trained[:2]
    whole = make().for_training(data)
    op2 = make()
    op2.for_training(data)
    np.testing.assert_allclose(op2.objective(whole)[0], op2.objective(data)[0], rtol=1e-4)
    part = {k: v[:7] for k, v in whole.items()}
    again = op.positions(part)["embedding"]
    np.testing.assert_allclose(again, trained[3]["spatial_embeddings"][:7], atol=1e-3)


def test_equal_attention_is_a_plain_average_on_principal_axes():
    data, _ = stripes()
    op = make(alpha=1.0)
    op.init_from(data)
    op.attention.direction[...] = 0 * op.attention.direction[...]
    out = op.apply(data)[0]
    near = np.asarray(out["neighbor_indices"])
    np.testing.assert_allclose(out["attention"], 1 / 15, rtol=1e-5)
    counts = data["counts"]
    size = counts.sum(axis=1, keepdims=True)
    x = np.log1p(counts / size * size.mean())
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    twice = x[near].mean(axis=1)[near].mean(axis=1)
    want = twice @ np.asarray(op.axes[...])[:, :3]
    np.testing.assert_allclose(out["spatial_embeddings"], want, atol=2e-4)
    variance = np.linalg.eigvalsh(np.cov(twice.T))[::-1][:3]
    np.testing.assert_allclose(np.var(want, axis=0, ddof=1), variance, rtol=1e-3)


def test_cold_and_unsmoothed_is_the_likeliest_domain():
    data, _ = stripes()
    hard, soft = (make(smoothness=0.0, temperature=t) for t in (1e-4, 1.0))
    for op in (hard, soft):
        op.init_from(data)
    found, warm = (op.apply(data)[0] for op in (hard, soft))
    z, white = np.asarray(found["spatial_embeddings"]), np.asarray(hard.whitening[...])
    apart = (((z[:, None] - np.asarray(hard.centers[...])) @ white) ** 2).sum(axis=2)
    labels = (np.asarray(hard.log_weights[...]) - 0.5 * apart).argmax(axis=1)
    assert (np.asarray(found["domain_labels"]) == labels).mean() > 0.995
    assert np.asarray(found["domain_assignments"]).max(axis=1).mean() > 0.995
    assert 0 < np.asarray(warm["domain_assignments"]).min(axis=1).max() < 0.5


def test_smoothness_joins_neighbors():
    data, _ = stripes()
    disagree = []
    for strength in (0.0, 5.0):
        op = make(smoothness=strength, alpha=0.0)
        op.init_from(data)
        out = op.apply(data)[0]
        labels = np.asarray(out["domain_labels"])
        disagree.append((labels[np.asarray(out["neighbor_indices"])] != labels[:, None]).mean())
    assert disagree[1] < 0.8 * disagree[0]


def test_slices_share_domains_but_not_neighbors():
    data, domain = stripes(300, slices=2)
    op = make(n_batches=2)
    op.init_from(data)
    out = op.apply(data)[0]
    labels = data["batch_labels"]
    assert (labels[np.asarray(out["neighbor_indices"])] == labels[:, None]).all()
    assert adjusted_rand_score(domain, out["domain_labels"]) > 0.6
    assert abs(adjusted_rand_score(labels, out["domain_labels"])) < 0.1


def test_what_is_wrong_is_named():
    data, _ = stripes(40)
    with pytest.raises(DataError, match="rows 0 and 1 lie at one place"):
        make().apply(data | {"spatial_coords": data["spatial_coords"][[0, 0, *range(2, 40)]]})
    with pytest.raises(DataError, match=r"batch_labels.*pass n_batches=2"):
        make(n_neighbors=3).apply(data | {"batch_labels": jnp.arange(40) % 2})
    with pytest.raises(DataError, match="n_domains=40 or fewer"):
        make(n_domains=41).init_from(data)
    with pytest.raises(ConfigError, match="multiple of num_heads"):
        SpatialDomainConfig(hidden_dim=10)
    with pytest.raises(ConfigError, match="n_latent must be at most"):
        SpatialDomainConfig(n_latent=65)
