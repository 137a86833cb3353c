import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import diffbio
from diffbio.errors import DataError
from diffbio.math.distributions import nb_log_prob
from diffbio.operators.base import mode_of
from diffbio.operators.normalization import VAENormalizer, VAENormalizerConfig


def make(**settings):
    sizes = {"n_genes": 40, "latent_dim": 4, "hidden_dims": (32,), **settings}
    return VAENormalizer(VAENormalizerConfig(**sizes), rngs=nnx.Rngs(0))


def three_types(n_cells=600, n_genes=40, seed=0, n_batches=1):
    """NB counts of three cell types, with a gene-wise batch effect."""
    rng = np.random.default_rng(seed)
    types, batch = rng.integers(0, 3, n_cells), rng.integers(0, n_batches, n_cells)
    log_fraction = rng.normal(0, 1, n_genes) + rng.normal(0, 1.0, (3, n_genes))[types]
    log_fraction += rng.normal(0, 0.7, (n_batches, n_genes))[batch] * (n_batches > 1)
    fraction = np.exp(log_fraction) / np.exp(log_fraction).sum(1, keepdims=True)
    mean = rng.uniform(200, 500, (n_cells, 1)) * fraction
    counts = rng.poisson(rng.gamma(5.0, mean / 5.0)).astype(np.float32)
    return {"counts": counts, "batch_labels": batch.astype(np.int32)}, types, fraction


def test_normalized_rows_are_the_expected_share_of_the_library():
    op, data = VAENormalizer.examples()["nb, three batches"]
    out = op.apply(data, {}, None)[0]
    np.testing.assert_allclose(out["normalized"].sum(-1), 1.0, rtol=1e-5)
    expected = jnp.log(out["normalized"] * data["library_size"][:, None])
    np.testing.assert_allclose(out["log_rate"], expected, rtol=1e-4, atol=1e-5)


def test_objective_is_the_negative_elbo():
    op, data = VAENormalizer.examples()["nb, three batches"]
    out = op.apply(data, {}, None)[0]
    log_prob = nb_log_prob(data["counts"], out["log_rate"], out["log_theta"]).sum(-1)
    mean, logvar = out["latent_mean"], out["latent_logvar"]
    kl = 0.5 * (jnp.exp(logvar) + mean**2 - 1 - logvar).sum(-1)
    loss, metrics = op.objective(data, kl_weight=0.3)
    np.testing.assert_allclose(loss, (-log_prob + 0.3 * kl).mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, metrics["reconstruction"] + 0.3 * metrics["kl"], rtol=1e-6)


def test_every_cell_has_its_own_noise_in_train_mode():
    op, data = VAENormalizer.examples()["zinb"]
    with mode_of(op, training=True):
        one, two = (op.apply(data, {}, None)[0] for _ in range(2))
    noise = (one["latent_z"] - one["latent_mean"]) / jnp.exp(one["latent_logvar"] / 2)
    assert (jnp.std(noise, axis=0) > 0.2).all()
    assert jnp.abs(one["latent_z"] - two["latent_z"]).max() > 0
    out = op.apply(data, {}, None)[0]
    np.testing.assert_array_equal(out["latent_z"], out["latent_mean"])


def test_batch_labels_are_checked_and_matter():
    op, data = VAENormalizer.examples()["nb, three batches"]
    with pytest.raises(DataError, match="VAENormalizer: batch_labels holds label 3, but n_batches is 3"):
        op.apply(data | {"batch_labels": jnp.full(12, 3)}, {}, None)
    with pytest.raises(DataError, match="n_batches is 3, but data has no 'batch_labels'"):
        op.objective({"counts": data["counts"]})
    other = op.apply(data | {"batch_labels": (data["batch_labels"] + 1) % 3}, {}, None)[0]
    out = op.apply(data, {}, None)[0]
    assert jnp.abs(out["normalized"] - other["normalized"]).max() > 0
    np.testing.assert_array_equal(out["latent_mean"], other["latent_mean"])  # as scVI: the decoder alone


def test_settings_that_a_likelihood_lacks_are_at_their_limit():
    counts = jnp.ones((3, 40))
    free = {"zinb": (True, True), "nb": (True, False), "poisson": (False, False)}
    for likelihood, (theta_free, zeros_free) in free.items():
        out = make(likelihood=likelihood).apply({"counts": counts}, {}, None)[0]
        assert bool((out["log_theta"] == 30).all()) is not theta_free
        assert bool((out["pi_logit"] == -30).all()) is not zeros_free


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
def test_fit_denoises_and_tells_types_apart(likelihood):
    data, types, fraction = three_types()
    op = make(likelihood=likelihood)
    diffbio.fit(op, data, max_epochs=60, progress=False)
    out = op.apply(data, {}, None)[0]
    observed = data["counts"] / data["counts"].sum(1, keepdims=True)
    error, raw_error = (np.abs(np.asarray(x) - fraction).sum(1).mean() for x in (out["normalized"], observed))
    assert error < 0.5 * raw_error
    z = np.asarray(out["latent_mean"])
    centres = np.stack([z[types == k].mean(0) for k in range(3)])
    nearest = ((z[:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (nearest == types).mean() > 0.98


def test_the_latent_space_need_not_know_the_batch():
    data, types, _ = three_types(n_batches=2)
    scores = []
    for n_batches in (1, 2):
        op = make(likelihood="nb", n_batches=n_batches)
        seen = data if n_batches == 2 else {"counts": data["counts"]}
        diffbio.fit(op, seen, max_epochs=60, progress=False)
        z = np.asarray(op.apply(seen, {}, None)[0]["latent_mean"])
        batch = data["batch_labels"]
        centre = np.array([[z[(types == k) & (batch == b)].mean(0) for k in range(3)] for b in range(2)])
        shift = centre[0] - centre[1]
        scores.append(np.linalg.norm(shift) / np.linalg.norm(z.std(0)))
    assert scores[1] < 0.5 * scores[0]


def test_negative_counts_are_refused():
    counts = np.full((6, 40), 2.0, np.float32)
    counts[2, 1] = -1.0
    for call in (make().apply, make().init_from):
        with pytest.raises(DataError, match=r"VAENormalizer: .* row 2, column 1 holds -1"):
            call({"counts": counts})
