"""One analysis of one data set: checks, choice of genes, training, results with their provenance."""

import dataclasses
import difflib
import functools
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from .. import slots
from ..data.genes import highly_variable_genes
from ..data.guard import sniff
from ..data.names import batch_codes, label_codes
from ..data.plain import plain
from ..data.provenance import provenance
from ..data.read import read
from ..data.source import Source, as_source, counts_of
from ..data.tables import tables_of
from ..data.validate import check_ambient_profile, check_counts
from ..data.write import RowStream, add_results
from ..errors import ConfigError, DataWarning, MissingKeyError
from ..fitting import fit
from ..history import History
from ..operators.base import Config, Operator, _is_a, _say_type, nonnegative, positive
from ..operators.normalization.umap import UMAPConfig
from ..recording import recording
from ..train import Settings
from .inference import apply_in_chunks, joined
from .memory import check_memory
from .single_cell import SingleCellPipeline, SingleCellPipelineConfig, create_single_cell_pipeline

FROM_DATA = frozenset({"n_genes", "n_batches"})  # fields of the pipeline's config that the data decide
FEWEST_FOR_MAP = UMAPConfig().n_neighbors
STAGES = {
    "ambient removal": "ambient_removal",
    "normalisation": "vae_normalizer",
    "batch correction": "batch_correction",
    "UMAP": "dim_reduction",
    "clustering": "clustering",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(Config):
    """What an analysis does with a data set, besides the settings of the pipeline and of its training.

    batch_key: column of `obs`; None, or a column with one value, skips the batch correction.
    label_key: column of `obs` that the clusters are compared with; training does not see it.
    layer: of the counts; None is X.
    ambient_profile: column of `var` with the soup's gene fractions. None takes "ambient_profile" if it is
        there; without it the ambient removal is skipped.
    n_top_genes: variable genes to use (seurat_v3, batch by batch); None uses all.
    allow_non_integer: accepts values that are not whole, such as counts after a correction.
    seed: of everything drawn at random.
    """

    batch_key: str | None = None
    label_key: str | None = None
    layer: str | None = None
    ambient_profile: str | None = None
    n_top_genes: int | None = positive(2000)
    allow_non_integer: bool = False
    seed: int = nonnegative(0)


def known_settings() -> dict[str, type[Any]]:
    """Every setting that `analyse` takes, with the class it belongs to."""
    return {
        field.name: owner
        for owner in (Settings, SingleCellPipelineConfig, RunSettings)
        for field in dataclasses.fields(owner)
        if field.name not in FROM_DATA
    }


def sorted_out(settings: Mapping[str, Any]) -> tuple[RunSettings, dict[str, Any], dict[str, Any]]:
    """`settings` divided into those of the run, of the pipeline and of the training, the values checked.

    Raises:
        ConfigError: a setting is unknown, naming the nearest one, or out of range.
    """
    known = known_settings()
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}."
            msg = f"unknown setting {name!r}; {hint}"
            raise ConfigError(msg)
    parts: dict[type[Any], dict[str, Any]] = {RunSettings: {}, SingleCellPipelineConfig: {}, Settings: {}}
    for name, value in settings.items():
        owner = known[name]
        value = tuple(value) if isinstance(value, list) else value
        hint = typing.get_type_hints(owner)[name]
        if not _is_a(value, hint):
            msg = f"{name} must be {_say_type(hint)}, got {value!r}."
            raise ConfigError(msg)
        parts[owner][name] = value
    for owner, given in parts.items():
        owner(**given)  # checks the ranges
    return RunSettings(**parts[RunSettings]), parts[SingleCellPipelineConfig], parts[Settings]


