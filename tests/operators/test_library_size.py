import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scanpy as sc
from anndata import AnnData
from flax import nnx

import diffbio
from diffbio.errors import ConfigError, DataError
from diffbio.operators.normalization import LibrarySizeConfig, LibrarySizeNormalizer


def normalized(data, **settings):
    op = LibrarySizeNormalizer(LibrarySizeConfig(**settings), rngs=nnx.Rngs(0))
    return np.asarray(op.apply(data, {}, None)[0]["normalized"])


@pytest.fixture
def counts():
    return np.random.default_rng(0).poisson(1.5, (20, 30)).astype(np.float32)


@pytest.mark.parametrize("target_sum", [1e4, 50.0])
def test_equals_scanpy(counts, target_sum):
    adata = AnnData(counts.copy())
    sc.pp.normalize_total(adata, target_sum=target_sum)
    np.testing.assert_allclose(normalized({"counts": counts}, target_sum=target_sum, log=False), adata.X, rtol=1e-5)
    sc.pp.log1p(adata)
    np.testing.assert_allclose(normalized({"counts": counts}, target_sum=target_sum), adata.X, rtol=1e-5)


def test_pseudocount_is_the_shifted_logarithm(counts):
    scaled = normalized({"counts": counts}, log=False).astype(float)
    np.testing.assert_allclose(
        normalized({"counts": counts}, pseudocount=4.0), np.log(scaled + 4) - np.log(4), rtol=1e-5
    )


def test_depth_does_not_matter(counts):
    np.testing.assert_allclose(normalized({"counts": counts}), normalized({"counts": 7 * counts}), rtol=1e-5)


def test_given_totals_serve_a_part_of_the_genes(counts):
    whole = normalized({"counts": counts})
    part = normalized({"counts": counts[:, :5], "library_size": counts.sum(1)})
    np.testing.assert_allclose(part, whole[:, :5], rtol=1e-5)


def test_an_empty_cell_stays_zero(counts):
    counts[3] = 0
    out = normalized({"counts": counts})
    assert (out[3] == 0).all()
    assert np.isfinite(out).all()


def test_integer_counts_are_welcome(counts):
    np.testing.assert_allclose(
        normalized({"counts": jnp.asarray(counts, int)}), normalized({"counts": counts}), rtol=1e-6
    )


def learnable():
    return LibrarySizeNormalizer(LibrarySizeConfig(learnable=True), rngs=nnx.Rngs(0))


def test_pearson_residuals_equal_scanpys(counts):
    adata = AnnData(counts.copy())
    sc.experimental.pp.normalize_pearson_residuals(adata, theta=10, check_values=False)
    found = normalized({"counts": counts}, method="pearson_residuals", theta=10.0)
    np.testing.assert_allclose(found, adata.X, rtol=1e-4, atol=1e-5)
    whole = normalized({"counts": counts}, method="pearson_residuals")
    # a part of the cells with the shares of all; the limit is that of the part
    share = counts.sum(0) / counts.sum()
    part = normalized({"counts": counts[:9], "gene_share": share}, method="pearson_residuals")
    np.testing.assert_allclose(part, np.clip(whole[:9], -3, 3), rtol=1e-4, atol=1e-5)


def test_a_learnable_normaliser_starts_at_scanpys(counts):
    adata = AnnData(counts.astype(np.float64))
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    op = learnable()
    np.testing.assert_allclose(op.apply({"counts": counts})[0]["normalized"], adata.X, atol=1e-6 * adata.X.max())


def test_exponent_0_leaves_the_depth_in(counts):
    op = learnable()
    op.size_exponent[...] = jnp.asarray(0.0)
    np.testing.assert_allclose(op.apply({"counts": counts})[0]["normalized"], np.log1p(counts), rtol=1e-6)


def test_gradients_have_their_closed_form(counts):
    graph, params = nnx.split(learnable())

    def total(params):
        return nnx.merge(graph, params)(jnp.asarray(counts))["normalized"].sum()

    grad = jax.grad(total)(params)
    ratio = 1e4 / counts.sum(1, keepdims=True)
    scaled = counts * ratio
    np.testing.assert_allclose(grad["size_exponent"][...], (scaled / (1 + scaled) * np.log(ratio)).sum(), rtol=1e-4)
    np.testing.assert_allclose(grad["log_pseudocount"][...], -(scaled / (1 + scaled)).sum(), rtol=1e-4)


def test_training_takes_the_depth_out_of_the_values():
    rng = np.random.default_rng(0)
    depth = rng.lognormal(0, 0.7, (300, 1))
    data = {"counts": rng.poisson(depth * rng.lognormal(0, 1, 40)).astype(np.float32)}
    op = learnable()
    before = op.objective(data)
    diffbio.fit(op, data, validation=0.0, max_epochs=60, learning_rate=0.05, progress=False)
    after = op.objective(data)
    assert after[0] < 0.9 * before[0]
    assert op.fitted


def test_a_fixed_normaliser_has_nothing_to_train(counts):
    op = LibrarySizeNormalizer(LibrarySizeConfig(), rngs=nnx.Rngs(0))
    assert op.fitted
    assert len(diffbio.fit(op, {"counts": counts}, progress=False)) == 0


def test_settings_that_would_do_nothing_are_refused():
    pearson = {"method": "pearson_residuals", "learnable": True}
    for wrong in ({"theta": 5.0}, pearson, {"log": False, "learnable": True}):
        with pytest.raises(ConfigError):
            LibrarySizeConfig(**wrong)
    for name in ("target_sum", "pseudocount"):
        with pytest.raises(ConfigError, match=f"{name} is for method='shifted_log'"):
            LibrarySizeConfig(method="pearson_residuals", **{name: 0.5})
    with pytest.raises(ConfigError, match="pseudocount is for log=True"):
        LibrarySizeConfig(log=False, pseudocount=0.5)


@pytest.mark.parametrize("settings", [{}, {"method": "pearson_residuals"}, {"learnable": True}, {"log": False}])
@pytest.mark.parametrize("wrong", [-1.0, np.nan])
def test_counts_that_are_none_are_refused(counts, settings, wrong):
    counts = np.array(counts, np.float32)
    counts[3, 2] = wrong
    op = LibrarySizeNormalizer(LibrarySizeConfig(**settings), rngs=nnx.Rngs(0))
    with pytest.raises(DataError, match=r"LibrarySizeNormalizer: data\['counts'\] .* row 3, column 2"):
        op.apply({"counts": counts})
    for key, width in (("library_size", len(counts)), ("gene_share", counts.shape[1])):
        with pytest.raises(DataError, match=rf"data\['{key}'\] .* row 0"):
            op.apply({"counts": np.ones_like(counts), key: np.full(width, wrong, np.float32)})
