"""Spatial domains: regions of tissue, from expression that spots share with their neighbours."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...errors import ConfigError, DataError
from ...math.domain_mixture import spatial_mixture
from ...math.linalg import pca
from ...math.spatial import (
    check_places,
    mean_field,
    mixed_with_neighbors,
    relative_gaps,
    slice_neighbors,
    standardized_by_slice,
)
from ...nn.graph_attention import GraphAttention
from ..base import Config, Data, Operator, checked_counts, checked_finite, nonnegative, positive, setting

WHO = "DifferentiableSpatialDomain"
RARE, FEWEST = 0.003, 3  # share and number of the spots that a gene is seen in at least
FAINT = 0.1  # scale of the attention's first scores: it starts almost as a mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpatialDomainConfig(Config):
    """Settings of `DifferentiableSpatialDomain`.

    n_genes: columns of `counts`.
    hidden_dim: principal components that the attention reads, over all heads; a multiple of num_heads.
    num_heads: heads of the attention.
    n_domains: domains to find.
    alpha: share of the neighbours in each of the two rounds of averaging, BANKSY's lambda; 0 is expression alone.
    n_neighbors: nearest spots of the same slice, itself excluded.
    n_latent: width of the embedding; at most hidden_dim.
    n_batches: slices that `batch_labels` may name.
    smoothness: how strongly neighbours want the same domain, in units of log likelihood; 0 is none.
    n_rounds: rounds in which the neighbours' domains are asked.
    temperature: of the assignments, in units of log likelihood; 0+ gives hard domains.
    shrinkage: of the domains' covariance to a sphere, 0 to 1; 1 is the geometry of k-means.
    """

    n_genes: int = positive(2000)
    hidden_dim: int = positive(64)
    num_heads: int = positive(4)
    n_domains: int = positive(7)
    alpha: float = setting(0.8, "in [0, 1]", lambda v: 0 <= v <= 1)
    n_neighbors: int = positive(15)
    n_latent: int = positive(10)
    n_batches: int = positive(1)
    smoothness: float = nonnegative(1.0)
    n_rounds: int = positive(10)
    temperature: float = positive(1.0)
    shrinkage: float = setting(0.3, "in [0, 1]", lambda v: 0 <= v <= 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_dim % self.num_heads:
            msg = f"SpatialDomainConfig.hidden_dim must be a multiple of num_heads ({self.num_heads}), got "
            msg += f"{self.hidden_dim}."
            raise ConfigError(msg)
        if self.n_latent > self.hidden_dim:
            msg = f"SpatialDomainConfig.n_latent must be at most hidden_dim ({self.hidden_dim}), got {self.n_latent}."
            raise ConfigError(msg)


class SpatialDomains(TypedDict):
    """What `DifferentiableSpatialDomain` adds."""

    domain_assignments: Float[Array, "cells domains"]  # rows sum to 1
    domain_labels: Int[Array, " cells"]  # argmax of the row
    spatial_embeddings: Float[Array, "cells latent"]
    attention: Float[Array, "cells neighbors"]  # mean over heads, rows sum to 1
    neighbor_indices: Int[Array, "cells neighbors"]  # which spots these are


class Surroundings(NamedTuple):
    """What the network reads of some spots."""

    own: Float[Array, "cells hidden"]  # their expression alone, which is reconstructed
    mixed: Float[Array, "cells hidden"]  # after the first round of averaging
    sending: Float[Array, "senders hidden"]  # the same of those around them
    senders: Int[Array, "cells neighbors"]  # rows of these
    gaps: Float[Array, "cells neighbors"]


class Encoded(NamedTuple):
    """What the network makes of them."""

    embedding: Float[Array, "cells latent"]
    from_neighbors: Float[Array, "cells latent"]  # the part through them, who hold alpha / k of the spot
    attention: Float[Array, "cells neighbors"]


class DifferentiableSpatialDomain(Operator):
    """Finds domains of tissue by a graph attention autoencoder and a mixture that is smooth in space.

    After STAGATE (Dong and Zhang 2022), with the attention of GATv2 (Brody et al. 2022). Expression x_i is log counts
    per mean library size, standardised by gene within each slice, on the principal axes of its mean over
    neighbourhoods. Two rounds of averaging over the nearest spots follow, the first with equal weights, the second
    with attention:

        s_i = (1 - alpha) x_i + alpha mean_j x_j,      h_i = (1 - alpha) s_i + alpha sum_j a_ij V s_j,     z_i = Eᵀ h_i.

    The scores of the attention read s_i, s_j and the distance. The objective is to reconstruct each spot from its
    neighbours alone, |x_i - E Eᵀ sum_j a_ij V s_j - offset of the slice|²: the attention learns which neighbours tell
    most of a spot. At the start it is almost uniform, V is the identity and E picks the first `n_latent` axes, so that
    z is the principal components of plain averages. `fit` holds E and V there and trains the attention (a training
    loop of your own may train them too). Differences to STAGATE: the linear layers are principal axes, the decoder is
    tied and has no attention, a spot does not reconstruct itself from itself, and several slices are taken together,
    each with its own neighbours, means and variances.

    Domains are a mixture of Gaussians in z, one covariance for all, found by EM after training (`finish_from`;
    `init_from` finds those of the start). Assignments are mean-field memberships of a Potts model on the attention:
    softmax((log p(z_i, k) + smoothness sum_j a_ij q_jk) / temperature), `n_rounds` times. As the temperature goes to 0
    they are hard: iterated conditional modes, or at smoothness 0 the domain of largest p(z_i, k).

    Gradients with respect to counts and coordinates (through the distances that the attention reads) equal finite
    differences. Discrete, outside the gradient: which spots are neighbours, and which genes are seen in enough spots
    (0.3 %, at least 3) to be read.
    """

    config: SpatialDomainConfig
    graph_of_cells = True
    cell_numbers: ClassVar[frozenset[str]] = frozenset({"neighbor_indices"})
    # principal axes; trained along, they follow each spot's cell type rather than its region
    held_in_fit = ("attention/sender", "encoder")
    fit_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 50, "batch_size": 256, "learning_rate": 1e-3, "validation": 0.0,
    }  # fmt: skip

    def __init__(self, config: SpatialDomainConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.fitted = False
        width, heads = config.hidden_dim, config.num_heads
        axes = jax.random.normal(rngs.params(), (config.n_genes, width)) / np.sqrt(config.n_genes)
        self.axes = nnx.BatchStat(axes)
        self.attention = GraphAttention(width, width // heads, heads, n_edge_features=1, rngs=rngs)
        # a mean over the neighbours at first: heads joined are the sender, all scores are about the same
        self.attention.sender.kernel[...] = jnp.eye(width).reshape(width, heads, width // heads)
        self.attention.direction[...] = FAINT * self.attention.direction[...]
        self.encoder = nnx.Param(jnp.eye(width, config.n_latent))
        self.offset = nnx.Param(jnp.zeros((config.n_batches, width)))
        self.centers = nnx.Param(jax.random.normal(rngs.params(), (config.n_domains, config.n_latent)))
        self.whitening = nnx.Param(jnp.eye(config.n_latent))
        self.log_weights = nnx.Param(jnp.full(config.n_domains, -np.log(config.n_domains)))
        self.start_seed = nnx.BatchStat(jax.random.randint(rngs.params(), (), 0, 2**31 - 1))

    def __call__(
        self,
        counts: Float[Array, "cells genes"],
        spatial_coords: Float[Array, "cells dimensions"],
        batch_labels: Int[Array, " cells"] | None = None,
        library_size: Float[Array, " cells"] | None = None,
        neighbor_indices: Int[Array, "cells neighbors"] | None = None,
        neighborhoods: Float[Array, "cells members hidden"] | None = None,
        neighbor_gaps: Float[Array, "cells neighbors"] | None = None,
    ) -> SpatialDomains:
        """counts: raw.

        spatial_coords: 2 or 3 columns, of any unit.
        batch_labels: slice of each spot, 0 to n_batches - 1: neighbours are of one slice; None is one slice.
        library_size: counts of each spot over all genes, where `counts` holds a part of them; else their sum.
        neighbor_indices: n_neighbors row numbers of each spot; None finds the nearest.
        neighborhoods: for training, as `for_training` makes them: a spot's expression on the principal axes, its
            average and its neighbours' averages. They take the place of what is computed from `counts`.
        neighbor_gaps: with them, the neighbours' distances as `math.spatial.relative_gaps` gives them.

        Raises:
            DataError: n_neighbors spots or fewer in a slice; and where values are known (not under jit): counts below
                0 or missing, coordinates missing or the same twice, labels or row numbers out of range.
        """
        config = self.config
        if neighbor_indices is None:
            check_places(WHO, spatial_coords, config.n_neighbors, batch_labels)
            neighbor_indices = slice_neighbors(spatial_coords, config.n_neighbors, batch_labels)
        checked_finite(WHO, spatial_coords, key="spatial_coords")
        around = self._surroundings(
            counts, spatial_coords, batch_labels, library_size, neighbor_indices, neighborhoods, neighbor_gaps
        )
        found = self._encoded(around)
        white = jnp.asarray(self.whitening[...], found.embedding.dtype)
        apart = jnp.matmul(found.embedding, white)[:, None] - jnp.matmul(self.centers[...], white)[None]
        assignments = mean_field(
            self.log_weights[...] - 0.5 * (apart**2).sum(axis=2), neighbor_indices, found.attention,
            smoothness=config.smoothness, temperature=config.temperature, n_rounds=config.n_rounds,
        )  # fmt: skip
        return {
            "domain_assignments": assignments,
            "domain_labels": jnp.argmax(assignments, axis=1),
            "spatial_embeddings": found.embedding,
            "attention": found.attention,
            "neighbor_indices": neighbor_indices,
        }

    def objective(self, data: Data) -> tuple[Array, dict[str, Array]]:
        """Mean squared error of each spot's expression, on the principal axes, as its neighbours tell it.

        `metrics["explained"]` is the share of its variance that they do.
        """
        inputs = self._inputs(data)
        around = self._around(inputs)
        encoder = jnp.asarray(self.encoder[...], around.own.dtype)
        labels = inputs.get("batch_labels", jnp.zeros(len(around.own), jnp.int32))
        told = jnp.matmul(self._encoded(around).from_neighbors, encoder.T) + self.offset[...][labels]
        loss = ((around.own - told) ** 2).mean()
        return loss, {"explained": 1 - loss / jnp.maximum((around.own**2).mean(), 1e-12)}

    def for_training(self, data: Data) -> Data:
        """`data` with each spot's neighbourhood beside it, so that minibatches know it; sets the principal axes.

        The largest array is (cells, n_neighbors + 2, hidden_dim).
        """
        dense = {k: v.toarray() if hasattr(v, "toarray") else v for k, v in data.items()}
        inputs = self._inputs(dense)
        if "neighborhoods" in inputs:
            return data
        self._start_axes(inputs)
        around = self._around(inputs)
        mixed = np.asarray(around.mixed)
        indices = np.asarray(around.senders)
        members = np.concatenate([np.asarray(around.own)[:, None], mixed[:, None], mixed[indices]], axis=1)
        gaps = np.asarray(around.gaps)
        return {**data, "neighborhoods": members, "neighbor_indices": indices, "neighbor_gaps": gaps}

    def init_from(self, data: Data) -> None:
        """Puts the axes on the principal components of averages over neighbours, and domains where EM ends there.

        Raises:
            DataError: fewer spots than domains, or bad counts or coordinates.
        """
        inputs = self._inputs(data)
        if "neighborhoods" not in inputs:
            self._start_axes(inputs)
        around = self._around(inputs)
        found = self._encoded(around)
        where = np.asarray(inputs.get("neighbor_indices", around.senders))
        self._find_domains(np.asarray(found.embedding), where, np.asarray(found.attention))

    def positions(self, data: Data) -> dict[str, Array]:
        """What `finish_from` reads of each spot."""
        inputs = self._inputs(data)
        around = self._around(inputs)
        found = self._encoded(around)
        where = inputs.get("neighbor_indices", around.senders)
        return {"embedding": found.embedding, "attention": found.attention, "indices": where}

    def finish_from(self, positions: dict[str, np.ndarray]) -> None:
        """Finds the domains of the trained embedding."""
        self._find_domains(*(np.asarray(positions[key]) for key in ("embedding", "indices", "attention")))

    def _find_domains(self, embedding: np.ndarray, indices: np.ndarray, attention: np.ndarray) -> None:
        config = self.config
        distinct = len(np.unique(embedding, axis=0))
        if distinct < config.n_domains:
            msg = f"{WHO}: n_domains is {config.n_domains}, but there are only {distinct} different spots; pass "
            msg += f"n_domains={distinct} or fewer."
            raise DataError(msg)
        found = spatial_mixture(
            embedding, config.n_domains, indices, attention, smoothness=config.smoothness,
            shrinkage=config.shrinkage, seed=int(self.start_seed[...]),
        )  # fmt: skip
        for variable, value in zip((self.centers, self.whitening, self.log_weights), found, strict=True):
            variable[...] = jnp.asarray(value, variable[...].dtype)

    def _start_axes(self, inputs: Mapping[str, Array]) -> None:
        config = self.config
        indices = self._indices(inputs)
        x = self._expression(inputs["counts"], inputs.get("batch_labels"), inputs.get("library_size"))
        for _ in range(2):
            x = mixed_with_neighbors(x, indices, config.alpha)
        width = min(config.hidden_dim, *x.shape)
        axes = np.zeros((config.n_genes, config.hidden_dim), np.float32)
        axes[:, :width] = pca(np.asarray(x), width).components.T
        self.axes[...] = jnp.asarray(axes)

    def _indices(self, inputs: Mapping[str, Array]) -> Array:
        if "neighbor_indices" in inputs:
            return inputs["neighbor_indices"]
        places, labels, k = inputs["spatial_coords"], inputs.get("batch_labels"), self.config.n_neighbors
        check_places(WHO, places, k, labels)
        return slice_neighbors(places, k, labels)

    def _around(self, inputs: Mapping[str, Array]) -> Surroundings:
        return self._surroundings(
            inputs["counts"], inputs["spatial_coords"], inputs.get("batch_labels"), inputs.get("library_size"),
            self._indices(inputs) if "neighborhoods" not in inputs else None,
            inputs.get("neighborhoods"), inputs.get("neighbor_gaps"),
        )  # fmt: skip

    def _surroundings(
        self, counts: Array, places: Array, labels: Array | None, sizes: Array | None, indices: Array | None,
        neighborhoods: Array | None, gaps: Array | None,
    ) -> Surroundings:  # fmt: skip
        if neighborhoods is not None:
            n, members, width = neighborhoods.shape
            if gaps is None:
                gaps = jnp.ones((n, members - 2), neighborhoods.dtype)
            rows = jnp.arange(n * (members - 2)).reshape(n, members - 2)
            sending = neighborhoods[:, 2:].reshape(-1, width)
            return Surroundings(neighborhoods[:, 0], neighborhoods[:, 1], sending, rows, gaps)
        assert indices is not None
        self._check(labels, indices, len(counts))
        axes = jnp.asarray(self.axes[...], counts.dtype)
        own = jnp.matmul(self._expression(counts, labels, sizes), axes, precision="highest")
        mixed = mixed_with_neighbors(own, indices, self.config.alpha)
        return Surroundings(own, mixed, mixed, indices, relative_gaps(places, indices) if gaps is None else gaps)

    def _expression(self, counts: Array, labels: Array | None, sizes: Array | None) -> Float[Array, "cells genes"]:
        checked_counts(WHO, counts)
        if sizes is not None:
            checked_counts(WHO, sizes, key="library_size", fix="pass sums of raw counts")
        total = counts.sum(axis=1) if sizes is None else sizes
        rate = total.mean() / jnp.where(total > 0, total, 1.0)  # a spot without counts has none per library size either
        seen = (counts > 0).sum(axis=0) >= max(FEWEST, RARE * len(counts))
        logs = jnp.log1p(counts * rate[:, None]) * seen
        return standardized_by_slice(logs, labels, self.config.n_batches)

    def _encoded(self, around: Surroundings) -> Encoded:
        n, k = around.senders.shape
        message, attention = self.attention(
            around.senders.ravel(), jnp.repeat(jnp.arange(n), k), around.sending, around.mixed,
            edge_features=around.gaps.reshape(-1, 1), ordered=True,
        )  # fmt: skip
        alpha, encoder = self.config.alpha, jnp.asarray(self.encoder[...], around.own.dtype)
        told = jnp.matmul(message.reshape(n, -1), encoder)
        own = jnp.matmul(around.mixed, encoder)
        return Encoded((1 - alpha) * own + alpha * told, told, attention.mean(axis=1).reshape(n, k))

    def _check(self, labels: Array | None, indices: Array, n_cells: int) -> None:
        for key, values, top in (
            ("batch_labels", labels, self.config.n_batches),
            ("neighbor_indices", indices, n_cells),
        ):
            if values is None or isinstance(values, jax.core.Tracer) or not values.size:
                continue
            lowest, highest = int(np.asarray(values).min()), int(np.asarray(values).max())
            if lowest < 0 or highest >= top:
                odd = lowest if lowest < 0 else highest
                fix = f"; pass n_batches={highest + 1}" if key == "batch_labels" and lowest >= 0 else ""
                msg = f"{WHO}: data[{key!r}] holds {odd}, but numbers from 0 to {top - 1} are wanted{fix}."
                raise DataError(msg)

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableSpatialDomain", Data]]:
        """Two small slices together, and one in three dimensions, cold and on its start."""
        keys = jax.random.split(jax.random.key(0), 3)
        n = 24
        where = jax.random.uniform(keys[0], (n, 3)) * 10.0
        rates = jnp.exp(jax.random.normal(keys[1], (2, 6)) + 1.0)
        counts = jax.random.poisson(keys[2], rates[(where[:, 0] > 5).astype(int)]).astype(jnp.float32)
        slices = jnp.arange(n) % 2

        def op(**settings: Any) -> DifferentiableSpatialDomain:
            given = {"hidden_dim": 4, "num_heads": 2, "n_domains": 2, "n_neighbors": 4, "n_latent": 2} | settings
            return cls(SpatialDomainConfig(n_genes=6, **given), rngs=nnx.Rngs(0))

        two = {"counts": counts, "spatial_coords": where[:, :2], "batch_labels": slices}
        one = {"counts": counts, "spatial_coords": where, "library_size": counts.sum(axis=1) + 2.0}
        started = op(temperature=0.5, smoothness=2.0, n_rounds=3)
        started.init_from(one)
        return {"two slices": (op(n_batches=2, n_rounds=2), two), "3-d, started": (started, one)}
