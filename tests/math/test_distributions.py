import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import special, stats

from diffbio.math.distributions import (
    gaussian_kl,
    log_factorial,
    log_rising,
    nb_log_prob,
    nb_log_prob_of_zero,
    poisson_log_prob,
    zinb_log_prob,
    zinb_log_prob_of_zero,
)

# float32: 1e-5 relative to the log-probability, plus the rounding of x * log_mu itself
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}


def grid():
    rng = np.random.default_rng(0)
    x = np.r_[np.zeros(60), rng.integers(1, 40, 200), [500, 3000]].astype(float)
    log_mu = np.log(np.maximum(x, 0.1)) + rng.normal(size=x.size)
    return x, log_mu, rng.uniform(-3, 8, x.size), rng.normal(size=x.size) * 4


def scipy_nb(x, log_mu, log_theta):
    mu, theta = np.exp(log_mu), np.exp(log_theta)
    return stats.nbinom.logpmf(x, theta, theta / (theta + mu))


def scipy_zinb(x, log_mu, log_theta, pi_logit):
    pi = special.expit(pi_logit)
    return np.where(
        x > 0,
        special.log_expit(-pi_logit) + scipy_nb(x, log_mu, log_theta),
        np.log(pi + (1 - pi) * np.exp(scipy_nb(0, log_mu, log_theta))),
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_log_probabilities_equal_scipy(dtype):
    with jax.enable_x64(dtype == "float64"):
        x, log_mu, log_theta, pi = (jnp.asarray(a, dtype) for a in grid())
        wide = [np.asarray(a, np.float64) for a in (x, log_mu, log_theta, pi)]
        cases = [
            (poisson_log_prob(x, log_mu), stats.poisson.logpmf(wide[0], np.exp(wide[1]))),
            (nb_log_prob(x, log_mu, log_theta), scipy_nb(*wide[:3])),
            (zinb_log_prob(x, log_mu, log_theta, pi), scipy_zinb(*wide)),
        ]
        for ours, theirs in cases:
            assert ours.dtype == dtype
            rounding = np.finfo(dtype).eps * wide[0] * np.maximum(np.abs(wide[1]), 1)
            error = np.abs(np.asarray(ours) - theirs)
            assert (error <= TOLERANCE[dtype] * (1 + np.abs(theirs)) + 2 * rounding).all(), error.max()


@pytest.mark.parametrize("pi_logit", [-50.0, -1.0, 0.0, 3.0, 50.0])
def test_probabilities_sum_to_one(pi_logit):
    x = jnp.arange(4000.0)
    for log_theta in (-1.0, 2.0, 30.0):
        for log_mu in (-6.0, 0.0, 3.0):
            log_prob = zinb_log_prob(x, *map(jnp.float32, (log_mu, log_theta, pi_logit)))
            total = jnp.exp(log_prob)
            np.testing.assert_allclose(total.sum(), 1.0, rtol=2e-5)


def test_values_at_zero_that_another_package_gets_wrong():
    for (x, mu, theta, pi), expected in {
        (0, 2.0, 1.5, -1.0): -0.7464, (0, 0.1, 1.0, 2.0): -0.0109, (0, 20.0, 3.0, -3.0): -3.0050,
    }.items():
        got = zinb_log_prob(*map(jnp.float32, (x, np.log(mu), np.log(theta), pi)))
        np.testing.assert_allclose(got, expected, atol=6e-5)  # four decimals were stored


def test_nb_becomes_poisson_and_zinb_becomes_nb():
    x, log_mu, _, _ = (jnp.asarray(a, jnp.float32) for a in grid())
    almost = nb_log_prob(x, log_mu, jnp.float32(30.0))
    np.testing.assert_allclose(almost, poisson_log_prob(x, log_mu), rtol=1e-4)
    np.testing.assert_allclose(
        zinb_log_prob(x, log_mu, jnp.float32(1.0), jnp.float32(-30.0)),
        nb_log_prob(x, log_mu, jnp.float32(1.0)), rtol=1e-6, atol=1e-6,
    )


def test_gradients_equal_finite_differences():
    with jax.enable_x64(True):
        x, log_mu, log_theta, pi = (jnp.asarray(a[40:]) for a in grid())
        whole = x > 0  # at 0 a count cannot fall
        for f, args in (
            (lambda m, t, p: zinb_log_prob(x, m, t, p), (log_mu, log_theta, pi)),
            (lambda c: nb_log_prob(c, log_mu[whole], log_theta[whole]), (x[whole] + 0.3,)),
            (poisson_log_prob, (x[whole] + 0.3, log_mu[whole])),
        ):
            check_grads(lambda *a, f=f: f(*map(jnp.asarray, a)), args, order=2, rtol=1e-5)


def test_gradient_of_log_rising_is_a_difference_of_digammas():
    with jax.enable_x64(True):
        x = jnp.asarray([0.0, 0.5, 1.0, 7.0, 300.0, 1e5])[:, None]
        theta = jnp.asarray([1e-3, 0.1, 1.0, 50.0, 1e4])
        dx, dtheta = jax.grad(lambda *a: log_rising(*a).sum(), (0, 1))(*jnp.broadcast_arrays(x, theta))
        np.testing.assert_allclose(dx, special.digamma(x + theta) - np.log(theta), rtol=1e-9, atol=1e-11)
        expected = special.digamma(x + theta) - special.digamma(theta) - x / theta
        # scipy's own difference cancels at theta = 1e4
        np.testing.assert_allclose(dtheta, expected, rtol=1e-8, atol=1e-11)
        np.testing.assert_allclose(log_factorial(x), special.gammaln(x + 1), rtol=1e-12, atol=1e-14)


def test_values_and_gradients_are_finite_at_the_edges():
    grids = ([0.0, 0.5, 1.0, 1e3, 1e6], [-80.0, -5.0, 0.0, 14.0], [-7.0, 0.0, 30.0], [-50.0, 0.0, 50.0])
    args = [a.astype(jnp.float32).ravel() for a in jnp.meshgrid(*map(jnp.asarray, grids))]
    values = zinb_log_prob(*args)
    assert jnp.isfinite(values).all()
    for grad in jax.grad(lambda *a: zinb_log_prob(*a).sum(), (0, 1, 2, 3))(*args):
        assert jnp.isfinite(grad).all()


def test_per_gene_dispersion_broadcasts():
    x = jnp.arange(6.0).reshape(2, 3)
    log_mu, log_theta = jnp.zeros((2, 3)), jnp.asarray([-1.0, 0.0, 1.0])
    wide = nb_log_prob(x, log_mu, jnp.broadcast_to(log_theta, (2, 3)))
    np.testing.assert_allclose(nb_log_prob(x, log_mu, log_theta), wide, rtol=1e-6)
    slope = jax.grad(lambda t: nb_log_prob(x, log_mu, t).sum())(log_theta)
    wide_slope = jax.grad(lambda t: nb_log_prob(x, log_mu, t).sum())(jnp.broadcast_to(log_theta, (2, 3)))
    np.testing.assert_allclose(slope, wide_slope.sum(0), rtol=1e-5)


def test_gaussian_kl():
    assert gaussian_kl(jnp.zeros((2, 3)), jnp.zeros((2, 3))).tolist() == [0.0, 0.0]
    mean, sd = 0.7, 1.9
    z = np.random.default_rng(0).normal(mean, sd, 400_000)
    sampled = np.mean(stats.norm.logpdf(z, mean, sd) - stats.norm.logpdf(z))
    got = gaussian_kl(jnp.full((1, 1), mean), jnp.full((1, 1), 2 * np.log(sd)))
    np.testing.assert_allclose(got, sampled, rtol=0.01)  # 400,000 samples


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_log_probabilities_of_zero_are_those_of_the_distributions_at_zero(dtype):
    with jax.enable_x64(dtype == "float64"):
        _, log_mu, log_theta, pi = (jnp.asarray(a, dtype) for a in grid())
        zero = jnp.zeros_like(log_mu)
        cases = [
            (nb_log_prob_of_zero, lambda *p: nb_log_prob(zero, *p), (log_mu, log_theta)),
            (zinb_log_prob_of_zero, lambda *p: zinb_log_prob(zero, *p), (log_mu, log_theta, pi)),
        ]
        for cheap, full, parameters in cases:
            rtol = 1e-5 if dtype == "float32" else 1e-12
            np.testing.assert_allclose(cheap(*parameters), full(*parameters), rtol=rtol, atol=rtol / 10)
            slopes = [
                jax.grad(lambda *p, f=f: f(*p).sum(), argnums=tuple(range(len(parameters))))(*parameters)
                for f in (cheap, full)
            ]
            for ours, theirs in zip(*slopes, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol / 10)
            if dtype == "float64":
                check_grads(lambda *p, f=cheap: f(*map(jnp.asarray, p)), parameters, order=1, modes=["rev"], rtol=1e-5)
