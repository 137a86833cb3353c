"""The whole workflow as one operator: counts in, clusters out, gradients all the way."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ..data.source import Source
from ..errors import ConfigError, DataError, DataWarning, MissingKeyError
from ..history import History
from ..operators.base import Config, Data, Operator, one_of, positive
from ..operators.normalization.umap import DifferentiableUMAP
from ..operators.normalization.vae_normalizer import VAENormalizer, VAENormalizerConfig
from ..operators.singlecell.ambient_removal import AmbientRemovalConfig, DifferentiableAmbientRemoval
from ..operators.singlecell.harmony import DifferentiableHarmony
from . import parts
from .stages import fit_stages

UNDECLARED_BATCHES = 16  # room kept for batch labels when n_batches is None and no data has been seen


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleCellPipelineConfig(Config):
    """Settings of `SingleCellPipeline`.

    n_genes: number of genes in the expression matrix.
    integration: how batches are corrected in the latent space: "harmony"; "mmd" or "wgan", autoencoders for effects
        that are not linear; "scvi": by the VAE alone, whose decoder knows the batches.
    embedding: how the map is drawn: "umap" or "phate".
    clustering: "kmeans", or "communities" of the neighbour graph, which finds their number.
    n_clusters: number of clusters for soft k-means.
    resolution: of communities: more finds more of them; None is 1. k-means has none.
    latent_dim: dimension of the VAE latent space.
    hidden_dims: hidden layer dimensions of the VAE.
    umap_n_components: number of output dimensions of the map, UMAP or PHATE.
    batch_correction_clusters: number of clusters for Harmony, at most; `fit` takes fewer for few cells, as the
        published program does (one per 30 cells).
    batch_correction_iterations: number of Harmony iterations.
    clustering_temperature: temperature for soft clustering, in units of squared distance in latent space.
    enable_ambient_removal: enable ambient RNA removal.
    enable_batch_correction: enable batch correction.
    enable_dim_reduction: enable UMAP dimensionality reduction.
    enable_clustering: enable soft clustering.
    n_batches: number of batches. None: `fit`, and `apply` outside jit before training, take it from the data;
        under jit before that, labels 0-15 are understood.

    Inside the pipeline Harmony runs without its diversity penalty (theta 0): see `parts.PIPELINE_THETA`.
    """

    n_genes: int = positive(2000)
    integration: str = one_of("harmony", "mmd", "wgan", "scvi")
    embedding: str = one_of("umap", "phate")
    clustering: str = one_of("kmeans", "communities")
    n_clusters: int = positive(10)
    resolution: float | None = positive(None)
    latent_dim: int = positive(64)
    hidden_dims: tuple[int, ...] = positive((128, 64))
    umap_n_components: int = positive(2)
    batch_correction_clusters: int = positive(100)
    batch_correction_iterations: int = positive(10)
    clustering_temperature: float = positive(1.0)
    enable_ambient_removal: bool = True
    enable_batch_correction: bool = True
    enable_dim_reduction: bool = True
    enable_clustering: bool = True
    n_batches: int | None = positive(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution is not None and self.clustering == "kmeans":
            msg = f'resolution {self.resolution} is of clustering="communities"; k-means takes n_clusters.'
            raise ConfigError(msg)
        unused: tuple[str, ...] = ("n_clusters", "clustering_temperature") if self.clustering != "kmeans" else ()
        if self.integration != "harmony":
            unused += ("batch_correction_clusters", "batch_correction_iterations")
        for name in unused:
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default:
                method = self.clustering if "cluster" in name and "batch" not in name else self.integration
                msg = f"{name} {value} does nothing for method {method!r}; leave it out."
                raise ConfigError(msg)


class Analysed(TypedDict, total=False):
    """What `SingleCellPipeline` adds; a disabled stage adds nothing."""

    decontaminated_counts: Float[Array, "cells genes"]
    normalized: Float[Array, "cells genes"]  # gene fractions: rows sum to 1
    latent: Float[Array, "cells latent"]
    corrected_embeddings: Float[Array, "cells latent"]
    embeddings_2d: Float[Array, "cells components"]
    cluster_assignments: Float[Array, "cells clusters"]  # rows sum to 1


class SingleCellPipeline(Operator):
    """Counts -> ambient removal -> VAE normalisation -> Harmony -> parametric UMAP -> soft k-means.

    For the last three the config names others: `integration`, `embedding`, `clustering`.

    Each stage is an operator of its own: `ambient_removal`, `vae_normalizer`, `batch_correction`,
    `dim_reduction`, `clustering`; a disabled one is None and the next stage reads what the last enabled one
    gave. `diffbio.fit(pipeline, data)` trains stage by stage, then all of it jointly; afterwards `apply`
    projects any cells, one by one, without refitting. Before that the outputs are those of random weights, and
    the returned metadata says so.

    A batch label that the pipeline does not know raises DataError; under `jax.jit`, where it cannot raise, that
    cell's outputs are NaN: pass `n_batches`.
    """

    def __init__(self, config: SingleCellPipelineConfig, *, rngs: nnx.Rngs) -> None:
        self.config: SingleCellPipelineConfig = config
        self.fitted = False
        self.genes: tuple[str, ...] = ()  # names that new data are matched by; known if it was fitted to an AnnData
        self.batches: tuple[str, ...] = ()
        self.rngs = rngs.fork()  # parts are built anew when data says how many batches there are
        undeclared = UNDECLARED_BATCHES if config.enable_batch_correction else 1
        self._build(config.batch_correction_clusters, config.n_batches or undeclared)

    def _build(self, n_clusters: int, n_batches: int) -> None:
        config = self.config

        width = config.latent_dim
        ambient, drawn, grouped = None, None, None
        if config.enable_ambient_removal:
            ambient = DifferentiableAmbientRemoval(AmbientRemovalConfig(n_genes=config.n_genes), rngs=self.rngs)
        self.ambient_removal: DifferentiableAmbientRemoval | None = nnx.data(ambient)
        self.vae_normalizer = self._vae(n_batches)
        self.batch_correction: parts.Integration | None = nnx.data(self._integration(n_clusters, n_batches))
        if config.enable_dim_reduction:
            drawn = parts.map_of(
                config.embedding, width=width, n_components=config.umap_n_components, rngs=self.rngs
            )
        self.dim_reduction: parts.Map | None = nnx.data(drawn)
        if config.enable_clustering:
            grouped = parts.clustering(
                config.clustering, width=width, n_clusters=config.n_clusters,
                temperature=config.clustering_temperature, resolution=config.resolution or 1.0, rngs=self.rngs,
            )  # fmt: skip
        self.clustering: parts.Clustering | None = nnx.data(grouped)

    def _vae(self, n_batches: int) -> VAENormalizer:
        config = VAENormalizerConfig(
            n_genes=self.config.n_genes,
            latent_dim=self.config.latent_dim,
            hidden_dims=self.config.hidden_dims,
            n_batches=n_batches,
            likelihood="nb",
        )
        return VAENormalizer(config, rngs=self.rngs)

    def _integration(self, n_clusters: int, n_batches: int) -> parts.Integration | None:
        if not self.config.enable_batch_correction:
            return None
        return parts.integration(
            self.config.integration, width=self.config.latent_dim, n_batches=n_batches, n_clusters=n_clusters,
            n_iterations=self.config.batch_correction_iterations, rngs=self.rngs,
        )  # fmt: skip

    def __call__(
        self,
        counts: Float[Array, "cells genes"],
        ambient_profile: Float[Array, "genes"] | None = None,
        batch_labels: Int[Array, "cells"] | None = None,
    ) -> Analysed:
        """All enabled stages on these cells."""
        result = self._normalised(counts, ambient_profile, batch_labels)
        embedding = result["latent"]
        if self.batch_correction is not None:
            assert batch_labels is not None
            embedding = self.batch_correction(embedding, batch_labels)["corrected_embeddings"]
            result["corrected_embeddings"] = embedding
        if self.dim_reduction is not None:
            result["embeddings_2d"] = self.dim_reduction(embedding)["embedding"]
        if self.clustering is not None:
            result["cluster_assignments"] = self.clustering(embedding)["cluster_assignments"]
        return result

    def normalise(self, data: Data) -> Analysed:
        """The stages up to the VAE alone, which treat cells one by one even before Harmony has been learned."""
        return self._normalised(**self._inputs(data))

    def _normalised(
        self,
        counts: Float[Array, "cells genes"],
        ambient_profile: Float[Array, "genes"] | None = None,
        batch_labels: Int[Array, "cells"] | None = None,
    ) -> Analysed:
        result: Analysed = {}
        if self.ambient_removal is not None:
            assert ambient_profile is not None
            counts = self.ambient_removal(counts, ambient_profile)["decontaminated_counts"]
            result["decontaminated_counts"] = counts
        normal = self.vae_normalizer(counts, batch_labels=batch_labels)
        unknown = self._unknown(batch_labels, normal["latent_mean"].dtype)
        result["normalized"] = normal["normalized"] + unknown
        result["latent"] = normal["latent_mean"] + unknown
        return result

    def objective(
        self,
        data: Data,
        *,
        kl_weight: jax.Array | float = 1.0,
        clustering_weight: jax.Array | float = 1.0,
        embedding_weight: jax.Array | float = 1.0,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The sum of the stages' own objectives on a minibatch, the later ones on what the earlier ones give.

        So the VAE is trained for reconstruction, for compact clusters (weight `clustering_weight`) and for a
        faithful embedding (weight `embedding_weight`). The embedding's term reads the batch as pairs of
        neighbours: first half heads, second half tails.

        In `fit` this trains all parts but ambient removal, which keeps what its own objective has taught it: a
        likelihood rises with every count that is removed, so that it would remove them all.
        """
        inputs = self._inputs(data)
        counts, labels = inputs["counts"], inputs.get("batch_labels")
        metrics: dict[str, jax.Array] = {}
        loss: jax.Array = jnp.zeros((), counts.dtype)
        if self.ambient_removal is not None:
            stage = {"counts": counts, "ambient_profile": inputs["ambient_profile"]}
            metrics["ambient"], _ = self.ambient_removal.objective(stage)
            loss = loss + metrics["ambient"]
            counts = self.ambient_removal(counts, inputs["ambient_profile"])["decontaminated_counts"]
        labelled = {} if labels is None else {"batch_labels": labels}
        metrics["vae"], terms = self.vae_normalizer.objective({"counts": counts, **labelled}, kl_weight=kl_weight)
        metrics |= {key: terms[key] for key in ("reconstruction", "kl")}
        loss = loss + metrics["vae"]
        embedding = self.vae_normalizer(counts, batch_labels=labels)["latent_mean"]
        if self.batch_correction is not None:
            assert labels is not None
            if not isinstance(self.batch_correction, DifferentiableHarmony):
                stage = parts.integration_inputs(self.batch_correction, embedding, labels)
                metrics["integration"], _ = self.batch_correction.objective(stage)
                loss = loss + metrics["integration"]
            embedding = self.batch_correction(embedding, labels)["corrected_embeddings"]
        if isinstance(self.dim_reduction, DifferentiableUMAP):
            metrics["embedding"], _ = self.dim_reduction.objective({"features": embedding})
            loss = loss + embedding_weight * metrics["embedding"]
        if self.clustering is not None:
            metrics["clustering"], _ = self.clustering.objective({"embeddings": embedding})
            loss = loss + clustering_weight * metrics["clustering"]
        return loss, metrics

    def fit_stages(self, source: Source, **how: Any) -> History:
        """What `diffbio.fit` runs: see `diffbio.pipelines.stages`."""
        history = fit_stages(self, source, **how)
        self.mark_fitted()
        return history

    def learn_batches(self, labels: np.ndarray | None, n_cells: int) -> None:
        """Builds the stages for the batches and the number of cells at hand, before training starts.

        Raises:
            DataError: a label is negative, or too large for a given n_batches.
        """
        n_batches = self.config.n_batches
        if labels is not None:
            if labels.size and labels.min() < 0:
                msg = f"SingleCellPipeline: batch_labels holds {labels.min()}; labels start at 0."
                raise DataError(msg)
            largest = int(labels.max(initial=0))
            if n_batches is not None and largest >= n_batches:
                msg = (
                    f"SingleCellPipeline: batch_labels holds label {largest}, but n_batches is {n_batches}; "
                    f"pass n_batches={largest + 1}."
                )
                raise DataError(msg)
            n_batches = n_batches or largest + 1
            sizes = np.bincount(labels)
            if self.batch_correction is not None and self.config.integration in ("mmd", "wgan") and sizes.min() < 2:
                few = int(sizes.argmin())
                msg = (
                    f"SingleCellPipeline: {self.config.integration!r} compares batches, but batch {few} has "
                    f"{sizes[few]} cells; leave it out, or take another integration."
                )
                raise DataError(msg)
        n_batches = n_batches or 1
        n_clusters = max(1, min(self.config.batch_correction_clusters, round(n_cells / 30)))
        trained_for = self.vae_normalizer.config.n_batches
        if n_batches != trained_for:
            if self.vae_normalizer.fitted:
                warnings.warn(
                    f"SingleCellPipeline: the VAE was trained for {trained_for} batches, the data has {n_batches}: "
                    "it starts anew.", DataWarning, stacklevel=4,
                )
            self.vae_normalizer = self._vae(n_batches)
        if self.batch_correction is not None:
            held = self.batch_correction.config
            if (getattr(held, "n_clusters", n_clusters), held.n_batches) != (n_clusters, n_batches):
                self.batch_correction = self._integration(n_clusters, n_batches)
        self.config = dataclasses.replace(self.config, n_batches=n_batches)

    def provided(self) -> dict[str, Any]:
        """The outputs of the enabled stages."""
        stages = {
            "decontaminated_counts": self.ambient_removal,
            "corrected_embeddings": self.batch_correction,
            "embeddings_2d": self.dim_reduction,
            "cluster_assignments": self.clustering,
        }
        return {key: hint for key, hint in type(self).provides.items() if stages.get(key, self) is not None}

    @property
    def final_embedding(self) -> str:
        """The key of what clustering and UMAP read."""
        return "latent" if self.batch_correction is None else "corrected_embeddings"

    def _inputs(self, data: Data) -> dict[str, jax.Array]:
        config = self.config
        needs = {"ambient_profile": config.enable_ambient_removal, "batch_labels": config.enable_batch_correction}
        for key, needed in needs.items():
            if needed and data.get(key) is None:
                switch = "enable_ambient_removal" if key == "ambient_profile" else "enable_batch_correction"
                has = ", ".join(sorted(data)) or "nothing"
                msg = f"SingleCellPipeline needs data[{key!r}] (or {switch}=False); data has {has}."
                raise MissingKeyError(msg)
        inputs = super()._inputs({k: v for k, v in data.items() if v is not None})
        if self.vae_normalizer.config.n_batches == 1 and not self.config.enable_batch_correction:
            inputs.pop("batch_labels", None)  # one batch, or none declared: there is nothing to tell apart
        labels = inputs.get("batch_labels")
        if labels is not None and self.config.n_batches is None and not isinstance(labels, jax.core.Tracer):
            largest = int(labels.max()) if labels.size else 0
            if largest >= self.vae_normalizer.config.n_batches and not self.vae_normalizer.fitted:
                self._make_room(largest + 1)
            elif largest >= self.vae_normalizer.config.n_batches:
                msg = f"SingleCellPipeline: batch_labels holds label {largest}; pass n_batches={largest + 1}."
                raise DataError(msg)
        return inputs

    def _make_room(self, n_batches: int) -> None:
        self.vae_normalizer = self._vae(n_batches)
        if self.batch_correction is not None:
            self.batch_correction = self._integration(self._harmony_clusters or 1, n_batches)
        (self.train_mode if self.training else self.eval_mode)()

    def learn_reference(self, data: Data) -> None:
        """Stores what Harmony learns from the latent positions of these cells, for others to be projected onto.

        `diffbio.fit` does it; after a training loop of your own, call it before projecting new cells: without
        it Harmony corrects the cells it is given by themselves, as the published method does.
        """
        if not isinstance(self.batch_correction, DifferentiableHarmony):
            return
        embeddings = self.normalise(data)["latent"]
        self.batch_correction.init_from({"embeddings": embeddings, "batch_labels": data["batch_labels"]})

    def _unknown(self, labels: jax.Array | None, dtype: Any) -> jax.Array:
        """0 for a cell of a known batch, NaN for another: a traced label cannot raise."""
        if labels is None:
            return jnp.zeros((), dtype)
        known = (labels >= 0) & (labels < self.vae_normalizer.config.n_batches)
        return jnp.where(known, 0.0, jnp.nan).astype(dtype)[:, None]

    def _adapt(self, header: Mapping[str, Any]) -> None:
        if header.get("harmony_clusters") is not None and self.batch_correction is not None:
            n_batches = self.batch_correction.config.n_batches
            self.batch_correction = self._integration(int(header["harmony_clusters"]), n_batches)
        self.genes, self.batches = (tuple(map(str, header.get(key, ()))) for key in ("genes", "batches"))

    def _header(self) -> dict[str, Any]:
        return {
            "harmony_clusters": self._harmony_clusters, "genes": list(self.genes), "batches": list(self.batches),
        }  # fmt: skip

    @property
    def _harmony_clusters(self) -> int | None:
        part = self.batch_correction
        return part.config.n_clusters if isinstance(part, DifferentiableHarmony) else None

    @classmethod
    def examples(cls) -> dict[str, tuple["SingleCellPipeline", Data]]:
        """All stages, and the VAE alone."""
        keys = jax.random.split(jax.random.key(0), 2)
        data = {
            # no zeros: counts end there, so that a finite difference across has no meaning
            "counts": 1.0 + jax.random.poisson(keys[0], 3.0, (12, 8)).astype(jnp.float32),
            "ambient_profile": jnp.full((8,), 1 / 8),
            "batch_labels": jnp.arange(12) % 2,
        }
        small: dict[str, Any] = {"n_genes": 8, "n_clusters": 3, "latent_dim": 3, "hidden_dims": (6, 5)}
        harmony = {"batch_correction_clusters": 2, "batch_correction_iterations": 2, "n_batches": 2}
        off = {
            f"enable_{stage}": False
            for stage in ("ambient_removal", "batch_correction", "dim_reduction", "clustering")
        }
        return {
            "all stages": (create_single_cell_pipeline(**small, **harmony), data),
            "normalisation only": (create_single_cell_pipeline(**small, **off), {"counts": data["counts"]}),
        }


def create_single_cell_pipeline(*, seed: int = 42, **settings: Any) -> SingleCellPipeline:
    """Makes a `SingleCellPipeline`; `settings` are the fields of `SingleCellPipelineConfig`.

    Raises:
        ConfigError: a setting is out of range.
    """
    return SingleCellPipeline(SingleCellPipelineConfig(**settings), rngs=nnx.Rngs(seed))

