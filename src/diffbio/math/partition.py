"""Communities of a graph by multilevel search on the host: single moves, refinement, coarsening, again (Leiden)."""

from collections import deque
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Real
from scipy import sparse

from ..errors import DataError

AT_ONCE_ABOVE = 8_000  # waiting nodes; that many move together, a random half of them at a time, fewer one by one
SWEEPS = 12  # of nodes that move together
SHARE_MOVED = 0.5  # of the nodes that gain, in a sweep: if all moved, neighbours would only change places
LEAST_GAIN = 1e-10  # of a move, as a share of the node's edges; below is rounding
MOST_PASSES = 10  # over all levels
LEAST_RISE = 1e-5  # of the modularity in a pass that is worth another one
VISITS = 10_000  # nodes times starts; there is at least one start and at most MOST_STARTS
MOST_STARTS = 8
ROUNDS_OF_NAMES = 4


class Graph(NamedTuple):
    """An undirected graph whose nodes may stand for many cells."""

    links: Any  # (nodes, nodes) CSR, symmetric, without a diagonal
    degree: Float[np.ndarray, " nodes"]  # sum of weights, those inside the node among them
    pull: float  # resolution / sum of all degrees


def find_communities(
    rows: Int[Any, " edges"],
    columns: Int[Any, " edges"],
    weights: Real[Any, " edges"],
    n_cells: int,
    *,
    resolution: float = 1.0,
    seed: int = 0,
    most: int | None = None,
) -> Int[np.ndarray, " cells"]:
    """Labels 0, 1, ... of communities with a modularity close to the largest there is; how many is found, not given.

    The search of Traag, Waltman and van Eck 2019 (Leiden): single nodes move where modularity gains most, every
    community is split into parts that hang together, the parts become the nodes of a smaller graph, and so on; passes
    over all levels go on until modularity stays. Different here: a part is grown by best moves instead of random ones,
    and where more than 8,000 nodes wait for a move, a random half of those that gain moves at once. Small graphs are
    searched from several starts. Communities are numbered by their size, largest first.

    Where weights tell cells apart, the result does not depend on the order of the cells: nodes are first put in an
    order that follows from the graph. Cells that a symmetry of the graph exchanges keep their order.
    A cell without edges is a community of its own.

    Args:
        rows: one end of each edge.
        columns: the other end. A pair may be listed once or twice; what is listed of it adds up, in both directions.
            An edge from a cell to itself counts nothing.
        weights: of the edges, 0 or more.
        n_cells: how many cells there are; row numbers are below.
        resolution: larger gives more and smaller communities; 1 is modularity.
        seed: of the random order of moves.
        most: at most so many communities: those are joined whose union costs the least modularity; None is no limit.

    Raises:
        DataError: negative or missing weights, row numbers out of range, or no edges at all.
    """
    links = symmetric_links(rows, columns, weights, n_cells)
    degree = np.asarray(links.sum(axis=1)).ravel()
    if degree.sum() <= 0:
        msg = "find_communities: the graph has no edges (all weights are 0); there is nothing to tell groups apart."
        raise DataError(msg)
    order = _order_of_nodes(links, degree)
    links = links[order][:, order].tocsr()
    graph = Graph(links, degree[order], resolution / degree.sum())
    n_starts = int(np.clip(VISITS // n_cells, 1, MOST_STARTS))
    best, highest = np.zeros(n_cells, np.int64), -np.inf
    for number in range(n_starts):
        found = _search(graph, np.random.default_rng([seed, number]))
        quality = _quality(graph, found)
        if quality > highest + 1e-12:
            best, highest = found, quality
    if most is not None:
        best = _joined(graph, best, most)
    labels = np.empty(n_cells, np.int64)
    labels[order] = _by_size(best)
    return labels


def modularity(
    rows: Int[Any, " edges"],
    columns: Int[Any, " edges"],
    weights: Real[Any, " edges"],
    labels: Int[Any, " cells"],
    *,
    resolution: float = 1.0,
) -> float:
    """Share of the edges inside communities, less resolution times what chance would put there (Newman 2004).

    Edges are read as by `find_communities`. Without edges it is 0.

    Raises:
        DataError: negative or missing weights, or row numbers out of range.
    """
    labels = np.unique(np.asarray(labels), return_inverse=True)[1]
    links = symmetric_links(rows, columns, weights, len(labels))
    degree = np.asarray(links.sum(axis=1)).ravel()
    if degree.sum() <= 0:
        return 0.0
    return _quality(Graph(links, degree, resolution / degree.sum()), labels)


def symmetric_links(rows: Any, columns: Any, weights: Any, n_cells: int) -> Any:
    """The graph as a CSR matrix W + Wᵀ in float64, without a diagonal and without zeros.

    Raises:
        DataError: negative or missing weights, or row numbers out of range.
    """
    rows, columns, weights = (np.asarray(a) for a in (rows, columns, weights))
    weights = weights.astype(np.float64)
    if not (np.isfinite(weights) & (weights >= 0)).all():
        at = int(np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))[0])
        msg = f"communities: weights of edges must be finite and >= 0, but edge {at} has {weights[at]:g}."
        raise DataError(msg)
    for ends in (rows, columns):
        if len(ends) and not 0 <= ends.min() <= ends.max() < n_cells:
            odd = int(ends.min()) if ends.min() < 0 else int(ends.max())
            msg = f"communities: an edge ends at cell {odd}, but row numbers of {n_cells} cells are 0 to {n_cells - 1}."
            raise DataError(msg)
    kept = (rows != columns) & (weights > 0)
    one_way = sparse.csr_array((weights[kept], (rows[kept], columns[kept])), shape=(n_cells, n_cells))
    return sparse.csr_array(one_way + one_way.T)


