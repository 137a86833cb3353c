"""tl.align_slices and its figure."""

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from diffbio import pl, tl
from diffbio.errors import ConfigError, DataError, MissingKeyError

N = 40
TURNS = {"b": 0.0, "a": 0.7, "c": -1.1}


def stack(seed=0):
    """Three slices of one tissue, each turned by its own angle and its spots in its own order."""
    rng = np.random.default_rng(seed)
    place = rng.random((N, 2)) * np.sqrt(N)
    means = np.exp(1.5 * np.sin(place @ rng.normal(size=(2, 15)) * 0.6 + rng.random(15) * 6) + 1)
    parts = []
    for name, turn in TURNS.items():
        order = rng.permutation(N)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        obs = pd.DataFrame({"slice": name}, index=[f"{name}{k}" for k in range(N)])
        part = ad.AnnData(sparse.csr_matrix(rng.poisson(means[order]).astype(np.float32) + 1), obs=obs)
        part.obsm["spatial"], part.obsm["true"] = place[order] @ rotation.T + turn, place[order]
        parts.append(part)
    adata = ad.concat(parts)
    adata.obs["slice"] = pd.Categorical(adata.obs["slice"], categories=list(TURNS))
    return adata[rng.permutation(adata.n_obs)].copy()


@pytest.fixture(scope="module")
def chain():
    adata = stack()
    tl.align_slices(adata, "slice")
    return adata


def test_chain_brings_all_into_the_frame_of_the_first(chain, tmp_path):
    away = np.linalg.norm(chain.obsm["diffbio_spatial_aligned"] - chain.obsm["true"], axis=1)
    assert away.max() < 0.5
    first = (chain.obs["slice"] == "b").to_numpy()
    np.testing.assert_allclose(chain.obsm["diffbio_spatial_aligned"][first], chain.obsm["spatial"][first])
    chain.write_h5ad(tmp_path / "aligned.h5ad")
    found = ad.read_h5ad(tmp_path / "aligned.h5ad").uns["diffbio_alignment"]
    assert list(found["slices"]) == ["b", "a", "c"]
    np.testing.assert_array_equal(found["pairs"], [[0, 1], [1, 2]])
    assert sparse.issparse(found["couplings"]["1"])
    assert found["couplings"]["1"].shape == (N, N)
    assert found["couplings"]["1"].sum() == pytest.approx(1)
    angle = np.arctan2(found["rotation"][:, 1, 0], found["rotation"][:, 0, 0])
    np.testing.assert_allclose(angle, [0, -0.7, 1.1], atol=0.05)
    assert (found["marginal_error"] < 1e-4).all()
    assert chain.uns["diffbio"]["align_slices"]["params"]["alpha"] == 0.1


def test_centre_and_reference():
    adata = stack()
    made = tl.align_slices(adata, "slice", method="centre", reference="a", n_components=3, copy=True)
    assert "diffbio_alignment" not in adata.uns
    a = (made.obs["slice"] == "a").to_numpy()
    np.testing.assert_allclose(made.obsm["diffbio_spatial_aligned"][a], made.obsm["spatial"][a], atol=0.4)
    gone = made.obsm["diffbio_spatial_aligned"] - made.obsm["true"] @ np.array(
        [[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]]).T - 0.7  # fmt: skip
    assert np.linalg.norm(gone, axis=1).max() < 0.7
    np.testing.assert_array_equal(made.uns["diffbio_alignment"]["pairs"], [[1, 0], [1, 1], [1, 2]])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": "tree"}, ConfigError, "'tree' is not available"),
        ({"n_components": 3}, ConfigError, "n_components does nothing for method 'chain'"),
        ({"alpha": 2.0}, ConfigError, "alpha must be in"),
        ({"n_landmarks": 1}, ConfigError, "n_landmarks must be at least 3"),
        ({"reference": "z"}, MissingKeyError, "no slice 'z'; there are b, a, c"),
        ({"spatial_key": "place"}, MissingKeyError, "obsm has no 'place'"),
        ({"batch_key": "one"}, DataError, "holds 1 slice"),
    ],
)
def test_bad_calls_are_refused(settings, error, message):
    adata = stack()
    adata.obs["one"] = "x"
    with pytest.raises(error, match=message):
        tl.align_slices(adata, **{"batch_key": "slice", **settings})


def test_bad_slices_are_refused():
    adata = stack()
    adata.obsm["spatial"][np.flatnonzero(adata.obs["slice"] == "a")[2], 1] = np.nan
    with pytest.raises(DataError, match="finite, but row 2 of a holds"):
        tl.align_slices(adata, "slice")


def test_figure(chain):
    axes = pl.align_slices(chain)
    assert [ax.get_title() for ax in axes] == ["as given", "aligned", "stack"]
    assert len(axes[2].collections) == 3  # two sets of lines, one of points
    assert [text.get_text() for text in axes[2].get_legend().get_texts()] == ["b", "a", "c"]
    with pytest.raises(MissingKeyError, match="no alignment"):
        pl.align_slices(stack())
    with pytest.raises(MissingKeyError):
        pl.align_slices(chain, color="nothing")
    plt.close("all")
