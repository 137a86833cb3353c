"""Reads lists of marker genes: tables, 0/1 matrices, YAML, JSON and GMT."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import DataError, InputFileError
from .guard import MAGIC
from .strict import strict_json, strict_yaml

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MAX_BYTES = 64 << 20  # the largest collection of gene sets in use takes a tenth of it
TYPE_COLUMNS = ("celltype", "type", "cell", "celllabel", "label", "population", "celltypename", "name", "set",
                "cluster")  # fmt: skip
GENE_COLUMNS = ("gene", "genes", "marker", "markers", "markergene", "markergenes", "symbol", "genesymbol",
                "symbols", "genename", "feature", "geneid", "ensembl", "ensemblid")  # fmt: skip
ON, OFF = {"1", "1.0", "true"}, {"0", "0.0", "false", ""}
FORMS = (
    "expected a table with the columns cell_type and gene, a 0/1 matrix with genes as rows and types as columns, "
    "YAML or JSON such as 'B: [MS4A1, CD79A]', or GMT"
)


def read_markers(path: str | Path) -> dict[str, list[str]]:
    """Read the marker genes of cell types, in the order of the file.

    A .csv or .tsv holds two columns, type and gene (cell_type, gene, marker, symbol and the like; others are
    left aside), or a 0/1 matrix with genes as rows and types as columns; .yaml and .json hold `type: [genes]`;
    .gmt holds lines of type, description, genes. Under other names the content decides.

    Raises
    ------
    InputFileError : missing, unreadable, empty, of another form, or a type is given twice.
    """
    path = Path(path)
    text = _text_of(path)
    form = {".json": "json", ".yaml": "yaml", ".yml": "yaml", ".gmt": "gmt", ".csv": "table", ".tsv": "table"}.get(
        path.suffix.lower()
    ) or _form_of(text)
    if form in ("json", "yaml"):
        read = strict_json if form == "json" else strict_yaml
        return _from_mapping(read(text, path, error=InputFileError, name="type"), path)
    rows = _rows(text, path, "\t" if form == "gmt" else _delimiter(text))
    return _from_gmt(rows, path) if form == "gmt" else from_table(rows[0], rows[1:], path)


def from_table(header: Sequence[str], rows: Iterable[Sequence[str]], where: object) -> dict[str, list[str]]:
    """Types and their genes from a table of text: columns of types and of genes, or a 0/1 matrix."""
    rows = list(rows)
    if not rows:
        _refuse("has a heading but no rows", where, FORMS)
    if odd := [number for number, row in enumerate(rows, 2) if len(row) != len(header)]:
        _refuse(
            f"line {odd[0]} has {len(rows[odd[0] - 2])} fields, the first has {len(header)}", where, "repair the table"
        )
    kinds, genes = (_find(header, names) for names in (TYPE_COLUMNS, GENE_COLUMNS))
    if kinds is not None and genes is not None:
        return _from_pairs(((row[kinds], row[genes]) for row in rows), where)
    if len(header) > 1 and all(field.lower() in ON | OFF for row in rows for field in row[1:]):
        return _from_matrix(header, rows, where)
    found = ", ".join(repr(name) for name in header[:6])
    _refuse(f"is a table of another form, whose columns are {found}", where, FORMS)


def _text_of(path: Path) -> str:
    try:
        if path.is_dir():
            _refuse("is a folder", path, "name the file with the markers")
        if path.stat().st_size > MAX_BYTES:
            _refuse(f"has {path.stat().st_size:,} bytes, more than any list of markers", path, "check the name")
        content = path.read_bytes()
    except OSError as error:
        msg = f"markers: cannot be read ({error.strerror or error}); {path}; check the name"
        raise InputFileError(msg) from error
    if named := [name for magic, name in MAGIC.items() if content.startswith(magic)]:
        _refuse(f"is {named[0]}", path, f"unpack or convert it; {FORMS}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        _refuse("is no text in UTF-8", path, FORMS)
    if not text.strip():
        _refuse("is empty", path, FORMS)
    return text


def _form_of(text: str) -> str:
    first = next(line for line in text.splitlines() if line.strip())
    if first.lstrip().startswith("{"):
        return "json"
    if re.match(r"(#|---|[^,;\t]+:(\s|$))", first):
        return "yaml"
    fields = first.split("\t")
    if len(fields) > 2 and _find(fields, GENE_COLUMNS) is None:
        rows = [line.split("\t")[1:] for line in text.splitlines()[1:] if line.strip()]
        if not rows or any(field.strip().lower() not in ON | OFF for row in rows for field in row):
            return "gmt"
    return "table"


def _delimiter(text: str) -> str:
    first = next(line for line in text.splitlines() if line.strip())
    return max(",\t;", key=first.count)


def _rows(text: str, path: Path, delimiter: str) -> list[list[str]]:
    try:
        found = list(csv.reader(text.splitlines(), delimiter=delimiter))
    except csv.Error as error:
        _refuse(f"is not a table ({error})", path, FORMS)
    return [[field.strip() for field in row] for row in found if any(field.strip() for field in row)]


def _find(header: Sequence[str], names: Sequence[str]) -> int | None:
    plain = [re.sub(r"[^a-z0-9]", "", str(name).lower()) for name in header]
    return next((plain.index(name) for name in names if name in plain), None)


def _from_pairs(pairs: Iterable[tuple[str, str]], where: object) -> dict[str, list[str]]:
    markers: dict[str, list[str]] = {}
    for number, (kind, field) in enumerate(pairs, 2):
        if not kind or not field:
            _refuse(f"line {number} has no {'gene' if kind else 'type'}", where, "fill it in or leave the line out")
        genes = (gene for gene in re.split(r"[,;]\s*", field) if gene)
        markers.setdefault(kind, []).extend(genes)
    return {kind: list(dict.fromkeys(genes)) for kind, genes in markers.items()}


def _from_matrix(header: Sequence[str], rows: Sequence[Sequence[str]], where: object) -> dict[str, list[str]]:
    types = list(header[1:])
    _distinct(types, "type", where)
    _distinct([row[0] for row in rows], "gene", where)
    return {
        kind: [row[0] for row in rows if row[column].lower() in ON] for column, kind in enumerate(types, 1)
    }


def _from_gmt(rows: Sequence[Sequence[str]], path: Path) -> dict[str, list[str]]:
    short = [row for row in rows if len(row) < 2]
    if short:
        _refuse(f"has a line of one field, {short[0][0]!r}", path, "GMT lines are type, description, genes with tabs")
    _distinct([row[0] for row in rows], "type", path)
    return {row[0]: list(dict.fromkeys(gene for gene in row[2:] if gene)) for row in rows}


def _from_mapping(found: object, path: Path) -> dict[str, list[str]]:
    if not isinstance(found, dict) or not found:
        _refuse(f"holds {type(found).__name__}, not types with their genes", path, "write 'B: [MS4A1, CD79A]'")
    return from_lists(found, path)


def from_lists(markers: Mapping[Any, Any], where: object) -> dict[str, list[str]]:
    """Types and genes from a mapping whose values are lists of text; anything else is refused."""
    checked: dict[str, list[str]] = {}
    for kind, genes in markers.items():
        if not isinstance(kind, str) or not kind.strip():
            _refuse(f"the type {kind!r} is {type(kind).__name__}, not text", where, "put it in quotes")
        if isinstance(genes, set | frozenset):
            genes = sorted(genes, key=str)  # the order of a set differs from run to run
        if genes is None or isinstance(genes, str | bytes | dict) or not hasattr(genes, "__iter__"):
            _refuse(f"the markers of {kind!r} are {genes!r:.60}, not a list of genes", where, f"write {kind}: [gene]")
        listed = list(genes)
        if odd := [gene for gene in listed if not isinstance(gene, str) or not gene.strip()]:
            _refuse(
                f"the markers of {kind!r} hold {odd[0]!r} ({type(odd[0]).__name__}), which is no gene name", where,
                "put names such as NO, 1-Mar or 7SK in quotes, or restore the gene's name",
            )  # fmt: skip
        if kind.strip() in checked:
            _refuse(f"the type {kind.strip()!r} is given twice", where, "keep one")
        checked[kind.strip()] = list(dict.fromkeys(gene.strip() for gene in listed))
    return checked


def _distinct(names: Sequence[str], what: str, where: object) -> None:
    if not all(names):
        _refuse(f"has a {what} without a name", where, "fill it in")
    again = [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []
    if again:
        _refuse(f"the {what} {again[0]!r} is given twice", where, "keep one")


def _refuse(what: str, where: object, fix: str) -> NoReturn:
    msg = f"markers: {what}; {where}; {fix}"
    raise (InputFileError if isinstance(where, Path) else DataError)(msg)
