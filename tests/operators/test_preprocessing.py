"""Scaler, principal components, learnable projections, gates: each equals its counterpart at the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scanpy as sc
from anndata import AnnData
from flax import nnx
from scipy.stats import norm
from sklearn.decomposition import PCA

import diffbio
from diffbio.errors import ConfigError, DataError
from diffbio.operators.normalization import (
    DifferentiablePCA,
    DifferentiableScaler,
    LearnableOrthogonalProjection,
    LearnableProjection,
    MatrixFreePCA,
    MatrixFreePCAConfig,
    PCAConfig,
    ProjectionConfig,
    ScalerConfig,
    SoftComponentConfig,
    SoftComponentSelection,
    StochasticGateConfig,
    StochasticGateSelector,
)


def make(cls, config, seed=0, **more):
    return cls(config, rngs=nnx.Rngs(seed), **more)


def run(op, data):
    return jax.jit(lambda d: op.apply(d)[0])(data)


@pytest.fixture(scope="module")
def features():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(120, 20)) * np.geomspace(5, 0.3, 20) + 1).astype(np.float32)


@pytest.fixture(scope="module")
def expected(features):
    fitted = PCA(5, svd_solver="full").fit(features.astype(np.float64))
    signs = np.sign(fitted.components_[np.arange(5), np.abs(fitted.components_).argmax(axis=1)])
    return fitted.transform(features) * signs, fitted.components_ * signs[:, None], fitted.explained_variance_


def test_scaler_equals_scanpys_and_constant_genes_are_0(features):
    x = features.copy()
    x[:, 3] = 2.5
    x[0, 0] = 1e3
    adata = AnnData(x.copy())
    sc.pp.scale(adata, max_value=10)
    found = make(DifferentiableScaler, ScalerConfig()).apply({"features": x})[0]["scaled"]
    np.testing.assert_allclose(found, adata.X, atol=1e-4)
    assert (found[:, 3] == 0).all()
    assert np.abs(found).max() <= 10
    again = make(DifferentiableScaler, ScalerConfig()).apply(
        {"features": x[:7], "mean": x.mean(axis=0), "sd": x.std(axis=0, ddof=1)}
    )[0]["scaled"]
    np.testing.assert_allclose(again, found[:7], atol=1e-3)


@pytest.mark.parametrize("cls", [DifferentiablePCA, MatrixFreePCA])
def test_components_equal_scikit_learns(cls, features, expected):
    config = PCAConfig(n_components=5) if cls is DifferentiablePCA else MatrixFreePCAConfig(
        n_components=5, n_iterations=12
    )  # fmt: skip
    out = run(make(cls, config), {"features": features})
    for key, wanted in zip(("pca", "pca_components", "explained_variance"), expected, strict=True):
        np.testing.assert_allclose(out[key], wanted, rtol=1e-3, atol=2e-3, err_msg=key)


@pytest.mark.parametrize("cls", [DifferentiablePCA, MatrixFreePCA])
def test_gradients_stay_bounded_as_two_variances_meet(cls):
    config = {DifferentiablePCA: PCAConfig(n_components=2), MatrixFreePCA: MatrixFreePCAConfig(n_components=2)}[cls]
    op = make(cls, config)
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(40, 4)) - 0.0)[0]
    basis = np.linalg.qr(basis - basis.mean(axis=0))[0]
    gradient = jax.jit(jax.grad(lambda x: (op(x)["pca_components"] * jnp.arange(8.0).reshape(2, 4)).sum()))
    for gap in (1.0, 1e-2, 1e-4, 1e-6, 0.0):
        x = jnp.asarray(basis * np.array([3 + gap, 3.0, 1.0, 0.5]), jnp.float32)
        grad = gradient(x)
        assert jnp.isfinite(grad).all()
        assert jnp.abs(grad).max() < 1e7
    # of a function of the subspace alone the gradient is of order 1 at the tie
    subspace = jax.jit(jax.grad(lambda x: (op(x)["pca"] ** 2).sum()))(x)
    np.testing.assert_allclose(subspace, 2 * x * jnp.array([1, 1, 0, 0]), atol=2e-2)


def test_the_exact_gradient_away_from_ties_is_that_of_plain_eigh(features):
    def reference(x):
        centred = x - x.mean(axis=0)
        return jnp.linalg.eigh(centred.T @ centred / (len(x) - 1))[0][::-1][:5]

    op = make(DifferentiablePCA, PCAConfig(n_components=5))
    weight = jnp.arange(1.0, 6.0)
    found = jax.jit(jax.grad(lambda x: (weight * op(x)["explained_variance"]).sum()))(jnp.asarray(features))
    wanted = jax.jit(jax.grad(lambda x: (weight * reference(x)).sum()))(jnp.asarray(features))
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_another_seed_finds_the_same_subspace(features):
    config = MatrixFreePCAConfig(n_components=3, n_iterations=12)
    a, b = (run(make(MatrixFreePCA, config, seed), {"features": features}) for seed in (0, 1))
    np.testing.assert_allclose(a["pca"], b["pca"], atol=5e-3)


def test_too_many_components_are_refused(features):
    for op in (make(DifferentiablePCA, PCAConfig()), make(MatrixFreePCA, MatrixFreePCAConfig())):
        with pytest.raises(DataError, match="n_components=20 or fewer"):
            op.apply({"features": features})
    with pytest.raises(ConfigError, match="at most n_features"):
        ProjectionConfig(n_features=3, n_components=4)
    with pytest.raises(DataError, match="only 4 cells"):
        make(LearnableProjection, ProjectionConfig(n_features=20, n_components=5)).init_from({"features": features[:4]})


@pytest.mark.parametrize("cls", [LearnableProjection, LearnableOrthogonalProjection])
def test_projections_start_at_the_pca_scores_and_learn_back_to_them(cls, features, expected):
    config = ProjectionConfig(n_features=20, n_components=5)
    op = make(cls, config)
    op.init_from({"features": features})
    np.testing.assert_allclose(op.apply({"features": features})[0]["projection"], expected[0], atol=2e-3)
    best = float(op.objective({"features": features})[0])
    kept = expected[2].sum() / features.var(axis=0, ddof=1).sum()
    np.testing.assert_allclose(best, 1 - kept, atol=1e-4)
    # the objective has its minimum there: from a random start, plain gradient steps come near
    random = make(cls, config, 1)
    random.mean[...] = jnp.asarray(features.mean(axis=0))
    graph, params, rest = nnx.split(random, nnx.Param, ...)
    step = jax.jit(jax.grad(lambda p: nnx.merge(graph, p, rest, copy=True).objective({"features": features})[0]))
    start = float(random.objective({"features": features})[0])
    for _ in range(400):
        params = jax.tree.map(lambda p, g: p - 0.2 * g, params, step(params))
    end = float(nnx.merge(graph, params, rest).objective({"features": features})[0])
    assert start > best + 0.2
    assert end < best + 0.05


def test_orthogonal_loadings_stay_orthonormal_wherever_the_weights_go(features):
    op = make(LearnableOrthogonalProjection, ProjectionConfig(n_features=20, n_components=5))
    op.weight[...] = jax.random.normal(jax.random.key(3), (20, 5)) * 7
    out = op.apply({"features": jnp.eye(20)})[0]["projection"]
    np.testing.assert_allclose(out.T @ out, np.eye(5), atol=1e-5)


def test_components_are_kept_until_they_cover_the_variance():
    scores = np.random.default_rng(0).normal(size=(500, 6)) * np.array([4, 3, 1, 0.5, 0.2, 0.1])
    share = np.cumsum(scores.var(axis=0)) / scores.var(axis=0).sum()
    op = make(SoftComponentSelection, SoftComponentConfig(coverage=0.97, temperature=1e-4))
    gates = op.apply({"projection": scores.astype(np.float32)})[0]["component_gates"]
    assert (gates > 0.5).sum() == np.searchsorted(share, 0.97) + 1
    learned = make(SoftComponentSelection, SoftComponentConfig(coverage=0.99))
    diffbio.fit(learned, {"projection": scores.astype(np.float32)}, max_epochs=300, progress=False)
    gates = learned.apply({"projection": scores.astype(np.float32)})[0]["component_gates"]
    above_average = scores.var(axis=0) > scores.var(axis=0).mean()
    assert (np.asarray(gates) > 0.5).sum() in (above_average.sum(), above_average.sum() + 1)


def test_the_start_of_the_component_gates_is_no_identity():
    scores = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    op = make(SoftComponentSelection, SoftComponentConfig(coverage=0.75))
    gates = np.asarray(op.apply({"projection": scores})[0]["component_gates"])
    assert gates[0] > 0.999
    assert abs(gates[3] - 0.5) < 0.2  # three quarters lie before it


def test_a_projection_starts_at_given_loadings(features, expected):
    config = ProjectionConfig(n_features=20, n_components=5)
    op = make(LearnableProjection, config, init_loadings=expected[1])
    out = op.apply({"features": features - features.mean(axis=0)})[0]["projection"]
    np.testing.assert_allclose(out, expected[0], atol=2e-3)
    with pytest.raises(ConfigError, match=r"init_loadings must have the shape \(5, 20\)"):
        make(LearnableProjection, config, init_loadings=expected[1].T)


def test_as_many_components_as_cells_leave_the_last_without_variance(features):
    out = make(DifferentiablePCA, PCAConfig(n_components=6)).apply({"features": features[:6]})[0]
    rows = np.asarray(out["pca_components"])
    np.testing.assert_allclose(rows[:5] @ rows[:5].T, np.eye(5), atol=1e-4)
    np.testing.assert_allclose(out["explained_variance"][5], 0.0, atol=1e-4)


@pytest.mark.parametrize(
    ("cls", "config", "key"),
    [
        (DifferentiableScaler, ScalerConfig(), "features"),
        (DifferentiablePCA, PCAConfig(n_components=2), "features"),
        (MatrixFreePCA, MatrixFreePCAConfig(n_components=2), "features"),
        (LearnableProjection, ProjectionConfig(n_features=20, n_components=2), "features"),
        (LearnableOrthogonalProjection, ProjectionConfig(n_features=20, n_components=2), "features"),
        (SoftComponentSelection, SoftComponentConfig(), "projection"),
        (StochasticGateSelector, StochasticGateConfig(n_genes=20), "features"),
    ],
)
def test_values_that_are_not_finite_are_refused(cls, config, key, features):
    wrong = features[:10].copy()
    wrong[4, 1] = np.nan
    op = make(cls, config)
    with pytest.raises(DataError, match=rf"{cls.__name__}: data\['{key}'\] must be finite, but row 4, column 1"):
        op.apply({key: wrong})
    if hasattr(op, "init_from"):
        with pytest.raises(DataError, match="row 4, column 1"):
            op.init_from({key: wrong})
    assert np.isfinite(op.apply({key: features[:10]})[0][next(iter(op.provides))]).all()


def test_gates_are_given_or_start_at_mu_init():
    with pytest.raises(ConfigError, match=r"mu_init is 0\.3, but init_gate"):
        make(StochasticGateSelector, StochasticGateConfig(n_genes=4, mu_init=0.3), init_gate=np.ones(4))


def test_gates_are_clipped_means_and_the_penalty_counts_open_ones(features):
    mask = (np.arange(20) % 3 == 0).astype(np.float32)
    op = make(StochasticGateSelector, StochasticGateConfig(n_genes=20), init_gate=mask)
    out = op.apply({"features": features})[0]
    np.testing.assert_array_equal(out["gate"], mask)
    np.testing.assert_array_equal(out["gated"], features * mask)
    op.mu[...] = jnp.linspace(-1, 2, 20)
    out = op.apply({"features": features})[0]
    np.testing.assert_allclose(out["gate"], np.clip(np.linspace(-1, 2, 20), 0, 1), atol=1e-6)
    np.testing.assert_allclose(out["l0_penalty"], norm.cdf(np.linspace(-1, 2, 20) / 0.5).sum(), rtol=1e-5)
    op.train_mode()
    assert (op.apply({"features": features})[0]["gate"] != out["gate"]).any()


def test_trained_gates_keep_the_genes_that_vary(features):
    op = make(StochasticGateSelector, StochasticGateConfig(n_genes=20, l0_lambda=1.0))
    diffbio.fit(op, {"features": features}, max_epochs=150, learning_rate=0.05, validation=0.0, progress=False)
    gate = np.asarray(op.apply({"features": features})[0]["gate"])
    assert gate[:3].min() > 0.5
    assert gate[-8:].max() < 0.1
