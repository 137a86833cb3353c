"""`tl.fate`: which terminal state each cell is bound for; `tl.driver_genes`: genes that go with a fate."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from .. import slots
from ..data.transform import shifted_log
from ..errors import ConfigError, DataError, MissingKeyError
from ..math.gene_trends import drivers
from ..math.graph import Edges
from ..math.kernels import combined_kernel, connectivity_kernel, cosine_lists_of, pseudotime_kernel, velocity_kernel
from ..math.macrostates import core_cells, eigengap, macrostates, spectrum, terminal_states
from ..math.transitions import connectivities, to_scipy
from ..operators.singlecell import DifferentiableFateProbability, FateProbabilityConfig
from ..recording import recorded

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

KERNELS = ("connectivity", "pseudotime", "velocity")
SCHEMES, N_NEIGHBORS = ("hard", "soft"), 15
MODES_LOOKED_AT = 20  # eigenvalues among which the largest gap is looked for


@recorded
def fate(
    adata: "AnnData",
    *,
    terminal_states: Mapping[str, Sequence[str]] | str | None = None,
    kernel: str | Mapping[str, float] = "connectivity",
    n_macrostates: int | None = None,
    n_terminal: int | None = None,
    stability_threshold: float | None = None,
    n_cells: int | None = None,
    groupby: str | None = None,
    n_neighbors: int | None = None,
    scheme: str | None = None,
    pseudotime_key: str | None = None,
    velocity_key: str | None = None,
    use_rep: str | None = None,
    layer: str | None = None,
    random_state: int = 0,
    copy: bool = False,
) -> None:
    """Finds the probability that each cell ends in each terminal state (`DifferentiableFateProbability`).

    Args:
        adata: cells x genes, changed in place.
        terminal_states: {name: names of the cells that hold it}; a column of `obs` that names the terminal state of
            such cells and is missing in others; None finds them: macrostates of the chain, of which the stable ones
            are terminal.
        kernel: "connectivity", a walk on the graph of neighbours; "pseudotime", the same without most steps back in
            time; "velocity", a walk along RNA velocities; or weights of several kernels, such as
            {"velocity": 0.8, "connectivity": 0.2}.
        n_macrostates: how many are looked for; None is where the chain's eigenvalues have their largest gap.
        n_terminal: how many of them are terminal, the most stable first; None is those of stability
            `stability_threshold` and more.
        stability_threshold: probability, 0-1, that a step stays in the macrostate; None is 0.96.
        n_cells: a macrostate that is found is held by so many of its surest cells; None is 30.
        groupby: column of `obs` that gives found macrostates the name of most of their cells; None numbers them.
        n_neighbors: of the graph, the cell itself among them as in scanpy; None is 15.
        scheme: of "pseudotime": "hard" (None) or "soft" (`math.kernels.pseudotime_kernel`).
        pseudotime_key: of "pseudotime": column of `obs`; None is "diffbio_pseudotime".
        velocity_key: of "velocity": sparse matrix in `obsp` of the cosines between velocities and steps; None is
            "diffbio_velocity_graph".
        use_rep: key of `obsm` for the graph; None is the PCA of log-normalised counts of the variable genes.
        layer: of the counts that the PCA reads; None is X.
        random_state: of the start of the eigensolver.
        copy: works on a copy and returns it.

    Adds `obsm["diffbio_fate_prob"]`, a DataFrame (cells, terminal states) whose rows sum to 1,
    `obs["diffbio_macrostate"]` (categorical; missing in cells that hold none), and in `uns["diffbio"]["diffbio_fate"]`
    the names. Where macrostates were found also `obsm["diffbio_macrostate_prob"]`, a DataFrame (cells, macrostates) of
    memberships, and in `uns` their stability, the chain between them and its share of time in each.

    Raises:
        ConfigError: an unknown kernel, or a setting that does nothing with those asked for.
        MissingKeyError: no such column, cells or matrix.
        DataError: a cell in two terminal states, a state without cells, cells that can reach none, no macrostate that
            is stable enough.
    """
    import pandas as pd

    shares = _shares(kernel)
    searched: dict[str, Any] = {
        "n_macrostates": n_macrostates, "n_terminal": n_terminal, "stability_threshold": stability_threshold,
        "n_cells": n_cells, "groupby": groupby,
    }  # fmt: skip
    if terminal_states is not None:
        slots.refuse("tl.fate", "given terminal states", **{key: value is not None for key, value in searched.items()})
    elif n_terminal is not None:
        slots.refuse("tl.fate", "a given n_terminal", stability_threshold=stability_threshold is not None)
    read_by: dict[str, dict[str, Any]] = {
        "pseudotime": {"scheme": scheme, "pseudotime_key": pseudotime_key}, "velocity": {"velocity_key": velocity_key},
    }  # fmt: skip
    if set(shares) == {"velocity"}:
        read_by["graph"] = {"n_neighbors": n_neighbors, "use_rep": use_rep, "layer": layer}
    for owner, settings in read_by.items():
        if owner not in shares:
            slots.refuse("tl.fate", ", ".join(shares), **{key: value is not None for key, value in settings.items()})
    given: dict[str, Any] = {"n_macrostates": n_macrostates, "n_terminal": n_terminal, "n_terminal_cells": n_cells}
    given["stability_threshold"] = stability_threshold
    asked = FateProbabilityConfig(**{key: value for key, value in given.items() if value is not None})
    slots.choose(scheme or "hard", SCHEMES, "tl.fate")
    chain = _chain(
        adata, shares, n_neighbors or N_NEIGHBORS, scheme or "hard", pseudotime_key, velocity_key, use_rep, layer
    )
    record: dict[str, Any] = {}
    if terminal_states is None:
        names, cores, terminal = _found(adata, chain, record, n_macrostates, asked, groupby, random_state)
    else:
        names, cores = _given(adata, terminal_states)
        terminal = np.arange(len(names))
        if (cores >= 0).all():
            msg = "tl.fate: every cell holds a terminal state, so there are no fates to find; leave out of "
            msg += "terminal_states the cells that are on their way"
            raise DataError(msg)
        adata.obsm.pop(slots.MACROSTATE_PROB, None)  # of an earlier search
    number = np.full(len(names) + 1, -1)  # the last is that of cells in between
    number[terminal] = np.arange(len(terminal))
    op = DifferentiableFateProbability(FateProbabilityConfig(n_macrostates=len(terminal)), rngs=nnx.Rngs(random_state))
    data = {
        "transition_rows": chain.rows,
        "transition_columns": chain.columns,
        "transition_weights": chain.weights,
        "terminal_states": jnp.asarray(number[cores]),
    }
    fates = np.asarray(op.apply(data)[0]["fate_probabilities"])
    record["terminal_states"] = [names[k] for k in terminal]
    adata.varm.pop(slots.DRIVER_GENES, None)  # of other fates
    adata.uns.pop(slots.GENE_TRENDS, None)
    adata.obsm[slots.FATE_PROB] = pd.DataFrame(fates, index=adata.obs_names, columns=record["terminal_states"])
    adata.obs[slots.MACROSTATE] = pd.Categorical.from_codes(cores.tolist(), categories=pd.Index(names))
    slots.note(adata, slots.FATE, record)


@recorded
def driver_genes(
    adata: "AnnData",
    *,
    fates: Sequence[str] | None = None,
    groupby: str | None = None,
    groups: Sequence[str] | None = None,
    confidence: float = 0.95,
    layer: str | None = None,
    random_state: int = 0,
    copy: bool = False,
) -> None:
    """Finds genes whose log-normalised expression goes with the probability of a fate, as CellRank's lineage drivers.

    Args:
        adata: cells with the results of `tl.fate`.
        fates: names; None is all.
        groupby: column of `obs` to restrict the cells by.
        groups: its values to keep, such as the types on the way to the fates.
        confidence: of the interval of a correlation.
        layer: of the counts; None is X.
        random_state: recorded only; nothing is drawn at random.
        copy: works on a copy and returns it.

    Adds `varm["diffbio_driver_genes"]`, a DataFrame (genes, 5 columns for each fate): NAME_corr, Pearson's correlation,
    NAME_ci_low, NAME_ci_high, NAME_pval (Fisher's test) and NAME_qval (Benjamini & Hochberg within the fate). Cells are
    not independent of each other, so p-values are too small: rank by the correlation. Missing where a gene does not
    vary.

    Raises:
        ConfigError: only one of `groupby` and `groups`.
        MissingKeyError: no fates yet, no such fate or column.
        DataError: no counts, or fewer than 4 cells left.
    """
    import pandas as pd

    if (groupby is None) != (groups is None):
        msg = "tl.driver_genes: groupby and groups go together; pass both or none."
        raise ConfigError(msg)
    probabilities = fate_table(adata, fates, "tl.driver_genes")
    groups = [groups] if isinstance(groups, str) else groups
    kept = np.ones(adata.n_obs, bool)
    if groupby is not None and groups is not None:
        if groupby not in adata.obs:
            msg = f"obs has no column {groupby!r}; it has {', '.join(map(str, adata.obs.columns)) or 'none'}"
            raise MissingKeyError(msg)
        there = set(adata.obs[groupby].astype(str))
        for name in groups:
            if str(name) not in there:
                msg = f"tl.driver_genes: no cell has {groupby} {name!r}; there are {', '.join(sorted(there)[:12])}"
                raise MissingKeyError(msg)
        kept = np.asarray(adata.obs[groupby].astype(str).isin([str(name) for name in groups]))
    expression = shifted_log(slots.counts(adata, layer))[kept]
    found = drivers(expression, probabilities.to_numpy(float)[kept], confidence=confidence)
    columns = {
        f"{name}_{what}": values[:, k]
        for k, name in enumerate(probabilities.columns)
        for what, values in zip(("corr", "ci_low", "ci_high", "pval", "qval"), found, strict=True)
    }
    adata.varm[slots.DRIVER_GENES] = pd.DataFrame(columns, index=adata.var_names)


def fate_table(adata: "AnnData", fates: Sequence[str] | None, who: str) -> "pd.DataFrame":
    """`obsm["diffbio_fate_prob"]`, of the fates that are named.

    Raises:
        MissingKeyError: `tl.fate` was not called, or no such fate.
    """
    import pandas as pd

    if slots.FATE_PROB not in adata.obsm:
        msg = f"{who}: obsm has no {slots.FATE_PROB!r}; call tl.fate(adata) first"
        raise MissingKeyError(msg)
    table = adata.obsm[slots.FATE_PROB]
    if not isinstance(table, pd.DataFrame):
        names = [str(k + 1) for k in range(np.asarray(table).shape[1])]
        table = pd.DataFrame(np.asarray(table), index=adata.obs_names, columns=names)
    fates = [fates] if isinstance(fates, str) else fates
    for name in fates or ():
        if name not in table:
            msg = f"{who}: there is no fate {name!r}; there are {', '.join(map(str, table.columns))}"
            raise MissingKeyError(msg)
    return table if fates is None else table[list(fates)]


def _shares(kernel: str | Mapping[str, float]) -> dict[str, float]:
    shares = {kernel: 1.0} if isinstance(kernel, str) else kernel
    if not isinstance(shares, Mapping):
        msg = f"tl.fate: kernel must be a name or weights by name, such as {{'velocity': 0.8}}; got {kernel!r}."
        raise ConfigError(msg)
    shares = dict(shares)
    for name, share in shares.items():
        if name not in KERNELS or not share > 0:
            msg = (
                f"tl.fate: kernel must be one of {', '.join(map(repr, KERNELS))}, or weights above 0 of some of them; "
                f"got {kernel!r}."
            )
            raise ConfigError(msg)
    if not shares:
        msg = "tl.fate: kernel holds no kernel."
        raise ConfigError(msg)
    return shares


def _chain(
    adata: "AnnData",
    shares: dict[str, float],
    n_neighbors: int,
    scheme: str,
    pseudotime_key: str | None,
    velocity_key: str | None,
    use_rep: str | None,
    layer: str | None,
) -> Edges:
    """The Markov chain of a weighted sum of kernels."""
    pseudotime_key, velocity_key = pseudotime_key or slots.PSEUDOTIME, velocity_key or slots.VELOCITY_GRAPH
    parts: list[tuple[float, Edges]] = []
    graph = None
    if set(shares) - {"velocity"}:
        if not 1 < n_neighbors <= adata.n_obs:
            msg = f"tl.fate: n_neighbors is {n_neighbors}, the cell itself counted, and there are {adata.n_obs} cells; "
            msg += "pass 2 to that number."
            raise ConfigError(msg)
        points = slots.representation(adata, use_rep, layer)
        graph = connectivities(jnp.asarray(points), n_neighbors)
    for name, share in shares.items():
        if name == "velocity":
            if velocity_key not in adata.obsp:
                msg = f"tl.fate: obsp has no {velocity_key!r}; call tl.velocity(adata) first"
                raise MissingKeyError(msg)
            parts.append((share, velocity_kernel(cosine_lists_of(adata.obsp[velocity_key]))))
            continue
        assert graph is not None
        if name == "connectivity":
            parts.append((share, connectivity_kernel(graph, adata.n_obs)))
            continue
        if pseudotime_key not in adata.obs:
            msg = f"tl.fate: obs has no {pseudotime_key!r}; call tl.pseudotime(adata, root=...) first"
            raise MissingKeyError(msg)
        when = slots.times(adata, pseudotime_key, "tl.fate").astype(np.float32)
        parts.append((share, pseudotime_kernel(graph, jnp.asarray(when), scheme=scheme)))
    return combined_kernel(parts, adata.n_obs)


def _given(adata: "AnnData", states: Mapping[str, Sequence[str]] | str) -> tuple[list[str], np.ndarray]:
    """Names, and the number of its state for each cell, -1 for cells in between."""
    import pandas as pd

    if isinstance(states, str):
        if states not in adata.obs:
            msg = f"tl.fate: obs has no column {states!r}; it has {', '.join(map(str, adata.obs.columns)) or 'none'}"
            raise MissingKeyError(msg)
        named = adata.obs[states].astype(object)
        column = pd.Categorical(named.where(named.astype(str) != ""))  # no text is no name
        if not len(column.categories):
            msg = f"tl.fate: obs[{states!r}] names no terminal cell"
            raise DataError(msg)
        return [str(name) for name in column.categories], np.asarray(column.codes).astype(int)
    if not states:
        msg = "tl.fate: terminal_states is empty; name at least one state and its cells"
        raise DataError(msg)
    if not adata.obs_names.is_unique:
        msg = "tl.fate: obs_names holds names twice, so that cells cannot be told apart; adata.obs_names_make_unique()"
        raise DataError(msg)
    names, cores = [str(name) for name in states], np.full(adata.n_obs, -1)
    for code, (name, cells) in enumerate(states.items()):
        wanted = [cells] if isinstance(cells, str) else list(cells)
        rows = adata.obs_names.get_indexer_for(pd.Index(wanted))
        if not len(rows) or (rows < 0).any():
            missing = [cell for cell, row in zip(wanted, rows, strict=False) if row < 0]
            what = f"names cells that are not there, such as {missing[0]!r}" if missing else "has no cell"
            msg = f"tl.fate: terminal state {name!r} {what}; cells go by their names in obs_names"
            raise DataError(msg)
        taken = rows[cores[rows] >= 0]
        if taken.size:
            other = names[cores[taken[0]]]
            msg = f"tl.fate: cell {adata.obs_names[taken[0]]!r} is in the terminal states {other!r} and {name!r}"
            raise DataError(msg)
        cores[rows] = code
    return names, cores


def _found(
    adata: "AnnData",
    chain: Edges,
    record: dict[str, Any],
    n_macrostates: int | None,
    asked: FateProbabilityConfig,
    groupby: str | None,
    seed: int,
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of macrostates, the cells that hold them, and which are terminal."""
    import pandas as pd

    matrix = to_scipy(chain, adata.n_obs)
    if n_macrostates is None:
        n_macrostates = _number(matrix, seed)
    found = macrostates(matrix, n_macrostates, seed=seed)
    terminal = terminal_states(found, n_terminal=asked.n_terminal, stability_threshold=asked.stability_threshold)
    cores = core_cells(found.memberships, asked.n_terminal_cells)
    names = [str(k + 1) for k in range(n_macrostates)]
    if groupby is not None:
        if groupby not in adata.obs:
            msg = f"tl.fate: obs has no column {groupby!r}; it has {', '.join(map(str, adata.obs.columns)) or 'none'}"
            raise MissingKeyError(msg)
        names = _named(adata.obs[groupby].astype(str).to_numpy(), cores, n_macrostates)
    record |= {
        "macrostates": names,
        "stability": found.stability,
        "coarse_transition": found.coarse,
        "stationary": found.stationary,
        "crispness": found.crispness,
    }
    adata.obsm[slots.MACROSTATE_PROB] = pd.DataFrame(found.memberships, index=adata.obs_names, columns=names)
    return names, cores, terminal


def _number(matrix: Any, seed: int) -> int:
    """Where the eigenvalues have their largest gap, two at least."""
    count = min(MODES_LOOKED_AT, matrix.shape[0] - 1)
    try:
        values = spectrum(matrix, count, seed=seed).values
    except ConfigError:  # the last one has a conjugate
        values = spectrum(matrix, count - 1, seed=seed).values
    number = max(2, eigengap(values))
    return number + 1 if abs(values[number - 1] - np.conj(values[min(number, len(values) - 1)])) < 1e-9 else number


def _named(groups: np.ndarray, cores: np.ndarray, count: int) -> list[str]:
    """Each macrostate by most of its cells; where several share a name, they are numbered."""
    most = []
    for state in range(count):
        names, sizes = np.unique(groups[cores == state], return_counts=True)
        most.append(str(names[sizes.argmax()]))
    return [f"{name}_{most[: k + 1].count(name)}" if most.count(name) > 1 else name for k, name in enumerate(most)]
