"""Neighbours within slices, smoothing of labels, and the mixture of the domains."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffbio.errors import DataError
from diffbio.math.domain_mixture import log_joint, spatial_mixture
from diffbio.math.spatial import (
    check_places,
    mean_field,
    mixed_with_neighbors,
    relative_gaps,
    slice_neighbors,
    standardized_by_slice,
)

RNG = np.random.default_rng(0)


def test_neighbors_are_the_nearest_of_the_own_slice():
    places = RNG.uniform(size=(40, 3)).astype(np.float32)
    labels = np.arange(40) % 2
    found = np.asarray(slice_neighbors(jnp.asarray(places + 1e4 * labels[:, None]), 5, jnp.asarray(labels)))
    assert (labels[found] == labels[:, None]).all()
    apart = ((places[:, None] - places[None]) ** 2).sum(axis=2)
    apart[(labels[:, None] != labels) | np.eye(40, dtype=bool)] = np.inf
    agree = [set(found[i]) == set(np.argsort(apart[i])[:5]) for i in range(40)]
    assert np.mean(agree) > 0.9  # coordinates near 1e4 are rounded in float32
    gaps = np.asarray(relative_gaps(jnp.asarray(places), jnp.asarray(found)))
    np.testing.assert_allclose(gaps.mean(axis=1), 1, rtol=1e-5)


def test_averages_and_standard_values_of_slices():
    values = RNG.normal(size=(12, 3)).astype(np.float32) + 3
    labels = np.arange(12) % 2
    near = (np.arange(12)[:, None] + [2, 4]) % 12
    mixed = np.asarray(mixed_with_neighbors(jnp.asarray(values), jnp.asarray(near), 0.8))
    np.testing.assert_allclose(mixed, 0.2 * values + 0.8 * values[near].mean(axis=1), rtol=1e-5)
    values[:, 2] = labels
    found = np.asarray(standardized_by_slice(jnp.asarray(values), jnp.asarray(labels), 3))
    for k in range(2):
        np.testing.assert_allclose(found[labels == k, :2].mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(found[labels == k, :2].std(axis=0), 1, rtol=1e-4)
    assert (found[:, 2] == 0).all()  # constant within both


def test_cold_memberships_are_iterated_conditional_modes():
    logits = RNG.normal(size=(30, 3))
    near = np.stack([RNG.permutation(30)[:4] for _ in range(30)])
    weights = RNG.uniform(size=(30, 4))
    labels = logits.argmax(axis=1)
    for _ in range(5):
        votes = (np.eye(3)[labels[near]] * weights[:, :, None]).sum(axis=1)
        labels = (logits + 0.7 * votes).argmax(axis=1)
    given = (jnp.asarray(a, jnp.float32) for a in (logits, near.astype(float), weights))
    logits, near, weights = given
    cold = mean_field(logits, near.astype(int), weights, smoothness=0.7, temperature=1e-4, n_rounds=5)
    np.testing.assert_allclose(cold, np.eye(3)[labels], atol=1e-5)


def test_the_mixture_finds_flat_groups_that_kmeans_splits():
    truth = np.repeat(np.arange(3), 150)
    points = RNG.normal(size=(450, 2)) * [20.0, 0.5] + np.stack([0 * truth, 4 * truth], axis=1)
    near = np.arange(450)[:, None] // 150 * 150 + RNG.integers(0, 150, size=(450, 5))
    settings = {"shrinkage": 0.0, "seed": 0}
    found = spatial_mixture(points, 3, near, np.full((450, 5), 0.2), smoothness=1.0, **settings)
    labels = log_joint(points, found).argmax(axis=1)
    pairs = {(a, b) for a, b in zip(truth, labels, strict=True)}
    assert len(pairs) == 3
    precision = found.whitening @ found.whitening.T
    rest = points - found.centers[labels]
    np.testing.assert_allclose(np.linalg.inv(precision), np.cov(rest.T, bias=True), rtol=0.02, atol=0.2)
    density = -0.5 * np.einsum("if,fg,ig->i", rest, precision, rest) + found.log_weights[labels]
    np.testing.assert_allclose(log_joint(points, found)[np.arange(450), labels], density, atol=1e-6)


def test_places_without_neighbors_are_refused():
    places = RNG.uniform(size=(10, 2)).astype(np.float32)
    check_places("X", places, 3)
    for change, words in (
        (np.column_stack([places, places]), "2 or 3 columns, got 4"),
        (np.where(np.arange(20).reshape(10, 2) == 6, np.nan, places), "first in row 3"),
        (places[[0, 1, 2, 3, 4, 5, 6, 7, 2, 9]], "rows 2 and 8 lie at one place"),
        (places[:3], "only 3 cells"),
    ):
        with pytest.raises(DataError, match=words):
            check_places("X", change, 3)
    with pytest.raises(DataError, match="only 2 cells of slice 1"):
        check_places("X", places, 3, np.array([0] * 8 + [1] * 2))
