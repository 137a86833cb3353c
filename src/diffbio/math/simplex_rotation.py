"""PCCA+: the linear map that makes an invariant subspace into memberships as crisp as can be."""

import numpy as np
from jaxtyping import Float
from scipy.optimize import linprog

MOST_STEPS = 100
ENOUGH = 1e-8  # relative gain of crispness below which the ascent ends
INSIDE = 1e-9  # a membership may be so far below 0 before it becomes a constraint
DIRECTIONS = 64  # in which extreme cells are looked for, for each state


def crispest(basis: Float[np.ndarray, "cells states"]) -> tuple[Float[np.ndarray, "cells states"], float]:
    """Memberships chi = X A, non-negative, with rows that sum to 1, and of largest crispness; and the crispness.

    Crispness is sum_j |chi_j|² / <chi_j, 1> over the number of states (Roeblitz & Weber 2013, Adv. Data Anal.
    Classif. 7:147, eq. 12), a convex function of A on a polytope. So linear programs, each along the gradient of the
    last, climb to a corner of it that no neighbouring corner beats. That replaces the descent without gradient of
    PCCA+, needs no start of its own, and never lowers crispness. Start: the inner simplex (Weber & Galliat 2002).

    Args:
        basis: X; orthogonal columns of mean square 1, the first is 1.
    """
    k = basis.shape[1]
    if k == 1:
        return np.ones((len(basis), 1)), 1.0
    corners = inner_simplex(basis[:, 1:])
    rotation = _feasible(np.linalg.inv(basis[corners]), basis)
    value = _crispness(rotation)
    limits = _extreme_cells(basis, corners)
    for _ in range(MOST_STEPS):
        step, limits = _climbed(rotation, basis, limits)
        step = _feasible(step, basis)
        if not (gained := _crispness(step)) > value * (1 + ENOUGH):
            break
        rotation, value = step, gained
    memberships = np.clip(basis @ rotation, 0.0, 1.0)
    return memberships / memberships.sum(axis=1, keepdims=True), value / k


def inner_simplex(points: Float[np.ndarray, "cells dimensions"]) -> np.ndarray:
    """Row numbers of dimensions + 1 points that span the largest simplex, found one after the other."""
    count = points.shape[1] + 1
    corners = [int(np.argmax((points**2).sum(axis=1)))]
    rest = points - points[corners[0]]
    while len(corners) < count:
        length = (rest**2).sum(axis=1)
        corners.append(int(np.argmax(length)))
        axis = rest[corners[-1]] / np.sqrt(max(float(length.max()), 1e-300))
        rest = rest - np.outer(rest @ axis, axis)
    return np.asarray(corners)


def _feasible(rotation: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The same directions with the least constant part that makes all memberships non-negative and sum to 1."""
    moving = rotation[1:].copy()
    moving[:, 0] = -moving[:, 1:].sum(axis=1)
    constant = -(basis[:, 1:] @ moving).min(axis=0)
    return np.vstack([constant, moving]) / constant.sum()


def _crispness(rotation: np.ndarray) -> float:
    """sum_ij A_ij² / A_0j; the columns of X are orthonormal, so |chi_j|² = sum_i A_ij² and <chi_j, 1> = A_0j."""
    if (rotation[0] <= INSIDE).any():
        return -np.inf
    return float((rotation**2 / rotation[0]).sum())


def _climbed(rotation: np.ndarray, basis: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The corner that is furthest along the gradient, and the cells that hold it; violated ones are added as found."""
    k = len(rotation)
    slope = 2 * rotation / rotation[0]
    slope[0] = -((rotation[1:] / rotation[0]) ** 2).sum(axis=0)  # the constant term sums to 1 whatever it is
    sums = np.kron(np.eye(k), np.ones((1, k)))  # of each row of A, entries in order of rows
    total = np.zeros(k)
    total[0] = 1.0
    found = rotation
    for _ in range(MOST_STEPS):
        held = np.concatenate([np.kron(-basis[limits], np.eye(k)[j]) for j in range(k)])
        solution = linprog(
            -slope.ravel(),
            A_ub=held,
            b_ub=np.zeros(len(held)),
            A_eq=sums,
            b_eq=total,
            bounds=(-1.0, 1.0),  # |A_ij| = |<X_i, chi_j>| <= |chi_j| <= 1
            method="highs",
        )
        if solution.x is None:
            break
        found = solution.x.reshape(k, k)
        memberships = basis @ found
        worst = memberships.argmin(axis=0)
        outside = worst[memberships[worst, np.arange(k)] < -INSIDE]
        added = np.setdiff1d(outside, limits)
        if not added.size:
            break
        limits = np.append(limits, added)
    return found, limits


def _extreme_cells(basis: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Cells at the border of the cloud: extreme in some directions, the same on every run."""
    k = basis.shape[1]
    directions = np.random.default_rng(0).normal(size=(k - 1, DIRECTIONS * k))
    at = np.unique([basis[:, 1:][:, :].dot(direction).argmax() for direction in directions.T])
    return np.union1d(at, corners)
