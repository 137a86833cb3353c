"""Couplings on the host: dense, through landmarks, and to a centre slice."""

import numpy as np
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist

from diffbio.math.centre_slice import centre_slice
from diffbio.math.slice_coupling import CouplingSettings, Slice, couple_slices, distance_units

N = 64


def tissue(seed=0, turn=0.9, n=N):
    """A slice with expression that varies over space, and its spots in another order, rotated, counts drawn anew."""
    rng = np.random.default_rng(seed)
    place = rng.random((n, 2)) * np.sqrt(n)
    means = np.exp(1.5 * np.sin(place @ rng.normal(size=(2, 20)) * 0.4 + rng.random(20) * 6) + 1)
    order = rng.permutation(n)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    first = Slice(sparse.csr_matrix(rng.poisson(means) + 1.0), place)
    return first, Slice(rng.poisson(means[order]) + 1.0, place[order] @ rotation.T), order


@pytest.fixture(scope="module")
def dense():
    first, second, order = tissue()
    return first, second, order, couple_slices(first, second)


def test_turned_and_shuffled_spots_find_themselves(dense):
    *_, order, found = dense
    assert found.exact
    plan = found.plan.toarray()
    assert (plan.argmax(axis=0) == order).mean() > 0.9
    np.testing.assert_allclose(N * plan.sum(axis=1), 1, rtol=1e-9)
    np.testing.assert_allclose(N * plan.sum(axis=0), 1, atol=1e-2)  # the smallest entries are not kept


def test_each_spot_its_own_landmark_is_the_dense_plan(dense):
    first, second, _, expected = dense
    found = couple_slices(first, second, CouplingSettings(most_dense=0, n_landmarks=N))
    assert not found.exact
    np.testing.assert_allclose(N * found.plan.toarray(), N * expected.plan.toarray(), atol=0.02)
    assert found.error < 1e-4


@pytest.mark.parametrize("dissimilarity", ["kl", "euclidean"])
def test_few_landmarks_bring_spots_near_their_place(dense, dissimilarity):
    first, second, order, _ = dense
    settings = CouplingSettings(most_dense=0, n_landmarks=16, dissimilarity=dissimilarity)
    found = couple_slices(first, second, settings)
    to = (found.plan @ first.coords[order]) * N
    away = np.linalg.norm(to - first.coords, axis=1).mean()
    assert away < 1.5
    assert away < np.linalg.norm(first.coords.mean(axis=0) - first.coords, axis=1).mean() / 2
    assert found.error < 1e-2


def test_units():
    first, second, _ = tissue()
    nearest = [np.median(np.sort(cdist(v.coords, v.coords), axis=1)[:, 1]) for v in (first, second)]
    assert distance_units(first.coords, second.coords, "spacing")[0] == pytest.approx(np.mean(nearest))
    widest = [cdist(v.coords, v.coords).max() for v in (first, second)]
    np.testing.assert_allclose(distance_units(first.coords, second.coords, "max"), widest)
    assert distance_units(first.coords, second.coords, "none") == (1.0, 1.0)


def test_centre_slice_is_closer_to_the_truth_than_one_slice(dense):
    first, second, order, _ = dense
    found = centre_slice([first, second], n_components=4, turns=2)
    assert found.expression.shape == first.counts.shape
    assert len(found.couplings) == 2
    assert found.objective[-1] <= found.objective[0] * 1.05
    assert (found.couplings[1].plan.toarray().argmax(axis=0) == order).mean() > 0.9
    np.testing.assert_allclose(found.weights @ found.components, found.expression)
