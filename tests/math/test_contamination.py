import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffbio.math.contamination import (
    contaminated_log_prob,
    contamination_posterior,
    native_share,
    soft_round,
)
from diffbio.math.distributions import nb_log_prob, poisson_log_prob


def delaporte(mu, theta, lam, size=200):
    """Probabilities of NB + Poisson by convolution, and the expected native part given the sum."""
    x = np.arange(size)
    native = stats.nbinom.pmf(x, theta, theta / (theta + mu))
    total = np.convolve(native, stats.poisson.pmf(x, lam))[:size]
    weighted = np.convolve(x * native, stats.poisson.pmf(x, lam))[:size]
    return total, weighted / np.maximum(total, 1e-300)


def logs(*values):
    return [jnp.float32(np.log(v)) for v in values]


@pytest.mark.parametrize(("mu", "theta", "lam"), [(3.0, 2.0, 1.0), (0.2, 1.0, 0.5), (20.0, 5.0, 2.0)])
def test_probability_is_that_of_the_convolution_to_its_second_moment(mu, theta, lam):
    x = jnp.arange(200.0)
    ours = np.exp(contaminated_log_prob(x, *logs(mu, theta, lam)))
    exact, _ = delaporte(mu, theta, lam)
    np.testing.assert_allclose(ours.sum(), 1.0, rtol=1e-4)
    np.testing.assert_allclose((ours * np.arange(200)).sum(), mu + lam, rtol=1e-4)
    variance = (ours * (np.arange(200) - mu - lam) ** 2).sum()
    np.testing.assert_allclose(variance, mu + lam + mu**2 / theta, rtol=1e-3)
    assert np.abs(ours - exact).sum() < 0.06  # total variation under 3 %


def test_probability_in_the_limits():
    x = jnp.arange(30.0)
    mu, theta, none = logs(4.0, 2.0, 1e-12)
    np.testing.assert_allclose(contaminated_log_prob(x, mu, theta, none), nb_log_prob(x, mu, theta), rtol=1e-4)
    np.testing.assert_allclose(contaminated_log_prob(x, none, theta, mu), poisson_log_prob(x, mu), rtol=1e-4)
    value, grads = jax.value_and_grad(lambda *a: contaminated_log_prob(x, *a).sum(), (0, 1, 2))(
        jnp.float32(-80.0), jnp.float32(-3.0), jnp.float32(3.0)
    )
    assert np.isfinite([value, *grads]).all()


@pytest.mark.parametrize(("mu", "theta", "lam"), [(3.0, 2.0, 1.0), (0.05, 1.0, 0.5), (20.0, 5.0, 2.0)])
def test_native_share_is_near_the_exact_posterior_mean(mu, theta, lam):
    x = np.arange(200)
    share = native_share(jnp.asarray(x, jnp.float32), *logs(mu, theta, lam))
    total, native = delaporte(mu, theta, lam)
    ambient, exact = x * (1 - np.asarray(share)), x - native
    assert (total * np.abs(ambient - exact)).sum() < 0.15 * lam  # a mode against a mean


def test_native_share_solves_its_equation_and_has_its_limits():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, mu, theta, lam = rng.integers(0, 100, 50), *np.exp(rng.normal(0, 3, (3, 50)))
        y = np.asarray(native_share(*map(jnp.asarray, (x.astype(float), np.log(mu), np.log(theta), np.log(lam)))))
        g = lam * y / (1 - y)
        residual = theta / g - theta / mu - 1 + x / (g + lam)
        assert np.abs(residual / (theta / g)).max() < 1e-8
    x = jnp.arange(50.0)
    np.testing.assert_allclose(native_share(x, *logs(2.0, 3.0, 1e-9)), 1.0, atol=1e-6)
    np.testing.assert_allclose(native_share(x, *logs(2.0, 1e9, 3.0)), 0.4, rtol=1e-5)
    np.testing.assert_allclose(native_share(x, *logs(1e-12, 3.0, 1.0)), 0.0, atol=1e-6)
    many = jnp.float32(10_000.0)  # far above what either source expects: a number goes, not a share
    removed = many * (1 - native_share(many, *logs(2.0, 1.0, 3.0)))
    np.testing.assert_allclose(removed, 3.0 * (1 + 1.0 / 2.0), rtol=0.01)


def test_soft_round():
    x = jnp.linspace(-2.01, 5.01, 140)
    np.testing.assert_allclose(soft_round(x, temperature=1e-3), jnp.round(x), atol=1e-3)
    np.testing.assert_allclose(soft_round(x, temperature=100.0), x, atol=1e-4)
    whole = jnp.arange(6.0)
    np.testing.assert_allclose(soft_round(whole, temperature=0.3), whole, atol=1e-6)
    slope = jax.vmap(jax.grad(lambda v: soft_round(v, temperature=0.3)))
    assert (slope(x) > 0).all()
    np.testing.assert_allclose(slope(whole - 1e-4), slope(whole + 1e-4), rtol=1e-2)


def test_the_posterior_of_the_fraction_is_that_of_a_fine_grid():
    rng = np.random.default_rng(0)
    n_genes, n_cells = 200, 30
    profile, fraction = rng.dirichlet(np.full(n_genes, 0.3)), rng.dirichlet(np.full(n_genes, 0.3))
    theta, library = 5.0, 2000
    rho = rng.beta(4, 36, n_cells)[:, None]
    native = rng.poisson(rng.gamma(theta, library * (1 - rho) * fraction / theta))
    x = native + rng.poisson(library * rho * profile)
    prior = {"prior_mean": float(np.log(0.1 / 0.9)), "prior_sd": 0.6}
    wide = jnp.broadcast_to(jnp.asarray(fraction, jnp.float32), x.shape)
    args = (jnp.asarray(x, jnp.float32), wide, jnp.full(n_genes, theta), jnp.asarray(profile, jnp.float32))
    mean, variance = contamination_posterior(*args, **prior)
    assert np.corrcoef(jax.nn.sigmoid(mean), rho[:, 0])[0, 1] > 0.9
    again, _ = contamination_posterior(*args, **prior, n_steps=20)
    np.testing.assert_allclose(mean, again, atol=0.02)  # three steps are enough
    grid = np.linspace(-6, 1, 400)
    share = 1 / (1 + np.exp(-grid))[:, None, None]
    total = x.sum(1)[:, None]
    log_prob = contaminated_log_prob(
        jnp.asarray(x, jnp.float32),
        jnp.log(jnp.asarray((1 - share) * total * fraction, jnp.float32)),
        jnp.log(jnp.float32(theta)),
        jnp.log(jnp.asarray(share * total * profile, jnp.float32)),
    ).sum(-1)
    log_posterior = np.asarray(log_prob) - 0.5 * ((grid - prior["prior_mean"]) / prior["prior_sd"])[:, None] ** 2
    weight = np.exp(log_posterior - log_posterior.max(0))
    weight /= weight.sum(0)
    exact = (weight * grid[:, None]).sum(0)
    exact_sd = np.sqrt((weight * (grid[:, None] - exact) ** 2).sum(0))
    assert np.abs(np.asarray(mean) - exact).max() < 1.0 * exact_sd.max()  # quasi-likelihood against NB
    np.testing.assert_allclose(np.sqrt(variance).mean(), exact_sd.mean(), rtol=0.3)
