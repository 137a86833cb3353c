"""`tl.velocity` and `pl.velocity` on cells whose time is known."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from branching_cells import branching_cells
from scipy import sparse
from scipy.stats import spearmanr

from diffbio import pl, tl
from diffbio.errors import ConfigError, DataError, MissingKeyError


@pytest.fixture(scope="module")
def moved():
    """Cells with velocities and a map on which time goes from left to right."""
    adata = branching_cells()
    time = adata.obs["time"].to_numpy()
    adata.obsm["X_umap"] = np.column_stack([time, (adata.obs["branch"] - 0.5) * np.maximum(time - 0.4, 0)])
    tl.velocity(adata)
    return adata


def test_steps_lead_forward_in_time(moved):
    time = moved.obs["time"].to_numpy()
    chain = moved.obsp["diffbio_velocity_transition"]
    np.testing.assert_allclose(np.asarray(chain.sum(axis=1)).ravel(), 1.0, rtol=1e-4)
    on_the_way = time < 0.8
    assert ((chain @ time - time)[on_the_way] > 0).mean() > 0.9
    assert spearmanr(moved.obs["diffbio_latent_time"], time).statistic > 0.9
    graph = moved.obsp["diffbio_velocity_graph"]
    assert np.abs(graph.data).max() <= 1 + 1e-5
    assert moved.obs["diffbio_velocity_confidence"].mean() > 0.5


@pytest.mark.filterwarnings("ignore::diffbio.errors.DataWarning")
def test_genes_that_are_not_read_have_no_velocity(moved):
    adata = moved.copy()
    without = np.where(np.arange(adata.n_vars) == 3, 0.0, adata.layers["unspliced"].toarray())
    adata.layers["unspliced"] = sparse.csr_matrix(without.astype(np.float32))
    tl.velocity(adata, n_neighbors=20)
    read = np.arange(adata.n_vars) != 3
    assert np.isnan(adata.layers["diffbio_velocity"][:, 3]).all()
    assert np.isfinite(adata.layers["diffbio_velocity"][:, read]).all()
    assert not adata.var["diffbio_velocity_genes"].iloc[3]
    assert (adata.var["diffbio_velocity_gamma"][read] >= 0).all()


def test_arrows_on_the_map_point_along_time(moved):
    for kind in ("stream", "arrows"):
        ax = pl.velocity(moved, color="cell_type", kind=kind)
        assert ax.get_title() == "RNA velocity"
        plt.close(ax.figure)
    ax = pl.velocity(moved, kind="arrows")
    arrows = next(artist for artist in ax.collections if hasattr(artist, "U"))
    right = np.ma.getdata(arrows.U)[~np.ma.getmaskarray(arrows.U)]
    assert (right[np.isfinite(right)] > 0).mean() > 0.85
    plt.close(ax.figure)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"mode": "stationary"}, ConfigError, "'dynamical'"),
        ({"max_epochs": 3}, ConfigError, "max_epochs does nothing"),
        ({"spliced": "mature"}, MissingKeyError, "'mature'"),
        ({"min_shared_counts": 10**9}, DataError, "min_shared_counts"),
    ],
)
def test_what_is_wrong_is_named(settings, error, words):
    with pytest.raises(error, match=words):
        tl.velocity(branching_cells(60), **settings)


def test_figures_need_results_and_a_map(moved):
    bare = branching_cells(60)
    with pytest.raises(MissingKeyError, match=r"tl\.velocity"):
        pl.velocity(bare)
    without = moved.copy()
    del without.obsm["X_umap"]
    with pytest.raises(MissingKeyError, match=r"tl\.embed"):
        pl.velocity(without)
    with pytest.raises(ConfigError, match="stream"):
        pl.velocity(moved, kind="lines")
