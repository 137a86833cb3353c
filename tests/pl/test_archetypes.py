"""The figure of archetypes: corners, genes, the curve that a number was chosen by."""

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from diffbio import pl
from diffbio.data.transform import shifted_log
from diffbio.errors import DataError, MissingKeyError
from diffbio.math.archetypes import gene_enrichment


@pytest.fixture
def cells():
    """Cells whose genes 0 ... 2 are those of three archetypes."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(3, 0.4), 120)
    rates = np.hstack([20 * weights + 1, np.full((120, 9), 5.0)])
    adata = anndata.AnnData(rng.poisson(rates).astype(np.float32))
    adata.var_names = [f"gene{g}" for g in range(12)]
    adata.obsm["diffbio_archetype_weights"] = weights
    found = gene_enrichment(shifted_log(adata.X), weights)
    adata.varm["diffbio_archetype_genes"], adata.varm["diffbio_archetype_qvalues"] = found.difference.T, found.qvalues.T
    adata.obs["group"] = pd.Categorical(["a", "b"] * 60)
    yield adata
    plt.close("all")


def test_cells_genes_and_numbers(cells):
    polygon, genes = pl.archetypes(cells, n_genes=1)
    assert [text.get_text() for text in genes.get_yticklabels()] == ["gene0", "gene1", "gene2"]
    assert [text.get_text() for text in polygon.texts] == ["A1", "A2", "A3"]
    cells.uns["diffbio"] = {"diffbio_archetypes": {"explained_by_number": np.array([0, 0.6, 0.9, 0.92])}}
    polygon, curve = pl.archetypes(cells, color="group", n_genes=0)
    assert curve.get_title() == "3 archetypes"
    assert [text.get_text() for text in polygon.get_legend().get_texts()] == ["a (60)", "b (60)"]
    points = np.asarray(polygon.collections[0].get_offsets())
    weights = cells.obsm["diffbio_archetype_weights"]
    assert len(points) == 120
    height = weights[:, 0] - 0.5 * weights[:, 1:].sum(axis=1)  # A1 is on top
    np.testing.assert_allclose(np.sort(points[:, 1]), np.sort(height), atol=1e-9)


def test_two_archetypes_are_a_line_and_one_is_nothing(cells):
    weights = cells.obsm["diffbio_archetype_weights"]
    cells.obsm["diffbio_archetype_weights"] = np.column_stack([weights[:, 0], 1 - weights[:, 0]])
    assert len(pl.archetypes(cells, n_genes=0)) == 1
    cells.obsm["diffbio_archetype_weights"] = np.ones((120, 1))
    with pytest.raises(DataError, match="one archetype"):
        pl.archetypes(cells)
    del cells.obsm["diffbio_archetype_weights"]
    with pytest.raises(MissingKeyError, match=r"call tl\.archetypes"):
        pl.archetypes(cells)
