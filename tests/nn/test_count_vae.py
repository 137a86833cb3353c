import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import sparse

from diffbio.data.source import ArraySource
from diffbio.errors import DataError
from diffbio.math.distributions import gaussian_kl, nb_log_prob, zinb_log_prob
from diffbio.nn.count_vae import CountVAE, count_log_prob, log_positive, moments, one_hot_batch

COUNTS = jax.random.poisson(jax.random.key(0), 2.0, (9, 6)).astype(jnp.float32)
LIBRARY = COUNTS.sum(-1)


def vae(**settings):
    return CountVAE(6, 2, hidden_dims=(8,), rngs=nnx.Rngs(0), **settings)


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
def test_rates_sum_to_the_library(likelihood):
    model = vae(likelihood=likelihood)
    p = model.decode(model.encode(COUNTS).mean, jnp.log(LIBRARY))
    np.testing.assert_allclose(jnp.exp(p.log_rate).sum(-1), LIBRARY, rtol=1e-5)


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
def test_every_likelihood_is_the_zinb_of_its_parameters(likelihood):
    model = vae(likelihood=likelihood)
    p = model.decode(model.encode(COUNTS).mean, jnp.log(LIBRARY))
    np.testing.assert_allclose(
        count_log_prob(likelihood, COUNTS, p), zinb_log_prob(COUNTS, *p).sum(-1), rtol=1e-5
    )


def test_loss_is_the_negative_elbo_at_the_mean_in_eval_mode():
    model = vae(likelihood="nb")
    reconstruction, kl = model.loss(COUNTS, LIBRARY)
    q = model.encode(COUNTS)
    p = model.decode(q.mean, jnp.log(LIBRARY))
    expected = -nb_log_prob(COUNTS, p.log_rate, p.log_theta).sum(-1)
    np.testing.assert_allclose(reconstruction, expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(kl, gaussian_kl(q.mean, q.logvar).mean(), rtol=1e-6)


def test_samples_have_the_encoders_mean_and_variance_in_train_mode():
    model = vae()
    q = model.encode(jnp.broadcast_to(COUNTS[:1], (20_000, 6)))
    assert (model.sample(q) == q.mean).all()
    model.train()
    z = model.sample(q)
    np.testing.assert_allclose(z.mean(0), q.mean[0], atol=0.03)  # 20,000 samples of sd ~ 1
    np.testing.assert_allclose(jnp.log(z.var(0)), q.logvar[0], atol=0.05)
    assert jnp.abs(model.sample(q) - z).max() > 0


@pytest.mark.parametrize("dispersion", ["gene", "gene-group", "gene-cell"])
def test_dispersion(dispersion):
    model = vae(dispersion=dispersion, n_injected=3, n_groups=3)
    batch = one_hot_batch(jnp.array([0, 1, 2] * 3), 3, who="test")
    if dispersion == "gene-group":
        model.decoder.log_theta[...] = jnp.arange(18.0).reshape(3, 6)
        theta = model.decode(jnp.zeros((9, 2)), jnp.zeros(9), batch, groups=batch).log_theta
        np.testing.assert_array_equal(theta[:3], jnp.arange(18.0).reshape(3, 6))
        unknown = model.decode(jnp.zeros((9, 2)), jnp.zeros(9), batch, groups=jnp.zeros((9, 3))).log_theta
        np.testing.assert_allclose(unknown[0], jnp.arange(18.0).reshape(3, 6).mean(0))
    theta = model.decode(jnp.zeros((9, 2)), jnp.zeros(9), batch, groups=batch).log_theta
    assert theta.shape == ((6,) if dispersion == "gene" else (9, 6))
    assert jnp.isfinite(model.loss(COUNTS, LIBRARY, batch)[0])


def test_batch_reaches_the_decoder_and_not_the_encoder():
    model = vae(n_injected=2)
    one, two = (jax.nn.one_hot(jnp.full(9, b), 2) for b in (0, 1))
    np.testing.assert_array_equal(model.encode(COUNTS, one).mean, model.encode(COUNTS, two).mean)
    z = model.encode(COUNTS).mean
    rates = [model.decode(z, jnp.zeros(9), batch).log_rate for batch in (one, two)]
    assert jnp.abs(rates[0] - rates[1]).max() > 0
    both = vae(n_injected=2, encode_covariates=True)
    assert jnp.abs(both.encode(COUNTS, one).mean - both.encode(COUNTS, two).mean).max() > 0


def test_a_label_out_of_range_is_named_and_under_jit_is_zeros():
    labels = jnp.array([0, 1, 3])
    fix = "Me: batch_labels holds label 3, but n_batches is 3; pass n_batches=4"
    with pytest.raises(DataError, match=fix):
        one_hot_batch(labels, 3, who="Me")
    with pytest.raises(DataError, match="label -1"):
        one_hot_batch(jnp.array([-1, 0]), 3, who="Me")
    rows = jax.jit(lambda b: one_hot_batch(b, 3, who="Me"))(labels)
    np.testing.assert_array_equal(rows, [[1, 0, 0], [0, 1, 0], [0, 0, 0]])


def test_an_empty_cell_has_library_one():
    np.testing.assert_allclose(log_positive(jnp.array([0.0, 5.0])), [0.0, np.log(5.0)], rtol=1e-6)


def test_moments_recover_the_parameters_of_an_nb_without_cell_types():
    rng = np.random.default_rng(0)
    fraction, theta = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.5, 2.0, 8.0, 1.0])
    library = rng.uniform(200, 600, 20_000)
    counts = rng.poisson(rng.gamma(theta, np.outer(library, fraction) / theta))
    found, found_theta = moments(counts, library)
    np.testing.assert_allclose(found, fraction, rtol=0.02)
    np.testing.assert_allclose(found_theta, theta, rtol=0.1)
    model = CountVAE(4, 2, hidden_dims=(8,), rngs=nnx.Rngs(0))
    model.start_from(counts, library)
    np.testing.assert_allclose(jax.nn.softmax(model.decoder.fraction.bias[...]), found, rtol=1e-4)


