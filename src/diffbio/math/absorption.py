"""Absorption probabilities of a sparse Markov chain: a certified iterative solution with its exact gradient.

F = (I - Q)^-1 S, where Q holds the steps between transient cells and S those into each terminal state (Kemeny & Snell
1960, theorem 3.3.7). Solved in double precision on the host; the gradient is one more solve, with the transpose.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from scipy import sparse

from ..errors import DataError
from .callbacks import on_host
from .graph import Edges
from .transitions import normalized_rows, to_scipy

MOST_ITERATIONS = 20_000
DIRECT_UP_TO = 5_000  # transient cells whose equations are factorised where iterations stall
RESTART_BELOW = 1e-14  # of |r0| |r|: the shadow residual has nothing left to say
CHECK_EVERY = 10  # iterations between two looks at the error; where there are few cells, looks cost nothing


def absorption_probabilities(
    edges: Edges, terminal_states: Int[Array, " cells"], n_states: int, *, tolerance: float = 1e-8
) -> Float[Array, "cells states"]:
    """Probability that a walk from each cell ends in each terminal state; rows sum to 1.

    Differentiable in the weights. They are divided by the sum of their row first. Iterations (BiCGSTAB on the chain
    without its self-loops, all states at once) go on until the error is proven to be below `tolerance`: in the
    largest norm it is at most the residual times the largest expected number of jumps, which is solved along.

    On values and under `jax.grad` the errors below are raised as they are; inside jit the host finds them when it
    solves, and JAX raises a `JaxRuntimeError` that carries the text.

    Args:
        edges: steps (row, column) with weights >= 0; pairs listed twice add up.
        terminal_states: 0 to n_states - 1 in a terminal cell, -1 in a transient one.
        n_states: columns of the result; that of a state without cells is 0.
        tolerance: largest error of a probability; of the gradient, relative to its sum of absolute values.

    Raises:
        DataError: no terminal cell, cells from which no terminal cell can be reached, or no convergence.
    """
    chain = normalized_rows(edges, len(terminal_states))
    return _absorbed(*chain, terminal_states, n_states, tolerance)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _absorbed(
    rows: Array, columns: Array, weights: Array, terminal: Array, n_states: int, tolerance: float
) -> Float[Array, "cells states"]:
    return _forward(rows, columns, weights, terminal, n_states, tolerance)[0]


def _forward(
    rows: Array, columns: Array, weights: Array, terminal: Array, n_states: int, tolerance: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def solve(*parts: Any) -> tuple[np.ndarray, float]:
        *edges, states = parts
        return absorbed(to_scipy(Edges(*edges), len(states)), states, n_states, tolerance=tolerance)

    shapes = (
        jax.ShapeDtypeStruct((len(terminal), n_states), weights.dtype),
        jax.ShapeDtypeStruct((), weights.dtype),
    )
    found, jumps = on_host(solve, shapes, rows, columns, weights, terminal)
    return found, (rows, columns, weights, terminal, found, jumps)


def _backward(
    n_states: int, tolerance: float, kept: tuple[jax.Array, ...], change: jax.Array
) -> tuple[None, None, jax.Array, None]:
    rows, columns, weights, terminal, found, jumps = kept

    def solve(*parts: Any) -> np.ndarray:
        *edges, states, change, jumps = parts
        chain = to_scipy(Edges(*edges), len(states))
        return adjoint(chain, states, change, float(jumps), tolerance=tolerance)

    shape = jax.ShapeDtypeStruct((len(terminal), n_states), weights.dtype)
    visits = on_host(solve, shape, rows, columns, weights, terminal, change, jumps)
    # a step i -> j is worth what it leads to, beyond where i stands: the part along the row's sum cannot be used
    slope = (visits[rows] * (found[columns] - found[rows])).sum(axis=1)
    return None, None, slope, None


_absorbed.defvjp(_forward, _backward)


def absorbed(
    chain: sparse.csr_array, terminal: Int[np.ndarray, " cells"], n_states: int, *, tolerance: float
) -> tuple[Float[np.ndarray, "cells states"], float]:
    """`absorption_probabilities` on the host, and the largest expected number of jumps before absorption.

    Raises:
        DataError: no terminal cell, cells from which no terminal cell can be reached, or no convergence.
    """
    check_reachable(chain, terminal)
    found = np.zeros((len(terminal), n_states))
    ends = np.flatnonzero(terminal >= 0)
    found[ends, terminal[ends]] = 1.0
    inner = np.flatnonzero(terminal < 0)
    if not inner.size:
        return found, 1.0
    jump, _ = _jumps(chain, inner)
    used = np.unique(terminal[ends])
    # the last column counts jumps: (I - J)^-1 1, whose largest entry is the norm of the inverse
    right = np.column_stack([jump @ found[:, used], np.ones(len(inner))])
    system = (sparse.eye_array(len(inner), format="csr") - jump[:, inner]).tocsr()

    def enough(x: np.ndarray, residual: np.ndarray) -> float:
        off = float(np.abs(residual[:, -1]).max())
        most = float(x[:, -1].max()) / (1 - off) if off < 0.5 else np.inf  # a bound on the inverse's norm
        # twice, since rows are divided by their sum in the end
        return 2 * most * float(np.abs(residual[:, :-1]).sum(axis=1).max()) / tolerance

    x = _solved(system, right, enough, "absorption probabilities")
    part = np.clip(x[:, :-1], 0.0, 1.0)
    found[np.ix_(inner, used)] = part / part.sum(axis=1, keepdims=True)  # by at most the tolerance off 1
    return found, float(x[:, -1].max())


def adjoint(
    chain: sparse.csr_array,
    terminal: Int[np.ndarray, " cells"],
    change: Float[np.ndarray, "cells states"],
    jumps: float,
    *,
    tolerance: float,
) -> Float[np.ndarray, "cells states"]:
    """(I - Q)^-T of `change` on transient cells, 0 on terminal ones.

    Args:
        chain: rows sum to 1.
        terminal: -1 in transient cells.
        change: derivative of a function with respect to the probabilities.
        jumps: of `absorbed`.
        tolerance: of the result, relative to its sum of absolute values.

    Raises:
        DataError: no convergence.
    """
    found = np.zeros(change.shape)
    inner = np.flatnonzero(terminal < 0)
    right = change[inner].astype(np.float64)
    if not np.abs(right).max(initial=0.0) > 0:
        return found
    jump, stays = _jumps(chain, inner)
    system = (sparse.eye_array(len(inner), format="csr") - jump[:, inner]).T.tocsr()

    def enough(x: np.ndarray, residual: np.ndarray) -> float:
        return float(jumps * np.abs(residual).sum() / (tolerance * np.abs(x).sum()))

    found[inner] = _solved(system, right, enough, "the gradient of absorption probabilities") / stays[:, None]
    return found


def check_reachable(chain: sparse.csr_array, terminal: Int[np.ndarray, " cells"]) -> None:
    """Refuses a chain on which the probabilities are not defined.

    Raises:
        DataError: no terminal cell, or cells from which none can be reached; says how many and names the first.
    """
    ends = np.flatnonzero(terminal >= 0)
    if not ends.size:
        msg = "absorption: there is no terminal cell; name at least one."
        raise DataError(msg)
    lost = np.flatnonzero(~reaching(chain, ends))
    if lost.size:
        msg = (
            f"absorption: from {lost.size} of {len(terminal)} cells no terminal cell can be reached (first: cell "
            f"{lost[0]}); name a terminal state in their part of the graph, or use more neighbours."
        )
        raise DataError(msg)


def reaching(chain: sparse.csr_array, ends: Int[np.ndarray, " some"]) -> np.ndarray:
    """Which cells have a path to one of the cells `ends`, (cells,) of bool."""
    n = chain.shape[0]
    backward = chain.T.tocoo()
    rows, columns = backward.coords
    kept = backward.data > 0
    # one more node, from which all ends are a step away
    rows = np.concatenate([rows[kept], np.full(len(ends), n)])
    columns = np.concatenate([columns[kept], ends])
    graph = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(n + 1, n + 1))
    order = sparse.csgraph.breadth_first_order(graph, n, return_predecessors=False)
    seen = np.zeros(n + 1, bool)
    seen[order] = True
    return seen[:n]


def _jumps(chain: sparse.csr_array, inner: np.ndarray) -> tuple[sparse.csr_array, np.ndarray]:
    """Rows of transient cells without their self-loops, summing to 1 in double precision; what a row summed to."""
    part = chain[inner].tocsr()
    part.data = part.data / np.repeat(np.asarray(part.sum(axis=1)).ravel(), np.diff(part.indptr))
    own = np.repeat(inner, np.diff(part.indptr)) == part.indices
    part.data[own] = 0.0
    stays = np.asarray(part.sum(axis=1)).ravel()
    part.data = part.data / np.repeat(stays, np.diff(part.indptr))
    return part, stays


def _solved(
    system: sparse.csr_array, right: np.ndarray, enough: Callable[[np.ndarray, np.ndarray], float], what: str
) -> np.ndarray:
    """Solves `system` x = `right` until `enough(x, right - system x)` <= 1."""
    x, bound, iterations = _bicgstab(system, right, enough)
    if bound <= 1:
        return x
    if system.shape[0] <= DIRECT_UP_TO:
        x = sparse.linalg.splu(system.tocsc()).solve(right)
        bound = enough(x, right - system @ x)
        if bound <= 1:
            return x
    msg = (
        f"absorption: {what} did not converge: after {iterations} iterations the error is bounded by {bound:.3g} times "
        "the tolerance; make the chain faster (fewer self-loops, more neighbours), or raise the tolerance."
    )
    raise DataError(msg)


def _bicgstab(
    system: sparse.csr_array, right: np.ndarray, enough: Callable[[np.ndarray, np.ndarray], float]
) -> tuple[np.ndarray, float, int]:
    """BiCGSTAB (van der Vorst 1992) on all columns at once, each with coefficients of its own.

    Returns:
        (x, what `enough` says of the true residual, iterations).
    """
    best, least = np.zeros_like(right), np.inf
    x, residual, done = best, right.copy(), 0
    stalled = 0
    while done < MOST_ITERATIONS and stalled < 3:
        x, done = _until(system, x, residual, enough, done)
        residual = right - system @ x  # the recursion's own residual drifts away from it
        bound = enough(x, residual)
        if not np.isfinite(x).all():
            break
        stalled = 0 if bound < 0.5 * least else stalled + 1
        if bound < least:
            best, least = x, bound
        if least <= 1:
            break
    return best, least, done


def _until(
    system: sparse.csr_array,
    x: np.ndarray,
    residual: np.ndarray,
    enough: Callable[[np.ndarray, np.ndarray], float],
    done: int,
) -> tuple[np.ndarray, int]:
    """Iterations from `x` until the recursion's residual is small enough, or its shadow residual is used up."""
    shadow, r = residual, residual
    p = v = np.zeros_like(r)
    rho = alpha = omega = np.ones(r.shape[1])
    start = np.abs(_dot(shadow, shadow))
    while done < MOST_ITERATIONS:
        before, rho = rho, _dot(shadow, r)
        p = r + _over(rho, before) * _over(alpha, omega) * (p - omega * v)
        v = system @ p
        alpha = _over(rho, _dot(shadow, v))
        s = r - alpha * v
        t = system @ s
        omega = _over(_dot(t, s), _dot(t, t))
        x = x + alpha * p + omega * s
        r = s - omega * t
        done += 1
        spent = np.abs(rho) <= RESTART_BELOW * np.sqrt(start * _dot(r, r))
        look = done % CHECK_EVERY == 0 or len(r) < CHECK_EVERY * CHECK_EVERY
        if spent.any() or look or not np.isfinite(r).all():
            if enough(x, r) <= 0.5 or not np.isfinite(r).all():
                break
            if (spent & (_dot(r, r) > 0)).any():
                break
    return x, done


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->j", a, b)


def _over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Quotient, 0 where b is 0: a column that is solved stays as it is."""
    return np.asarray(a / np.where(b != 0, b, 1.0) * (b != 0))