def _order_of_nodes(links: Any, degree: np.ndarray) -> np.ndarray:
    """Nodes sorted by a number that follows from their place in the graph, not from their row."""
    name = degree / degree.max()
    for _ in range(ROUNDS_OF_NAMES):
        name = links @ (name * (1.0 + name)) / degree.max() + name
        name = name / name.max()
    return np.argsort(name, kind="stable")


def _quality(graph: Graph, labels: np.ndarray) -> float:
    rows = np.repeat(np.arange(len(labels)), np.diff(graph.links.indptr))
    inside = graph.links.data[labels[rows] == labels[graph.links.indices]].sum()
    volume = np.bincount(labels, graph.degree)
    return float((inside - graph.pull * (volume**2).sum()) / graph.degree.sum())


def _search(graph: Graph, rng: np.random.Generator) -> np.ndarray:
    """Passes over all levels until modularity stays."""
    labels = np.arange(len(graph.degree))
    before = -np.inf
    for _ in range(MOST_PASSES):
        labels = _compact(_one_pass(graph, labels, rng))
        quality = _quality(graph, labels)
        if quality <= before + LEAST_RISE:
            break
        before = quality
    return labels


def _one_pass(graph: Graph, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    labels = _compact(_moved(graph, labels, rng))
    parts = _compact(_moved(_inside(graph, labels), np.arange(len(labels)), rng))
    n_parts = parts.max() + 1
    if n_parts == len(labels):
        return labels
    of_parts = np.zeros(n_parts, np.int64)
    of_parts[parts] = labels
    return _one_pass(_coarse(graph, parts), of_parts, rng)[parts]


def _inside(graph: Graph, labels: np.ndarray) -> Graph:
    """Only the edges inside communities: nodes of other communities are not found from there."""
    links = graph.links
    rows = np.repeat(np.arange(len(labels)), np.diff(links.indptr))
    kept = labels[rows] == labels[links.indices]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows[kept], minlength=len(labels)))])
    inside = sparse.csr_array((links.data[kept], links.indices[kept], indptr), shape=links.shape)
    return graph._replace(links=inside)


def _coarse(graph: Graph, labels: np.ndarray) -> Graph:
    """Every community one node."""
    n = len(labels)
    member = sparse.csr_array((np.ones(n), labels, np.arange(n + 1)), shape=(n, labels.max() + 1))
    links = sparse.csr_array(member.T @ graph.links @ member)
    links.setdiag(0)
    links.eliminate_zeros()
    links.sort_indices()
    return graph._replace(links=links, degree=np.bincount(labels, graph.degree))


