"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

AllowNonInteger = Annotated[bool, typer.Option("--allow-non-integer", help="Accept counts that are not whole numbers.")]
Cells = Annotated[Path, typer.Argument(help="Counts: .h5ad, .zarr, 10x .h5, or a 10x folder.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The .h5ad or .zarr to write.")]
Figures = Annotated[Path | None, typer.Option(help="Folder for figures and report.html.")]
LabelKey = Annotated[str | None, typer.Option(help="Column of obs to compare the clusters with.")]
Layer = Annotated[str | None, typer.Option(help="Layer of the counts instead of X.")]
Normalized = Annotated[bool, typer.Option("--normalized", help="Also write the normalised layer.")]
Profile = Annotated[
    str | None, typer.Option(help="Column of var with the soup's gene fractions. [default: ambient_profile]")
]
Stream = Annotated[
    bool | None,
    typer.Option("--stream/--in-memory", help="Leave the counts on disk. [default: if they are large]"),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output file.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Do not show how training goes.")]
