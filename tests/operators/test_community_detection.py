"""Communities: as good as Leiden's, found without their number, and an embedding that is trained for them."""

import anndata
import igraph
import jax
import jax.numpy as jnp
import leidenalg
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.metrics import adjusted_rand_score

from diffbio.data.genes import highly_variable_genes
from diffbio.data.transform import shifted_log
from diffbio.errors import DataError
from diffbio.math.diffusion import neighbor_distances
from diffbio.math.linalg import pca
from diffbio.math.modularity import fuzzy_lists, listed_edges, modularity, neighbor_lists
from diffbio.math.neighbors import knn
from diffbio.operators.singlecell import CommunityDetectionConfig, DifferentiableCommunityDetection


def make(**settings):
    return DifferentiableCommunityDetection(CommunityDetectionConfig(**settings), rngs=nnx.Rngs(0))


def as_data(lists):
    return {"neighbor_indices": jnp.asarray(lists.indices), "neighbor_weights": jnp.asarray(lists.weights)}


@pytest.fixture(scope="module")
def groups():
    """Three overlapping groups in the plane."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(3), 40)
    centres = np.array([[0, 0], [4, 0], [2, 3.5]])
    return (centres[truth] + rng.normal(size=(120, 2))).astype(np.float32), truth


def test_as_good_as_leiden_on_real_cells(data_dir):
    adata = anndata.read_h5ad(data_dir / "pbmc3k.h5ad")
    genes = highly_variable_genes(adata.X, n_top_genes=1000)["highly_variable"].to_numpy()
    lists = fuzzy_lists(*knn(pca(shifted_log(adata.X)[:, genes], 30).scores, 14))
    edges = listed_edges(*lists)
    out = make().apply(as_data(lists))[0]
    hardened = modularity(*edges, out["cluster_labels"])
    weighted = igraph.Graph(n=adata.n_obs, edges=np.stack(edges[:2], axis=1))
    weighted.es["weight"] = edges[2].astype(float)
    leiden = leidenalg.find_partition(
        weighted.simplify(combine_edges="sum"),
        leidenalg.RBConfigurationVertexPartition,
        weights="weight",
        n_iterations=-1,
        seed=0,
    )
    theirs = modularity(*edges, np.asarray(leiden.membership))
    assert hardened > theirs - 1e-3
    assert abs(float(out["modularity"]) - hardened) < 0.01  # softer at the borders only
    assert adjusted_rand_score(adata.obs["cell_type"], out["cluster_labels"]) > 0.6


def test_how_many_there_are_is_found(groups):
    points, truth = groups
    out = make(n_communities=12, resolution=0.3).apply(as_data(fuzzy_lists(*knn(points, 40))))[0]
    assignments = np.asarray(out["cluster_assignments"])
    assert assignments.shape == (120, 12)
    np.testing.assert_allclose(assignments.sum(axis=1), 1, atol=1e-6)
    assert (assignments[:, 3:] == 0).all()
    assert adjusted_rand_score(truth, out["cluster_labels"]) > 0.65  # they overlap
    few = make(n_communities=2, resolution=0.3).apply(as_data(fuzzy_lists(*knn(points, 40))))[0]
    assert set(np.asarray(few["cluster_labels"])) == {0, 1}


def test_temperature_softens_borders_first(groups):
    lists = fuzzy_lists(*knn(groups[0], 15))
    cold, warm = (make(n_communities=8, temperature=t).apply(as_data(lists))[0] for t in (1e-3, 0.1))
    assert np.asarray(cold["cluster_assignments"]).max(axis=1).min() > 0.99
    labels = np.asarray(cold["cluster_labels"])
    others = (labels[lists.indices] != labels[:, None]).mean(axis=1)
    assert np.corrcoef(np.asarray(warm["cluster_assignments"]).max(axis=1), others)[0, 1] < -0.5


def test_an_embedding_is_trained_for_its_communities(groups):
    """Points move along the gradient of modularity: groups that overlapped come apart."""
    points, truth = groups
    found, distances = knn(points, 30)
    indices, settings = jnp.asarray(found), {"n_communities": 4, "resolution": 0.3}
    labels = make(**settings).apply(as_data(fuzzy_lists(found, distances)))[0]["cluster_labels"]
    op = make(**settings, temperature=0.1, n_iterations=5)

    def loss(points):
        apart = neighbor_distances(points, indices)
        data = {"neighbor_indices": indices, "neighbor_weights": jnp.exp(-(apart**2)), "start_labels": labels}
        return -op.apply(data)[0]["modularity"]

    step = jax.jit(jax.value_and_grad(loss))
    optimizer = optax.adam(0.05)
    moved = jnp.asarray(points)
    state = optimizer.init(moved)
    values = []
    for _ in range(40):
        value, slope = step(moved)
        values.append(float(value))
        updates, state = optimizer.update(slope, state)
        moved = optax.apply_updates(moved, updates)
    assert values[-1] < values[0] - 0.05
    before, after = (separation(np.asarray(x), truth) for x in (points, moved))
    assert after > 1.1 * before


def separation(points, truth):
    """Distance between the groups' centres in units of their spread."""
    centres = np.stack([points[truth == k].mean(axis=0) for k in range(3)])
    spread = np.mean([points[truth == k].std(axis=0).mean() for k in range(3)])
    return np.linalg.norm(centres[0] - centres[1:], axis=1).mean() / spread


def test_given_labels_are_where_it_starts(groups):
    points, truth = groups
    data = as_data(fuzzy_lists(*knn(points, 15))) | {"start_labels": jnp.asarray((truth + 2) % 3)}
    out = make(n_communities=4, temperature=0.01).apply(data)[0]
    assert np.mean(np.asarray(out["cluster_labels"]) == (truth + 2) % 3) > 0.9


def test_lonely_cells_and_pieces():
    rows, columns = np.array([0, 1, 2, 3, 4, 5]), np.array([1, 2, 0, 4, 5, 3])
    out = make(n_communities=5).apply(as_data(neighbor_lists(rows, columns, np.ones(6), 7)))[0]
    labels = np.asarray(out["cluster_labels"])
    assert labels[6] == 2
    np.testing.assert_array_equal(np.asarray(out["cluster_assignments"])[6], [0, 0, 1, 0, 0])
    assert len({labels[0], labels[3], labels[6]}) == 3


def test_bad_graphs_are_refused(groups):
    data = as_data(fuzzy_lists(*knn(groups[0], 5)))
    op = make()
    with pytest.raises(DataError, match=r"neighbor_weights.*row 2, column 1 holds -1"):
        op.apply(data | {"neighbor_weights": data["neighbor_weights"].at[2, 1].set(-1.0)})
    with pytest.raises(DataError, match=r"neighbor_indices.*holds 500.*0 to 119"):
        op.apply(data | {"neighbor_indices": data["neighbor_indices"].at[2, 1].set(500)})
    with pytest.raises(DataError, match=r"start_labels.*holds 50.*0 to 49"):
        op.apply(data | {"start_labels": jnp.full(120, 50)})
    with pytest.raises(DataError, match="no edges"):
        op.apply(data | {"neighbor_weights": 0 * data["neighbor_weights"]})
