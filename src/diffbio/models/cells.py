"""Cells on their way to a model: counts beside their covariates, and labelled cells beside each minibatch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from ..data.device_source import resident
from ..data.matrix import DiskMatrix
from ..data.names import align_genes
from ..data.source import ArraySource, Source, as_source, counts_of
from ..errors import DataError
from ..parallel import Part, batch_of
from .registry import MINIFIED, Registry, layers_of

if TYPE_CHECKING:
    from anndata import AnnData

LATENT_MEAN, LATENT_VAR, LIBRARY = "X_latent_qzm", "X_latent_qzv", "diffbio_library"  # of a minified AnnData


class CellSource:
    """Counts of a source, which may lie on disk, with columns in memory beside them.

    counts: gives the key "counts"; None for minified cells.
    columns: one row per cell each.
    """

    def __init__(self, counts: Source | None, columns: Mapping[str, np.ndarray], n_cells: int) -> None:
        self.counts, self.columns, self.n_cells = counts, dict(columns), n_cells

    def take(self, rows: np.ndarray) -> dict[str, Any]:
        """The cells `rows`, counts dense."""
        return self._with_columns({} if self.counts is None else self.counts.take(rows), rows)

    def take_sparse(self, rows: np.ndarray) -> dict[str, Any]:
        """The cells `rows`, counts as `SparseRows` where the source can give them so."""
        return self._with_columns({} if self.counts is None else batch_of(self.counts, rows), rows)

    def take_blocks(self, rows: np.ndarray, n_blocks: int, mine: range) -> dict[str, Any]:
        """The blocks `mine` of `rows` cut into n_blocks equal ones, as of `ArraySource`."""
        own = np.concatenate([np.split(rows, n_blocks)[i] for i in mine])
        counts: dict[str, Any] = {}
        if self.counts is not None:
            blocks = getattr(self.counts, "take_blocks", None)
            counts = self.counts.take(own) if blocks is None else blocks(rows, n_blocks, mine)
        return self._with_columns(counts, own)

    @property
    def on_disk(self) -> bool:
        """Whether the counts are."""
        return getattr(self.counts, "on_disk", False)

    def order(self, rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        """`rows` in a random order that is cheap to read."""
        return rng.permutation(rows) if self.counts is None else self.counts.order(rng, rows)

    def _with_columns(self, batch: Mapping[str, Any], rows: np.ndarray) -> dict[str, Any]:
        return {**batch, **{key: column[rows] for key, column in self.columns.items()}}


class LabelledBeside:
    """A source whose batches bring labelled cells along, under `labelled_...` keys.

    Which ones depends on the seed and on the cells of the batch alone, so that a resumed run sees the same.

    source: gives `labels`.
    labelled: rows with a known label to train on.
    held_out: rows of the validation cells.
    labelled_held_out: rows with a known label to validate on; with none, validation sees no labels.
    n_samples_per_label: cells of every label per batch, drawn with replacement; None draws as many labelled
        cells as the batch has cells, or all there are if these are fewer.
    """

    def __init__(
        self,
        source: CellSource,
        labelled: np.ndarray,
        *,
        held_out: np.ndarray,
        labelled_held_out: np.ndarray,
        n_samples_per_label: int | None,
        seed: int,
    ) -> None:
        self.source, self.n_cells, self.seed = source, source.n_cells, seed
        self.n_per_label = n_samples_per_label
        self.is_held_out = np.zeros(source.n_cells, bool)
        self.is_held_out[held_out] = True
        self.labelled, self.labelled_held_out = labelled, labelled_held_out
        codes = source.columns["labels"]
        self.of_label = [labelled[codes[labelled] == code] for code in np.unique(codes[labelled])]

    def take(self, rows: np.ndarray) -> dict[str, Any]:
        """The cells `rows` and labelled ones, counts dense."""
        return self._beside(self.source.take, rows)

    def take_sparse(self, rows: np.ndarray) -> dict[str, Any]:
        """The cells `rows` and labelled ones, counts sparse where the source can."""
        return self._beside(self.source.take_sparse, rows)

    def order(self, rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        """As in the source beneath."""
        return self.source.order(rng, rows)

    def picked(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the labelled cells that go with a batch."""
        rng = np.random.default_rng([self.seed, len(rows), *(int(r) for r in rows[:8])])
        if self.is_held_out[rows[0]]:
            known = self.labelled_held_out
            return rng.permutation(known)[: len(rows)] if len(known) else rows[:1]
        if self.n_per_label is not None:
            return np.concatenate([rng.choice(cells, self.n_per_label) for cells in self.of_label])
        return rng.permutation(self.labelled)[: len(rows)]

    def parts(self, rows: np.ndarray) -> list[Part]:
        """What a batch is made of: the cells `rows`, and the labelled cells that go with them."""
        unlabelled: dict[str, Any] = {}
        picked = self.picked(rows)
        if self.is_held_out[rows[0]] and not len(self.labelled_held_out):  # a code outside: no label at all
            unlabelled = {"labels": np.full(len(picked), np.iinfo(np.int32).max, np.int32)}
        return [Part("", self.source, rows, {}), Part("labelled_", self.source, picked, unlabelled)]

    @property
    def on_disk(self) -> bool:
        """Whether the counts are."""
        return self.source.on_disk

    def _beside(self, take: Any, rows: np.ndarray) -> dict[str, Any]:
        parts = self.parts(rows)
        return {part.prefix + k: v for part in reversed(parts) for k, v in {**take(part.rows), **part.fixed}.items()}


