"""One analysis of one data set: checks, choice of genes, training, results with their provenance."""

import dataclasses
import difflib
import functools
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

from .. import slots
from ..data.droplets import soup_of
from ..data.genes import highly_variable_genes
from ..data.guard import sniff
from ..data.names import batch_codes, column_of, label_codes
from ..data.plain import plain
from ..data.provenance import provenance
from ..data.read import read
from ..data.source import as_source, counts_of
from ..data.tables import tables_of
from ..data.validate import check_ambient_profile, check_counts
from ..errors import ConfigError, DataError, MissingKeyError
from ..fitting import fit
from ..operators.base import Config, Operator, _is_a, _say_type, nonnegative, positive
from ..operators.normalization.phate import PHATEConfig
from ..operators.normalization.umap import UMAPConfig
from ..recording import recording
from ..train import Settings
from .analysis import Analysis, Prepared
from .memory import check_memory
from .single_cell import SingleCellPipeline, SingleCellPipelineConfig, create_single_cell_pipeline

FROM_DATA = frozenset({"n_genes", "n_batches"})  # fields of the pipeline's config that the data decide
FEWEST_FOR_MAP = {"umap": UMAPConfig().n_neighbors, "phate": PHATEConfig().n_neighbors + 1}
MAPS = {"umap": "UMAP", "phate": "PHATE"}


def stages_of(config: SingleCellPipelineConfig) -> dict[str, str]:
    """The stages of a pipeline, by the names that users read, and its attributes that hold them."""
    return {
        "ambient removal": "ambient_removal",
        "normalisation": "vae_normalizer",
        "batch correction": "vae_normalizer" if by_vae(config) else "batch_correction",
        MAPS[config.embedding]: "dim_reduction",
        "clustering": "clustering",
    }


def by_vae(config: SingleCellPipelineConfig) -> bool:
    """Whether batches are corrected by the VAE, without a stage of their own."""
    return config.enable_batch_correction and config.integration == "scvi"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(Config):
    """What an analysis does with a data set, besides the settings of the pipeline and of its training.

    batch_key: column of `obs`; None, or a column with one value, skips the batch correction.
    label_key: column of `obs` that the clusters are compared with; training does not see it.
    layer: of the counts; None is X.
    ambient_profile: column of `var` with the soup's gene fractions. None takes "ambient_profile" if it is
        there; without it the ambient removal is skipped.
    raw: file of all droplets, without a choice of cells: those of 1 to 100 counts that hold no cell are the soup.
    n_top_genes: variable genes to use (seurat_v3, batch by batch); None uses all.
    allow_non_integer: accepts values that are not whole, such as counts after a correction.
    seed: of everything drawn at random.
    """

    batch_key: str | None = None
    label_key: str | None = None
    layer: str | None = None
    ambient_profile: str | None = None
    raw: str | None = None
    n_top_genes: int | None = positive(2000)
    allow_non_integer: bool = False
    seed: int = nonnegative(0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.raw is not None and self.ambient_profile is not None:
            msg = "raw and ambient_profile both say what the soup is; give one of them."
            raise ConfigError(msg)


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
) -> Analysis:
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
    entry |= {"counts": prepared.counts, "batches": plain(prepared.batches), "history": history.columns()}
    entry["training"] = plain({stage: dict(chosen) for stage, chosen in history.settings.items()})
    if isinstance(origin, str | Path):
        entry["input"] = Path(origin).name
    pipeline.genes, pipeline.batches = prepared.names, tuple(prepared.batches)
    return Analysis(pipeline, prepared, history, entry)


def prepare(data: AnnData | str | Path, run: RunSettings) -> Prepared:
    """Checks counts, names, batches and ambient profile, and chooses the genes.

    Raises:
        DataError: naming what is wrong.
    """
    skipped: dict[str, str] = {}
    found = checked(data, run)
    places, codes, batches = dict(found.places), None, list[str]()
    if run.batch_key is None:
        skipped["batch correction"] = "no batch key was given"
    else:
        codes, batches = batch_codes(found.obs, run.batch_key)
        if len(batches) > 1:
            places["batch_labels"] = f"obs/{run.batch_key}"
        else:
            skipped["batch correction"] = f"obs[{run.batch_key!r}] holds one batch"
    labels = None if run.label_key is None else label_codes(found.obs, run.label_key)[0]
    genes = np.arange(found.matrix.shape[1])
    if run.n_top_genes is not None and run.n_top_genes < len(genes):
        variable = highly_variable_genes(found.matrix, n_top_genes=run.n_top_genes, batch_labels=codes)
        genes = np.flatnonzero(variable["highly_variable"].to_numpy())
    soup = None if run.raw is None else soup_of(run.raw, found.var.index, found.obs.index)
    if soup is None and "ambient_profile" not in places:
        skipped["ambient removal"] = (
            f"no ambient profile is known: var has no column {slots.AMBIENT_PROFILE!r}, and none was named"
        )
    source = opened_source(data, places, genes, found.matrix.shape[1], soup=None if soup is None else soup.profile)
    names = tuple(map(str, found.var.index[genes]))
    return Prepared(source, genes, names, found.matrix.shape[1], batches, labels, skipped, found.counts, soup=soup)


class Checked(NamedTuple):
    """What was found in a data set, with counts that are counts."""

    obs: pd.DataFrame
    var: pd.DataFrame
    matrix: Any
    places: dict[str, str]  # of the counts, and of an ambient profile
    counts: dict[str, float]