def analyse(
    data: AnnData | str | Path,
    *,
    on_disk: bool = False,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
    **settings: Any,
) -> "Analysis":
    """Checks `data`, chooses genes, and trains a `SingleCellPipeline` on them.

    Args:
        data: an AnnData, or the path of a file.
        on_disk: leaves the matrices of a .h5ad or .zarr where they are.
        checkpoint: folder for `diffbio.fit` to save to.
        resume: goes on from it.
        force: goes on even if settings are others by now.
        progress: shows how training goes.
        settings: fields of `RunSettings`, `SingleCellPipelineConfig` (without n_genes and n_batches) and
            `diffbio.train.Settings`.

    Raises:
        ConfigError: a setting is unknown or does not fit the data.
        DataError: the data are not what they should be.
    """
    run, pipeline_settings, training = sorted_out(settings)
    with recording() as record:
        origin = data
        if isinstance(data, str | Path) and not (on_disk and sniff(Path(data)) in ("h5ad", "zarr")):
            data = read(data)
        prepared = prepare(data, run)
        pipeline = _pipeline_for(prepared, pipeline_settings, run, training.get("batch_size", Settings.batch_size))
        history = fit(
            pipeline,
            prepared.source,
            checkpoint=checkpoint,
            resume=resume,
            force=force,
            progress=progress,
            seed=run.seed,
            **training,
        )
    params = {**dataclasses.asdict(run), **dataclasses.asdict(pipeline.config), **training}
    entry = provenance(
        params=params,
        seed=run.seed,
        data=origin,
        converged=history.stopped_early,
        unfitted=[s for s, op in _stages(pipeline).items() if not op.fitted],
        skipped=[f"{stage}: {reason}" for stage, reason in prepared.skipped.items()],
        **record,
    )
    entry |= {"counts": prepared.counts, "batches": plain(prepared.batches), "history": _columns(history)}
    if isinstance(origin, str | Path):
        entry["input"] = Path(origin).name
    return Analysis(pipeline, prepared, history, entry)


@dataclasses.dataclass
class Prepared:
    """Data that are ready to train on."""

    source: Source
    genes: np.ndarray  # column numbers in the order of the data
    n_genes: int
    batches: list[str]
    labels: np.ndarray | None  # codes of the known labels, -1 for the others
    skipped: dict[str, str]
    counts: dict[str, float]


def prepare(data: AnnData | str | Path, run: RunSettings) -> Prepared:
    """Checks counts, names, batches and ambient profile, and chooses the genes.

    Raises:
        DataError: naming what is wrong.
    """
    skipped: dict[str, str] = {}
    obs, var, names, _, _ = tables_of(data)
    if run.layer is not None and run.layer not in names["layers"]:
        others = ", ".join(names["layers"])
        fix = f"it has {others}; name one of them (--layer)" if others else "there are none"
        msg = f"layers has no {run.layer!r}; {fix}, or leave the layer out to use X"
        raise MissingKeyError(msg)
    matrix = counts_of(data, layer=run.layer)
    summary = check_counts(
        matrix,
        name="X" if run.layer is None else f"layers[{run.layer!r}]",
        obs_names=obs.index,
        var_names=var.index,
        uns=names["uns"] if run.layer is None else (),
        allow_non_integer=run.allow_non_integer,
    )
    places = {"counts": "X" if run.layer is None else f"layers/{run.layer}"}
    codes: np.ndarray | None = None
    batches: list[str] = []
    if run.batch_key is None:
        skipped["batch correction"] = "no batch key was given"
    else:
        codes, batches = batch_codes(obs, run.batch_key)
        if len(batches) > 1:
            places["batch_labels"] = f"obs/{run.batch_key}"
        else:
            skipped["batch correction"] = f"obs[{run.batch_key!r}] holds one batch"
    labels = None if run.label_key is None else label_codes(obs, run.label_key)[0]
    genes = np.arange(matrix.shape[1])
    if run.n_top_genes is not None and run.n_top_genes < len(genes):
        found = highly_variable_genes(matrix, n_top_genes=run.n_top_genes, batch_labels=codes)
        genes = np.flatnonzero(found["highly_variable"].to_numpy())
    profile = _profile(var, run.ambient_profile)
    if profile is None:
        skipped["ambient removal"] = (
            f"no ambient profile is known: var has no column {slots.AMBIENT_PROFILE!r}, and none was named"
        )
    else:
        places["ambient_profile"] = f"var/{run.ambient_profile or slots.AMBIENT_PROFILE}"
        check_ambient_profile(profile, matrix.shape[1])
    source: Any = as_source(
        data,
        cell_keys={"counts", "batch_labels"},
        constant_keys={"ambient_profile"},
        mapping=places,
        genes=None if len(genes) == matrix.shape[1] else genes,
    )
    if profile is not None:  # the soup of the chosen genes sums to 1 again
        soup = source.constants["ambient_profile"]
        source.constants["ambient_profile"] = soup / soup.sum()
    counts = {
        "cells": summary.n_cells,
        "genes": summary.n_genes,
        "total": summary.total,
        "largest": summary.maximum,
        "nonzero": summary.n_nonzero,
    }
    return Prepared(source, genes, matrix.shape[1], batches, labels, skipped, counts)


