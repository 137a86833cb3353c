"""Marker genes of cell types, and where they are in data."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import DataError, DataWarning
from .marker_files import from_lists, from_table
from .marker_files import read_markers as read_markers
from .names import check_names

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd
    from numpy.typing import NDArray

ENSEMBL = re.compile(r"ENS[A-Z]*G\d{6,}(\.\d+)?$")
DATE = re.compile(r"(\d{1,2}-(Mar|Sep|Dec|Oct|Apr|Feb)|(Mar|Sep|Dec)-\d{1,2})$", re.IGNORECASE)
ENOUGH = 0.5  # of the markers found by exact name: below, names are compared more loosely


class MarkerMatrix(NamedTuple):
    """Which gene marks which type, over the marker genes that the data has, in the data's order.

    `matrix` (types, genes) is 1 where a gene marks a type, float32; `columns` (genes,) are the genes' positions
    in the data, ascending, and `genes` their names there; `missing` holds for each type the markers not found.
    """

    matrix: NDArray[np.float32]
    genes: list[str]
    columns: NDArray[np.int64]
    types: list[str]
    missing: dict[str, list[str]]


def as_markers(markers: Mapping[str, Sequence[str]] | pd.DataFrame | str | Path) -> dict[str, list[str]]:
    """Return types and their marker genes from a mapping, a table or a file that `read_markers` reads.

    A table has columns of types and of genes, or is a 0/1 matrix with genes as rows (its index, or else its first
    column) and types as columns. A gene that a type names twice is kept once.

    Raises
    ------
    DataError : neither of these, a name is not text, or a type is given twice.
    """
    if isinstance(markers, str | Path):
        return read_markers(markers)
    if not isinstance(markers, Mapping):
        if hasattr(markers, "itertuples"):
            return _from_frame(markers)
        msg = (
            f"markers: got {type(markers).__name__}, expected a mapping of types to genes, a table or a file; "
            "pass {'B': ['MS4A1', 'CD79A'], ...}"
        )
        raise DataError(msg)
    return from_lists(markers, "the mapping given")


def marker_matrix(
    markers: Mapping[str, Sequence[str]], var_names: Sequence[str] | pd.Index, *, other: str | None = None
) -> MarkerMatrix:
    """Find the marker genes among those of the data, by name, as a matrix (types, genes found).

    If fewer than half are found as they are written, names are compared without regard to upper and lower case
    (symbols of man and mouse differ so), then without the version at the end of Ensembl identifiers; a warning
    says so.

    Parameters
    ----------
    markers
        Types and their genes, as of `as_markers`.
    var_names
        Names of the data's genes.
    other
        A type without markers, for cells of no other type; added as the last one if `markers` does not have it.

    Raises
    ------
    DataError : fewer than two types, a type none of whose markers is in the data, two types with the same
        markers, markers for `other`, or repeated names in the data.

    Warns
    -----
    DataWarning : markers are missing from the data, names were compared loosely, or a gene marks every type.
    """
    given = from_lists(dict(markers), "the markers given")
    if other is not None and given.setdefault(other, []):
        msg = f"markers: {other!r} is for cells without markers, but has {', '.join(given[other][:3])}; remove them"
        raise DataError(msg)
    if len(given) < 2:
        found = f"only {next(iter(given))!r}" if given else "no type"
        msg = f"markers: {found} is given; at least two types are needed to tell cells apart; add types"
        raise DataError(msg)
    check_names(var_names=var_names)
    position = _positions(list(dict.fromkeys(g for genes in given.values() for g in genes)), var_names)
    missing = {kind: [gene for gene in genes if gene not in position] for kind, genes in given.items()}
    sets = {kind: frozenset(position[gene] for gene in genes if gene in position) for kind, genes in given.items()}
    _check(given, sets, missing, var_names, other)
    columns = np.array(sorted(frozenset().union(*sets.values())), np.int64)
    matrix = np.array([[column in found for column in columns.tolist()] for found in sets.values()], np.float32)
    names = [str(var_names[column]) for column in columns.tolist()]
    named = np.array([kind != other for kind in given])
    everywhere = [name for name, marks in zip(names, matrix[named].all(axis=0), strict=True) if marks]
    if everywhere and named.sum() > 1:
        _warn(f"markers: {', '.join(everywhere[:3])} mark every type, which tells none from another")
    return MarkerMatrix(matrix, names, columns, list(given), missing)


def _positions(genes: list[str], var_names: Sequence[str] | pd.Index) -> dict[str, int]:
    """Position in the data of every gene found there, compared as loosely as needed."""
    exact = _matched(genes, var_names, str)
    if len(exact) >= ENOUGH * len(genes):
        return exact
    best, way = exact, ""
    for key, said in (
        (str.upper, "without regard to upper and lower case (is the list for another species?)"),
        (_without_version, "without the versions of Ensembl identifiers"),
    ):
        found = _matched(genes, var_names, key)
        if len(found) > len(best):
            best, way = found, said
    if way:
        _warn(f"markers: {len(exact)} of {len(genes)} genes are in the data as written; {len(best)} compared {way}")
    return best


def _matched(genes: list[str], var_names: Sequence[str] | pd.Index, key: Callable[[str], str]) -> dict[str, int]:
    """Positions of the genes whose `key` is that of one gene of the data, and of no more."""
    there: dict[str, int | None] = {}
    for index, name in enumerate(var_names):
        folded = key(str(name))
        there[folded] = None if folded in there else index
    keys = [key(gene) for gene in genes]
    pairs = ((gene, there.get(folded)) for gene, folded in zip(genes, keys, strict=True))
    return {gene: index for gene, index in pairs if index is not None}


def _without_version(name: str) -> str:
    return name.partition(".")[0] if ENSEMBL.match(name) else name


def _check(
    given: Mapping[str, Sequence[str]],
    sets: Mapping[str, frozenset[int]],
    missing: Mapping[str, list[str]],
    var_names: Sequence[str] | pd.Index,
    other: str | None,
) -> None:
    """Refuse what no model can use: types that nothing in the data marks, and types marked alike."""
    absent = list(dict.fromkeys(gene for genes in missing.values() for gene in genes))
    if not any(sets.values()):
        msg = (
            f"markers: none of {len(absent)} genes is in the data; the list has {', '.join(absent[:3]) or 'none'}, the "
            f"data {', '.join(map(str, list(var_names[:3])))}; {_advice(absent, var_names)}"
        )
        raise DataError(msg)
    if bare := [kind for kind, found in sets.items() if not found and kind != other]:
        kind = bare[0]
        had = f"has {', '.join(given[kind][:5])}, none of which is in the data" if given[kind] else "has no markers"
        more = f" (nor have {len(bare) - 1} other types)" if len(bare) > 1 else ""
        fix = "add markers that the data has, or leave the type out"
        fix += "" if other is not None or given[kind] else f"; if it stands for all other cells, pass other={kind!r}"
        msg = f"markers: the type {kind!r} {had}{more}; {fix}"
        raise DataError(msg)
    seen: dict[frozenset[int], str] = {}
    for kind, found in sets.items():
        if found in seen:
            lost = missing[kind] or missing[seen[found]]
            why = f" in the data, which lacks {', '.join(lost[:3])}" if lost else ""
            msg = (
                f"markers: {seen[found]!r} and {kind!r} have the same markers{why} and cannot be told apart; "
                "give each a marker of its own, or make them one type"
            )
            raise DataError(msg)
        seen[found] = kind
    if absent:
        n = len({gene for genes in given.values() for gene in genes})
        hint = _dates(absent)
        _warn(f"markers: {len(absent)} of {n} genes are not in the data and left out: {', '.join(absent[:5])}{hint}")


def _advice(genes: Sequence[str], var_names: Sequence[str] | pd.Index) -> str:
    def share(names: Sequence[str]) -> float:
        return float(np.mean([bool(ENSEMBL.match(name)) for name in names])) if len(names) else 0.0

    here, there = share(genes), share([str(name) for name in var_names[:1000]])
    if there > ENOUGH > here:
        return "the data has Ensembl identifiers: set adata.var_names to the column of var with gene symbols"
    if here > ENOUGH > there:
        return "the list has Ensembl identifiers: set adata.var_names to the column of var that holds them"
    return f"use the same gene names in both{_dates(genes)}"


def _dates(genes: Sequence[str]) -> str:
    dates = [gene for gene in genes if DATE.match(gene)]
    return f" ({dates[0]} is what a spreadsheet makes of a gene such as MARCH1 or SEPT2)" if dates else ""


def _from_frame(frame: pd.DataFrame) -> dict[str, list[str]]:
    import pandas as pd

    if not isinstance(frame.index, pd.RangeIndex):
        name = frame.index.name
        frame = frame.reset_index(names="" if name is None or name in frame.columns else str(name))
    header = [str(name) for name in frame.columns]
    if len(set(header)) < len(header):
        again = next(name for name in header if header.count(name) > 1)
        msg = f"markers: the column {again!r} is there twice; the table given; keep one"
        raise DataError(msg)
    rows = ([("" if pd.isna(value) else str(value)).strip() for value in row] for row in frame.itertuples(index=False))
    return from_table(header, rows, "the table given")


def _warn(message: str) -> None:
    warnings.warn(message, DataWarning, stacklevel=4)
