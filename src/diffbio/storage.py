"""Model folders: a header in JSON and arrays in safetensors, checked by sha256, renamed into place.

safetensors loads a file with one flipped byte without a word, so the header keeps its digest. Nothing
here can execute code from a file: no pickle, and names found in a file are never joined to a path.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from .errors import ModelFileError, OutputError
from .scratch import remove, scratch_beside

FORMAT_VERSION = 1
HEADER, WEIGHTS = "model.json", "weights.safetensors"
DATA = "adata.h5ad"  # cells that may lie beside a model; not covered by its digest
MAX_HEADER_BYTES = 64 << 20


def save_folder(path: str | Path, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
    """Writes `header` and `arrays` to the folder `path`, replacing a model folder that stands there.

    The folder appears whole or not at all: it is written beside its place, synced and renamed.

    Raises:
        OutputError: the place is taken by something that is not a model folder, or cannot be written.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not (path / HEADER).is_file()):
        msg = f"save: {path} exists and is not a diffbio model folder; choose another path."
        raise OutputError(msg)
    if path.exists() and kind_of(path) != header.get("kind"):
        held, new = kind_of(path) or "a model", header.get("kind") or "a model"
        msg = f"save: {path} holds {held}, which {new} would replace; choose another path."
        raise OutputError(msg)
    # safetensors copies each array, then all of them; where memory ends there it panics, numpy raises MemoryError
    np.empty(2 * sum(value.nbytes for value in arrays.values()), np.uint8)
    weights = save_tensors({name: np.asarray(value, order="C") for name, value in arrays.items()})
    digest = {WEIGHTS: hashlib.sha256(weights).hexdigest()}
    header = {"format_version": FORMAT_VERSION, "diffbio_version": version("diffbio"), "sha256": digest, **header}
    digest[HEADER] = _digest(header)
    text = json.dumps(header, indent=1)
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = scratch_beside(path)
        scratch.mkdir()
        _write(scratch / WEIGHTS, weights)
        _write(scratch / HEADER, text.encode())
        _swap(scratch, path)
    except OSError as error:
        msg = f"save: cannot write {path}: {error.strerror or error}; free space or choose another path."
        raise OutputError(msg) from error
    finally:
        if scratch is not None:
            remove(scratch)
    return path


def exists(path: str | Path) -> bool:
    """Whether there is a model folder at `path`, or was one when a save was cut off."""
    return _settled(Path(path)).is_dir()


def kind_of(path: Path) -> str | None:
    """What a folder says that it holds besides a model: 'checkpoint', 'pipeline stages'; None for a model."""
    try:
        kind = json.loads((path / HEADER).read_text()).get("kind")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return kind if isinstance(kind, str) else None


def load_folder(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads what `save_folder` wrote.

    Raises:
        ModelFileError: a file is missing, unexpected, damaged, of another kind, or from a newer diffbio.
    """
    path = _settled(Path(path))
    if path.is_file():
        kind = "a pickle-based model" if path.suffix in {".pkl", ".pt", ".pth", ".joblib"} else "a file"
        msg = (
            f"load: {path} is {kind}, not a diffbio model folder ({HEADER} + {WEIGHTS}); diffbio never "
            "unpickles. Train the model again, or export its weights to safetensors."
        )
        raise ModelFileError(msg)
    if not path.is_dir():
        msg = f"load: no model folder at {path}."
        raise ModelFileError(msg)
    found = {p.name for p in path.iterdir()} - {DATA}
    if found != {HEADER, WEIGHTS}:
        missing, extra = sorted({HEADER, WEIGHTS} - found), sorted(found - {HEADER, WEIGHTS})
        msg = f"load: {path} is not a whole model folder: missing {missing}, unexpected {extra}."
        raise ModelFileError(msg)
    header = _read_header(path / HEADER)
    weights = (path / WEIGHTS).read_bytes()
    if hashlib.sha256(weights).hexdigest() != header["sha256"].get(WEIGHTS):
        msg = f"load: {path / WEIGHTS} is damaged (sha256 differs from {HEADER}); use another copy."
        raise ModelFileError(msg)
    try:
        return header, load_tensors(weights)
    except (SafetensorError, ValueError, KeyError) as error:
        msg = f"load: {path / WEIGHTS} is not a safetensors file: {error}."
        raise ModelFileError(msg) from error


def _read_header(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_HEADER_BYTES:
        msg = f"load: {path} is larger than any header diffbio writes; it is not a model."
        raise ModelFileError(msg)
    try:
        header = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        msg = f"load: {path} is not readable JSON ({type(error).__name__}); use another copy."
        raise ModelFileError(msg) from error
    if not isinstance(header, dict) or not isinstance(header.get("sha256"), dict):
        msg = f"load: {path} is not the header of a diffbio model."
        raise ModelFileError(msg)
    version = header.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        msg = f"load: {path} has format {version!r}, this diffbio reads up to {FORMAT_VERSION}; upgrade diffbio."
        raise ModelFileError(msg)
    digests, own = header["sha256"], _digest(header)
    # models of others have no entry for the header itself
    if set(digests) - {WEIGHTS, HEADER} or digests.get(HEADER, own) != own:
        msg = f"load: {path} is damaged or was edited (its sha256 differs); use another copy."
        raise ModelFileError(msg)
    return header


def _digest(header: dict[str, Any]) -> str:
    """The sha256 of a header, its own entry aside."""
    digests = {name: value for name, value in header["sha256"].items() if name != HEADER}
    return hashlib.sha256(json.dumps({**header, "sha256": digests}, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _swap(new: Path, path: Path) -> None:
    """Puts folder `new` at `path`. A kill between the two renames leaves the old one, which load finds."""
    old = _old(path)
    if path.exists():
        if old.exists():
            shutil.rmtree(old)
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _settled(path: Path) -> Path:
    return _old(path) if not path.exists() and _old(path).is_dir() else path
