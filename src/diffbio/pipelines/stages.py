"""How a `SingleCellPipeline` is trained: each stage on what the one before gives, then all of them jointly."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.cluster import KMeans

from .. import storage
from ..data.source import ArraySource, Source
from ..errors import ModelFileError
from ..fitting import optimizer_of
from ..history import History
from ..math.graph import fuzzy_simplicial_set
from ..math.neighbors import knn
from ..operators.base import Operator, to_numpy
from ..operators.normalization.umap import DifferentiableUMAP, EdgeSampler
from ..operators.singlecell.harmony import DifferentiableHarmony
from ..operators.singlecell.soft_clustering import SoftKMeansClustering
from ..scratch import remove, remove_stale
from ..train import Sampler, Schedule, Settings, data_and_versions, same, told, train
from .graph_clustering import N_NEIGHBORS, GraphClustering
from .inference import MappedSource, apply_in_chunks, column, in_memory, joined, map_chunks
from .parts import integration_inputs

if TYPE_CHECKING:
    from .single_cell import SingleCellPipeline

# Neighbour graph, Harmony and the joint stage see at most this many cells (a random choice): memory stays flat,
# and a fitted stage embeds the other cells one by one.
REFERENCE_CELLS = 50_000
# Small steps of the whole pipeline refine a stage's own training and do not undo it.
JOINT = {"max_epochs": 20, "learning_rate": 3e-4, "validation": 0.0}
PROGRESS = "pipeline stages"  # kind of the folder that is written between two stages
JOINT_ROUNDS = 2  # after each, Harmony is learned again on the moved latent space


@dataclasses.dataclass
class Run:
    """One `fit` of a pipeline: what all stages share."""

    pipeline: "SingleCellPipeline"
    source: Source
    settings: Mapping[str, Any]
    checkpoint: Path | None
    resume: bool
    how: dict[str, Any]  # optimizer, progress and force, for `train`
    schedules: Mapping[str, Schedule] | None
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    done: list[str] = dataclasses.field(default_factory=list)
    chosen: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # the settings of every stage

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to go on between two stages."""
        settings = {k: v for k, v in self.settings.items() if k not in {"max_epochs", "patience"}}
        return {"config": told(self.pipeline.config), "settings": settings, **data_and_versions(self.source)}

    @property
    def seed(self) -> int:
        """The seed of everything that this fit draws."""
        return int(self.settings.get("seed", 0))

    def train(
        self,
        stage: str,
        model: Operator,
        source: Any,
        defaults: Mapping[str, Any],
        *,
        sampler: Sampler | None = None,
        own: tuple[str, ...] = (),
        frozen: tuple[str, ...] = (),
    ) -> None:
        """Trains `model`, but for its parts `frozen`; of the user's settings those in `own` do not reach this stage.

        The user's `max_epochs` is that of the VAE, and a limit for the other stages.
        """
        given = {k: v for k, v in self.settings.items() if k not in own}
        epochs = self.settings.get("max_epochs", defaults["max_epochs"])
        if stage != "vae":
            epochs = min(defaults["max_epochs"], epochs)
        folder = None if self.checkpoint is None else self.checkpoint / stage
        settings = Settings(**{**defaults, **given, "max_epochs": epochs})
        self.chosen[stage] = dataclasses.asdict(settings)
        how = dict(self.how)
        how["optimizer"] = how.get("optimizer") or optimizer_of(model, settings.learning_rate)
        if frozen:
            how["optimizer"] = all_but(frozen, optax.adam(settings.learning_rate))
        history = train(
            model,
            source,
            settings,
            sampler=sampler,
            schedules=self.schedules_of(model),
            checkpoint=folder,
            resume=self.resume and folder is not None and storage.exists(folder),
            label=stage,
            **how,
        )
        self.rows += [{"stage": stage, **row} for row in history.rows]
        model.mark_fitted()

    def schedules_of(self, model: Any) -> dict[str, Schedule]:
        """The model's own schedules, and of the user's those whose keyword its objective takes.

        The joint stage comes after the warm-ups: there each schedule stays at its value at infinity.
        """
        taken = inspect.signature(model.objective).parameters
        given = {name: schedule for name, schedule in (self.schedules or {}).items() if name in taken}
        if model is self.pipeline:
            return {name: constant(schedule(jnp.inf)) for name, schedule in given.items()}
        return {**getattr(model, "schedules", {}), **given}

    def stage(self, name: str, action: Callable[[], None]) -> None:
        """Runs `action` unless a resumed run has done it; saves the pipeline after it."""
        if name in self.done:
            return
        action()
        self.done.append(name)
        if self.checkpoint is not None:
            save_progress(self)


