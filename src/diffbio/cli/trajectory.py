"""`diffbio trajectory`."""

# ruff: noqa: FBT002 - switches are booleans, which typer reads from the signature

from typing import Annotated

import typer

from .options import Cells, Debug, Figures, Force, Layer, Output, Quiet
from .places import check_places, conclude


def trajectory(
    cells: Cells,
    output: Output,
    root_type: Annotated[str | None, typer.Option(help="Type of cells that the process starts in.")] = None,
    root_cell: Annotated[str | None, typer.Option(help="Name of the cell that it starts from.")] = None,
    label_key: Annotated[str | None, typer.Option(help="Column of obs with the types. [default: cell_type]")] = None,
    terminal_type: Annotated[
        list[str] | None, typer.Option(help="Type that the process ends in; may be repeated. [default: found]")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Of pseudotime: dpt or palantir. [default: dpt]")] = None,
    kernel: Annotated[
        str | None,
        typer.Option(help="Of the fates: connectivity, pseudotime or velocity. [default: velocity if there is some]"),
    ] = None,
    velocity: Annotated[
        str | None,
        typer.Option(help="steady_state, stochastic, dynamical or none. [default: steady_state if there are layers]"),
    ] = None,
    n_macrostates: Annotated[int | None, typer.Option(min=1, help="How many ends to look for.")] = None,
    time_key: Annotated[
        str | None, typer.Option(help="Column of obs with days: also transport cells from day to day.")
    ] = None,
    gene: Annotated[
        list[str] | None, typer.Option(help="Gene whose trend to draw; may be repeated. [default: driver genes]")
    ] = None,
    use_rep: Annotated[
        str | None, typer.Option(help="Key of obsm instead of a PCA, such as X_diffbio_harmony.")
    ] = None,
    figures: Figures = None,
    layer: Layer = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything drawn at random.")] = 0,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Order cells in time: velocity, pseudotime, fates, driver genes, and transport between days."""
    from .along import Asked, along

    asked = Asked(
        root_type=root_type, root_cell=root_cell, label_key=label_key,
        terminal_types=tuple(terminal_type) if terminal_type else None, method=method, kernel=kernel,
        velocity=velocity, n_macrostates=n_macrostates, time_key=time_key, genes=tuple(gene) if gene else None,
        use_rep=use_rep, layer=layer, seed=seed,
    )  # fmt: skip
    check_places(cells, output, figures, force=force)
    from ..data.write import write_results

    adata, lines = along(cells, asked, quiet=quiet)
    write_results(adata, output, {}, overwrite=force)
    conclude(lines, [output], figures)
