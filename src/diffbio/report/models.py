"""Which models lie in a folder, as descriptions and as lines of text."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import storage
from ..errors import DiffBioError, ModelFileError
from .facts import bytes_text, names_text

DEPTH = 2  # folders below the one that is named
UNFINISHED = {"checkpoint", "pipeline stages"}  # of runs: no models to use
SHOWN_SETTINGS = 40


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What the header of a model folder says; `problem` is why it cannot be used, and then the rest is empty.

    folder: where it is.
    kind: "annotator", the name of another operator, "SingleCellPipeline", "SCVI", "SCANVI".
    mode: of an annotator.
    trained: whether its weights come from training.
    genes, types, batches: names that it knows; n_genes also where it knows no names.
    n_cells: how many it was trained on; None where that was not written down.
    labels_key, reference: what it learned the types from.
    markers: type -> marker genes, of an annotator.
    version: of diffbio, that wrote it; "" where that was not written down.
    n_bytes: on disk.
    settings: of the operator or model.
    """

    folder: Path
    kind: str = ""
    mode: str = ""
    trained: bool = False
    genes: tuple[str, ...] = ()
    n_genes: int | None = None
    types: tuple[str, ...] = ()
    batches: tuple[str, ...] = ()
    n_cells: int | None = None
    labels_key: str = ""
    reference: str = ""
    markers: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    version: str = ""
    n_bytes: int = 0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problem: str | None = None


def models_in(folder: str | Path) -> list[ModelInfo]:
    """Every model in `folder`, itself or up to two levels below, by path; damaged ones with their `problem`.

    Checkpoints of runs are left out, unless `folder` is one. Nothing but the header is interpreted.

    Raises:
        ModelFileError: there is no such folder.
    """
    folder = Path(folder)
    if not storage.exists(folder):
        what = "is a file, not a folder" if folder.is_file() else "no such folder"
        msg = f"models: {what}; {folder}; name a model's folder, or one that holds several."
        raise ModelFileError(msg)
    return [model_info(path) for path in _folders(folder, DEPTH)]


def model_info(folder: str | Path) -> ModelInfo:
    """What is in a model folder; never raises, `problem` says what is wrong."""
    folder = Path(folder)
    try:
        n_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    except OSError:
        n_bytes = 0
    try:
        header, _ = storage.load_folder(folder)  # all of it: the digest tells whether the weights are whole
        return dataclasses.replace(_described(folder, header), n_bytes=n_bytes)
    except DiffBioError as error:
        problem = str(error).removeprefix("load: ")
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
    except MemoryError:
        problem = "is larger than the free memory"
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"{storage.HEADER} is not that of a model of diffbio ({type(error).__name__})"
    return ModelInfo(folder, n_bytes=n_bytes, problem=problem)


def described(folder: str | Path) -> Iterator[str]:
    """The models in `folder` as lines of text: one for each, or all about the one whose folder it is.

    Raises:
        ModelFileError: there is no such folder.
    """
    folder = Path(folder)
    found = models_in(folder)
    if not found:
        yield f"no models of diffbio in {folder}, nor in the two levels of folders below"
    elif len(found) == 1 and found[0].folder == folder:
        yield from _all_about(found[0])
    else:
        for info in found:
            yield f"{_printable(str(info.folder.relative_to(folder)))}: {_summary(info)}"


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """Model folders, in the order of their names; a model is not searched for others."""
    cut_off = not folder.is_dir()  # a save was, and what it would have replaced lies beside
    if cut_off or (folder / storage.HEADER).exists():
        if depth == DEPTH or storage.kind_of(folder) not in UNFINISHED:
            yield folder
        return
    if depth == 0:
        return
    try:
        names = {path.name for path in folder.iterdir() if path.is_dir()}
    except OSError:
        return
    # what a save that was cut off left behind stands for the folder itself
    names |= {name[1:-4] for name in names if name.startswith(".") and name.endswith(".old") and len(name) > 5}
    for name in sorted(name for name in names if not name.startswith(".")):
        if storage.exists(folder / name):
            yield from _folders(folder / name, depth - 1)


