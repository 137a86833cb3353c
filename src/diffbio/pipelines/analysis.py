"""What an analysis found: results by their places, and what to say of them."""

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from .. import slots
from ..data.droplets import Soup
from ..data.plain import plain
from ..data.source import Source
from ..data.write import RowStream, add_results
from ..errors import DataWarning
from ..history import History
from ..math.neighbors import knn
from .inference import apply_in_chunks, column, joined
from .single_cell import SingleCellPipeline

if TYPE_CHECKING:
    from anndata import AnnData

LOOKED_AT = 5_000  # cells at most, to tell whether batches mix
UNMIXED = 0.05  # share of the neighbours in other batches, relative to that of cells in any order


@dataclasses.dataclass
class Prepared:
    """Data that are ready to train on."""

    source: Source
    genes: np.ndarray  # column numbers in the data
    names: tuple[str, ...]  # of these genes
    n_genes: int
    batches: list[str]
    labels: np.ndarray | None  # codes of the known labels, -1 for the others
    skipped: dict[str, str]
    counts: dict[str, float]
    present: Any = slice(None)  # of the pipeline's genes those that the data have
    soup: Soup | None = None  # read from all droplets


@dataclasses.dataclass
class Analysis:
    """A fitted pipeline with the data that it was fitted to, or that were projected by it."""

    pipeline: SingleCellPipeline
    prepared: Prepared
    history: History | None  # None: the data were projected
    record: dict[str, Any]  # of uns["diffbio"]["pipeline"]
    n_clusters: int = 0  # known when there are results
    notes: list[str] = dataclasses.field(default_factory=list)  # what the results show to be doubtful

    def results(self, *, normalized: bool = False) -> dict[str, Any]:
        """What `write_results` and `add_results` take: place -> values; layers are computed while written."""
        source, parts = self.prepared.source, self.pipeline.provided()
        small = [key for key in parts if key not in ("normalized", "decontaminated_counts")]
        arrays = {key: np.empty((source.n_cells, 0), np.float32) for key in small}
        start = 0
        ambient = self.pipeline.ambient_removal
        for chunk in apply_in_chunks(self.pipeline, source, small):
            stop = start + len(chunk["latent"])
            for key in small:
                if start == 0:
                    arrays[key] = np.empty((source.n_cells, chunk[key].shape[1]), np.float32)
                arrays[key][start:stop] = chunk[key]
            start = stop
        results: dict[str, Any] = {self._place(key): values for key, values in arrays.items()}
        if "cluster_assignments" in arrays:
            self.n_clusters = arrays["cluster_assignments"].shape[1]
            self._score(arrays["cluster_assignments"])
            if self.pipeline.config.clustering == "kmeans":
                self._look_for_small(arrays["cluster_assignments"])
        if self.pipeline.config.enable_batch_correction:
            self._look_for_unmixed(arrays[self.pipeline.final_embedding], column(source, "batch_labels"))
        if ambient is not None:
            found = joined(apply_in_chunks(ambient, source, ["contamination_fraction"]))
            results[f"obs/{slots.AMBIENT_FRACTION}"] = found["contamination_fraction"]
            results["decontaminated_counts"] = self._layer("decontaminated_counts")
        if self.prepared.soup is not None:
            results[f"var/{slots.AMBIENT_PROFILE}"] = self.prepared.soup.profile
        if normalized:
            results["normalized"] = self._layer("normalized")
        if len(self.prepared.genes) < self.prepared.n_genes:
            chosen = np.zeros(self.prepared.n_genes, bool)
            chosen[self.prepared.genes] = True
            results[f"var/{slots.VARIABLE}"] = chosen
            if ambient is not None or normalized:
                n_genes = len(self.prepared.genes)
                self.record["layers"] = f"of the {n_genes:,} variable genes; the others are empty there"
        return results | {"uns/diffbio/pipeline": self.record}

    def add_to(self, adata: "AnnData", *, normalized: bool = False) -> None:
        """Adds the results to an AnnData in memory."""
        results = self.results(normalized=normalized)
        for note in self.notes:
            warnings.warn(note, DataWarning, stacklevel=3)
        for key, value in results.items():
            if isinstance(value, RowStream):
                blocks = [sparse.csr_array(block) for block in value.chunks]
                results[key] = _widened(sparse.vstack(blocks, format="csr"), self.prepared)
        add_results(adata, results)

    def summary(self) -> list[str]:
        """What came out, in a few lines."""
        n_genes, n_cells = self.pipeline.config.n_genes, self.prepared.source.n_cells
        clusters = f", {self.n_clusters} clusters" if self.n_clusters else ""
        lines = [
            f"{n_cells:,} cells, {n_genes:,} genes{clusters}; "
            f"{self.record['seconds']:.0f} s on {self.record['device']}"
        ]
        if scores := self.record.get("scores"):
            shown = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
            lines.append(
                f"clusters against {self.record['params']['label_key']}: {shown} "
                "(1 is the same; ARI of chance is 0)"
            )
        if "layers" in self.record:
            lines.append(f"layers are {self.record['layers']} (var[{slots.VARIABLE!r}])")
        lines += [f"note: {note}" for note in self.notes]
        return lines + [f"not run: {stage} ({reason})" for stage, reason in self.prepared.skipped.items()]

    def _score(self, assignments: np.ndarray) -> None:
        """Compares the clusters with the known labels."""
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

        labels = self.prepared.labels
        if labels is None:
            return
        found, known = assignments[labels >= 0].argmax(axis=1), labels[labels >= 0]
        scores = {"ARI": adjusted_rand_score(known, found), "NMI": normalized_mutual_info_score(known, found)}
        self.record["scores"] = {name: float(score) for name, score in scores.items()}

    def _look_for_small(self, assignments: np.ndarray) -> None:
        """Notes clusters of less than two cells: more were asked for than these cells hold."""
        n_cells, n_clusters = assignments.shape
        sizes = np.bincount(assignments.argmax(axis=1), minlength=n_clusters)
        n_small = int((sizes < 2).sum())
        if n_small and n_cells > 1:
            self._note(f"{n_small} of {n_clusters} clusters have less than 2 cells; ask for fewer (n_clusters)")

    def _look_for_unmixed(self, embedding: np.ndarray, batches: np.ndarray) -> None:
        """Notes batches whose cells have hardly a neighbour in another batch, as if nothing had been corrected."""
        some = np.random.default_rng(0).permutation(len(batches))[:LOOKED_AT]
        embedding, batches = embedding[some], batches[some]
        mixed = 1 - ((np.bincount(batches) / len(batches)) ** 2).sum()
        if len(batches) < 2 or mixed == 0:
            return
        near = knn(embedding, min(15, len(batches) - 1)).indices
        share = float((batches[near] != batches[:, None]).mean())
        if share < UNMIXED * mixed:
            self._note(
                f"the batches stay apart after the correction: {share:.1%} of the neighbours of a cell are of another "
                f"batch, where all were mixed it would be {mixed:.0%}; if the batches hold the same kinds of cells, "
                "clusters do not compare across them"
            )

    def _note(self, note: str) -> None:
        self.notes.append(note)
        self.record["warnings"] = plain(list(dict.fromkeys([*map(str, self.record["warnings"]), note])))

    def _place(self, key: str) -> str:
        """Where the results of a stage go that has alternatives: under the name of the one that ran."""
        config = self.pipeline.config
        names = {"corrected_embeddings": config.integration, "embeddings_2d": config.embedding}
        return f"obsm/X_diffbio_{names[key]}" if key in names else key

    def _layer(self, key: str) -> RowStream:
        present = self.prepared.present
        chunks = (chunk[key][:, present] for chunk in apply_in_chunks(self.pipeline, self.prepared.source, [key]))
        return RowStream(chunks, self.prepared.genes)


def _widened(rows: Any, prepared: Prepared) -> Any:
    """A sparse matrix of the chosen genes as one of all genes, the others empty."""
    indices = prepared.genes[rows.indices]
    return sparse.csr_matrix((rows.data, indices, rows.indptr), shape=(rows.shape[0], prepared.n_genes))
