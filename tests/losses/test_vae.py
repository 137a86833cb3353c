import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffbio.errors import ConfigError, DataError
from diffbio.losses import VAELoss
from diffbio.operators.normalization import VAENormalizer

CASES = {"zinb": "zinb", "nb": "nb, three batches", "poisson": "poisson"}


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
def test_is_the_negative_elbo_of_the_normalizer(likelihood):
    op, data = VAENormalizer.examples()[CASES[likelihood]]
    data = {k: v for k, v in data.items() if k != "library_size"}
    out = op.apply(data, {}, None)[0]
    names = ("normalized", "counts", "latent_mean", "latent_logvar", "log_theta", "pi_logit")
    outputs = [out[k] for k in names]
    for weight in (1.0, 0.1):
        loss = VAELoss(kl_weight=weight, reconstruction_type=likelihood)(*outputs)
        np.testing.assert_allclose(loss, op.objective(data, kl_weight=weight)[0], rtol=1e-5)


def test_mse_is_zero_for_the_observed_fractions():
    counts = jnp.array([[1.0, 3.0], [0.0, 2.0]])
    loss = VAELoss(reconstruction_type="mse")
    zero = jnp.zeros((2, 1))
    exact = counts / counts.sum(1, keepdims=True)
    np.testing.assert_allclose(loss(exact, counts, zero, zero), 0.0, atol=1e-6)
    # expected counts (2, 2) and (1, 1): squared errors 1 + 1 and 1 + 1
    np.testing.assert_allclose(loss(jnp.full((2, 2), 0.5), counts, zero, zero), 2.0, rtol=1e-6)


def test_poisson_is_least_at_the_true_fractions():
    rates = jax.random.dirichlet(jax.random.key(0), jnp.ones(20), (1,))
    counts = jax.random.poisson(jax.random.key(1), 500 * rates, (2000, 20)).astype(jnp.float32)
    zero = jnp.zeros((2000, 1))
    best, *others = (
        float(VAELoss(kl_weight=0.0)(jnp.broadcast_to(p, (2000, 20)), counts, zero, zero))
        for p in (rates, 0.9 * rates + 0.005, jnp.full((1, 20), 0.05))
    )
    assert all(best < other for other in others)


def test_fractions_of_zero_and_empty_cells_stay_finite():
    counts = jnp.array([[0.0, 0.0], [4.0, 0.0]])
    normalized = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    zero = jnp.zeros((2, 1))
    value, grad = jax.value_and_grad(VAELoss())(normalized, counts, zero, zero)
    assert jnp.isfinite(value)
    assert jnp.isfinite(grad).all()


def test_what_is_missing_or_unknown_is_named():
    with pytest.raises(ConfigError, match=r"reconstruction_type must be one of .*'mse', got 'bce'"):
        VAELoss(reconstruction_type="bce")
    with pytest.raises(ConfigError, match="kl_weight must be >= 0"):
        VAELoss(kl_weight=-1.0)
    x = jnp.ones((2, 2))
    with pytest.raises(DataError, match="'zinb' needs pi_logit"):
        VAELoss(reconstruction_type="zinb")(x, x, x, x, log_theta=jnp.zeros(2))