def _profile(var: pd.DataFrame, column: str | None) -> np.ndarray | None:
    if column is not None and column not in var:
        msg = f"var has no column {column!r}; it has {', '.join(map(str, var.columns)) or 'none'}"
        raise MissingKeyError(msg)
    name = column or slots.AMBIENT_PROFILE
    return var[name].to_numpy() if name in var else None


def _pipeline_for(
    prepared: Prepared, settings: Mapping[str, Any], run: RunSettings, batch_size: int = Settings.batch_size
) -> SingleCellPipeline:
    switches = {"ambient removal": "enable_ambient_removal", "batch correction": "enable_batch_correction"}
    given = dict(settings)
    n_cells = prepared.source.n_cells
    if n_cells < FEWEST_FOR_MAP:
        prepared.skipped["UMAP"] = f"a neighbourhood is {FEWEST_FOR_MAP} cells, and there are {n_cells}"
    for stage, switch in switches.items():
        if stage in prepared.skipped and given.get(switch) is True:
            msg = f"{switch} is True, but {prepared.skipped[stage]}."
            raise ConfigError(msg)
    for stage, attribute in {
        **switches,
        "UMAP": "enable_dim_reduction",
        "clustering": "enable_clustering",
    }.items():
        if given.get(attribute, True) is False:
            prepared.skipped[stage] = "switched off"
        given[attribute] = stage not in prepared.skipped
    given |= {"n_genes": len(prepared.genes), "n_batches": max(1, len(prepared.batches)), "seed": run.seed}
    make = functools.partial(create_single_cell_pipeline, **given)
    check_memory(make, given["n_genes"], min(batch_size, n_cells))
    pipeline = make()
    if given["enable_clustering"] and pipeline.config.n_clusters > n_cells:
        msg = f"n_clusters must be at most the number of cells, {n_cells}, got {pipeline.config.n_clusters}."
        raise ConfigError(msg)
    return pipeline


def _stages(pipeline: SingleCellPipeline) -> dict[str, Operator]:
    """The enabled stages by the names that users read."""
    parts = {name: getattr(pipeline, attribute) for name, attribute in STAGES.items()}
    return {name: part for name, part in parts.items() if part is not None}


def _columns(history: History) -> dict[str, np.ndarray]:
    """The history as columns; a number that a stage does not have is NaN."""
    names = list(dict.fromkeys(name for row in history.rows for name in row))
    return {
        name: np.asarray(
            [
                str(row.get(name, "")) if name == "stage" else float(row.get(name, np.nan))
                for row in history.rows
            ]
        )
        for name in names
    }


@dataclasses.dataclass
class Analysis:
    """A fitted pipeline with the data it was fitted to."""

    pipeline: SingleCellPipeline
    prepared: Prepared
    history: History
    record: dict[str, Any]  # of uns["diffbio"]["pipeline"]
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
        results: dict[str, Any] = dict(arrays)
        if "cluster_assignments" in arrays:
            self._score(arrays["cluster_assignments"])
            self._look_for_small(arrays["cluster_assignments"])
        if ambient is not None:
            found = joined(apply_in_chunks(ambient, source, ["contamination_fraction"]))
            results[f"obs/{slots.AMBIENT_FRACTION}"] = found["contamination_fraction"]
            results["decontaminated_counts"] = self._layer("decontaminated_counts")
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

    def add_to(self, adata: AnnData, *, normalized: bool = False) -> None:
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
        clusters = (
            f", {self.pipeline.config.n_clusters} clusters" if self.pipeline.clustering is not None else ""
        )
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
            self.notes = [f"{n_small} of {n_clusters} clusters have less than 2 cells; ask for fewer (n_clusters)"]
            self.record["warnings"] = plain(list(dict.fromkeys([*map(str, self.record["warnings"]), *self.notes])))

    def _layer(self, key: str) -> RowStream:
        chunks = (chunk[key] for chunk in apply_in_chunks(self.pipeline, self.prepared.source, [key]))
        return RowStream(chunks, self.prepared.genes)


def _widened(rows: Any, prepared: Prepared) -> Any:
    """A sparse matrix of the chosen genes as one of all genes, the others empty."""
    indices = prepared.genes[rows.indices]
    return sparse.csr_matrix((rows.data, indices, rows.indptr), shape=(rows.shape[0], prepared.n_genes))
