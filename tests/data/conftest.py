"""Small data and files for the tests of diffbio.data."""

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # anndata 0.13 uses options that pandas 3.1 has deprecated, whenever an AnnData is made or cut
    mark = pytest.mark.filterwarnings("ignore:The '.*' option is deprecated")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(mark)


def make_adata(n_cells: int = 90, n_genes: int = 30, seed: int = 0) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.5, 2.0, (n_cells, n_genes))).astype(np.float32)
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical(rng.choice(["b", "a", "c"], n_cells)),
            "size": rng.random(n_cells).astype(np.float32),
            "note": rng.choice(["x", "y"], n_cells),
        },
        index=[f"cell{i}" for i in range(n_cells)],
    )
    profile = rng.dirichlet(np.ones(n_genes))
    var = pd.DataFrame({"ambient": profile}, index=[f"gene{j}" for j in range(n_genes)])
    adata = ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)
    adata.layers["double"] = sparse.csr_matrix(counts * 2)
    adata.obsm["X_pca"] = rng.normal(size=(n_cells, 4)).astype(np.float32)
    adata.uns["old"] = {"kept": "yes"}
    return adata


@pytest.fixture
def small() -> ad.AnnData:
    return make_adata()


@pytest.fixture
def make() -> Callable[..., ad.AnnData]:
    return make_adata


@pytest.fixture
def h5ad(tmp_path: Path, small: ad.AnnData) -> Path:
    path = tmp_path / "small.h5ad"
    small.write_h5ad(path, compression="gzip", convert_strings_to_categoricals=False)
    return path