def _moved(graph: Graph, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves single nodes to where modularity gains most, until none gains."""
    labels = labels.copy()
    waiting = np.arange(len(labels))
    for _ in range(SWEEPS):
        if len(waiting) <= AT_ONCE_ABOVE:
            break
        waiting = _sweep(graph, labels, waiting, rng)
    return _one_by_one(graph, labels, rng.permutation(waiting))


def _sweep(graph: Graph, labels: np.ndarray, waiting: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves a random half of the waiting nodes that gain, all at once; changes `labels`, returns who waits then."""
    n = len(labels)
    volume = np.bincount(labels, graph.degree, minlength=n)
    member = sparse.csr_array((np.ones(n), labels, np.arange(n + 1)), shape=(n, n))
    some = len(waiting) < n
    near = (graph.links[waiting] if some else graph.links) @ member
    degree, own = graph.degree[waiting], labels[waiting]
    count = np.diff(near.indptr)
    row = np.repeat(np.arange(len(waiting)), count)
    is_own = near.indices == own[row]
    gain = near.data - graph.pull * degree[row] * (volume[near.indices] - degree[row] * is_own)
    stay = -graph.pull * degree * (volume[own] - degree)
    stay[row[is_own]] = gain[is_own]
    best = np.full(len(waiting), -np.inf)
    linked = count > 0
    best[linked] = np.maximum.reduceat(gain, near.indptr[:-1][linked]) if len(gain) else -np.inf
    at_best = np.flatnonzero(gain == best[row])
    target = own.copy()
    target[row[at_best]] = near.indices[at_best]
    gains = best > stay + LEAST_GAIN * degree
    goes = gains & (rng.random(len(waiting)) < SHARE_MOVED)
    labels[waiting[goes]] = target[goes]
    left = np.zeros(n, bool)
    left[waiting[gains & ~goes]] = True
    left[graph.links[waiting[goes]].indices] = True
    return np.flatnonzero(left)


def _one_by_one(graph: Graph, labels: np.ndarray, waiting: np.ndarray) -> np.ndarray:
    """Moves nodes in turn; whoever has a neighbour that has left waits again."""
    volume = np.bincount(labels, graph.degree, minlength=len(labels)).tolist()
    members = np.bincount(labels, minlength=len(labels)).tolist()
    empty = [c for c, size in enumerate(members) if size == 0]
    start, others, weights = (getattr(graph.links, name).tolist() for name in ("indptr", "indices", "data"))
    degrees, at, pull = graph.degree.tolist(), labels.tolist(), graph.pull
    queue, queued = deque(waiting.tolist()), [False] * len(at)
    for node in queue:
        queued[node] = True
    while queue:
        node = queue.popleft()
        queued[node] = False
        own, degree = at[node], degrees[node]
        near = range(start[node], start[node + 1])
        linked = {own: 0.0}
        for e in near:
            community = at[others[e]]
            linked[community] = linked.get(community, 0.0) + weights[e]
        volume[own] -= degree
        factor = pull * degree
        best, most = own, linked[own] - factor * volume[own] + LEAST_GAIN * degree
        for community, weight in linked.items():
            gain = weight - factor * volume[community]
            if gain > most:
                best, most = community, gain
        if most < 0 and members[own] > 1:  # alone is better than anywhere
            best = empty.pop()
        volume[best] += degree
        if best == own:
            continue
        at[node] = best
        members[best] += 1
        members[own] -= 1
        if members[own] == 0:
            empty.append(own)
        for e in near:
            other = others[e]
            if not queued[other] and at[other] != best:
                queued[other] = True
                queue.append(other)
    return np.asarray(at)


def _joined(graph: Graph, labels: np.ndarray, most: int) -> np.ndarray:
    """Joins, one pair at a time, the communities whose union costs the least modularity, until there are `most`."""
    labels = _compact(labels)
    n = int(labels.max()) + 1
    if n <= most:
        return labels
    small = _coarse(graph, labels)
    # communities without edges cost nothing wherever they are: they come together first
    lonely = np.flatnonzero(small.degree == 0)
    if len(lonely) > 1:
        to = np.arange(n)
        to[lonely] = lonely[0]
        labels = _compact(to[labels])
        n = int(labels.max()) + 1
        small = _coarse(graph, labels)
    # the smallest community is joined where that costs least: no table of all pairs
    links, volume = small.links.tolil(), small.degree.copy()
    to, alive = np.arange(n), set(range(n))
    while len(alive) > most:
        least = min(alive, key=lambda c: volume[c])
        near = dict(zip(links.rows[least], links.data[least], strict=True))
        rest = alive - {least}
        best = max(rest, key=lambda c: near.get(c, 0.0) - small.pull * volume[least] * volume[c])
        for other, weight in near.items():
            if other != best:
                links[best, other] += weight
                links[other, best] += weight
            links[other, least] = 0.0
        volume[best] += volume[least]
        to[to == least] = best
        alive = rest
    return _compact(to[labels])


def _compact(labels: np.ndarray) -> np.ndarray:
    """Labels without gaps."""
    return np.asarray(np.unique(labels, return_inverse=True)[1])


def _by_size(labels: np.ndarray) -> np.ndarray:
    """Numbers communities from the largest; of equal sizes, that of the earliest node first."""
    _, first, compact, size = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    number = np.empty(len(size), np.int64)
    number[np.lexsort((first, -size))] = np.arange(len(size))
    return np.asarray(number[compact])
