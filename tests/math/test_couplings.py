"""Couplings of many cells: the operator form is the array, and landmarks come close."""

import numpy as np
import pytest

from diffbio.math.couplings import averages, averages_back, couple, dense, landmarks_of, pairs, pull, push


def line(n, shift, seed):
    """Cells along a line in three dimensions, with noise."""
    rng = np.random.default_rng(seed)
    along = np.sort(rng.uniform(0, 8, n))
    return np.column_stack([along + shift, np.zeros(n), np.zeros(n)]) + 0.2 * rng.normal(size=(n, 3)), along


@pytest.fixture(scope="module")
def cells():
    (x, early), (y, late) = line(40, 0.0, 0), line(50, 0.5, 1)
    growth = np.where(early < 4, 2.0, 0.7)
    return x, y, growth, early, late


@pytest.fixture(scope="module")
def exact(cells):
    x, y, growth, *_ = cells
    return couple(x, y, growth)


def test_operator_form_is_the_array(exact):
    found, growth = exact
    plan = dense(found)
    assert found.shape == plan.shape == (40, 50)
    assert found.exact
    assert found.error < 1e-12
    np.testing.assert_allclose(plan.sum(axis=1), growth, rtol=1e-10)
    rng = np.random.default_rng(0)
    right, left = rng.normal(size=(50, 2)), rng.normal(size=(40, 3))
    np.testing.assert_allclose(pull(found, right), plan @ right, atol=1e-12)
    np.testing.assert_allclose(push(found, left), plan.T @ left, atol=1e-12)


def test_every_cell_a_landmark_is_the_exact_plan(cells, exact):
    x, y, growth, *_ = cells
    found, grown = couple(x, y, growth, most_dense=0, n_landmarks=50)
    assert found.exact
    # with no array of all pairs the median is that of evenly spaced cells, here all of them
    np.testing.assert_allclose(dense(found), dense(exact[0]), rtol=1e-8)
    np.testing.assert_allclose(grown, exact[1], rtol=1e-8)


def test_landmarks_come_close(cells, exact):
    x, y, growth, _, late = cells
    found, grown = couple(x, y, growth, most_dense=0, n_landmarks=20)
    assert not found.exact
    assert not couple(y, x[:15], np.ones(50), most_dense=0, n_landmarks=20)[0].exact  # only the early ones are many
    assert found.shape == (40, 50)
    np.testing.assert_allclose(dense(found).sum(axis=1), grown, rtol=1e-10)
    assert np.corrcoef(np.log(grown), np.log(exact[1]))[0, 1] > 0.95
    ends = [pull(c, np.column_stack([late, np.ones(50)])) for c in (found, exact[0])]
    means = [end[:, 0] / end[:, 1] for end in ends]
    assert np.abs(means[0] - means[1]).max() < 0.6  # of 8
    values = np.random.default_rng(0).normal(size=(50, 2))
    np.testing.assert_allclose(pull(found, values), dense(found) @ values, atol=1e-12)
    np.testing.assert_allclose(push(found, values[:40]), dense(found).T @ values[:40], atol=1e-12)


@pytest.mark.parametrize("most_dense", [0, 10**6])
def test_pairs_are_drawn_from_the_plan(cells, most_dense):
    x, y, growth, *_ = cells
    found, grown = couple(x, y, growth, most_dense=most_dense, n_landmarks=20, growth_iterations=1)
    early, late = pairs(found, grown, 20_000, 0)
    drawn = np.zeros((40, 50))
    np.add.at(drawn, (early, late), 1 / 20_000)
    plan = dense(found) / grown.sum()
    # four standard errors of a share p of 20,000 draws
    assert (np.abs(drawn - plan) < 4 * np.sqrt(plan / 20_000) + 2e-4).all()


@pytest.mark.parametrize("most_dense", [0, 10**6])
def test_averages_are_those_of_the_array(cells, most_dense):
    x, y, growth, *_ = cells
    found, _ = couple(x, y, growth, most_dense=most_dense, n_landmarks=20, growth_iterations=1)
    plan, rng = dense(found), np.random.default_rng(0)
    late, early = (np.where(np.arange(size) % 3 == 0, 0.0, rng.uniform(size=size)) for size in (50, 40))
    values = rng.normal(size=(50, 2))
    with np.errstate(divide="ignore"):
        means, mass = averages(found, values, np.log(late))
        back, arrived = averages_back(found, values[:40], np.log(early))
    np.testing.assert_allclose(np.exp(mass), plan @ late, rtol=1e-9)
    np.testing.assert_allclose(means, (plan @ (late[:, None] * values)) / (plan @ late)[:, None], atol=1e-9)
    np.testing.assert_allclose(np.exp(arrived), early @ plan, rtol=1e-9)
    np.testing.assert_allclose(back, (plan.T @ (early[:, None] * values[:40])) / (early @ plan)[:, None], atol=1e-9)


@pytest.mark.parametrize("most_dense", [0, 10**6])
def test_a_cell_far_from_all_others_disturbs_nobody(cells, most_dense):
    x, y, growth, *_ = cells
    apart, late = x.copy(), y.copy()
    apart[0], late[0] = 1e4, -1e4
    found, grown = couple(apart, late, growth, most_dense=most_dense, n_landmarks=20)
    assert found.error < 1e-9
    assert grown[0] == 0
    assert (grown[1:] > 0).all()
    assert np.isfinite(found.f).all()
    means, mass = averages(found, late, np.zeros(50))
    np.testing.assert_array_less(-1e-9, late.max(axis=0) - means[0])  # among the later cells, if far from itself
    assert np.isfinite(mass).all()
    back, arrived = averages_back(found, apart, np.zeros(40))
    assert np.isfinite(back).all()
    assert np.isfinite(arrived).all()
    _, drawn = pairs(found, np.eye(40)[0] + 1e-300, 50, 0)
    # the far cell stands on the diagonal, at the end of the line
    assert (np.linalg.norm(late[drawn] - apart[0], axis=1) < np.median(np.linalg.norm(late - apart[0], axis=1))).all()


def test_landmarks_are_means_of_their_cells(cells):
    x = cells[0]
    means, labels = landmarks_of(x, 7)
    assert set(labels) == set(range(len(means)))
    np.testing.assert_allclose(means, [x[labels == k].mean(axis=0) for k in range(len(means))], rtol=1e-12)
    assert landmarks_of(x, 40)[0] is x


def test_duplicates_and_one_cell():
    same = np.ones((3, 2))
    found, grown = couple(same, same, np.ones(3))
    np.testing.assert_allclose(dense(found), 1 / 3, rtol=1e-10)
    np.testing.assert_allclose(grown, 1.0)
