"""Imputation of dropouts by diffusion of expression over a graph of similar cells (MAGIC)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from scipy import sparse

from ...errors import ConfigError, DataError
from ...losses.molecular_cv import poisson_loss, split_molecules
from ...math.diffusion import Markov, adaptive_affinity, diffuse, markov, neighbor_distances, step
from ...math.linalg import pca
from ...math.neighbors import knn, nearest
from ...math.principal import principal_components
from ..all_cells import AllCells
from ..base import Config, Data, Operator, checked_counts, nonnegative, one_of, positive

MOST_STEPS = 20  # of diffusion; MAGIC's own search for t ends there
SHARE_KEPT = 0.9  # of the molecules, when t and bandwidth are learned; the others have to be predicted
# (cells, genes) entries that t and bandwidth are learned from: three numbers need no more
LEARNING_ENTRIES = 1 << 20
FEWEST_GENES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionImputerConfig(Config):
    """Settings of `DifferentiableDiffusionImputer`; the defaults are MAGIC's.

    n_neighbors: the neighbour whose distance is a cell's bandwidth.
    reach: each cell has edges to its reach * n_neighbors nearest, or to all others if they are fewer.
    diffusion_t: steps of diffusion, a real number; 0 is no imputation. Where learning starts.
    n_pca_components: of the space in which cells are compared; at most as many as cells and genes.
    bandwidth: in units of the distance to the neighbour above. Where learning starts.
    decay: exponent alpha of the kernel: 1 is Laplace's, 2 Gauss's, large a step at the bandwidth. Where learning
        starts.
    metric: "euclidean" or "cosine" in that space.
    """

    n_neighbors: int = positive(5)
    reach: int = positive(3)
    diffusion_t: float = nonnegative(3.0)
    n_pca_components: int = positive(100)
    bandwidth: float = positive(1.0)
    decay: float = positive(1.0)
    metric: str = one_of("euclidean", "cosine")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.diffusion_t > MOST_STEPS:
            msg = f"DiffusionImputerConfig.diffusion_t must be at most {MOST_STEPS}, got {self.diffusion_t!r}."
            raise ConfigError(msg)


class Imputed(TypedDict):
    """What `DifferentiableDiffusionImputer` adds."""

    imputed_counts: Float[Array, "cells genes"]  # on the scale of the counts


class DifferentiableDiffusionImputer(Operator):
    """Restores expression as P^t y: y = sqrt(counts / library size), P a Markov chain over similar cells (MAGIC).

    Van Dijk et al. 2018. Cells are compared by principal components of y; the affinity of cell i to each of its
    nearest is exp(-(d / (bandwidth * d_k))^decay), d_k the distance to its n_neighbors-th; P is the mean of that and
    its transpose, rows divided by their sums. `imputed_counts` is library size * max(P^t y, 0)²: the counts
    themselves at t = 0, an empty cell stays empty, and a cell's sum is below its library size by the variance of y
    among the cells that were averaged. Equals magic-impute 3.0.0 at whole t, given the same principal components
    (its own come from a randomised algorithm, ours are exact).

    t, bandwidth and decay are parameters. t is read mirrored at 0 and at 20 (`steps()`): whatever value training gives
    it stands for 0 to 20 steps and has a gradient. `objective` is molecular cross-validation (Batson et al. 2019): a
    tenth of every cell's molecules is held out and predicted from the others. Real t: see `power_weights`.

    Which cells are neighbours is a discrete choice outside the gradient. The gradient with respect to a count of 0,
    where the root has no slope, is taken as 0.
    """

    config: DiffusionImputerConfig
    graph_of_cells = True
    cell_numbers: ClassVar[frozenset[str]] = frozenset({"neighbor_indices"})
    fit_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 40, "batch_size": 4096, "learning_rate": 0.1, "validation": 0.0,
    }  # fmt: skip

    def __init__(self, config: DiffusionImputerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.t = nnx.Param(jnp.asarray(config.diffusion_t, jnp.float32))
        self.log_bandwidth = nnx.Param(jnp.asarray(math.log(config.bandwidth), jnp.float32))
        self.log_decay = nnx.Param(jnp.asarray(math.log(config.decay), jnp.float32))
        # one draw per operator: which molecules are held out is the same in every step
        self.split_seed = nnx.BatchStat(jax.random.randint(rngs.params(), (), 0, 2**31 - 1))
        self.fitted = False

    def __call__(
        self,
        counts: Float[Array, "cells genes"],
        embeddings: Float[Array, "cells components"] | None = None,
        neighbor_indices: Int[Array, "cells nearest"] | None = None,
        held_out_counts: Float[Array, "cells genes"] | None = None,
    ) -> Imputed:
        """embeddings: what cells are compared by instead of principal components of the counts.

        neighbor_indices: row numbers of each cell's neighbours, itself excluded, in any order; at least n_neighbors.
        held_out_counts: molecules that are not in `counts`, which `objective` is to predict; no output needs them.

        Raises:
            DataError: there are not more cells than n_neighbors; and, where values are known (not under jit): negative
                or missing counts, a row number that is out of range, or the cell's own.
        """
        del held_out_counts
        checked_counts("DifferentiableDiffusionImputer", counts)
        operator = self.graph(self._embedded(counts, embeddings, neighbor_indices), neighbor_indices)
        library, y = stabilised(counts)
        return {"imputed_counts": library * jnp.maximum(self.diffused(operator, y), 0.0) ** 2}

    def graph(
        self,
        embeddings: Float[Array, "cells components"],
        neighbor_indices: Int[Array, "cells nearest"] | None = None,
    ) -> Markov:
        """The Markov operator of cells at `embeddings`; gradients to them, the bandwidth and the decay."""
        k, n = self.config.n_neighbors, len(embeddings)
        if neighbor_indices is None:
            self._check_enough(n)
            indices = nearest(embeddings, min(k * self.config.reach, n - 1), metric=self.config.metric)
        else:
            self._check_indices(neighbor_indices, n)
            indices = neighbor_indices
        distances = neighbor_distances(embeddings, indices, metric=self.config.metric)
        bandwidth, decay = (jnp.exp(p[...]).astype(distances.dtype) for p in (self.log_bandwidth, self.log_decay))
        return markov(indices, adaptive_affinity(distances, k, bandwidth=bandwidth, decay=decay))

    def diffused(self, operator: Markov, y: Float[Array, "cells genes"]) -> Float[Array, "cells genes"]:
        """P^t y; genes do not depend on each other, so that any columns may be given."""
        return diffuse(operator, y, self.steps().astype(y.dtype), most=MOST_STEPS)

    def steps(self) -> Float[Array, ""]:
        """How many steps the parameter `t` stands for, in [0, 20]: t itself there, mirrored at the ends beyond."""
        t = jnp.mod(self.t[...], 2.0 * MOST_STEPS)
        return jnp.where(t > MOST_STEPS, 2.0 * MOST_STEPS - t, t)

    def objective(self, data: Data) -> tuple[Array, dict[str, Array]]:
        """Poisson loss of the held-out molecules, in nats per cell and gene, given all other molecules.

        The graph is built without the held-out molecules too. If `data` has no "held_out_counts", a tenth of the
        counts is drawn, the same one each time; `embeddings` are then taken to know nothing of it.
        """
        inputs = self._with_held_out(data)
        loss = poisson_loss(self(**inputs)["imputed_counts"], inputs["held_out_counts"])
        bandwidth, decay = jnp.exp(self.log_bandwidth[...]), jnp.exp(self.log_decay[...])
        return loss, {"t": self.steps(), "bandwidth": bandwidth, "decay": decay}

    def for_training(self, data: Data) -> Data:
        """Does once what does not depend on the parameters: the split of the molecules, components, neighbours.

        Of many cells, some genes are enough to learn three numbers from: evenly spaced in order of expression, so
        that there are about a million entries. Neighbours come from all genes.
        """
        if data.get("counts") is None:
            return data
        counts = sparse.csr_matrix(data["counts"], dtype=np.float32)
        held_out = data.get("held_out_counts")
        if held_out is None:
            drawn = split_molecules(jnp.asarray(counts.data)[None], SHARE_KEPT, jax.random.key(self.split_seed[...]))[1]
            held_out = sparse.csr_matrix((np.asarray(drawn)[0], counts.indices, counts.indptr), counts.shape)
            counts = counts - held_out
        held_out = sparse.csr_matrix(held_out, dtype=np.float32)
        embeddings, indices = data.get("embeddings"), data.get("neighbor_indices")
        if embeddings is None:
            embeddings = self.embedded_on_host(counts)
        if indices is None:
            indices = self.neighbors_on_host(embeddings)
        genes = _spread(counts, max(FEWEST_GENES, LEARNING_ENTRIES // max(counts.shape[0], 1)))
        return {
            **data,
            "counts": counts[:, genes],
            "held_out_counts": held_out[:, genes],
            "embeddings": np.asarray(embeddings, np.float32),
            "neighbor_indices": np.asarray(indices),
        }

    def init_from(self, data: Data) -> None:
        """Puts t where the objective is least among the whole numbers, at the bandwidth and decay of the settings."""
        inputs = {key: jnp.asarray(value) for key, value in data.items() if key in self.requires}
        self.t[...] = jnp.asarray(np.argmin(self.losses(inputs)), self.t[...].dtype)

    def losses(self, data: Data) -> Float[np.ndarray, " steps"]:
        """The objective at t = 0, 1, 2, ... and the present bandwidth and decay, until it has risen twice."""
        inputs = self._with_held_out(data)
        given = inputs.get("embeddings"), inputs.get("neighbor_indices")
        operator = self.graph(self._embedded(inputs["counts"], *given), given[1])
        y = stabilised(inputs["counts"])[1]
        found = [float(poisson_loss(y**2, inputs["held_out_counts"]))]
        while len(found) <= MOST_STEPS and not (len(found) > 2 and found[-1] > found[-2] > found[-3]):
            y, loss = _one_more(operator, y, inputs["held_out_counts"])
            found.append(float(loss))
        return np.asarray(found)

    def sampler(self, data: Data) -> AllCells:
        """Every minibatch is all cells: they are each other's neighbours."""
        return AllCells(len(data["counts"]))

    def embedded_on_host(self, counts: Any) -> np.ndarray:
        """What cells are compared by, of counts that may be sparse."""
        return pca(stabilised_on_host(counts), min(self.config.n_pca_components, *counts.shape)).scores

    def neighbors_on_host(self, embeddings: np.ndarray) -> np.ndarray:
        """Row numbers of each cell's nearest.

        Raises:
            DataError: there are not more cells than n_neighbors.
        """
        n = len(embeddings)
        self._check_enough(n)
        k = min(self.config.n_neighbors * self.config.reach, n - 1)
        return knn(embeddings, k, metric=self.config.metric).indices

    def _with_held_out(self, data: Data) -> dict[str, jax.Array]:
        """The inputs; if molecules to predict are not among them, they are drawn from the counts."""
        inputs = self._inputs(data)
        if "held_out_counts" not in inputs:
            kept, held_out = split_molecules(inputs["counts"], SHARE_KEPT, jax.random.key(self.split_seed[...]))
            inputs |= {"counts": kept, "held_out_counts": held_out}
        return inputs

    def _embedded(
        self, counts: jax.Array, embeddings: jax.Array | None, neighbor_indices: jax.Array | None
    ) -> jax.Array:
        if embeddings is not None:
            return embeddings
        if neighbor_indices is None:
            self._check_enough(len(counts))
        return principal_components(stabilised(counts)[1], min(self.config.n_pca_components, *counts.shape)).scores

    def _check_enough(self, n_cells: int) -> None:
        if n_cells <= self.config.n_neighbors:
            msg = (
                f"DifferentiableDiffusionImputer: n_neighbors is {self.config.n_neighbors}, but there are only "
                f"{n_cells} cells, and a cell is not its own neighbour; pass n_neighbors={max(n_cells - 1, 1)}."
            )
            raise DataError(msg)

    def _check_indices(self, indices: jax.Array, n_cells: int) -> None:
        if indices.shape[1] < self.config.n_neighbors:
            msg = (
                f"DifferentiableDiffusionImputer: n_neighbors is {self.config.n_neighbors}, but "
                f"data['neighbor_indices'] has {indices.shape[1]} of each cell."
            )
            raise DataError(msg)
        if isinstance(indices, jax.core.Tracer):
            return
        values = np.asarray(indices)
        if values.size and not 0 <= values.min() <= values.max() < n_cells:
            odd = int(values.min()) if values.min() < 0 else int(values.max())
            msg = (
                f"DifferentiableDiffusionImputer: data['neighbor_indices'] holds {odd}, but row numbers of "
                f"{n_cells} cells are 0 to {n_cells - 1}."
            )
            raise DataError(msg)
        own = (values == np.arange(n_cells)[:, None]).any(axis=1)
        if own.any():
            msg = (
                f"DifferentiableDiffusionImputer: data['neighbor_indices'] names the cell itself in {own.sum()} of "
                f"{n_cells} rows, first in row {int(own.argmax())}; leave it out: a cell always keeps a part of itself."
            )
            raise DataError(msg)

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableDiffusionImputer", Data]]:
        """Three steps as MAGIC, and a part of a step over a graph that is given."""
        keys = jax.random.split(jax.random.key(0), 3)
        groups = jnp.exp(jax.random.normal(keys[0], (3, 10)))[jnp.arange(15) % 3]
        # no zeros: there the root has no slope that finite differences could find
        data = {"counts": 1.0 + jax.random.poisson(keys[1], 6.0 * groups).astype(jnp.float32)}

        def op(**settings: Any) -> DifferentiableDiffusionImputer:
            return cls(DiffusionImputerConfig(n_neighbors=3, reach=2, **settings), rngs=nnx.Rngs(0))

        given = {"embeddings": jax.random.normal(keys[2], (15, 3))}
        return {
            "three steps": (op(n_pca_components=4), data),
            "given components": (op(diffusion_t=1.6, decay=2.0, bandwidth=1.5), {**data, **given}),
        }


