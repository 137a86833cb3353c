"""MMD batch correction: batches mix, types stay apart even where a batch lacks one; counts; linear cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from simulated_batches import cells_in_batches, neighbours_with

import diffbio
from diffbio.errors import ConfigError, DataError
from diffbio.operators.singlecell import DifferentiableMMDBatchCorrection, MMDBatchCorrectionConfig

SMALL = MMDBatchCorrectionConfig(n_genes=12, n_batches=2, hidden_dim=32, latent_dim=8)
ONE_BATCH_LACKS_THE_LAST = ((120, 120, 120), (120, 120, 0))


def operator(config=SMALL, **settings):
    return DifferentiableMMDBatchCorrection(dataclasses.replace(config, **settings), rngs=nnx.Rngs(0))


def corrected(op, data):
    return np.asarray(op.apply(data)[0]["corrected_embeddings"])


def test_batches_mix_and_a_type_that_one_batch_lacks_stays_apart():
    data, kind = cells_in_batches(ONE_BATCH_LACKS_THE_LAST)
    op = operator()
    batch, shared = data["batch_labels"], kind < 2
    assert neighbours_with(data["expression"][shared], batch[shared]).mean() > 0.95
    diffbio.fit(op, data, max_epochs=15, batch_size=120, progress=False)
    out = op.apply(data)[0]
    z = np.asarray(out["corrected_embeddings"])
    assert neighbours_with(z[shared], batch[shared]).mean() < 0.65
    assert neighbours_with(z, kind).mean() > 0.98
    assert neighbours_with(z, kind)[~shared].min() > 0.5
    spread = ((data["expression"] - data["expression"].mean(0)) ** 2).mean()
    assert out["reconstruction_loss"] * op.autoencoder.scale[...] ** 2 < 0.15 * spread
    # decoded without the batch, the same type of both batches has one mean
    values = np.asarray(out["corrected_expression"])
    for one in (0, 1):
        means = [values[(kind == one) & (batch == b)].mean(axis=0) for b in (0, 1)]
        raw = [data["expression"][(kind == one) & (batch == b)].mean(axis=0) for b in (0, 1)]
        assert np.linalg.norm(means[0] - means[1]) < 0.35 * np.linalg.norm(raw[0] - raw[1])


def test_labels_that_mean_nothing_correct_nothing():
    data, _ = cells_in_batches(((120, 120, 120), (120, 120, 120)))
    truth = data["batch_labels"]
    shuffled = data | {"batch_labels": np.random.default_rng(0).permutation(truth)}
    op = operator()
    op.init_from(shuffled)
    start = corrected(op, shuffled)
    diffbio.fit(op, shuffled, max_epochs=8, batch_size=120, progress=False)
    end = corrected(op, shuffled)
    assert neighbours_with(end, truth).mean() > neighbours_with(start, truth).mean() - 0.02
    assert ((end - start) ** 2).sum() < 0.05 * ((start - start.mean(0)) ** 2).sum()


def test_before_training_it_is_the_components_within_batches():
    data, _ = cells_in_batches(((40, 40), (40, 40)))
    op = operator(latent_dim=12)
    op.init_from(data)
    x, batch = data["expression"], data["batch_labels"]
    means = np.stack([x[batch == b].mean(axis=0) for b in (0, 1)])
    z, plain = corrected(op, data), x - means[batch]
    distance = [np.linalg.norm(v[:50, None] - v[None, :50], axis=-1) for v in (z, plain)]
    np.testing.assert_allclose(distance[0], distance[1], atol=0.6)  # the networks start small, not at 0
    np.testing.assert_allclose(op.apply(data)[0]["corrected_expression"].mean(0), means.mean(0), atol=0.3)


def test_discrepancy_of_many_cells_is_linear_and_agrees():
    rng = np.random.default_rng(0)
    labels = np.arange(3000) % 3
    x = (rng.normal(size=(3000, 12)) + labels[:, None]).astype(np.float32)
    op = operator(n_batches=3, n_frequencies=2048)
    batch = jnp.eye(3)[labels]
    few = op._mmd(jnp.asarray(x[:, :8][:2000]), batch[:2000])
    many = op._mmd(jnp.asarray(x[:, :8]), batch)
    assert few > 0.05
    np.testing.assert_allclose(many, few, atol=0.02)
    shapes = jax.make_jaxpr(lambda z: op._mmd(z, batch))(jnp.asarray(x[:, :8]))
    assert "3000,3000" not in str(shapes), "no array of all pairs"


@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
def test_counts_are_reconstructed_by_their_likelihood(likelihood):
    rng = np.random.default_rng(0)
    batch = np.arange(90) % 2
    rate = rng.gamma(2.0, 1.0, (2, 12))[batch] * rng.uniform(5, 30, (90, 1))
    data = {"expression": rng.poisson(rate).astype(np.float32), "batch_labels": batch}
    op = operator(reconstruction=likelihood)
    op.init_from(data)
    out = op.apply(data)[0]
    np.testing.assert_allclose(out["corrected_expression"].sum(1), data["expression"].sum(1), rtol=1e-4)
    # the start knows the mean fractions of each batch: as good as they are alone, but for the small networks
    fractions = np.stack([data["expression"][batch == b].sum(0) for b in (0, 1)])
    mean = (fractions / fractions.sum(1, keepdims=True))[batch] * data["expression"].sum(1, keepdims=True)
    if likelihood == "poisson":
        from scipy.stats import poisson

        assert out["reconstruction_loss"] < -poisson.logpmf(data["expression"], mean).mean() + 0.3
    gradient = nnx.grad(lambda m: m.objective(data)[0])(op)
    leaves = dict(nnx.to_flat_state(nnx.state(gradient, nnx.Param)))
    assert (("autoencoder", "log_theta") in leaves) == (likelihood == "nb")
    assert all(jnp.abs(leaf[...]).max() > 0 for leaf in leaves.values())
    with pytest.raises(DataError, match="expression"):
        op.apply(data | {"expression": data["expression"] - 5})


def test_a_minibatch_holds_every_batch_in_equal_parts():
    labels = np.repeat([0, 1, 2], [1000, 100, 10])
    rows = operator(n_batches=3).sampler({"batch_labels": labels}).order(np.random.default_rng(0), 96)
    assert rows.shape == (11, 96)
    assert all((np.bincount(labels[r]) == 32).all() for r in rows)
    assert len(np.unique(rows[labels[rows] == 0])) == 11 * 32


def test_what_cannot_be_corrected_is_refused():
    data, _ = cells_in_batches(((20, 20), (20, 20)))
    with pytest.raises(ConfigError, match="latent_dim"):
        operator(latent_dim=13)
    with pytest.raises(ConfigError, match="reference_batch"):
        operator(reference_batch=2)
    with pytest.raises(DataError, match="batch 2 has 0 cells"):
        operator(n_batches=3).init_from(data)
    with pytest.raises(DataError, match="n_batches is 1"):
        operator(n_batches=1).init_from(data | {"batch_labels": np.zeros(80, int)})
    with pytest.raises(DataError, match="latent_dim is 8"):
        operator().init_from({key: value[:6] for key, value in data.items()})
    with pytest.raises(DataError, match="label 2"):
        operator().apply(data | {"batch_labels": data["batch_labels"] + 1})
    with pytest.raises(DataError, match="expression"):
        operator().apply(data | {"expression": data["expression"] * np.nan})
