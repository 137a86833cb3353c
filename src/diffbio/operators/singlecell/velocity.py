"""RNA velocity: where every cell goes next, from its unspliced and spliced RNA."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ...errors import ConfigError, DataError
from ...math.linalg import pca
from ...math.neighbors import knn
from ...math.shared_time import fit, noise_of, problem
from ...math.splicing_kinetics import Kinetics, advanced, curve
from ...math.steady_state import Ratios, steady_state, stochastic, upper_tail
from ...math.velocity_graph import (
    candidates,
    confidence,
    cosine_lists,
    potential,
    transition_edges,
    unit_interval,
)
from ...math.velocity_moments import moments, neighborhood, size_normalized
from ...nn.splicing_ode import SplicingODE, State
from ..base import Config, Data, Operator, checked_counts, nonnegative, one_of, positive, setting

COMPONENTS = 30  # of the log-normalised spliced counts, where no neighbours are given
MODES = ("steady_state", "stochastic", "dynamical", "neural_ode")
OF_ONE_MODE = {"dynamical": ("switch_width", "scaling_spread", "n_iterations"), "neural_ode": ("hidden_dim", "n_steps")}
LEAST_FIT = 0.2  # share of a gene's variance that its kinetics explain, for a velocity gene


@dataclasses.dataclass(frozen=True, kw_only=True)
class VelocityConfig(Config):
    """Settings of `DifferentiableVelocity`; the defaults are scVelo's.

    n_genes: columns of `spliced` and `unspliced`.
    kinetics_model: "steady_state", "stochastic", "dynamical" or "neural_ode".
    n_neighbors: cells of a neighbourhood, the cell itself among them, where no neighbours are given.
    normalize: scales the counts of every cell to the median total, each layer by its own.
    tail: share of the cells, those in which a gene is highest, that its steady state is read from.
    temperature: of the edge of that tail, in units of s / max s + u / max u; 0 is a sharp edge, as in scVelo.
    reach: 1 compares a velocity with the ways to the neighbours, 2 also with those to their neighbours.
    scale: transition probabilities are exp(scale cosine), normalised.
    self_transitions: a cell whose velocity points nowhere may stay.
    variance_stabilized: compares signed square roots: "stochastic" in that mode only, as scVelo, "always" or "never".
    dt: time after which `projected_spliced` is the state; in units of 1 / beta, of "dynamical" in those of
        latent_time; of "neural_ode" also the length of a step.
    switch_width: of "dynamical" only: time in which transcription is switched on or off, in units of latent_time. As
        it goes to 0 the curves are those of scVelo's model, which have a kink there.
    scaling_spread: of "dynamical" only: spread of the prior of the log of how many unspliced molecules are seen per
        molecule; near 0 they are seen as often as spliced ones.
    n_iterations: of "dynamical" only: rounds of the fit.
    hidden_dim: of "neural_ode" only: width of its networks.
    n_steps: of "neural_ode" only: steps of dt in which time goes from 0 to 1.
    """

    n_genes: int = positive(2000)
    kinetics_model: str = one_of("steady_state", "stochastic", "dynamical", "neural_ode")
    n_neighbors: int = setting(30, ">= 2", lambda v: v >= 2)
    normalize: bool = True
    tail: float = setting(0.05, "in (0, 1)", lambda v: 0 < v < 1)
    temperature: float = nonnegative(0.0)
    reach: int = setting(2, "1 or 2", lambda v: v in (1, 2))
    scale: float = positive(10.0)
    self_transitions: bool = True
    variance_stabilized: str = one_of("stochastic", "always", "never")
    dt: float = positive(0.1)
    switch_width: float = positive(0.02)
    scaling_spread: float = positive(0.5)
    n_iterations: int = positive(20)
    hidden_dim: int = positive(64)
    n_steps: int = positive(10)

    def __post_init__(self) -> None:
        super().__post_init__()
        usual = {f.name: f.default for f in dataclasses.fields(self)}
        for owner, names in OF_ONE_MODE.items():
            for name in names:
                if getattr(self, name) != usual[name] and self.kinetics_model != owner:
                    msg = f"VelocityConfig.{name} is for kinetics_model {owner!r}, and does nothing for "
                    msg += f"{self.kinetics_model!r}; leave it {usual[name]!r}."
                    raise ConfigError(msg)


class Velocities(TypedDict):
    """What `DifferentiableVelocity` adds."""

    velocity: Float[Array, "cells genes"]  # ds/dt; time as of `dt`
    alpha: Float[Array, " genes"]  # transcription rate of an active gene
    beta: Float[Array, " genes"]  # splicing rate; 1 but for "dynamical" and "neural_ode"
    gamma: Float[Array, " genes"]  # degradation rate
    unspliced_scaling: Float[Array, " genes"]  # unspliced molecules seen per molecule; 1 but for "dynamical"
    velocity_genes: Int[Array, " genes"]  # 1 for genes that follow the model, which the graph is made of
    latent_time: Float[Array, " cells"]  # 0 to 1
    projected_spliced: Float[Array, "cells genes"]  # spliced moments after dt
    velocity_confidence: Float[Array, " cells"]  # mean correlation with the neighbours' velocities
    transition_rows: Int[Array, " edges"]
    transition_columns: Int[Array, " edges"]
    transition_weights: Float[Array, " edges"]  # P(row -> column); pairs listed twice add up, rows sum to 1
    transition_cosines: Float[Array, " edges"]  # of the row's velocity with the way to the column; 0 where not compared


class Rates(NamedTuple):
    """What each mode finds, before the graph."""

    alpha: Float[Array, " genes"]
    beta: Float[Array, " genes"]
    gamma: Float[Array, " genes"]
    scaling: Float[Array, " genes"]
    genes: Bool[Array, " genes"]  # which follow the model
    active: Float[Array, "cells genes"]  # rate of transcription in each cell now
    time: Float[Array, " cells"] | None


class DifferentiableVelocity(Operator):
    """Splicing kinetics ds/dt = beta u - gamma s of every gene, and where they lead every cell.

    Moments are means of the size-normalised counts over the graph of neighbours. Then, by `kinetics_model`:
    "steady_state" (La Manno et al. 2018): gamma from the cells in which a gene is highest, beta = 1. "stochastic"
    (Bergen et al. 2020): with second moments, by generalised least squares. Both equal scVelo 0.3.4 on the same
    neighbours at temperature 0. "dynamical": transcription that is switched on and off, and a latent time that all
    genes share, by maximum likelihood (`math.shared_time`; scVelo fits a time per gene and cell, and joins them
    later). "neural_ode": a network for the rate of transcription along a time that another network reads from the
    cell (`nn.splicing_ode`); it has to be trained, `diffbio.fit(op, data)` minimises the distance of the cells from
    the trajectory.

    The chain of transitions is scVelo's: correlation of v_i with x_j - x_i over neighbours and their neighbours,
    through exp(scale cos). There v is per splicing time, u - (gamma / beta) s, in every mode: times beta, genes that
    splice fast would add noise only. `latent_time` is the fitted time of "dynamical" and "neural_ode"; else the
    times whose differences along the graph are nearest to the cosines (`math.velocity_graph.potential`).

    Gradients with respect to the counts equal finite differences. Discrete, outside the gradient: which cells are
    neighbours (by 30 principal components of log-normalised spliced counts, unless given), which are in a sharp tail,
    which genes are read, and in "dynamical" the point of a grid of times at which each cell is while genes are fitted.
    """

    config: VelocityConfig
    graph_of_cells = True
    cell_numbers: ClassVar[frozenset[str]] = frozenset(
        {"neighbor_indices", "candidate_indices", "transition_rows", "transition_columns"}
    )
    fit_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 200, "batch_size": 256, "learning_rate": 3e-3, "validation": 0.0,
    }  # fmt: skip

    def __init__(self, config: VelocityConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.ode = nnx.data(None)
        if config.kinetics_model == "neural_ode":
            self.ode = SplicingODE(
                config.n_genes, hidden_dim=config.hidden_dim, dt=config.dt,
                n_steps=config.n_steps, rngs=rngs,
            )  # fmt: skip
            self.fitted = False

    def __call__(
        self,
        spliced: Float[Array, "cells genes"],
        unspliced: Float[Array, "cells genes"],
        neighbor_indices: Int[Array, "cells nearest"] | None = None,
        candidate_indices: Int[Array, "cells candidates"] | None = None,
    ) -> Velocities:
        """spliced: counts.

        unspliced: counts.
        neighbor_indices: row numbers of each cell's neighbours, itself excluded.
        candidate_indices: cells that each velocity is compared with, sorted; `math.velocity_graph.distinct_candidates`
            gives those of `reach` in lists several times shorter than those made here, which have one length.

        Raises:
            DataError: fewer cells than n_neighbors; and where values are known (not under jit): negative or missing
                counts, a layer without any, or row numbers out of range.
        """
        around, now, second = self._moments(spliced, unspliced, neighbor_indices)
        if candidate_indices is None:
            columns = candidates(around.indices, reach=self.config.reach)
        else:
            self._check_indices("candidate_indices", candidate_indices, len(spliced))
            columns = candidate_indices
        return self._outputs(around.indices, columns, now, self.rates(around.indices, now, second))

    def _outputs(self, indices: Array, columns: Array, now: State, rates: Rates) -> Velocities:
        config = self.config
        per_splicing = now.unspliced / rates.scaling - rates.gamma / rates.beta * now.spliced
        lists = cosine_lists(now.spliced, per_splicing, columns, genes=rates.genes, variance_stabilized=self._rooted())
        edges = transition_edges(lists, scale=config.scale, self_transitions=config.self_transitions)
        time = rates.time
        if time is None:
            time = self.potential_time(indices, now, per_splicing, rates.genes)
        return {
            "velocity": rates.beta * per_splicing,
            "alpha": rates.alpha,
            "beta": rates.beta,
            "gamma": rates.gamma,
            "unspliced_scaling": rates.scaling,
            "velocity_genes": rates.genes.astype(jnp.int32),
            "latent_time": time,
            "projected_spliced": self._projected(now, rates),
            "velocity_confidence": confidence(per_splicing, indices, genes=rates.genes),
            "transition_rows": edges.rows,
            "transition_columns": edges.columns,
            "transition_weights": edges.weights,
            "transition_cosines": lists.cosines.ravel(),
        }

    def rates(self, indices: Array, now: State, second: tuple[Array, Array] | None = None) -> Rates:
        """Kinetics of every gene from moments; `second` are those of s² and u s, for "stochastic".

        Args:
            indices: neighbours of each cell, itself excluded.
            now: moments.
            second: (cells, genes) each.
        """
        config = self.config
        tail = {"share": config.tail, "temperature": config.temperature}
        if self.ode is not None:
            beta, gamma = self.ode.rates()
            time = self.ode.time_of(now)
            read = (now.spliced > 0).any(axis=0) & (now.unspliced > 0).any(axis=0)
            active = self.ode.transcription(time)
            return Rates(active.mean(axis=0), beta, gamma, jnp.ones_like(beta), read, active, time)
        if second is not None:
            found = stochastic(now.spliced, now.unspliced, *second, **tail)
        else:
            found = steady_state(now.spliced, now.unspliced, **tail)
        if config.kinetics_model == "dynamical":
            return self._dynamical(indices, now, found)
        weights = upper_tail(now.spliced, now.unspliced, **tail)
        one = jnp.ones_like(found.gamma)
        alpha = (weights * now.unspliced).sum(axis=0) / weights.sum(axis=0)
        # as much is transcribed as is spliced: La Manno's "constant unspliced" extrapolation
        return Rates(alpha, one, found.gamma, one, found.velocity_genes, now.unspliced, None)

    @property
    def objective(self) -> Callable[[Data], tuple[Array, dict[str, Array]]]:
        """Of "neural_ode": mean squared distance of moments, as of `for_training`, from the trajectory at their times.

        The other modes have nothing to train, and no such attribute.
        """
        if self.ode is None:
            msg = f"kinetics_model {self.config.kinetics_model!r} has nothing to train"
            raise AttributeError(msg)
        return self._distance

    def _distance(self, data: Data) -> tuple[Array, dict[str, Array]]:
        inputs = self._inputs(data)
        assert self.ode is not None
        return self.ode.loss(State(inputs["unspliced"], inputs["spliced"]))

    def for_training(self, data: Data) -> Data:
        """Moments in place of the counts: minibatches of them know nothing of neighbours."""
        inputs = self._inputs(data)
        _, now, _ = self._moments(inputs["spliced"], inputs["unspliced"], inputs.get("neighbor_indices"))
        return {"spliced": np.asarray(now.spliced), "unspliced": np.asarray(now.unspliced)}

    def init_from(self, data: Data) -> None:
        """Of "neural_ode": spreads, gamma / beta and a first guess of the times from moments; else nothing."""
        if self.ode is None:
            return
        inputs = self._inputs(data)
        now = State(inputs["unspliced"], inputs["spliced"])
        found = steady_state(now.spliced, now.unspliced, share=self.config.tail, temperature=self.config.temperature)
        self._check_enough(len(now.spliced))
        indices = self._neighbors(now.spliced)
        per_splicing = now.unspliced - found.gamma * now.spliced
        first = self.potential_time(indices, now, per_splicing, found.velocity_genes)
        self.ode.start_from(now, found.gamma, _ranks(first))

    def potential_time(self, indices: Array, now: State, velocity: Array, genes: Array) -> Float[Array, " cells"]:
        """Times, 0 to 1, whose differences along the graph are nearest to the velocities' cosines."""
        lists = cosine_lists(now.spliced, velocity, indices, genes=genes, variance_stabilized=self._rooted())
        return unit_interval(potential(lists.columns, lists.cosines))

    def _dynamical(self, indices: Array, now: State, first: Ratios) -> Rates:
        config = self.config
        start = self.potential_time(indices, now, now.unspliced - first.gamma * now.spliced, first.velocity_genes)
        width = config.switch_width
        data = problem(now.unspliced, now.spliced, first.gamma)
        found = fit(_ranks(start), data, width=width, scale_spread=config.scaling_spread, rounds=config.n_iterations)
        explained = 1.0 - noise_of(found, data, width)
        gene, time = found.genes, found.time
        fixed = jax.lax.stop_gradient(time)
        span = time[jnp.argmax(fixed)] - time[jnp.argmin(fixed)]
        span = jnp.where(span > 0, span, 1.0)
        beta = jnp.exp(gene.log_beta) * span
        # per cell: on between the two switches, smooth as the curves are
        on = jax.nn.sigmoid((time[:, None] - gene.on) / width)
        off = jax.nn.sigmoid((time[:, None] - gene.on - jnp.exp(gene.log_span)) / width)
        alpha = jnp.exp(gene.log_level) * beta
        genes = first.velocity_genes & (explained > LEAST_FIT)
        genes = jnp.where(genes.any(), genes, first.velocity_genes)
        return Rates(
            alpha, beta, beta * jnp.exp(gene.log_ratio), jnp.exp(gene.log_scale), genes, alpha * (on - off),
            unit_interval(time),
        )  # fmt: skip

    def _projected(self, now: State, rates: Rates) -> Array:
        if self.ode is not None and rates.time is not None:
            return self.ode.step(now, rates.time).spliced
        return advanced(
            now.unspliced / rates.scaling, now.spliced, alpha=rates.active, beta=rates.beta, gamma=rates.gamma,
            time=self.config.dt,
        )[1]  # fmt: skip

    def _rooted(self) -> bool:
        asked = self.config.variance_stabilized
        return asked == "always" or asked == self.config.kinetics_model

    def _moments(
        self, spliced: Array, unspliced: Array, neighbor_indices: Array | None
    ) -> tuple[Any, State, tuple[Array, Array] | None]:
        who = type(self).__name__
        for key, layer in (("spliced", spliced), ("unspliced", unspliced)):
            checked_counts(who, layer, key=key, fix="pass counts")
            if not isinstance(layer, jax.core.Tracer) and layer.size and not np.asarray(layer).any():
                msg = f"{who}: data[{key!r}] holds no counts at all; pass the layer of {key} counts."
                raise DataError(msg)
        if neighbor_indices is None:
            self._check_enough(len(spliced))
        else:
            self._check_indices("neighbor_indices", neighbor_indices, len(spliced))
        if self.config.normalize:
            spliced, unspliced = size_normalized(spliced), size_normalized(unspliced)
        indices = self._neighbors(spliced) if neighbor_indices is None else neighbor_indices
        around = neighborhood(indices, spliced.dtype)
        now = State(moments(around, unspliced), moments(around, spliced))
        if self.config.kinetics_model != "stochastic":
            return around, now, None
        return around, now, (moments(around, spliced**2), moments(around, spliced * unspliced))

    def _neighbors(self, spliced: Array) -> Array:
        """By principal components of log(1 + spliced); on the host, also inside jit."""
        k = self.config.n_neighbors - 1

        def search(spliced: Any) -> np.ndarray:
            x = np.log1p(np.asarray(spliced, np.float64))
            return knn(pca(x, min(COMPONENTS, *x.shape)).scores, k).indices

        fixed = jax.lax.stop_gradient(spliced)
        if not isinstance(fixed, jax.core.Tracer):
            return jnp.asarray(search(fixed))
        shape = jax.ShapeDtypeStruct((len(spliced), k), jnp.int32)
        return jax.pure_callback(search, shape, fixed, vmap_method="sequential")

    def _check_enough(self, n_cells: int) -> None:
        if n_cells < self.config.n_neighbors:
            msg = f"{type(self).__name__}: config.n_neighbors is {self.config.n_neighbors}, but data['spliced'] has "
            msg += f"only {n_cells} cells; lower it."
            raise DataError(msg)

    def _check_indices(self, key: str, indices: Array, n_cells: int) -> None:
        if isinstance(indices, jax.core.Tracer) or not indices.size:
            return
        lowest, highest = int(np.asarray(indices).min()), int(np.asarray(indices).max())
        if lowest < 0 or highest >= n_cells:
            odd = lowest if lowest < 0 else highest
            msg = f"{type(self).__name__}: data[{key!r}] holds {odd}, but row numbers from 0 to "
            msg += f"{n_cells - 1} are wanted."
            raise DataError(msg)

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableVelocity", Data]]:
        """Cells along one course of six genes, in three modes."""
        keys = jax.random.split(jax.random.key(1), 3)
        n_cells, n_genes = 24, 6
        time = (jnp.arange(n_cells) + 0.5) / n_cells
        genes = Kinetics(
            log_level=jnp.log(jnp.array([20.0, 30.0, 25.0, 40.0, 15.0, 30.0])),
            log_beta=jnp.log(jnp.array([4.0, 6.0, 4.0, 5.0, 8.0, 5.0])),
            log_ratio=jnp.log(jnp.array([0.6, 1.4, 1.0, 0.8, 2.0, 1.2])),
            on=jnp.array([-0.1, -0.2, 0.2, 0.3, 0.0, 0.1]),
            log_span=jnp.log(jnp.array([2.0, 0.6, 0.5, 2.0, 0.4, 0.5])),
            log_scale=jnp.zeros(n_genes),
        )
        layers = jax.vmap(lambda t: curve(genes, t, width=0.02))(time)
        noisy = [x + 1.0 + 4.0 * jax.random.uniform(key, x.shape) for key, x in zip(keys, layers, strict=False)]
        data: Data = {"unspliced": noisy[0], "spliced": noisy[1]}
        near = jnp.argsort(jnp.abs(time[:, None] - time[None, :]), axis=1)[:, 1:7]
        base: dict[str, Any] = {"n_genes": n_genes, "n_neighbors": 7}
        steady = VelocityConfig(**base, temperature=0.1)
        dynamical = VelocityConfig(
            **base, kinetics_model="dynamical", normalize=False, switch_width=0.1, n_iterations=4, reach=1,
            scaling_spread=0.1,
        )  # fmt: skip
        ode = VelocityConfig(**base, kinetics_model="neural_ode", hidden_dim=4, n_steps=5, dt=0.2, reach=1)
        return {
            "steady state": (cls(steady, rngs=nnx.Rngs(0)), data),
            "dynamical": (cls(dynamical, rngs=nnx.Rngs(0)), data | {"neighbor_indices": near}),
            "neural ode": (cls(ode, rngs=nnx.Rngs(0)), data),
        }


def _ranks(values: Array) -> Array:
    """Ranks from 0 to 1, no gradient."""
    fixed = jax.lax.stop_gradient(values)
    return (jnp.argsort(jnp.argsort(fixed)) + 0.5).astype(fixed.dtype) / len(fixed)
