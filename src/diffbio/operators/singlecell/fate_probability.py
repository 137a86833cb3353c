"""Fates of cells: where walks on a Markov chain of cells end, and the macrostates they end in."""

import dataclasses
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...errors import ConfigError, DataError
from ...math.absorption import absorption_probabilities
from ...math.callbacks import on_host
from ...math.graph import Edges
from ...math.macrostates import core_cells, macrostates, terminal_states
from ...math.transitions import ROWS_SUM_TO_1, normalized_rows, to_scipy
from ..base import Config, Data, Operator, checked_finite, positive, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class FateProbabilityConfig(Config):
    """Settings of `DifferentiableFateProbability`.

    n_macrostates: columns of the result. Given terminal states are numbered below it; where none are given, so many
        macrostates are looked for.
    n_terminal: how many of the macrostates that were found are terminal, the most stable first; None takes those whose
        stability is at least `stability_threshold`.
    stability_threshold: probability, 0-1, that a step from a terminal macrostate stays in it; without `n_terminal`.
    n_terminal_cells: a macrostate that was found is held by so many of its surest cells.
    tolerance: largest error of a probability; proven when the equations are solved.
    n_cells: number of cells; None takes it from `terminal_states`, or else from the largest row number.
    """

    n_macrostates: int = positive(2)
    n_terminal: int | None = setting(None, "> 0", lambda v: v is None or v > 0)
    stability_threshold: float = setting(0.96, "in [0, 1]", lambda v: 0 <= v <= 1)
    n_terminal_cells: int = positive(30)
    tolerance: float = positive(1e-8)
    n_cells: int | None = setting(None, "> 0", lambda v: v is None or v > 0)


class Fates(TypedDict):
    """What `DifferentiableFateProbability` adds."""

    fate_probabilities: Float[Array, "cells macrostates"]  # rows sum to 1; 0 in columns that are not terminal
    macrostates: Int[Array, " cells"]  # the macrostate that a cell holds, -1 for cells in between


