import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.decomposition import PCA

import diffbio.math.linalg as module
from diffbio.errors import ConfigError
from diffbio.math.linalg import pca


def counts(n, width, seed=0):
    rng = np.random.default_rng(seed)
    return np.log1p(rng.poisson(rng.gamma(0.5, 1.0, size=(n, 1)) * rng.gamma(0.5, 2.0, size=width))).astype(np.float32)


def compare(ours, x, n_components):
    theirs = PCA(n_components, svd_solver="full").fit(x.astype(np.float64))
    flip = np.sign((ours.components * theirs.components_).sum(axis=1))[:, None]
    np.testing.assert_allclose(flip * ours.components, theirs.components_, atol=1e-3)  # float32 covariance
    np.testing.assert_allclose(ours.variance, theirs.explained_variance_, rtol=1e-4)
    np.testing.assert_allclose(flip.T * ours.scores, theirs.transform(x.astype(np.float64)), atol=5e-3)
    np.testing.assert_allclose(ours.scores, (x - ours.mean) @ ours.components.T, atol=1e-3)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("shape", [(300, 40), (30, 80)])
def test_equals_sklearn(shape, sparse):
    x = counts(*shape)
    compare(pca(sp.csr_matrix(x) if sparse else x, 5), x, 5)


@pytest.mark.parametrize("sparse", [False, True])
def test_lanczos_equals_sklearn(sparse, monkeypatch):
    monkeypatch.setattr(module, "EXACT_UP_TO", 10)
    x = counts(300, 40)
    compare(pca(sp.csr_array(x) if sparse else x, 5), x, 5)


def test_sparse_equals_dense_over_several_blocks(monkeypatch):
    x = counts(300, 40)
    whole = pca(x, 6)
    monkeypatch.setattr(module, "ROWS_PER_BLOCK", 64)
    blocks = pca(sp.csr_matrix(x), 6)
    np.testing.assert_allclose(whole.scores, blocks.scores, atol=2e-3)  # float32 covariance
    assert blocks.scores.dtype == np.float32


def test_signs_do_not_depend_on_the_order_of_cells():
    x = counts(200, 30)
    order = np.random.default_rng(1).permutation(200)
    np.testing.assert_allclose(pca(x[order], 4).scores, pca(x, 4).scores[order], atol=1e-4)


def test_rotating_the_data_rotates_nothing_in_the_scores():
    x = counts(200, 20)
    q, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(20, 20)))
    np.testing.assert_allclose(np.abs(pca(x @ q, 4).scores), np.abs(pca(x, 4).scores), atol=1e-3)


@pytest.mark.parametrize("x", [np.zeros((10, 4)), np.ones((1, 4))])
def test_data_without_variance_gives_zero_scores(x):
    np.testing.assert_allclose(pca(x, 1).scores, 0, atol=1e-7)


@pytest.mark.parametrize("n_components", [0, 5])
def test_impossible_number_of_components_is_named(n_components):
    with pytest.raises(ConfigError, match=f"1 to 4 for 10 cells x 4 features, got {n_components}"):
        pca(np.zeros((10, 4)), n_components)
