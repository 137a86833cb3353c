"""The diffusion imputer beside magic-impute's stored output, on hard data, and in training."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import sparse

import diffbio
from diffbio.errors import ConfigError, DataError
from diffbio.operators.singlecell import DifferentiableDiffusionImputer, DiffusionImputerConfig

ORACLE = Path(__file__).parents[1] / "oracles" / "magic.npz"  # written by benchmarks/peers/run_magic.py


def imputer(**settings):
    return DifferentiableDiffusionImputer(DiffusionImputerConfig(**settings), rngs=nnx.Rngs(0))


def imputed(op, **data):
    return np.asarray(jax.jit(lambda data: op.apply(data)[0]["imputed_counts"])(data))


def mixed_types(n=90, genes=40, seed=0):
    """Counts of three types, few molecules each."""
    rng = np.random.default_rng(seed)
    profile = rng.dirichlet(np.full(genes, 0.5), size=3)
    return rng.poisson(120 * profile[np.arange(n) % 3]).astype(np.float32)


@pytest.mark.parametrize("t", [1, 3, 5])
def test_equals_magic_impute(t):
    stored = np.load(ORACLE)
    counts = stored["counts"].astype(np.float32)
    library = counts.sum(axis=1, keepdims=True)
    found = np.sqrt(imputed(imputer(diffusion_t=float(t)), counts=counts) / library * np.median(library))
    np.testing.assert_allclose(found, stored[f"t{t}"], atol=1e-4)


def test_auto_of_pp_equals_magic_impute():
    import anndata

    from diffbio import pp

    stored = np.load(ORACLE)
    adata = anndata.AnnData(sparse.csr_matrix(stored["counts"].astype(np.float32)))
    pp.impute(adata, t="auto")
    library = np.asarray(adata.X.sum(axis=1)).reshape(-1, 1)
    found = np.sqrt(adata.layers["diffbio_imputed"] / library * np.median(library))
    np.testing.assert_allclose(found, stored["auto"], atol=1e-4)


def test_no_steps_return_the_counts():
    counts = mixed_types()
    np.testing.assert_allclose(imputed(imputer(diffusion_t=0.0), counts=counts), counts, rtol=1e-5, atol=1e-5)


def test_a_graph_that_is_given_is_used():
    counts, op = mixed_types(), imputer(diffusion_t=2.5)
    points = op.embedded_on_host(counts)
    neighbors = op.neighbors_on_host(points)
    own = imputed(op, counts=counts)
    given = imputed(op, counts=counts, embeddings=points, neighbor_indices=neighbors[:, ::-1])
    np.testing.assert_allclose(given, own, rtol=1e-3, atol=1e-3)  # float32 components of two algorithms
    others = imputed(op, counts=counts, embeddings=points, neighbor_indices=(neighbors + 1) % len(counts))
    assert np.abs(others - own).max() > 1


def test_hard_cells_and_genes_stay_finite():
    counts = mixed_types(30, 20)
    counts[10:22] = counts[10]  # twelve alike: no bandwidth
    counts[:, 4] = 0
    counts[:, 5] = 2  # constant
    counts[3] = 0  # an empty cell
    found = imputed(imputer(), counts=counts)
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    assert (found[3] == 0).all()
    assert (found[:, 4] == 0).all()
    few = imputed(imputer(n_neighbors=3), counts=mixed_types(5, 20))  # fewer cells than edges wanted
    assert np.isfinite(few).all()


def test_bad_data_is_refused():
    counts = mixed_types(6, 8)
    with pytest.raises(DataError, match=r"n_neighbors is 6, but there are only 6 cells.*n_neighbors=5"):
        imputer(n_neighbors=6).apply({"counts": counts})
    with pytest.raises(DataError, match="has 2 of each cell"):
        imputer(n_neighbors=3).apply({"counts": counts, "neighbor_indices": np.zeros((6, 2), int)})
    with pytest.raises(DataError, match="holds 6, but row numbers"):
        imputer(n_neighbors=1).apply({"counts": counts, "neighbor_indices": np.full((6, 2), 6)})
    own = np.array([[1, 2], [2, 0], [0, 1], [3, 1], [0, 1], [0, 1]])
    with pytest.raises(DataError, match="the cell itself in 1 of 6 rows, first in row 3"):
        imputer(n_neighbors=1).apply({"counts": counts, "neighbor_indices": own})
    for bad, said in ((np.nan, "holds nan"), (-1.0, "holds -1")):
        odd = counts.copy()
        odd[2, 3] = bad
        with pytest.raises(DataError, match=rf"DiffusionImputer: data\['counts'\].*row 2, column 3 {said}"):
            imputer(n_neighbors=3).apply({"counts": odd})
    with pytest.raises(ConfigError, match="at most 20"):
        DiffusionImputerConfig(diffusion_t=21.0)


def test_training_learns_from_held_out_molecules_alone():
    counts = mixed_types(120)
    op = imputer(n_pca_components=10)
    data = op.for_training({"counts": sparse.csr_matrix(counts)})
    kept, held_out = (np.asarray(data[key].todense()) for key in ("counts", "held_out_counts"))
    np.testing.assert_array_equal(kept + held_out, counts)
    assert held_out.sum() / counts.sum() == pytest.approx(0.1, abs=0.02)
    history = diffbio.fit(op, {"counts": counts}, max_epochs=15, progress=False)
    losses = [row["loss"] for row in history.rows]
    assert losses[-1] < losses[0]
    assert op.fitted
    assert float(op.t[...]) > 0
    again = imputer(n_pca_components=10)
    diffbio.fit(again, {"counts": sparse.csr_matrix(counts)}, max_epochs=15, progress=False)
    np.testing.assert_allclose(again.t[...], op.t[...], rtol=1e-3)  # sparse or not, the same split
    whole = [op.objective({**data, "counts": kept, "held_out_counts": held_out})[0]]
    op.t[...] = jnp.asarray(0.0)
    whole.append(op.objective({**data, "counts": kept, "held_out_counts": held_out})[0])
    assert whole[0] < whole[1]


@pytest.mark.parametrize(("t", "steps"), [(0.0, 0.0), (20.0, 20.0), (-1.5, 1.5), (21.5, 18.5), (-43.0, 3.0)])
def test_t_stays_between_0_and_20_steps_and_keeps_its_gradient(t, steps):
    data = {"counts": jnp.asarray(mixed_types(30, 12))}
    op, within = imputer(n_pca_components=5), imputer(n_pca_components=5, diffusion_t=steps)
    op.t[...] = jnp.asarray(t)

    def loss(op):
        return op.objective(data)[0]

    (value, metrics), wanted = op.objective(data), loss(within)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["t"], steps, atol=1e-5)
    slopes = [np.asarray(nnx.grad(loss)(each).t[...]) for each in (op, within)]
    assert slopes[0] != 0
    np.testing.assert_allclose(abs(slopes[0]), abs(slopes[1]), rtol=1e-3, atol=1e-7)


def test_many_cells_are_learned_from_some_genes(monkeypatch):
    from diffbio.operators.singlecell import diffusion_imputation

    monkeypatch.setattr(diffusion_imputation, "LEARNING_ENTRIES", 500)
    monkeypatch.setattr(diffusion_imputation, "FEWEST_GENES", 4)
    counts = mixed_types(100, 30)
    data = imputer(n_pca_components=5).for_training({"counts": counts})
    assert data["counts"].shape == (100, 5)
    assert data["held_out_counts"].shape == (100, 5)
    assert data["embeddings"].shape == (100, 5)
    assert data["counts"].sum() > 0
