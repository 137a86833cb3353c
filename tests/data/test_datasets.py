import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from diffbio.data import check_counts, counts_of, pbmc68k, read, stream_counts
from diffbio.errors import ConfigError


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the file is of anndata 0.6
def test_real_cells_with_their_counts():
    adata = pbmc68k()
    assert adata.shape == (700, 765)
    assert check_counts(adata.X, obs_names=adata.obs_names, var_names=adata.var_names).total == 486_651
    assert adata.X.dtype == np.float32
    assert adata.obs["cell_type"].nunique() == 10
    assert "batch" not in adata.obs
    # 765 genes of a cell hold part of all its molecules
    share = adata.X.sum(axis=1).A1 / adata.obs["n_counts"]
    assert 0.05 < share.min() < share.max() < 1
    # markers are where they belong
    mean = adata.to_df().groupby(adata.obs["cell_type"], observed=True).mean()
    assert mean["CD79A"].idxmax() == "CD19+ B"
    assert mean["LYZ"].idxmax() in ("CD14+ Monocyte", "Dendritic")


def test_imports_stay_light():
    code = """
import sys, warnings
warnings.simplefilter("ignore")
import diffbio.data
heavy = {"jax", "pandas", "anndata", "h5py", "zarr", "scanpy", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
diffbio.data.pbmc68k()
assert not {"jax", "scanpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_simulated_counts(tmp_path):
    path = stream_counts(tmp_path / "a.h5ad", 3000, 200, chunk_rows=700)
    adata = read(path)
    assert adata.shape == (3000, 200)
    assert adata.obs["cell_type"].nunique() == 8
    assert adata.obs["batch"].nunique() == 2
    assert adata.X.nnz / 600_000 == pytest.approx(0.1, rel=0.25)  # types, batches and sizes add to it
    x = adata.X.toarray()[(adata.obs["cell_type"] == "type_0") & (adata.obs["batch"] == "batch_0")]
    mean, variance = x.mean(axis=0), x.var(axis=0)
    high = mean > 0.5
    # NB with theta 2 times log-normal sizes of sd 0.4: variance = mean + mean^2 (1.5 exp(0.16) - 1)
    ratio = (variance[high] - mean[high]) / mean[high] ** 2
    assert np.median(ratio) == pytest.approx(1.5 * np.exp(0.16) - 1, rel=0.3)
    again = read(stream_counts(tmp_path / "b.h5ad", 3000, 200, chunk_rows=700))
    assert (again.X != adata.X).nnz == 0


def test_simulation_and_its_check_need_memory_for_one_chunk(tmp_path):
    tracemalloc.start()
    stream_counts(tmp_path / "a.h5ad", 8000, 100, chunk_rows=100)
    check_counts(counts_of(tmp_path / "a.h5ad"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 << 20  # dense float32 would be 3.2 MB, the names and labels of the cells are 2 MB


def test_settings_out_of_range(tmp_path):
    for wrong in ({"n_types": 0}, {"density": 1.0}, {"dispersion": 0.0}):
        with pytest.raises(ConfigError, match="stream_counts"):
            stream_counts(tmp_path / "a.h5ad", 10, 10, **wrong)
