"""`diffbio gradients`."""

# ruff: noqa: FBT002 - switches are booleans, which typer reads from the signature

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import AllowNonInteger, Cells, Debug, Layer, Profile, Quiet
from .places import make
from .streams import say

TABLE, FIGURE = "gradients.csv", "gradients.png"
SHOWN = {
    "parameters": "{:.0f}",
    "out": "{:.3g}",
    "into": "{:.3g}",
    "gain": "{:.3g}",
    "condition": "{:.3g}",
    "silent": "{:.0%}",
    "signal_to_noise": "{:.2f}",
    "agreement": "{:.2f}",
}


def gradients(
    cells: Cells,
    model: Annotated[
        Path | None, typer.Option(help="Folder that diffbio run --save-model wrote. [default: one is trained]")
    ] = None,
    batch_key: Annotated[str | None, typer.Option(help="Column of obs to correct for.")] = None,
    layer: Layer = None,
    ambient_profile: Profile = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of training, where there is no model.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for the table and its figure.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything drawn at random.")] = 0,
    allow_non_integer: AllowNonInteger = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure how well gradients pass through each stage of the pipeline on these cells."""
    if figures is not None:
        make(figures)
    from ..pipelines.gradient_report import gradients as measured

    given: dict[str, Any] = {
        "batch_key": batch_key, "layer": layer, "ambient_profile": ambient_profile,
        "allow_non_integer": allow_non_integer,
    }  # fmt: skip
    if model is None:
        from ..pipelines.run import analyse

        given |= {"seed": seed, "progress": not quiet} | ({} if epochs is None else {"max_epochs": epochs})
        analysis = analyse(cells, **given)
    else:
        from ..pipelines.projection import project

        analysis = project(cells, model, **given)
    found = measured(analysis.pipeline, analysis.prepared.source, seed=seed)
    width = max(map(len, found.index))
    say(" ".join([" " * width, *(f"{name:>{wide(name)}}" for name in SHOWN), "verdict"]))
    for name, row in found.iterrows():
        cells_of = (f"{form.format(row[column]):>{wide(column)}}" for column, form in SHOWN.items())
        say(" ".join([f"{name:<{width}}", *cells_of, row["verdict"]]))
    if figures is not None:
        from ..pl.gradients import gradients as draw
        from ..report.figures import drawing, png, write_whole

        with drawing():
            write_whole(figures / FIGURE, png(draw(found)[0].figure))
        write_whole(figures / TABLE, found.to_csv().encode())
        say(f"wrote {figures / TABLE}, {figures / FIGURE}")


def wide(name: str) -> int:
    """Width of a column."""
    return max(9, len(name))
