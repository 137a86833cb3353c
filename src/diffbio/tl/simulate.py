"""`tl.simulate`: cells that were never measured."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax import nnx

from .. import slots
from ..data.provenance import provenance
from ..data.simulated import simulated, write_simulated
from ..data.write import add_results
from ..errors import ConfigError
from ..fitting import fit, gathered, source_for
from ..operators.singlecell import DifferentiableSimulator, SimulationConfig
from ..recording import recording

if TYPE_CHECKING:
    from anndata import AnnData

# clusters whose means are kept, and programmes of correlated genes: those of benchmarks/quality/simulator.py
LIKE_REAL_CELLS = {"gene_values": "kept", "n_groups": 8, "n_programs": 10}


def simulate(
    like: "AnnData | None" = None,
    *,
    n_cells: int | None = None,
    max_epochs: int | None = None,
    layer: str | None = None,
    path: str | Path | None = None,
    overwrite: bool = False,
    random_state: int = 0,
    progress: bool = False,
    **settings: Any,
) -> "AnnData | Path":
    """Simulates counts of cells in groups or along paths, in batches, with doublets, ambient RNA and dropout (Splat).

    Args:
        like: real cells whose means, dispersions, groups, library sizes and correlations the simulated ones are to
            have, gene by gene; None simulates from the settings alone.
        n_cells: how many; None is as many as in `like`, or 500.
        max_epochs: with `like`, how long the estimates are fitted by gradient until the statistics match; None is what
            the simulator prefers, 0 is the estimates alone.
        layer: of the counts of `like`; None is X.
        path: a .h5ad or .zarr to write to piece by piece, for more cells than memory holds.
        overwrite: whether a file of that name is replaced.
        random_state: seed.
        progress: whether to show how fitting goes.
        settings: fields of `SimulationConfig`, which has Splatter's parameters: n_groups, de_prob, path_from,
            n_batches, doublet_prob, ambient_fraction, dropout_type and others. With `like` gene_values is
            "kept", n_groups 8 and n_programs 10 unless given here.

    Returns:
        The cells: counts in X, `obs["group"]`, `obs["batch"]`, `obs["doublet"]`, `obs["library_size"]`, with paths
        `obs["path_position"]`, and the truth about genes in `var`; or the path of the file that was written.

    Raises:
        ConfigError: an unknown setting, or one out of its range.
        DataError: `like` holds no counts.
        OutputError: the file cannot be written.
    """
    names = None
    if like is not None:
        slots.refuse("tl.simulate", "like", n_genes="n_genes" in settings)
        settings = {**LIKE_REAL_CELLS, **settings, "n_genes": like.n_vars}
        names = list(map(str, like.var_names))
    elif max_epochs is not None:
        slots.refuse("tl.simulate", "without `like`", max_epochs=True)
    known = set(SimulationConfig.__dataclass_fields__) - {"n_cells"}
    if unknown := sorted(set(settings) - known):
        msg = f"tl.simulate: unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}."
        raise ConfigError(msg)
    n_cells = n_cells if n_cells is not None or like is None else like.n_obs
    with recording() as record:
        simulator = DifferentiableSimulator(SimulationConfig(**settings), rngs=nnx.Rngs(random_state))
        if like is not None:
            data = {"counts": slots.counts(like, layer)}
            if max_epochs == 0:
                simulator.init_from(gathered(source_for(simulator, data), simulator.init_cells, seed=random_state))
            else:
                how: dict[str, Any] = {} if max_epochs is None else {"max_epochs": max_epochs}
                fit(simulator, data, seed=random_state, progress=progress, **how)
        cells = None if path is not None else simulated(simulator, n_cells, gene_names=names)
    params = {"n_cells": n_cells, "max_epochs": max_epochs, "like": like is not None, **settings}
    entry = provenance(params=params, seed=random_state, data=like if cells is None else cells, **record)
    if path is not None:
        return write_simulated(
            simulator, path, n_cells=n_cells, gene_names=names, overwrite=overwrite, record=entry
        )
    assert cells is not None
    add_results(cells, {"uns/diffbio/simulate": entry})
    return cells
