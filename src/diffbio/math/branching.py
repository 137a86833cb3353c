"""Branches of a trajectory, from diffusion distances (Haghverdi et al. 2016)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .callbacks import on_host

LEAST_SHARE = 0.01  # of the cells; smaller groups are not divided, as in scanpy
SHORTEST = 5  # cells on either side of a split
MOST_COMPARED = 1000  # cells along a segment whose order decides where it splits

Distances = Callable[[int], np.ndarray]


def branch_labels(
    scaled: Float[Array, "cells components"],
    parts: Int[Array, " cells"],
    root: Int[Array, ""],
    n_branchings: int,
) -> Int[Array, " cells"]:
    """Number of the segment that each cell is on, after `n_branchings` splits; a discrete choice, on the host.

    A segment has three tips: its two farthest cells, and the one farthest from both. Going away from one tip, the
    distances to the other two first change alike and then, past the branching point, against each other: the cell
    where Kendall's correlation changes most is where that tip's branch ends. Cells on several of the three branches,
    or on none, are undecided and a segment too, which may be split further. Segments are numbered by the mean diffusion
    distance of their cells from the root, nearest first; cells of other connected parts have -1.

    The split compares at most 1000 cells, evenly spaced along the segment.

    Args:
        scaled: of `spectrum.Spectrum`.
        parts: of `spectrum.Spectrum`.
        root: row number.
        n_branchings: splits at most; 0 leaves one segment.
    """
    shape = jax.ShapeDtypeStruct(parts.shape, jnp.int32)
    search = partial(_labels, n_branchings=n_branchings)
    found: Array = on_host(search, shape, jax.lax.stop_gradient(scaled), parts, root)
    return found


def _labels(scaled: np.ndarray, parts: np.ndarray, root: np.ndarray, *, n_branchings: int) -> np.ndarray:
    points, start = scaled.astype(np.float64), int(root)
    labels = np.full(len(points), -1)
    cells = np.flatnonzero(parts == parts[start])

    def distances(cell: int) -> np.ndarray:
        return np.sqrt(((points - points[cell]) ** 2).sum(axis=1))

    first = int(cells[distances(start)[cells].argmax()])
    tips = (first, int(cells[distances(first)[cells].argmax()]))
    segments = [(cells, tips)]
    least = max(LEAST_SHARE * len(points), 2 * SHORTEST + 1)
    for _ in range(n_branchings):
        scores = [_score(segment, distances) if len(segment[0]) > least else 0.0 for segment in segments]
        if max(scores) == 0:
            break
        at = int(np.argmax(scores))
        segments[at : at + 1] = _split(*segments[at], distances)
    from_root = distances(start)
    segments.sort(key=lambda segment: float(from_root[segment[0]].mean()))
    for number, (segment, _) in enumerate(segments):
        labels[segment] = number
    return labels


Segment = tuple[np.ndarray, tuple[int, int]]


def _score(segment: Segment, distances: Distances) -> float:
    """How far the third tip is off the line between the first two: their added distance over that of the line."""
    cells, (a, b) = segment
    line = distances(a)[b]
    return float((distances(a) + distances(b))[cells].max() / line) if line > 0 else 0.0


def _split(cells: np.ndarray, tips: tuple[int, int], distances: Distances) -> list[Segment]:
    a, b = tips
    c = int(cells[(distances(a) + distances(b))[cells].argmax()])
    away = [distances(tip)[cells] for tip in (a, b, c)]
    on = np.zeros((3, len(cells)), bool)
    for i in range(3):
        order = np.argsort(away[i], kind="stable")
        end = _turning_point(away[(i + 1) % 3][order], away[(i + 2) % 3][order])
        on[i, order[:end]] = True
    alone = on & (on.sum(axis=0) == 1)
    found: list[Segment] = []
    for i, tip in enumerate((a, b, c)):
        own = cells[alone[i]]
        if len(own):
            found.append((own, (tip, int(own[away[i][alone[i]].argmax()]))))
    rest = cells[~alone.any(axis=0)]
    if len(rest):
        one = int(rest[distances(a)[rest].argmax()])
        found.append((rest, (one, int(rest[distances(one)[rest].argmax()]))))
    return found


def _turning_point(a: np.ndarray, b: np.ndarray) -> int:
    """How many of the first entries change alike in both, so that tau(before) - tau(after) is largest."""
    n = len(a)
    if n < 2 * SHORTEST + 2:
        return n
    taken = np.unique(np.linspace(0, n - 1, min(n, MOST_COMPARED)).astype(int))
    m = len(taken)
    alike = np.sign(a[taken][:, None] - a[taken]) * np.sign(b[taken][:, None] - b[taken])
    pairs = np.tril(alike, -1)
    before = np.cumsum(pairs.sum(axis=1))  # concordance of the first i + 1
    after = np.cumsum(pairs.sum(axis=0)[::-1])[::-1]  # of those from i on
    i = np.arange(SHORTEST, m - SHORTEST)  # length of the first part
    rest = m - i
    change = before[i - 1] / (i * (i - 1) / 2) - after[i] / (rest * (rest - 1) / 2)
    end = i[int(change.argmax())]
    if end > 0.95 * m:  # all change alike: as scanpy, a cautious choice
        end = int(0.95 * end)
    return int(taken[min(end, m - 1)]) + 1