def all_but(frozen: tuple[str, ...], optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` for all parameters except those of the parts `frozen`, which stay as they are."""

    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: str(path[0].key) in frozen, params)

    return optax.multi_transform({False: optimizer, True: optax.set_to_zero()}, labels)


def constant(value: Any) -> Schedule:
    """The schedule that stays at `value`."""
    return lambda epoch: value


def fit_stages(
    pipeline: "SingleCellPipeline",
    source: Source,
    *,
    settings: Mapping[str, Any],
    optimizer: optax.GradientTransformation | None = None,
    schedules: Mapping[str, Schedule] | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
) -> History:
    """Trains the enabled stages in their order, then all jointly; returns one history, with the stage in each row.

    Raises:
        DataError: batch labels that the pipeline cannot hold.
        ModelFileError: the checkpoint belongs to another pipeline.
    """
    labels = column(source, "batch_labels") if "batch_labels" in source.keys else None
    folder = None if checkpoint is None else Path(checkpoint)
    run = Run(pipeline, source, settings, folder, resume, {"progress": progress, "force": force}, schedules)
    n_cells = min(source.n_cells, REFERENCE_CELLS)
    pipeline.learn_batches(labels, n_cells)
    pipeline.eval_mode()
    if folder is not None:
        if resume and storage.exists(folder / "pipeline"):
            load_progress(run)
        elif not resume:
            forget(folder)
    if pipeline.ambient_removal is not None:
        run.stage("ambient", lambda: _fit_ambient(run))
    run.stage("vae", lambda: _fit_vae(run, optimizer))
    reference = in_memory(source, REFERENCE_CELLS, seed=run.seed)
    run.stage("embedding", lambda: _fit_embedding(run, reference))
    if pipeline.clustering is not None or pipeline.dim_reduction is not None:
        for i in range(JOINT_ROUNDS):
            run.stage(f"joint{i + 1}", lambda i=i: _fit_jointly(run, reference, f"joint{i + 1}"))  # type: ignore[misc]
    pipeline.eval_mode()
    trained = sum(row["stage"] == "vae" for row in run.rows)
    longest = settings.get("max_epochs", pipeline.vae_normalizer.fit_defaults["max_epochs"])
    return History(run.rows, stopped_early=trained < longest, settings=run.chosen)


def _fit_ambient(run: Run) -> None:
    ambient = run.pipeline.ambient_removal
    assert ambient is not None
    ambient.init_from(_some(run.source, ambient.init_cells, run.seed))
    run.train("ambient", ambient, run.source, ambient.fit_defaults)


def _fit_vae(run: Run, optimizer: optax.GradientTransformation | None) -> None:
    vae, ambient = run.pipeline.vae_normalizer, run.pipeline.ambient_removal
    source: Any = run.source
    if ambient is not None:
        graph, state = nnx.split(ambient)

        def clean(batch: dict[str, Any]) -> dict[str, Any]:
            result = nnx.merge(graph, state)(batch["counts"], batch["ambient_profile"])
            return {**batch, "counts": result["decontaminated_counts"]}

        source = MappedSource(run.source, clean)
    vae.init_from(_some(source, vae.init_cells, run.seed))
    run.how["optimizer"] = optimizer
    run.train("vae", vae, source, vae.fit_defaults)
    run.how.pop("optimizer")


def _fit_embedding(run: Run, reference: Source) -> None:
    """Integration, clusters and map on the latent space as it stands."""
    pipeline = run.pipeline
    features = _integrated(run, reference, "integration", fresh=True)
    if pipeline.clustering is not None:
        pipeline.clustering.init_from({"embeddings": features})
        pipeline.clustering.mark_fitted()
    _fit_map(run, features, "umap", fresh=True)


def _fit_jointly(run: Run, reference: Source, name: str) -> None:
    """A round of training of the whole pipeline; then the stages after the VAE settle on the moved latents."""
    pipeline = run.pipeline
    final = pipeline.final_embedding
    features = joined(apply_in_chunks(pipeline, reference, [final]))[final]
    edges = _edges(run, features)
    sampler = None if edges is None else PerCell(edges, reference.n_cells)
    defaults = {**JOINT, "max_epochs": JOINT["max_epochs"] // JOINT_ROUNDS, "batch_size": 256}
    own = ("max_epochs", "learning_rate", "validation", "patience")
    limit = int(run.settings.get("max_epochs", 10**9))
    defaults["max_epochs"] = min(int(defaults["max_epochs"]), limit)
    # an adversary takes turns with its encoder, which a joint step does not: both rest until they settle
    adversary = ("batch_correction",) if hasattr(pipeline.batch_correction, "alternation") else ()
    frozen = ("ambient_removal", *adversary)
    run.train(name, pipeline, reference, defaults, sampler=sampler, own=own, frozen=frozen)
    features = _integrated(run, reference, f"integration after {name}", fresh=False)
    if isinstance(pipeline.clustering, SoftKMeansClustering):
        centroids = pipeline.clustering.centroids
        centroids[...] = jnp.asarray(_settle(np.asarray(centroids[...]), features))
    elif pipeline.clustering is not None:
        pipeline.clustering.init_from({"embeddings": features})
    _fit_map(run, features, f"umap after {name}", fresh=False)


def _integrated(run: Run, reference: Source, name: str, *, fresh: bool) -> np.ndarray:
    """The embedding that map and clusters read, after its integration has been learned on the latents."""
    pipeline = run.pipeline
    part = pipeline.batch_correction
    graph, state = nnx.split(pipeline)

    def latents(state: Any, batch: dict[str, Any]) -> dict[str, Any]:
        return {"latent": nnx.merge(graph, state).normalise(batch)["latent"]}

    latent: np.ndarray = joined(map_chunks(latents, state, reference))["latent"]
    if part is None:
        return latent
    data = integration_inputs(part, latent, column(reference, "batch_labels"))
    if isinstance(part, DifferentiableHarmony):
        part.init_from(data)
        return np.asarray(part.apply(data)[0]["corrected_embeddings"])
    if fresh:
        part.init_from(data)
    _train_part(run, part, data, name, fresh=fresh, sampler=part.sampler(data))
    return joined(apply_in_chunks(part, ArraySource(data), ["corrected_embeddings"]))["corrected_embeddings"]


def _fit_map(run: Run, features: np.ndarray, name: str, *, fresh: bool) -> None:
    part = run.pipeline.dim_reduction
    if part is None:
        return
    data = {"features": features}
    if isinstance(part, DifferentiableUMAP):
        if fresh:
            part.init_from(data)
        _train_part(run, part, data, name, fresh=fresh, sampler=part.sampler(data))
    else:
        part.init_from(data)
        part.mark_fitted()


def _train_part(
    run: Run, part: Operator, data: dict[str, Any], name: str, *, fresh: bool, sampler: Sampler | None = None
) -> None:
    """Trains a stage after the VAE; one that has been trained settles in a fifth of the epochs."""
    defaults = dict(part.fit_defaults)
    if not fresh:
        defaults["max_epochs"] = max(1, defaults.get("max_epochs", 100) // 5)
    run.train(name, part, ArraySource(data), defaults, sampler=sampler, own=("batch_size", "learning_rate"))


def _edges(run: Run, features: np.ndarray) -> EdgeSampler | None:
    """Pairs of neighbours, where a stage of the joint objective learns from them."""
    pipeline, n_cells = run.pipeline, len(features)
    if n_cells > 2 and isinstance(pipeline.dim_reduction, DifferentiableUMAP):
        return pipeline.dim_reduction.sampler({"features": features})
    if n_cells > 2 and isinstance(pipeline.clustering, GraphClustering):
        return EdgeSampler(fuzzy_simplicial_set(*knn(features, min(N_NEIGHBORS, n_cells - 1))))
    return None


def _settle(centroids: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Where Lloyd's rounds end from these centroids."""
    found = KMeans(len(centroids), init=centroids, n_init=1).fit(features)
    return np.asarray(found.cluster_centers_, centroids.dtype)


class PerCell:
    """An edge sampler cut to about one pass over the cells."""

    def __init__(self, sampler: Sampler, n_cells: int) -> None:
        self.sampler, self.n_cells = sampler, n_cells

    def order(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """Row numbers (steps, batch_size): heads, then tails."""
        size = max(4, min(batch_size, self.n_cells) // 2 * 2)
        return self.sampler.order(rng, size)[: max(1, self.n_cells // size)]


def save_progress(run: Run) -> None:
    """Writes the pipeline between two stages."""
    assert run.checkpoint is not None
    arrays = {key: to_numpy(value) for key, value in run.pipeline.saved_state().items()}
    header = {"kind": PROGRESS, **run.identity(), "done": run.done, "rows": run.rows, "chosen": run.chosen}
    run.checkpoint.mkdir(parents=True, exist_ok=True)
    storage.save_folder(run.checkpoint / "pipeline", header, arrays)


def load_progress(run: Run) -> None:
    """Puts the pipeline back to where `save_progress` left it."""
    assert run.checkpoint is not None
    header, arrays = storage.load_folder(run.checkpoint / "pipeline")
    if header.get("kind") != PROGRESS:
        msg = f"resume: {run.checkpoint / 'pipeline'} holds no stages of a run; name the checkpoint of this pipeline."
        raise ModelFileError(msg)
    same(header, run.identity(), run.checkpoint, force=run.how["force"])
    run.pipeline.restore(arrays, where=str(run.checkpoint))
    run.done, run.rows, run.chosen = list(header["done"]), list(header["rows"]), dict(header["chosen"])


def forget(folder: Path) -> None:
    """Removes the checkpoints in `folder`, which a later resume would take for its own; then it, if empty.

    Saved models and other files that stand there stay.
    """
    remove_stale(folder)
    for header in folder.glob(f"*/{storage.HEADER}"):
        if storage.kind_of(header.parent) in {"checkpoint", PROGRESS}:
            remove(header.parent)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _some(source: Any, n_cells: int | None, seed: int) -> dict[str, np.ndarray]:
    n = source.n_cells if n_cells is None else min(n_cells, source.n_cells)
    rows = np.sort(np.random.default_rng([seed, 1]).choice(source.n_cells, n, replace=False))
    return {key: np.asarray(value) for key, value in source.take(rows).items()}
