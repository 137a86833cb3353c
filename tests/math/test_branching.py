import jax.numpy as jnp
import numpy as np

from diffbio.math.branching import branch_labels


def star(n=60):
    """Three arms of a star, the root at the end of the first: points and arm."""
    along, arm = np.tile(np.linspace(0.02, 1, n), 3), np.repeat(np.arange(3), n)
    angle = 2 * np.pi * arm / 3
    x = along[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return x + 0.002 * np.random.default_rng(0).normal(size=x.shape), along, arm


def test_one_branching_finds_the_arms_of_a_star():
    x, along, arm = star()
    found = np.asarray(branch_labels(jnp.asarray(x), jnp.zeros(len(x), int), jnp.array(59), 1))
    assert found[59] == 0, "the root is on the first segment"
    for k in range(3):
        own = np.bincount(found[(arm == k) & (along > 0.3)])
        assert own.max() > 0.9 * own.sum()
    ends = [found[60 * k + 59] for k in range(3)]
    assert len(set(ends)) == 3


def test_without_branchings_there_is_one_segment_and_other_parts_have_none():
    x, _, arm = star(20)
    found = np.asarray(branch_labels(jnp.asarray(x), jnp.asarray(arm == 2, jnp.int32), jnp.array(0), 0))
    np.testing.assert_array_equal(found, np.where(arm == 2, -1, 0))


def test_few_cells_are_not_divided():
    x, _, _ = star(3)
    assert (np.asarray(branch_labels(jnp.asarray(x), jnp.zeros(9, int), jnp.array(2), 3)) == 0).all()
