import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.spatial.distance import pdist, squareform
from scipy.stats import spearmanr

from diffbio.errors import ConfigError, DataError, DataWarning
from diffbio.operators.normalization import DifferentiablePHATE, PHATEConfig


def make(width=5, **settings):
    return DifferentiablePHATE(PHATEConfig(input_features=width, **settings), rngs=nnx.Rngs(0))


def applied(op, x):
    found = op.apply({"features": jnp.asarray(x)}, {}, None)[0]
    return np.asarray(found["embedding"]), np.asarray(found["potential_distances"])


def curve(n=90, seed=0):
    """Cells along three quarters of a circle, with noise."""
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 1.5 * np.pi, n))
    plane = 3 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.hstack([plane, np.zeros((n, 3))]).astype(np.float32) + 0.1 * rng.normal(size=(n, 5)).astype("f4"), angle


def astray(embedding, angle):
    """How far along the curve the nearest in the map is from a cell."""
    apart = ((embedding[:, None] - embedding) ** 2).sum(-1) + np.where(np.eye(len(angle)), np.inf, 0)
    return np.abs(angle[apart.argmin(axis=1)] - angle).mean()


@pytest.fixture(scope="module")
def kept():
    op = make()
    op.init_from({"features": curve()[0]})
    return op


def test_cells_lie_in_the_order_of_the_curve(kept):
    x, angle = curve()
    embedding, distances = applied(kept, x)
    assert astray(embedding, angle) < 0.1  # of 4.7
    assert distances.shape == (90, 90)


def test_embedded_distances_follow_those_of_potentials(kept):
    reference = kept.reference
    d = np.asarray(reference.distances)
    np.testing.assert_array_equal(np.diag(d), 0)
    embedded = pdist(np.asarray(reference.embedding))
    assert spearmanr(embedded, squareform(d, checks=False))[0] > 0.95
    assert embedded.mean() == pytest.approx(squareform(d, checks=False).mean(), rel=0.1)  # the same unit


def test_both_forms_are_one_map(kept):
    x, _ = curve()
    own, own_distances = applied(make(), x)
    placed, distances = applied(kept, x)
    assert spearmanr(pdist(own), pdist(placed))[0] > 0.9999
    np.testing.assert_allclose(own_distances, distances, rtol=1e-2, atol=0.05)


def test_cells_one_by_one_are_cells_together(kept):
    x, _ = curve(20, seed=3)
    embedding, distances = applied(kept, x)
    alone = [applied(kept, x[i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(np.concatenate([a[0] for a in alone]), embedding[:3], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(np.concatenate([a[1] for a in alone]), distances[:3], rtol=1e-3, atol=1e-2)


def test_new_cells_land_at_their_place_along_the_curve(kept):
    x, angle = curve()
    new, new_angle = curve(40, seed=5)
    y, at = applied(kept, x)[0], applied(kept, new)[0]
    nearest = ((at[:, None] - y[None]) ** 2).sum(-1).argmin(axis=1)
    assert np.abs(angle[nearest] - new_angle).mean() < 0.15


def test_a_fitted_cell_moves_with_its_features(kept):
    x, _ = curve()
    grad = jax.grad(lambda x: kept.apply({"features": x}, {}, None)[0]["embedding"][:, 0].sum())(jnp.asarray(x))
    assert np.isfinite(grad).all()
    assert (np.abs(grad).max(axis=1) > 0).all()


def test_landmarks_keep_the_arrangement():
    x, angle = curve(240)
    op = make(n_landmarks=60)
    op.init_from({"features": x})
    assert 40 <= len(op.reference.points) <= 60
    assert astray(applied(op, x)[0], angle) < 0.1
    op.clear_reference()
    assert op.reference is None
    assert applied(op, x)[1].shape == (240, 60)


def test_following_the_gradient_moves_cells_as_asked():
    x, _ = curve(24)
    op = make(n_neighbors=4, decay=4.0, diffusion_t=4)

    @jax.jit
    def wanted(x):  # the ends of the curve closer together, in shares of all distances
        y = op.apply({"features": x}, {}, None)[0]["embedding"]
        return ((y[0] - y[-1]) ** 2).sum() / ((y - y.mean(axis=0)) ** 2).sum()

    slope, before = jax.jit(jax.grad(wanted)), float(wanted(x))
    for _ in range(30):
        g = slope(x)
        x = x - 0.02 * g / jnp.abs(g).max()
    assert wanted(x) < 0.9 * before


def test_parts_that_do_not_touch_are_told():
    x, _ = curve(40)
    with pytest.warns(DataWarning, match=r"falls into \d parts"):
        make(n_neighbors=3).init_from({"features": np.vstack([x, x + 100])})


def test_what_cannot_be_embedded_is_named(kept):
    x, _ = curve(20)
    with pytest.raises(DataError, match=r"only 4 cells.*n_neighbors=3"):
        make().apply({"features": x[:4]}, {}, None)
    with pytest.raises(DataError, match="are alike"):
        make().init_from({"features": np.ones((9, 5))})
    with pytest.raises(DataError, match=r"2001 cells.*init_from"):
        make().apply({"features": np.zeros((2001, 5), np.float32)}, {}, None)
    bad = x.copy()
    bad[3, 1] = np.nan
    for call in (lambda: make().init_from({"features": bad}), lambda: kept.apply({"features": bad}, {}, None)):
        with pytest.raises(DataError, match="row 3"):
            call()
    for wrong in ({"gamma": -1.0}, {"diffusion_t": 0}, {"diffusion_t": 101}, {"metric": "chebyshev"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            PHATEConfig(**wrong)
