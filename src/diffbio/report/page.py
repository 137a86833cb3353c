"""One page about the results in a file: made from that file alone, complete in itself, nothing in it runs."""

import html
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import pl
from .figures import drawing, figures_of, inline, labels_of_types, write_whole

if TYPE_CHECKING:
    from anndata import AnnData

LONGEST = 300  # characters of a value from the file
MOST_ROWS = 100

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light dark; --line: #8884; --warn: #d55e00; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; } caption { text-align: left; color: #888; }
th, td { text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top;  overflow-wrap: anywhere; font-weight: normal; }
th { color: #888; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.notes { border-left: 4px solid var(--warn); padding: .3rem 1rem; }
.notes ul { margin: 0; padding-left: 1.1rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; background: white; padding: .5rem; }
figure img { max-width: 100%; height: auto; max-height: 26rem; display: block; }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media print { details > * { display: block; } }
"""
TITLES = {
    "umap": "UMAP",
    "phate": "PHATE",
    "cluster_sizes": "Cluster sizes",
    "ambient": "Ambient RNA",
    "quality": "Quality of the cells",
    "doublets": "Doublets",
    "imputation": "Choice of the diffusion time",
    "pseudotime": "Pseudotime",
    "fate": "Fates",
    "driver_genes": "Driver genes",
    "gene_trends": "Gene trends",
    "velocity": "RNA velocity",
    "ot_trajectory": "Transport from day to day",
    "spatial_domains": "Spatial domains",
    "aligned_slices": "Aligned slices",
    "grn": "Regulators and their genes",
    "ligand_receptor": "Ligands and receptors",
    "communication": "Communication between cells",
    "switch_de": "Genes that switch",
    "differential_distribution": "Genes whose distribution differs",
    "training": "Training",
    "types_and_labels": "Called types against labels",
    "confidence": "Confidence of the calls",
    "markers": "Marker genes",
}
OF_TYPES = ("types_and_labels", "confidence", "markers")  # figures of tl.annotate
FACTS = {
    "input": "input file",
    "input_sha256": "sha256 of the input",
    "started": "started (UTC)",
    "seconds": "seconds",
    "device": "device",
    "seed": "seed",
}


def write_report(adata: "AnnData", path: str | Path) -> Path:
    """Writes the page to `path` and returns that.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(path)
    write_whole(path, page(adata).encode("utf-8", errors="replace"))
    return path


def page(adata: "AnnData") -> str:
    """The page as text: warnings and what did not run first, then numbers, figures, settings and versions."""
    record, annotation = pl.record_of(adata, "pipeline"), pl.record_of(adata, "annotate")
    source = record.get("input", annotation.get("input", ""))
    with drawing():
        pictures = {name: inline(figure) for name, figure in figures_of(adata).items()}
    maps = [name for name in pictures if name.startswith(tuple(pl.maps_of(adata)))]
    others = [name for name in pictures if name not in (*maps, *OF_TYPES, "training")]
    parts = [
        f"<h1>diffbio report{': ' + text(source) if len(str(source)) else ''}</h1>",
        _notes(notes_of(adata)),
        _section("Run", _table(_facts(adata, record))),
        _section("Maps", _figures(pictures, maps)),
        _section("Cell types", _table(_annotation(adata)) + _figures(pictures, list(OF_TYPES)) + _types(adata)),
        _section("Results", _figures(pictures, others) + _clusters(adata)),
        _section("Training", _figures(pictures, ["training"]) + _list(assessment(adata))),
        _section("Settings", _table(_items(record.get("params", {})))),
        _section("Versions", _table(_items(record.get("versions", annotation.get("versions", {}))))),
        _section("Other steps", _other_steps(adata)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>diffbio report</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def has_results(adata: "AnnData") -> bool:
    """Whether diffbio wrote anything into these cells."""
    records = adata.uns.get("diffbio", {})
    return hasattr(records, "items") and bool(records)


def notes_of(adata: "AnnData") -> list[str]:
    """Warnings, stages that did not run, outputs of untrained weights: what a reader has to know first."""
    if not has_results(adata):
        return ["This file holds no results of diffbio."]
    records = adata.uns["diffbio"]
    notes = []
    for name, record in records.items():
        if not hasattr(record, "get"):
            continue
        where = "" if name == "pipeline" else f" ({name})"
        notes += [f"Not run: {skipped}{where}" for skipped in _listed(record.get("skipped"))]
        notes += [f"Untrained, do not use: {output}{where}" for output in _listed(record.get("unfitted"))]
        notes += [f"Warning: {warning}{where}" for warning in _listed(record.get("warnings"))]
    return notes


def assessment(adata: "AnnData") -> list[str]:
    """What the training curves say, a sentence for each stage that needs one."""
    said = []
    for stage in pl.stages_of(adata):
        history = pl.history_of(adata)
        rows = history["stage"] == stage
        loss = history["loss"][rows]
        validation = history.get("validation_loss", np.full(len(rows), np.nan))[rows]
        skipped = float(np.nansum(history.get("skipped_steps", np.zeros(len(rows)))[rows]))
        if skipped:
            said.append(
                f"{stage}: {skipped:.0f} steps with an infinite gradient were skipped; lower learning_rate."
            )
        if not np.isfinite(validation).any():
            continue
        best = int(np.nanargmin(validation))
        span = float(np.nanmax(loss) - np.nanmin(loss)) or 1.0
        if best == len(validation) - 1 and len(validation) > 10:
            fell = (validation[-10] - validation[-1]) / span
            if fell > 0.02:
                said.append(
                    f"{stage}: the validation loss was still falling at the end; more epochs may help."
                )
        elif validation[-1] - validation[best] > 0.25 * span:
            said.append(f"{stage}: the validation loss rose after epoch {best + 1}, whose weights were kept.")
    return said or (["No stage shows a sign of trouble."] if pl.stages_of(adata) else [])


def text(value: Any) -> str:
    """A value from the file as harmless text: escaped, cut, letters that reorder text made visible."""
    if isinstance(value, np.ndarray | list | tuple):
        value = ", ".join(str(item) for item in np.ravel(np.asarray(value, dtype=object))[:MOST_ROWS])
    elif isinstance(value, float | np.floating):
        value = f"{value:.6g}"
    shown = "".join(
        c if unicodedata.category(c)[0] != "C" or c == "\n" else "�" for c in str(value)[: LONGEST + 1]
    )
    return html.escape(shown if len(shown) <= LONGEST else shown[:LONGEST] + "…", quote=True)


def _facts(adata: "AnnData", record: Any) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = [("cells x genes", f"{adata.n_obs:,} x {adata.n_vars:,}")]
    params = record.get("params", {})
    if hasattr(params, "get") and "n_genes" in params:
        rows.append(("genes used", params["n_genes"]))
    if "batches" in record and len(_listed(record["batches"])):
        rows.append(("batches", record["batches"]))
    rows += [(f"{name}, clusters against labels", score) for name, score in _items(record.get("scores", {}))]
    return rows + [(shown, record[key]) for key, shown in FACTS.items() if key in record]


def _annotation(adata: "AnnData") -> list[tuple[str, Any]]:
    """How the cells were annotated, how many are, and how that agrees with labels."""
    if pl.CELL_TYPE not in adata.obs or not adata.n_obs:
        return []
    record = pl.record_of(adata, "annotate")
    params = record.get("params", {})
    rows = [(key, params[key]) for key in ("mode", "reference", "model", "markers")
            if hasattr(params, "get") and str(params.get(key, "none")) not in ("none", "")]  # fmt: skip
    called = np.asarray(adata.obs[pl.CELL_TYPE].astype(str))
    n_unassigned = int((called == pl.UNASSIGNED).sum())
    rows.append(("annotated", f"{len(called) - n_unassigned:,} of {len(called):,} cells"))
    rows.append(("unassigned", f"{n_unassigned:,} cells ({n_unassigned / len(called):.1%})"))
    if pl.CONFIDENCE in adata.obs:
        rows.append(("mean confidence", f"{np.nanmean(np.asarray(adata.obs[pl.CONFIDENCE], float)):.3f}"))
    if pl.VOTED in adata.obs:
        changed = int((np.asarray(adata.obs[pl.VOTED].astype(str)) != called).sum())
        rows.append(("changed by majority voting", f"{changed:,} cells (in {pl.VOTED}; the rest here is before it)"))
    if key := labels_of_types(adata):
        found = pl.agreement(adata, key)
        scores = f"accuracy {found['accuracy']:.3f}, macro-F1 {found['macro_f1']:.3f}"
        cells = f"{found['cells']:,} labelled cells; unassigned ones count as wrong"
        rows.append((f"agreement with {key}", f"{scores}, over {cells}"))
        if found["trained_on"]:
            rows.append(("mind", "It was trained on these labels: this is no measure of how it does on other cells."))
        if found["strangers"]:
            rows.append(("labels that are no types", found["strangers"]))
    return rows


def _types(adata: "AnnData") -> str:
    return _groups(adata, pl.CELL_TYPE, pl.CONFIDENCE, "type", "confidence")


def _clusters(adata: "AnnData") -> str:
    return _groups(adata, "diffbio_cluster", "diffbio_cluster_max_prob", "cluster", "probability")


def _groups(adata: "AnnData", key: str, sureness: str, what: str, of_what: str) -> str:
    """A table of groups of cells: how many there are, and how sure their cells."""
    if key not in adata.obs or not adata.n_obs:
        return ""
    names, codes = pl.codes_of(adata.obs[key])
    sure = adata.obs.get(sureness)
    sizes = np.bincount(codes, minlength=len(names))
    weight = np.ones(len(codes)) if sure is None else np.nan_to_num(np.asarray(sure, float))
    means = np.bincount(codes, weight, minlength=len(names)) / np.maximum(sizes, 1)
    head = f"<tr><th>{what}<th>cells<th>share" + ("" if sure is None else f"<th>mean {of_what}") + "</tr>"
    rows = [
        f'<tr><td>{text(names[k])}<td class="number">{sizes[k]:,}'
        f'<td class="number">{sizes[k] / len(codes):.1%}'
        + ("" if sure is None else f'<td class="number">{means[k]:.3f}')
        for k in range(min(len(names), MOST_ROWS))
    ]
    return f"<details><summary>Table of {what}s</summary><table>{head}{''.join(rows)}</table></details>"


def _other_steps(adata: "AnnData") -> str:
    records = adata.uns.get("diffbio", {})
    names = [name for name in records if name != "pipeline"] if hasattr(records, "items") else []
    tables = []
    for name in names[:MOST_ROWS]:
        record = records[name]
        if hasattr(record, "get"):
            rows = _items(record.get("params", {})) + [
                (k, record[k]) for k in ("started", "seconds") if k in record
            ]
            tables.append(f"<details><summary>{text(name)}</summary>{_table(rows)}</details>")
    return "".join(tables)


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>\n{content}" if content else ""


def _notes(notes: list[str]) -> str:
    return (
        f'<div class="notes">{_list(notes)}</div>' if notes else "<p>Every stage ran, without a warning.</p>"
    )


def _list(sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{text(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def _table(rows: list[tuple[str, Any]]) -> str:
    cells = "".join(f"<tr><th>{text(name)}<td>{text(value)}</tr>" for name, value in rows)
    return f"<table>{cells}</table>" if rows else ""


def _figures(pictures: dict[str, str], names: list[str]) -> str:
    shown = [
        f'<figure><img src="{pictures[name]}" alt="{text(TITLES.get(name, name))}"></figure>'
        for name in names
        if name in pictures
    ]
    return f'<div class="figures">{"".join(shown)}</div>' if shown else ""


def _items(mapping: Any) -> list[tuple[str, Any]]:
    return [(str(k), mapping[k]) for k in list(mapping)[:MOST_ROWS]] if hasattr(mapping, "items") else []


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value] if value else []
    return [str(item) for item in np.ravel(np.asarray(value, dtype=object))]