def checked(data: AnnData | str | Path, run: RunSettings) -> Checked:
    """Tables and counts of a data set, and its ambient profile.

    Raises:
        DataError: naming what is wrong.
    """
    found = checked_counts(data, layer=run.layer, allow_non_integer=run.allow_non_integer)
    profile = None if run.raw is not None else _profile(found.var, run.ambient_profile)
    if profile is None:
        return found
    check_ambient_profile(profile, found.matrix.shape[1])
    place = f"var/{run.ambient_profile or slots.AMBIENT_PROFILE}"
    return found._replace(places={**found.places, "ambient_profile": place})


def checked_counts(data: AnnData | str | Path, *, layer: str | None, allow_non_integer: bool) -> Checked:
    """Tables and counts of a data set.

    Raises:
        DataError: naming what is wrong.
    """
    obs, var, names, _, _ = tables_of(data)
    if layer is not None and layer not in names["layers"]:
        others = ", ".join(names["layers"])
        fix = f"it has {others}; name one of them (--layer)" if others else "there are none"
        msg = f"layers has no {layer!r}; {fix}, or leave the layer out to use X"
        raise MissingKeyError(msg)
    matrix = counts_of(data, layer=layer)
    summary = check_counts(
        matrix,
        name="X" if layer is None else f"layers[{layer!r}]",
        obs_names=obs.index,
        var_names=var.index,
        uns=names["uns"] if layer is None else (),
        allow_non_integer=allow_non_integer,
    )
    counts = {
        "cells": summary.n_cells,
        "genes": summary.n_genes,
        "total": summary.total,
        "largest": summary.maximum,
        "nonzero": summary.n_nonzero,
    }
    return Checked(obs, var, matrix, {"counts": "X" if layer is None else f"layers/{layer}"}, counts)


def opened_source(
    data: AnnData | str | Path,
    places: Mapping[str, str],
    genes: np.ndarray,
    n_genes: int,
    *,
    soup: np.ndarray | None = None,
) -> Any:
    """The cells with the chosen genes; the soup of those, given or found at its place, sums to 1 again."""
    source: Any = as_source(
        data,
        cell_keys={"counts", "batch_labels"},
        constant_keys={"ambient_profile"},
        mapping=places,
        genes=None if np.array_equal(genes, np.arange(n_genes)) else genes,
    )
    if soup is not None:
        source.keys = (*source.keys, "ambient_profile")
        source.constants["ambient_profile"] = soup[genes].astype(np.float32)
    if "ambient_profile" in source.constants:
        known = source.constants["ambient_profile"]
        if not known.sum() > 0:
            msg = f"the soup holds none of the {len(genes):,} chosen genes; take more (n_top_genes), or another profile"
            raise DataError(msg)
        source.constants["ambient_profile"] = known / known.sum()
    return source


def _profile(var: pd.DataFrame, column: str | None) -> np.ndarray | None:
    if column is None and slots.AMBIENT_PROFILE not in var:
        return None
    return column_of(var, column or slots.AMBIENT_PROFILE, "var").to_numpy()


def _pipeline_for(
    prepared: Prepared, settings: Mapping[str, Any], run: RunSettings, batch_size: int = Settings.batch_size
) -> SingleCellPipeline:
    switches = {"ambient removal": "enable_ambient_removal", "batch correction": "enable_batch_correction"}
    given = dict(settings)
    n_cells = prepared.source.n_cells
    method = given.get("embedding", SingleCellPipelineConfig.embedding)
    drawn, fewest = MAPS[method], FEWEST_FOR_MAP[method]
    if given.get("clustering") == "communities" and "n_clusters" in given:
        msg = "communities find their number: leave out n_clusters (--n-clusters), or set resolution (--resolution)"
        raise ConfigError(msg)
    if "integration" in given and "batch correction" in prepared.skipped:
        msg = f"integration is {given['integration']!r}, but {prepared.skipped['batch correction']}"
        raise ConfigError(msg)
    if n_cells < fewest:
        prepared.skipped[drawn] = f"a neighbourhood is {fewest} cells, and there are {n_cells}"
    for stage, switch in switches.items():
        if stage in prepared.skipped and given.get(switch) is True:
            msg = f"{switch} is True, but {prepared.skipped[stage]}."
            raise ConfigError(msg)
    for stage, attribute in {
        **switches,
        drawn: "enable_dim_reduction",
        "clustering": "enable_clustering",
    }.items():
        if given.get(attribute, True) is False:
            prepared.skipped[stage] = "switched off"
        given[attribute] = stage not in prepared.skipped
    given |= {"n_genes": len(prepared.genes), "n_batches": max(1, len(prepared.batches)), "seed": run.seed}
    make = functools.partial(create_single_cell_pipeline, **given)
    check_memory(make, given["n_genes"], min(batch_size, n_cells))
    pipeline = make()
    config = pipeline.config
    if config.enable_clustering and config.clustering == "kmeans" and config.n_clusters > n_cells:
        msg = f"n_clusters must be at most the number of cells, {n_cells}, got {config.n_clusters}."
        raise ConfigError(msg)
    return pipeline


def _stages(pipeline: SingleCellPipeline) -> dict[str, Operator]:
    """The enabled stages by the names that users read."""
    parts = {name: getattr(pipeline, attribute) for name, attribute in stages_of(pipeline.config).items()}
    return {name: part for name, part in parts.items() if part is not None}