def _described(folder: Path, header: Mapping[str, Any]) -> ModelInfo:
    version = str(header.get("diffbio_version", ""))
    if "annotation" in header:
        version = version or str(header["annotation"].get("version", ""))
        return dataclasses.replace(_annotator(folder, header), version=version)
    if "operator" in header:
        settings = dict(header.get("config", {}))
        genes = tuple(map(str, header.get("genes", ())))
        n_genes = settings.get("n_genes")
        return ModelInfo(
            folder, kind=str(header["operator"]), trained=all(header.get("fitted", ())), genes=genes,
            n_genes=int(n_genes) if n_genes is not None else len(genes) or None,
            batches=tuple(map(str, header.get("batches", ()))), version=version, settings=settings,
        )  # fmt: skip
    if "registry" in header:
        return dataclasses.replace(_scvi(folder, header), version=version)
    if header.get("kind") == "scvi-tools":
        kind, genes = f"{header['model']} for scvi-tools", tuple(map(str, header["var_names"]))
        return ModelInfo(folder, kind=kind, trained=bool(header.get("is_trained")), genes=genes, n_genes=len(genes),
                         types=tuple(map(str, header.get("labels") or ())), version=version)  # fmt: skip
    if header.get("kind") in UNFINISHED:
        msg = "is the checkpoint of a run, which diffbio run --resume goes on from, and no model"
        raise ModelFileError(msg)
    msg = "holds no operator, pipeline or model"
    raise ModelFileError(msg)


def _annotator(folder: Path, header: Mapping[str, Any]) -> ModelInfo:
    found = header["annotation"]
    types, genes = (tuple(map(str, found[key])) for key in ("types", "genes"))
    markers = [tuple(map(str, listed)) for listed in found.get("markers") or ()]
    settings = dict(header.get("config", {}))
    return ModelInfo(
        folder, kind="annotator", mode=str(found["mode"]), trained=all(header.get("fitted", ())), genes=genes,
        n_genes=len(genes) or settings.get("n_genes"), types=types,
        n_cells=int(found["n_cells"]) if found.get("n_cells") else None, labels_key=str(found.get("labels_key") or ""),
        reference=str(found.get("reference") or ""), markers=dict(zip(types, markers, strict=False)),
        settings=settings,
    )  # fmt: skip


def _scvi(folder: Path, header: Mapping[str, Any]) -> ModelInfo:
    registry = header["registry"]
    genes = tuple(map(str, registry["var_names"]))
    setup = dict(registry["setup"])
    unlabelled = str(setup.get("unlabeled_category", ""))
    is_scanvi = str(header["model"]) == "SCANVI"
    return ModelInfo(
        folder, kind=str(header["model"]), mode="scanvi" if is_scanvi else "", trained=bool(header.get("is_trained")),
        genes=genes, n_genes=len(genes),
        types=tuple(str(name) for name in registry["labels"] if str(name) != unlabelled) if is_scanvi else (),
        batches=tuple(map(str, registry["batches"])), labels_key=str(setup.get("labels_key") or ""),
        settings=dict(header.get("init_params", {})),
    )  # fmt: skip


def _summary(info: ModelInfo) -> str:
    if info.problem is not None:
        return f"damaged: {_printable(info.problem)}"
    parts = [_kind(info)]
    if info.types:
        parts.append(f"{len(info.types)} types: {names_text(list(info.types))}")
    if info.n_genes:
        parts.append(f"{info.n_genes:,} genes")
    if info.n_cells:
        parts.append(f"trained on {info.n_cells:,} cells")
    return "; ".join([*parts, *_origin(info)])


def _all_about(info: ModelInfo) -> Iterator[str]:
    if info.problem is not None:
        yield f"{_printable(str(info.folder))}: damaged: {_printable(info.problem)}"
        return
    yield f"{_printable(str(info.folder))}: {'; '.join([_kind(info), *_origin(info)])}"
    learned = [f"{info.n_cells:,} cells"] if info.n_cells else []
    learned += [f"labels of obs[{_printable(info.labels_key)!r}]"] if info.labels_key else []
    learned += [f"of {_printable(info.reference)}"] if info.reference else []
    if learned:
        yield f"  trained on: {', '.join(learned)}"
    if info.n_genes:
        yield f"  genes: {info.n_genes:,}" + (f": {names_text(list(info.genes))}" if info.genes else ", without names")
    if info.batches:
        yield f"  batches: {names_text(list(info.batches))}"
    if info.types:
        yield f"  types: {len(info.types):,}"
        for kind in info.types:
            known = info.markers.get(kind, ())
            yield f"    {_printable(kind)}" + (f": {names_text(list(known))}" if known else "")
    settings = [f"{name}={value}" for name, value in list(info.settings.items())[:SHOWN_SETTINGS]]
    if settings:
        yield f"  settings: {_printable(', '.join(settings), 2000)}"


def _kind(info: ModelInfo) -> str:
    mode = f", mode {_printable(info.mode)}" if info.mode and info.mode != info.kind.lower() else ""
    return _printable(info.kind) + mode + ("" if info.trained else ", UNTRAINED")


def _origin(info: ModelInfo) -> list[str]:
    return [bytes_text(info.n_bytes)] + ([f"diffbio {_printable(info.version)}"] if info.version else [])


def _printable(text: str, longest: int = 300) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:longest]