@pytest.mark.parametrize("dispersion", ["gene", "gene-group", "gene-cell"])
@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
def test_sparse_counts_give_the_loss_and_gradients_of_dense_ones(likelihood, dispersion):
    counts = sparse.csr_array(np.random.default_rng(0).poisson(0.4, (20, 9)).astype(np.float32))
    rows = np.arange(3, 15)
    entries = jax.device_put(ArraySource({"counts": counts}).take_sparse(rows)["counts"])
    dense = jnp.asarray(counts[rows].toarray())
    batch = jax.nn.one_hot(rows % 2, 2)
    vae = CountVAE(
        9, 3, hidden_dims=(7,), likelihood=likelihood, n_injected=2, n_groups=2, dispersion=dispersion, rngs=nnx.Rngs(0)
    )
    graph, params, rest = nnx.split(vae, nnx.Param, ...)

    def loss(params, x):
        return 12 * sum(nnx.merge(graph, params, rest).loss(x, dense.sum(-1), batch))

    blocks = ArraySource({"counts": counts}).take_blocks(rows, 3, range(3))["counts"]
    in_turn = jax.device_put(dataclasses.replace(blocks, in_turn=True))
    np.testing.assert_array_equal(in_turn.dense(), dense)
    expected, *found = [jax.value_and_grad(loss)(params, x) for x in (dense, entries, in_turn)]
    for got in found:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


def test_continuous_covariates_reach_the_decoder_and_on_request_the_encoders():
    one, two = jnp.zeros((9, 2)), jnp.ones((9, 2))
    model = vae(n_continuous=2)
    z = model.encode(COUNTS, None, one).mean
    np.testing.assert_array_equal(z, model.encode(COUNTS, None, two).mean)
    rates = [model.decode(z, jnp.zeros(9), None, extra).log_rate for extra in (one, two)]
    assert jnp.abs(rates[0] - rates[1]).max() > 0
    both = vae(n_continuous=2, encode_covariates=True)
    assert jnp.abs(both.encode(COUNTS, None, one).mean - both.encode(COUNTS, None, two).mean).max() > 0


def test_softplus_scale_is_that_of_the_head_also_far_below_zero():
    model = vae(scale="softplus")
    model.decoder.fraction.bias[...] = jnp.linspace(-200.0, 20.0, 6)
    model.decoder.fraction.kernel[...] = jnp.zeros((8, 6))
    log_rate = model.decode(jnp.zeros((9, 2)), jnp.zeros(9)).log_rate[0]
    expected = np.log(np.logaddexp(0, np.linspace(-200, 20, 6, dtype=np.longdouble)))
    np.testing.assert_allclose(log_rate, expected, rtol=1e-5)
    slopes = jax.grad(lambda z: model.decode(z, jnp.zeros(9)).log_rate.sum())(jnp.ones((9, 2)))
    assert jnp.isfinite(slopes).all()
