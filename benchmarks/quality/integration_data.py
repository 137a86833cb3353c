"""The four integration data sets, prepared once and read identically by every method.

Preparation needs scanpy and scikit-misc (the project's environment and the ``scib`` one
have both); reading a prepared file needs only numpy and scipy, so it works everywhere.

Protocol: cells without a label are dropped (in ``scmix_cell_lines`` also every cell whose
``demuxlet_cls`` is not ``SNG``), genes must be seen in at least three of the cells left, and
at most 2000 highly variable genes are kept (``seurat_v3`` on counts, ``batch_key="batch"``).
Values stay raw counts.

    python -m benchmarks.quality.integration_data      # prepare every data set
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

DATASETS = (
    "pbmc_three_chemistries",
    "scmix_cell_lines",
    "kang_pbmc_ifnb",
    "pancreas_human_mouse",
)
SEEDS = (0, 1, 2)
N_TOP_GENES = 2000
MIN_CELLS = 3

REPO = Path(__file__).resolve().parents[2]
CACHE = REPO / "benchmarks" / "cache" / "integration"
RESULTS = REPO / "benchmarks" / "results"


@dataclass(frozen=True)
class IntegrationData:
    """Counts of one data set with its batches and cell types as integer codes."""

    name: str
    counts: sp.csr_matrix
    batch: np.ndarray
    batch_names: np.ndarray
    cell_type: np.ndarray
    cell_type_names: np.ndarray
    genes: np.ndarray

    @property
    def n_batches(self) -> int:
        """Number of batches."""
        return len(self.batch_names)

    @property
    def n_cell_types(self) -> int:
        """Number of labelled cell types."""
        return len(self.cell_type_names)

    def fingerprint(self) -> str:
        """Short hash of genes, counts, batches and labels; equal for every method."""
        digest = hashlib.sha256("\n".join(self.genes).encode())
        for part in (self.counts.indptr, self.counts.indices, self.counts.data):
            digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
        for codes in (self.batch, self.cell_type):
            digest.update(np.ascontiguousarray(codes, dtype=np.int64).tobytes())
        return digest.hexdigest()[:12]


def data_dir() -> Path:
    """Folder of the h5ad files: ``$DIFFBIO_DATA``, else ``../shared/data`` of the repository."""
    return Path(os.environ.get("DIFFBIO_DATA") or REPO.parent / "shared" / "data")


def prepare(name: str) -> IntegrationData:
    """Read one h5ad file and apply the protocol in the module's docstring."""
    import anndata
    import scanpy as sc

    adata = anndata.read_h5ad(data_dir() / f"{name}.h5ad")
    keep = adata.obs["cell_type"].notna().to_numpy()
    if name == "scmix_cell_lines":
        keep = keep & (adata.obs["demuxlet_cls"] == "SNG").to_numpy()
    adata = adata[keep].copy()
    sc.pp.filter_genes(adata, min_cells=MIN_CELLS)
    adata.obs["batch"] = adata.obs["batch"].astype(str).astype("category")
    if adata.n_vars > N_TOP_GENES:
        sc.pp.highly_variable_genes(adata, n_top_genes=N_TOP_GENES, flavor="seurat_v3", batch_key="batch")
        adata = adata[:, adata.var["highly_variable"].to_numpy()].copy()
    counts = sp.csr_matrix(adata.X, dtype=np.float32)
    counts.sort_indices()
    if (counts.data != np.round(counts.data)).any() or counts.min() < 0:
        raise ValueError(f"{name}: the matrix does not hold raw counts")
    batch_names, batch = np.unique(adata.obs["batch"].astype(str), return_inverse=True)
    type_names, cell_type = np.unique(adata.obs["cell_type"].astype(str), return_inverse=True)
    return IntegrationData(
        name=name,
        counts=counts,
        batch=batch.astype(np.int32),
        batch_names=batch_names.astype(str),
        cell_type=cell_type.astype(np.int32),
        cell_type_names=type_names.astype(str),
        genes=np.asarray(adata.var_names, dtype=str),
    )


def load(name: str) -> IntegrationData:
    """Return a prepared data set from the cache, preparing it on first use."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    path = CACHE / f"{name}.npz"
    if not path.exists():
        _save(prepare(name), path)
    with np.load(path) as file:
        counts = sp.csr_matrix((file["data"], file["indices"], file["indptr"]), shape=tuple(file["shape"]))
        fields = ("batch", "batch_names", "cell_type", "cell_type_names", "genes")
        return IntegrationData(name=name, counts=counts, **{key: file[key] for key in fields})


def halves(data: IntegrationData, seed: int, turn: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the seen and of the unseen cells: half of every batch each, at random; turn 1 is the other way round."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(data.batch == batch)) for batch in range(data.n_batches)]
    seen = np.concatenate([some[: (len(some) + 1) // 2] for some in rows])
    first, second = np.sort(seen), np.setdiff1d(np.arange(len(data.batch)), seen)
    return (second, first) if turn else (first, second)


def half_path(dataset: str, method: str, seed: int, turn: int) -> Path:
    """File that holds where a method that learned from one half of the cells puts those of the other."""
    return CACHE / "halves" / f"{dataset}__{method}__{seed}_{turn}.npz"


def embedding_path(dataset: str, method: str, seed: int) -> Path:
    """File that holds one method's embedding (and clusters) of one data set and seed."""
    return CACHE / "embeddings" / f"{dataset}__{method}__{seed}.npz"


def save_embedding(dataset: IntegrationData, method: str, seed: int, **arrays: object) -> Path:
    """Write one embedding with the fingerprint of the data it was computed from."""
    path = embedding_path(dataset.name, method, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, fingerprint=dataset.fingerprint(), **arrays)
    temporary.replace(path)
    return path


def _save(dataset: IntegrationData, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
    np.savez_compressed(
        temporary,
        data=dataset.counts.data,
        indices=dataset.counts.indices,
        indptr=dataset.counts.indptr,
        shape=np.asarray(dataset.counts.shape),
        batch=dataset.batch,
        batch_names=dataset.batch_names,
        cell_type=dataset.cell_type,
        cell_type_names=dataset.cell_type_names,
        genes=dataset.genes,
    )
    temporary.replace(path)


def main() -> None:
    """Prepare every data set and print its size and fingerprint."""
    for name in DATASETS:
        data = load(name)
        print(
            f"{name}: {data.counts.shape[0]} cells x {data.counts.shape[1]} genes, "
            f"{data.n_batches} batches, {data.n_cell_types} cell types, {data.fingerprint()}"
        )


if __name__ == "__main__":
    main()
