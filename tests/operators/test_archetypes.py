"""Archetypal analysis: any cells on the stored hull, unfitted outputs marked, a bar on real mixtures."""

import anndata
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scanpy as sc
from flax import nnx
from scipy.optimize import linear_sum_assignment

import diffbio
from diffbio.errors import DataError
from diffbio.operators.singlecell import ArchetypalAnalysisConfig, DifferentiableArchetypalAnalysis


def make(**settings):
    return DifferentiableArchetypalAnalysis(ArchetypalAnalysisConfig(**settings), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(0)
    corners = rng.normal(size=(3, 4)) * 3
    weights = rng.dirichlet(np.full(3, 0.5), 150)
    op = make(n_archetypes=3, n_features=4)
    cells = (weights @ corners + 0.02 * rng.normal(size=(150, 4))).astype(np.float32)
    diffbio.fit(op, {"embeddings": cells}, progress=False)
    return op, cells


def test_cells_one_by_one_are_as_all_at_once(fitted):
    op, cells = fitted
    assert op.fitted
    whole = op.apply({"embeddings": cells})[0]
    some = op.apply({"embeddings": cells[7:30]})[0]
    np.testing.assert_allclose(some["archetype_weights"], whole["archetype_weights"][7:30], atol=1e-5)
    np.testing.assert_allclose(whole["archetype_weights"].sum(axis=1), 1, atol=1e-6)
    assert float(whole["archetype_weights"].min()) >= 0
    assert np.abs(whole["reconstructed"] - cells).mean() < 0.05


def test_archetypes_lie_in_the_hull_and_have_themselves(fitted):
    op, cells = fitted
    out = op.apply({"embeddings": np.asarray(op.found[...])})[0]
    np.testing.assert_allclose(out["archetype_weights"], np.eye(3), atol=1e-2)
    outward = np.random.default_rng(0).normal(size=(20, 4))
    assert ((np.asarray(op.found[...]) @ outward.T).max(axis=0) <= (cells @ outward.T).max(axis=0) + 1e-4).all()


def test_the_gradient_leads_cells_to_an_archetype(fitted):
    op, cells = fitted

    def far(x):
        return (1.0 - op.apply({"embeddings": x})[0]["archetype_weights"][:, 0]).mean()

    step = jax.jit(jax.value_and_grad(far))
    x, first = jnp.asarray(cells), None
    for _ in range(30):
        value, slope = step(x)
        first = value if first is None else first
        x = x - 100 * slope
    assert value < 0.7 * first


def test_random_archetypes_are_marked():
    op = make(n_archetypes=3, n_features=4)
    metadata = op.apply({"embeddings": jnp.ones((5, 4))})[2]
    assert set(metadata["unfitted"]) == {"archetype_weights", "archetypes", "reconstructed"}
    with pytest.raises(DataError, match="only 2 different cells"):
        op.init_from({"embeddings": np.arange(8.0).reshape(2, 4)})


def test_rna_mixtures_get_their_shares(data_dir):
    """340 wells with known shares of the RNA of three cell lines; no worse than py-pcha."""
    adata = anndata.read_h5ad(data_dir / "scmix_rna_mixture_celseq2.h5ad")
    sc.pp.filter_genes(adata, min_cells=3)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=2000)
    sc.pp.pca(adata, n_comps=30, random_state=0)
    cells = adata.obsm["X_pca"][:, :5]
    op = make(n_archetypes=3, n_features=5)
    op.init_from({"embeddings": cells})
    weights = np.asarray(op.apply({"embeddings": cells})[0]["archetype_weights"])
    truth = adata.obs[["prop_H2228", "prop_H1975", "prop_HCC827"]].to_numpy(float)
    match = np.corrcoef(weights.T, truth.T)[:3, 3:]
    rows, columns = linear_sum_assignment(-match)
    assert match[rows, columns].mean() >= 0.973  # py-pcha's
    assert np.abs(weights[:, rows] - truth[:, columns]).mean() <= 0.0615
