import jax.numpy as jnp
import numpy as np
import pytest
import scanpy as sc
from anndata import AnnData
from flax import nnx

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
