"""Macrostates of a sparse Markov chain: G-PCCA on its slowest modes, and which of them are terminal.

Reuter et al. 2018 (J. Chem. Theory Comput. 14:3579), 2019 (J. Chem. Phys. 150:174103), as CellRank uses it: memberships
chi = X A of the real invariant subspace X of the largest eigenvalues, with A such that chi is non-negative, has rows
that sum to 1, and is as crisp as can be.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from ..errors import ConfigError, DataError
from .simplex_rotation import crispest

DENSE_UP_TO = 400  # cells whose whole spectrum costs less than starting ARPACK
EIGEN_TOLERANCE = 1e-10
CONJUGATE = 1e-9  # imaginary parts below it are rounding


class Spectrum(NamedTuple):
    """The eigenvalues of largest real part, largest first, and their real invariant subspace."""

    values: np.ndarray  # complex, (states,)
    basis: Float[np.ndarray, "cells states"]  # orthogonal, columns of mean square 1; the first is 1


class Macrostates(NamedTuple):
    """Metastable groups of cells, largest first."""

    memberships: Float[np.ndarray, "cells states"]  # rows sum to 1
    coarse: Float[np.ndarray, "states states"]  # chain between macrostates; rows sum to 1
    stationary: Float[np.ndarray, " states"]  # share of time in each, in the long run
    crispness: float  # 0-1; 1 where every cell is in one state

    @property
    def stability(self) -> Float[np.ndarray, " states"]:
        """Probability that a step from a macrostate stays there."""
        return np.diag(self.coarse)


def macrostates(chain: sparse.csr_array, n_states: int, *, seed: int = 0) -> Macrostates:
    """Groups the cells of a Markov chain into `n_states` macrostates between which it moves slowly.

    Args:
        chain: rows sum to 1.
        n_states: 1 or more.
        seed: of the start of the eigensolver; decides where the chain has several equal eigenvalues.

    Raises:
        ConfigError: more states than cells, or a number that parts a conjugate pair of eigenvalues.
        DataError: the eigensolver did not converge.
    """
    n = chain.shape[0]
    if not 1 <= n_states <= n:
        msg = f"macrostates: n_states must be from 1 to the number of cells, {n}, got {n_states}."
        raise ConfigError(msg)
    basis = spectrum(chain, n_states, seed=seed).basis
    memberships, crispness = crispest(basis)
    order = np.argsort(-memberships.sum(axis=0), kind="stable")
    memberships = memberships[:, order]
    overlap = memberships.T @ memberships
    coarse = np.linalg.solve(overlap, memberships.T @ (chain @ memberships))
    return Macrostates(memberships, coarse, _stationary(coarse), crispness)


def spectrum(chain: sparse.csr_array, n_states: int, *, seed: int = 0) -> Spectrum:
    """The slowest modes of a Markov chain: eigenvalues of largest real part, and the real subspace of their vectors.

    Raises:
        ConfigError: `n_states` parts a conjugate pair.
        DataError: ARPACK did not converge.
    """
    n = chain.shape[0]
    if n_states == 1:
        return Spectrum(np.ones(1, complex), np.ones((n, 1)))
    values, vectors = _eigenpairs(chain, min(n_states + 1, n), seed)
    if len(values) > n_states and _conjugate(values[n_states - 1], values[n_states]):
        msg = (
            f"macrostates: {n_states} of the chain's eigenvalues part a conjugate pair, "
            f"{values[n_states - 1]:.4f}; ask for {n_states - 1} or {n_states + 1} macrostates."
        )
        raise ConfigError(msg)
    values, vectors = values[:n_states], vectors[:, :n_states]
    parts = np.concatenate([vectors.real, vectors.imag], axis=1)
    parts = parts - parts.mean(axis=0)  # the constant vector is one of them, and becomes the first column
    left, sizes, _ = np.linalg.svd(parts, full_matrices=False)
    del sizes
    return Spectrum(values, np.column_stack([np.ones(n), left[:, : n_states - 1] * np.sqrt(n)]))


def eigengap(values: np.ndarray, *, alpha: float = 1.0) -> int:
    """How many eigenvalues lie before the largest gap; a number of macrostates.

    A gap counts the less, the further from 1 it opens: gap - alpha (1 - eigenvalue), as CellRank weighs it.

    Args:
        values: eigenvalues of the chain (their real parts count), two at least.
        alpha: weight of the distance from 1.
    """
    real = np.sort(np.real(values))[::-1]
    return int(np.argmax(real[:-1] - real[1:] - alpha * (1 - real[:-1]))) + 1


def terminal_states(
    found: Macrostates, *, n_terminal: int | None = None, stability_threshold: float = 0.96
) -> Int[np.ndarray, " terminal"]:
    """Which macrostates are terminal: the `n_terminal` most stable ones, or all that are stable enough.

    Raises:
        ConfigError: more terminal states than macrostates.
        DataError: no macrostate is stable enough; says how stable they are.
    """
    stability = found.stability
    if n_terminal is not None:
        if n_terminal > len(stability):
            msg = f"macrostates: there are {len(stability)} macrostates, {n_terminal} of them cannot be terminal."
            raise ConfigError(msg)
        return np.sort(np.argsort(-stability, kind="stable")[:n_terminal])
    chosen = np.flatnonzero(stability >= stability_threshold)
    if not chosen.size:
        msg = (
            f"macrostates: none is as stable as {stability_threshold}: {np.round(stability, 3).tolist()}; lower the "
            "threshold, or say how many are terminal."
        )
        raise DataError(msg)
    return chosen


def core_cells(memberships: Float[np.ndarray, "cells states"], n_cells: int) -> Int[np.ndarray, " cells"]:
    """Number of the macrostate of which a cell is one of the `n_cells` surest, -1 for cells that are in no core.

    A cell that is among the surest of two belongs to the one where its membership is larger.

    Raises:
        DataError: a macrostate is left without a cell.
    """
    top = np.zeros(memberships.shape, bool)
    for state, column in enumerate(memberships.T):
        top[np.argsort(-column, kind="stable")[:n_cells], state] = True
    cores = np.where(top.any(axis=1), np.where(top, memberships, -1.0).argmax(axis=1), -1)
    empty = np.setdiff1d(np.arange(memberships.shape[1]), cores)
    if empty.size:
        msg = (
            f"macrostates: the {n_cells} surest cells of macrostate {empty[0]} all belong rather to others; use fewer "
            "macrostates or fewer cells for each."
        )
        raise DataError(msg)
    return cores


def _eigenpairs(chain: sparse.csr_array, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    n = chain.shape[0]
    if n <= DENSE_UP_TO or count >= n - 1:
        values, vectors = np.linalg.eig(chain.toarray())
    else:
        start = np.random.default_rng(seed).normal(size=n)
        try:
            values, vectors = sparse.linalg.eigs(
                chain, count, which="LR", v0=start, tol=EIGEN_TOLERANCE, ncv=min(n, max(4 * count, 40))
            )
        except sparse.linalg.ArpackNoConvergence as error:
            msg = f"macrostates: the {count} slowest modes of the chain were not found; ask for fewer macrostates."
            raise DataError(msg) from error
    # by real part; a pair side by side, whatever rounding does to the real parts
    order = np.lexsort((-np.abs(values.imag), -np.round(values.real, 10)))[:count]
    return values[order], vectors[:, order]


def _conjugate(a: complex, b: complex) -> bool:
    return bool(abs(a.imag) > CONJUGATE and abs(a - np.conj(b)) < CONJUGATE)


def _stationary(coarse: np.ndarray) -> np.ndarray:
    """Of a chain that coarse-graining may have given small negative entries."""
    n = len(coarse)
    system = np.vstack([coarse.T - np.eye(n), np.ones(n)])
    found = np.linalg.lstsq(system, np.append(np.zeros(n), 1.0))[0]
    found = np.maximum(found, 0.0)
    return np.asarray(found / found.sum())
