"""`tl.spatial_domains` and `pl.spatial_domains` on two slices with stripes."""

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

from diffbio import pl, tl
from diffbio.errors import ConfigError, DataError, MissingKeyError


def tissue(n=160):
    rng = np.random.default_rng(0)
    places = rng.uniform(size=(n, 2)) * 5000
    domain = (places[:, 0] > 2500).astype(int)
    counts = rng.poisson(np.exp(0.8 * rng.normal(size=(2, 20)))[domain]).astype(np.float32)
    obs = pd.DataFrame(
        {"section": [f"s{k % 2}" for k in range(n)], "truth": domain}, index=[f"spot{k}" for k in range(n)]
    )
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, obsm={"spatial": places})


@pytest.fixture(scope="module")
def found():
    adata = tissue()
    tl.spatial_domains(adata, 2, batch_key="section", n_neighbors=8, max_epochs=2)
    return adata


def test_what_is_written(found):
    assert adjusted_rand_score(found.obs["truth"], found.obs["diffbio_domain"]) > 0.6
    np.testing.assert_allclose(found.obsm["diffbio_domain_prob"].sum(axis=1), 1, rtol=1e-5)
    assert found.obsm["X_diffbio_spatial"].shape == (160, 10)
    graph = found.obsp["diffbio_spatial_attention"]
    assert graph.nnz == 160 * 8
    np.testing.assert_allclose(np.asarray(graph.sum(axis=1)).ravel(), 1, rtol=1e-5)
    rows, columns = graph.nonzero()
    section = found.obs["section"].to_numpy()
    assert (section[rows] == section[columns]).all()


def test_figure_has_slices_and_edges(found):
    axes = pl.spatial_domains(found)
    assert axes.shape == (2, 2)
    assert axes[1, 0].get_title() == "domains, s1"
    edges = axes[0, 1].collections[0]
    assert 80 < len(edges.get_segments()) < 160 * 8
    plt.close(axes[0, 0].figure)


def test_what_is_wrong_is_named(found):
    bare = tissue(40)
    with pytest.raises(ConfigError, match="n_domains is 41"):
        tl.spatial_domains(bare, 41)
    with pytest.raises(MissingKeyError, match=r"'places'.*spatial"):
        tl.spatial_domains(bare, 2, spatial_key="places")
    with pytest.raises(MissingKeyError, match=r"tl\.spatial_domains"):
        pl.spatial_domains(bare)
    with pytest.raises(MissingKeyError, match="elsewhere"):
        pl.spatial_domains(found, spatial_key="elsewhere")
    bare.obsm["spatial"][3] = np.nan
    with pytest.raises(DataError, match="spatial_coords"):
        tl.spatial_domains(bare, 2)