def stabilised(
    counts: Float[Array, "cells genes"],
) -> tuple[Float[Array, "cells 1"], Float[Array, "cells genes"]]:
    """Library sizes, and sqrt(counts / library size), whose noise is about equal for all genes; 0 in an empty cell."""
    library = counts.sum(axis=1, keepdims=True)
    fraction = counts / jnp.where(library > 0, library, 1.0)
    some = fraction > 0
    return library, jnp.where(some, jnp.sqrt(jnp.where(some, fraction, 1.0)), 0.0)


def stabilised_on_host(counts: Any) -> Any:
    """sqrt(counts / library size) as `stabilised`, float32; sparse counts stay sparse (CSR)."""
    library = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    factor = (1.0 / np.where(library > 0, library, 1.0)).astype(np.float32)
    if not sparse.issparse(counts):
        return np.sqrt(np.asarray(counts, np.float32) * factor[:, None])
    rows = cast("Any", sparse.csr_matrix)(counts, dtype=np.float32)
    rows.data = np.sqrt(rows.data * np.repeat(factor, np.diff(rows.indptr)))
    return rows


@jax.jit
def _one_more(operator: Markov, y: jax.Array, held_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = step(operator, y)
    return y, poisson_loss(y**2, held_out)


def _spread(counts: Any, n_genes: int) -> np.ndarray:
    """Columns of `n_genes` genes, evenly spaced in order of expression."""
    total = np.asarray(counts.sum(axis=0)).ravel()
    order = np.argsort(-total, kind="stable")
    if n_genes >= len(order):
        return np.arange(len(order))
    return np.sort(order[np.linspace(0, len(order) - 1, n_genes).astype(int)])