def cells_of(adata: "AnnData", registry: Registry) -> CellSource:
    """The cells of `adata` as the model reads them; the model's genes are found by name.

    Raises:
        DataError: genes, categories or covariates that the model needs are missing.

    Warns:
        DataWarning: some genes are missing and taken as zero.
    """
    columns = registry.columns(adata)
    if MINIFIED in adata.uns:
        columns |= {
            "qz_mean": np.asarray(adata.obsm[LATENT_MEAN], np.float32),
            "qz_var": np.asarray(adata.obsm[LATENT_VAR], np.float32),
            "library": adata.obs[LIBRARY].to_numpy(np.float32),
        }
        return CellSource(None, columns, adata.n_obs)
    return CellSource(_counts(adata, registry), columns, adata.n_obs)


def _counts(adata: "AnnData", registry: Registry) -> Source:
    layer = registry.setup.get("layer")
    if layer is not None and layer not in adata.layers:
        msg = f"{registry.model}: no layer {layer!r}; layers are {layers_of(adata)}."
        raise DataError(msg)
    names = tuple(map(str, adata.var_names))
    place = "X" if layer is None else f"layers/{layer}"
    if adata.isbacked or isinstance(counts_of(adata, layer=layer), DiskMatrix):
        columns = None
        if names != registry.var_names:
            alignment = align_genes(names, registry.var_names)
            if alignment.missing:
                msg = "genes of the model are missing from a file on disk; call adata.to_memory() first."
                raise DataError(msg)
            columns = alignment.columns
        return as_source(adata, cell_keys=("counts",), mapping={"counts": place}, genes=columns)
    matrix = counts_of(adata, layer=layer)
    if names != registry.var_names:
        matrix = align_genes(names, registry.var_names).apply(matrix)
    return resident(ArraySource({"counts": matrix}))


def library_sizes(counts: Source) -> np.ndarray:
    """Sum of the counts of every cell."""
    held = counts.cells["counts"] if isinstance(counts, ArraySource) else None
    if held is not None:
        return np.asarray(held.sum(axis=1), np.float64).ravel()
    parts = [np.arange(s, min(s + 4096, counts.n_cells)) for s in range(0, counts.n_cells, 4096)]
    return np.concatenate([np.asarray(counts.take(part)["counts"]).sum(1, dtype=np.float64) for part in parts])


def counts_of_rows(counts: Source, rows: np.ndarray) -> sparse.csr_array | np.ndarray:
    """The counts of the cells `rows`, in memory."""
    if isinstance(counts, ArraySource):
        held: sparse.csr_array | np.ndarray = counts.cells["counts"][rows]
        return held
    parts = [sparse.csr_array(counts.take(part)["counts"]) for part in np.array_split(rows, -(-len(rows) // 4096))]
    return sparse.vstack(parts, format="csr")