class DifferentiableFateProbability(Operator):
    """Probability that a walk on the Markov chain of the cells ends in each terminal state.

    F = (I - Q)^-1 S on the cells in between (CellRank, Lange et al. 2022, Nat. Methods 19:159), by iterations on the
    sparse chain whose error is proven to be below the tolerance (`math.absorption`). The gradient with respect to the
    steps' weights is exact, by one more solve with the transposed chain. `math.kernels` makes chains out of a graph of
    cells, a pseudotime and velocities.

    Terminal states are given, or found: macrostates by G-PCCA (`math.macrostates`), of which the stable ones are
    terminal and are held by their surest cells. Which cells those are is a discrete choice; no gradient goes through
    it. Both work inside jit, where the host does the linear algebra as a callback.
    """

    config: FateProbabilityConfig
    graph_of_cells = True
    cell_numbers: ClassVar[frozenset[str]] = frozenset({"transition_rows", "transition_columns"})

    def __init__(self, config: FateProbabilityConfig, *, rngs: nnx.Rngs) -> None:
        del rngs  # nothing is drawn
        self.config = config
        if config.n_terminal is not None and config.n_terminal > config.n_macrostates:
            msg = (
                f"{type(self).__name__}: n_terminal is {config.n_terminal}, but there are {config.n_macrostates} "
                "macrostates; raise n_macrostates."
            )
            raise ConfigError(msg)

    def __call__(
        self,
        transition_rows: Int[Array, " edges"],
        transition_columns: Int[Array, " edges"],
        transition_weights: Float[Array, " edges"],
        terminal_states: Int[Array, " cells"] | None = None,
    ) -> Fates:
        """transition_rows: cells that steps start from; a pair that is listed twice has the sum of its weights.

        transition_columns: cells that they lead to.
        transition_weights: probabilities, 0 or more; those of one row sum to 1.
        terminal_states: 0 to n_macrostates - 1 in cells that hold a terminal state, -1 in others. Where all are -1, as
            where there are none, macrostates are found. The column of a number that no cell has is 0.

        Raises:
            ConfigError: neither `terminal_states` nor `config.n_cells` says under jit how many cells there are.
            DataError: row numbers or labels out of range, weights that are negative, missing or do not sum to 1 in a
                row, cells from which no terminal state can be reached, no macrostate that is stable enough, or no
                convergence. Under jit, where values are not known beforehand, rows are divided by their sum, and the
                last three stop the program with a `JaxRuntimeError` of the same text.
        """
        config = self.config
        n_cells = self._n_cells(transition_rows, transition_columns, terminal_states)
        given = jnp.full(n_cells, -1) if terminal_states is None else terminal_states
        edges = Edges(transition_rows, transition_columns, transition_weights)
        self._check(edges, given)
        edges = normalized_rows(edges, n_cells)
        held = self._states(edges, given)
        labels, ends = held[0], held[1]
        fates = absorption_probabilities(edges, ends, config.n_macrostates, tolerance=config.tolerance)
        return {"fate_probabilities": fates, "macrostates": labels}

    def _states(self, edges: Edges, given: Array) -> Array:
        """Labels of the cells that hold macrostates, and of those that hold terminal ones: (2, cells)."""
        config = self.config

        def find(rows: Any, columns: Any, weights: Any, given: Any) -> np.ndarray:
            if (given >= 0).any():
                return np.stack([given, given])
            chain = to_scipy(Edges(rows, columns, weights), len(given))
            found = macrostates(chain, config.n_macrostates)
            terminal = terminal_states(
                found, n_terminal=config.n_terminal, stability_threshold=config.stability_threshold
            )
            cores = core_cells(found.memberships, config.n_terminal_cells)
            return np.stack([cores, np.where(np.isin(cores, terminal), cores, -1)])

        shape = jax.ShapeDtypeStruct((2, len(given)), given.dtype)
        return jnp.asarray(on_host(find, shape, *(jax.lax.stop_gradient(part) for part in edges), given))

    def _n_cells(self, rows: Array, columns: Array, given: Array | None) -> int:
        if given is not None:
            return len(given)
        if self.config.n_cells is not None:
            return self.config.n_cells
        if any(isinstance(part, jax.core.Tracer) for part in (rows, columns)):
            msg = (
                f"{type(self).__name__}: under jit the number of cells is not known; pass data['terminal_states'] or "
                "config.n_cells."
            )
            raise ConfigError(msg)
        return 1 + int(max(np.asarray(rows).max(initial=0), np.asarray(columns).max(initial=0)))

    def _check(self, edges: Edges, given: Array) -> None:
        who, n_cells = type(self).__name__, len(given)
        ranges = (
            ("transition_rows", edges.rows, 0, n_cells - 1),
            ("transition_columns", edges.columns, 0, n_cells - 1),
            ("terminal_states", given, -1, self.config.n_macrostates - 1),
        )
        for key, values, low, high in ranges:
            if isinstance(values, jax.core.Tracer) or not values.size:
                continue
            lowest, highest = int(np.asarray(values).min()), int(np.asarray(values).max())
            if lowest < low or highest > high:
                odd = lowest if lowest < low else highest
                msg = f"{who}: data[{key!r}] holds {odd}, but numbers from {low} to {high} are wanted."
                raise DataError(msg)
        fix = "weights are probabilities of steps"
        checked_finite(who, edges.weights, key="transition_weights", fix=fix, lowest=0.0)
        if any(isinstance(part, jax.core.Tracer) for part in (*edges, given)):
            return
        sums = np.bincount(np.asarray(edges.rows), np.asarray(edges.weights, float), minlength=n_cells)
        off = np.flatnonzero(np.abs(sums - 1) > ROWS_SUM_TO_1)
        if off.size:
            msg = (
                f"{who}: data['transition_weights'] of a row must sum to 1; {off.size} of {n_cells} rows do not "
                f"(first: row {off[0]}, {sums[off[0]]:.6g}); math.transitions.normalized_rows makes them."
            )
            raise DataError(msg)

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableFateProbability", Data]]:
        """A trunk of 5 cells with three branches of 5: ends found as macrostates, and two ends given."""
        branches = [range(first, first + 5) for first in (5, 10, 15)]
        steps = [(i, i + 1) for i in range(4)] + [(4, branch[0]) for branch in branches]
        steps += [(i, i + 1) for branch in branches for i in branch[:-1]]
        rows, columns = np.array([*steps, *((j, i) for i, j in steps), *((i, i) for i in range(20))]).T
        raw = np.random.default_rng(0).uniform(0.5, 1.0, len(rows))
        raw[: len(steps)] *= 1.5  # rather forward than back, so that the trunk is left in the end
        raw[4:7] *= 0.3  # by narrow ways
        weights = raw / np.bincount(rows, raw)[rows]
        chain: dict[str, Any] = {
            "transition_rows": jnp.asarray(rows),
            "transition_columns": jnp.asarray(columns),
            "transition_weights": jnp.asarray(weights, jnp.float32),
        }
        given = np.full(20, -1)
        given[[9, 8, 14]] = [0, 0, 1]
        found = FateProbabilityConfig(n_macrostates=4, n_terminal_cells=2, stability_threshold=0.97, tolerance=1e-12)
        two = FateProbabilityConfig(n_macrostates=2, tolerance=1e-12)
        return {
            "found": (cls(found, rngs=nnx.Rngs(0)), chain | {"terminal_states": jnp.full(20, -1)}),
            "given": (cls(two, rngs=nnx.Rngs(0)), chain | {"terminal_states": jnp.asarray(given)}),
        }
