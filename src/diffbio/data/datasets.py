"""Data to try things on: real cells that scanpy carries, and simulated counts of any size."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from scipy import sparse

from ..errors import ConfigError, InputFileError
from .read import quiet, read
from .stream import RowStream, write_stream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from numpy.typing import NDArray


def pbmc68k() -> AnnData:
    """Load 700 peripheral blood cells x 765 genes with their UMI counts, from the installed scanpy.

    A subset of the 68,000 PBMCs of Zheng et al. 2017 (Nat. Commun. 8:14049), as in
    `scanpy.datasets.pbmc68k_reduced`. That keeps log(1 + counts per 10,000); the counts come back as
    expm1(raw.X) * n_counts / 10,000, which is within 0.09 of a whole number everywhere.

    Returns
    -------
    AnnData with counts in X (CSR, float32, whole numbers), `obs["cell_type"]` (10 populations, by correlation
    with sorted cells), `obs["n_counts"]` (of all genes, before the 765 were chosen), `obs["percent_mito"]`.
    One run: there is no batch.

    Raises
    ------
    InputFileError : scanpy is not installed, or has no such file.
    """
    import pandas as pd
    from anndata import AnnData

    spec = importlib.util.find_spec("scanpy")  # finds the folder without the seconds that importing takes
    if spec is None or spec.origin is None:
        msg = "pbmc68k: scanpy is not installed, which carries the data; run: pip install scanpy"
        raise InputFileError(msg)
    stored = read(Path(spec.origin).parent / "datasets" / "10x_pbmc68k_reduced.h5ad")
    logged = cast("Any", sparse.csr_matrix)(stored.raw.X, dtype=np.float64)
    total = stored.obs["n_counts"].to_numpy(np.float64)
    counts = np.rint(np.expm1(logged.data) * np.repeat(total, np.diff(logged.indptr)) / 1e4)
    matrix = cast("Any", sparse.csr_matrix)(
        (counts.astype(np.float32), logged.indices, logged.indptr), shape=logged.shape
    )
    matrix.eliminate_zeros()
    obs = pd.DataFrame(
        {
            "cell_type": stored.obs["bulk_labels"],
            "n_counts": total.astype(np.float32),
            "percent_mito": stored.obs["percent_mito"].to_numpy(np.float32),
        },
        index=stored.obs_names.astype(str),
    )
    obs.index.name = None
    var = pd.DataFrame(index=pd.Index(stored.raw.var_names.astype(str), name=None))
    with quiet():
        return AnnData(matrix, obs=obs, var=var)


def stream_counts(
    path: str | Path,
    n_cells: int,
    n_genes: int,
    *,
    n_types: int = 8,
    n_batches: int = 2,
    density: float = 0.1,
    dispersion: float = 2.0,
    seed: int = 0,
    chunk_rows: int = 1024,
) -> Path:
    """Simulate counts and write them chunk by chunk as CSR to a .h5ad; memory does not grow with `n_cells`.

    x_ij ~ NB(mean = s_i * mu_j * exp(type effect + batch effect), theta): library sizes s are log-normal (sd
    0.4), each type raises 1 gene in 20 fourfold, a batch scales every gene by a log-normal factor (sd 0.3).

    Parameters
    ----------
    path
        The .h5ad to write; replaced if it exists.
    n_cells, n_genes, n_types, n_batches
        Sizes; type and batch of a cell are drawn evenly: `obs["cell_type"]`, `obs["batch"]`.
    density
        Fraction of non-zero counts aimed at, in (0, 1).
    dispersion
        theta of the negative binomial: variance = mean + mean^2 / theta.
    seed
        Same seed, same file content.
    chunk_rows
        Cells made at a time.

    Raises
    ------
    ConfigError : a size below 1, density outside (0, 1), or dispersion not above 0.
    """
    if min(n_cells, n_genes, n_types, n_batches, chunk_rows) < 1 or not 0 < density < 1 or dispersion <= 0:
        msg = (
            "stream_counts: sizes must be at least 1, density in (0, 1), dispersion above 0; got "
            f"n_cells={n_cells}, n_genes={n_genes}, n_types={n_types}, n_batches={n_batches}, "
            f"chunk_rows={chunk_rows}, density={density}, dispersion={dispersion}"
        )
        raise ConfigError(msg)
    import h5py
    import pandas as pd
    from anndata.io import write_elem

    rng = np.random.default_rng(seed)
    kind, batch = rng.integers(n_types, size=n_cells), rng.integers(n_batches, size=n_cells)
    level = rng.normal(0.0, 1.5, n_genes)
    by_type = np.where(rng.random((n_types, n_genes)) < 0.05, np.log(4.0), 0.0)
    by_batch = rng.normal(0.0, 0.3, (n_batches, n_genes))
    level += _level_for(density, level, dispersion)
    by_type, by_batch = (level + by_type).astype(np.float32), by_batch.astype(np.float32)

    def made() -> Iterator[NDArray[np.float32]]:
        for start in range(0, n_cells, chunk_rows):
            here = slice(start, min(start + chunk_rows, n_cells))
            size = rng.normal(0.0, 0.4, len(kind[here])).astype(np.float32)[:, None]
            mean = np.exp(by_type[kind[here]] + by_batch[batch[here]] + size) / np.float32(dispersion)
            mean *= rng.standard_gamma(dispersion, mean.shape, dtype=np.float32)
            yield rng.poisson(mean).astype(np.float32)

    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical([f"type_{k}" for k in kind]),
            "batch": pd.Categorical([f"batch_{b}" for b in batch]),
        },
        index=[f"cell_{i}" for i in range(n_cells)],
    )
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for slot in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
            write_elem(cast("Any", file), slot, {})
        write_elem(cast("Any", file), "obs", obs)
        write_elem(cast("Any", file), "var", pd.DataFrame(index=[f"gene_{j}" for j in range(n_genes)]))
        write_stream(file, "X", RowStream(made(), np.arange(n_genes)), (n_cells, n_genes), "X")
    return Path(path)


def _level_for(density: float, level: NDArray[np.float64], theta: float) -> float:
    """Return the shift of log means at which a fraction `density` of counts is non-zero, by bisection."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        nonzero = 1.0 - (1.0 + np.exp(level + middle) / theta) ** -theta
        low, high = (middle, high) if nonzero.mean() < density else (low, middle)
    return low
