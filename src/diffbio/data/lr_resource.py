"""Ligand-receptor resources: tables of names, of files or of the `liana` package, and where the genes are in data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import ConfigError, DataError, InputFileError, MissingKeyError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

SEPARATOR = "_"
OTHER_SEPARATORS = re.compile(r"[+&|;,/\s]|::")


class PairColumns(NamedTuple):
    """Pairs all of whose genes are there.

    `table` has the columns ligand and receptor, as in the resource; `columns` (pairs, 2, subunits) are positions of
    the subunits in the data, -1 where there is none; `left_out` is how many pairs of the resource lack a gene.
    """

    table: pd.DataFrame
    columns: NDArray[np.int64]
    left_out: int


def read_pairs(resource: Any, *, species: str | None = None) -> pd.DataFrame:
    """Return a resource as a table with the columns ligand and receptor, each pair once.

    Parameters
    ----------
    resource
        A DataFrame with these columns, a list of (ligand, receptor), the path of a .csv or .tsv, or the name of a
        resource of the `liana` package such as "consensus" or "mouseconsensus"; None is "consensus".
    species
        Keeps the rows whose column `species` says so; None takes all.

    Raises
    ------
    ConfigError : a resource of `liana` is asked for, and the package is not installed or has none of that name.
    MissingKeyError : there is no column ligand, receptor or species.
    DataError : no pair, or a name is missing.
    InputFileError : no such file.
    """
    import pandas as pd

    if resource is None or (isinstance(resource, str) and not resource.lower().endswith((".csv", ".tsv", ".txt"))):
        table = _of_liana(resource or "consensus")
    elif isinstance(resource, str | Path):
        if not Path(resource).is_file():
            msg = f"resource: there is no file {resource}"
            raise InputFileError(msg)
        table = pd.read_csv(resource, sep="," if str(resource).lower().endswith(".csv") else "\t", comment="#")
    elif isinstance(resource, pd.DataFrame):
        table = resource
    elif isinstance(resource, Sequence) and all(len(pair) == 2 for pair in resource):
        table = pd.DataFrame([tuple(pair) for pair in resource], columns=["ligand", "receptor"])
    else:
        msg = "resource: pass a DataFrame with columns ligand and receptor, a list of (ligand, receptor), the path of "
        msg += f"a .csv, or the name of a resource of liana; got {type(resource).__name__}"
        raise DataError(msg)
    for name in ("ligand", "receptor", *(() if species is None else ("species",))):
        if name not in table.columns:
            msg = f"resource: there is no column {name!r}; there are {', '.join(map(str, table.columns))}"
            raise MissingKeyError(msg)
    if species is not None:
        known = sorted(set(table["species"].astype(str)))
        table = table[table["species"].astype(str) == species]
        if not len(table):
            msg = f"resource: species {species!r} has no pair; there are those of {', '.join(known)}"
            raise DataError(msg)
    pairs = table[["ligand", "receptor"]]
    if not len(pairs) or pairs.isna().to_numpy().any():
        what = "holds a pair without a name" if len(pairs) else "has no pair"
        msg = f"resource: {what}; each row is a ligand and a receptor"
        raise DataError(msg)
    return pairs.astype(str).drop_duplicates().reset_index(drop=True)


def pair_columns(table: pd.DataFrame, genes: Sequence[str]) -> PairColumns:
    """Return the pairs whose genes are all among `genes`, complexes joined by "_".

    Raises
    ------
    DataError : no pair has all its genes, naming some that are missing; or complexes are joined by something else.
    """
    where = {str(gene): position for position, gene in enumerate(genes)}
    subunits = [
        [[name] if name in where else name.split(SEPARATOR) for name in table[side]] for side in ("ligand", "receptor")
    ]
    missing: list[str] = []
    kept: list[int] = []
    for row, pair in enumerate(zip(*subunits, strict=True)):
        lacking = [name for side in pair for name in side if name not in where]
        missing.extend(lacking)
        if not lacking:
            kept.append(row)
    odd = next((name for name in missing if OTHER_SEPARATORS.search(name)), None)
    if odd is not None:
        msg = f"resource: {odd!r} is no gene; join the subunits of a complex by '_', as ITGA1_ITGB1"
        raise DataError(msg)
    if not kept:
        some = ", ".join(dict.fromkeys(missing[:5]))
        msg = f"resource: none of its {len(table)} pairs has all genes in the data, which lacks {some}; are the names "
        msg += "of the same species and kind (gene symbols)?"
        raise DataError(msg)
    most = max(len(side[row]) for side in subunits for row in kept)
    columns = np.full((len(kept), 2, most), -1)
    for place, row in enumerate(kept):
        for side in range(2):
            names = subunits[side][row]
            columns[place, side, : len(names)] = [where[name] for name in names]
    return PairColumns(table.iloc[kept].reset_index(drop=True), columns, len(table) - len(kept))


def _of_liana(name: str) -> pd.DataFrame:
    try:
        from liana.resource import select_resource
    except ImportError as error:
        msg = f"resource {name!r} comes with the liana package, which is not installed: pip install liana, "
        msg += "or pass a DataFrame or .csv with columns ligand and receptor"
        raise ConfigError(msg) from error
    try:
        found: pd.DataFrame = select_resource(name)
    except (ValueError, KeyError) as error:
        msg = f"resource: liana has no {name!r} ({error})"
        raise ConfigError(msg) from error
    return found
