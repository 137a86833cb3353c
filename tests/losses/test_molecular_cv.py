"""The split of molecules and the loss of held-out ones."""

import jax
import jax.numpy as jnp
import numpy as np

from diffbio.losses.molecular_cv import poisson_loss, split_molecules


def test_parts_sum_to_the_counts_and_are_binomial():
    counts = jnp.tile(jnp.asarray([0.0, 1.0, 7.0, 300.0]), (4000, 1))
    kept, held_out = split_molecules(counts, 0.9, jax.random.key(0))
    np.testing.assert_array_equal(kept + held_out, counts)
    assert (held_out >= 0).all()
    assert (kept >= 0).all()
    np.testing.assert_array_equal(held_out, jnp.round(held_out))
    sd = np.sqrt(0.09 * counts[0])
    np.testing.assert_array_less(np.abs(held_out.mean(0) - 0.1 * counts[0]), 4 * sd / np.sqrt(4000) + 1e-6)
    np.testing.assert_allclose(held_out.var(0), sd**2, rtol=0.1)


def test_what_is_no_whole_molecule_is_kept():
    counts = jnp.full((200, 3), 1.5)
    kept, held_out = split_molecules(counts, 0.5, jax.random.key(1))
    assert set(np.unique(held_out)) == {0.0, 1.0}
    np.testing.assert_allclose(kept + held_out, counts)


def test_loss_is_least_at_the_true_profile_and_blind_to_scale():
    rng = np.random.default_rng(0)
    profile = rng.dirichlet(np.ones(20), size=30).astype(np.float32)
    held_out = jnp.asarray(50 * profile)
    best = poisson_loss(jnp.asarray(profile), held_out)
    np.testing.assert_allclose(poisson_loss(jnp.asarray(profile) * 17.0, held_out), best, rtol=1e-5)
    for _ in range(3):
        other = profile * rng.uniform(0.8, 1.25, profile.shape)
        assert poisson_loss(jnp.asarray(other, jnp.float32), held_out) > best


def test_loss_equals_its_formula_and_is_finite_where_a_gene_was_ruled_out():
    predicted = jnp.asarray([[2.0, 6.0, 0.0], [0.0, 0.0, 0.0]])
    held_out = jnp.asarray([[1.0, 3.0, 2.0], [0.0, 1.0, 0.0]])
    mu = np.maximum(np.asarray([[1.5, 4.5, 0.0], [0.0, 0.0, 0.0]]), 1e-8)
    wanted = (mu - np.asarray(held_out) * np.log(mu)).mean()
    value, grad = jax.value_and_grad(poisson_loss)(predicted, held_out)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    assert jnp.isfinite(grad).all()
