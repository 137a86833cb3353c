"""A checksum of the texts in an .h5ad: HDF5 keeps one of the numbers (Fletcher32), and none of names and attributes."""

from __future__ import annotations

import hashlib
import warnings
from typing import TYPE_CHECKING, Any

from ..errors import DataWarning

if TYPE_CHECKING:
    from pathlib import Path

ATTRIBUTE = "diffbio_names_sha256"


def seal(file: Any) -> None:
    """Store the checksum of the open file's keys and texts in its root attributes."""
    file.attrs[ATTRIBUTE] = _digest(file)


def check_seal(path: Path) -> None:
    """Warn where the names of a file that diffbio wrote are others now.

    A program that adds to the file in place does that, as a flipped bit does, so it is no error.
    """
    import h5py

    with h5py.File(path, "r") as file:
        sealed = file.attrs.get(ATTRIBUTE)
        if sealed is not None and sealed != _digest(file):
            warnings.warn(
                f"{path.name}: names in it are not those that diffbio wrote: another program changed the file, or it "
                "is damaged; if you changed nothing, make a fresh copy",
                DataWarning, stacklevel=4,
            )  # fmt: skip


def _digest(file: Any) -> str:
    """Of the path and the attributes of every element, and the content of those that hold text."""
    import h5py
    import numpy as np

    digest = hashlib.sha256()

    def add(name: str, element: Any) -> None:
        attributes = {k: np.asarray(element.attrs[k]).tolist() for k in sorted(element.attrs) if k != ATTRIBUTE}
        digest.update(f"{name}\0{attributes}\0".encode(errors="surrogateescape"))
        if isinstance(element, h5py.Dataset) and h5py.check_string_dtype(element.dtype) and element.shape is not None:
            texts = element[()] if element.ndim == 0 else element[:].ravel()
            for text in [texts] if element.ndim == 0 else texts:
                digest.update((text if isinstance(text, bytes) else str(text).encode()) + b"\0")

    add("/", file)
    file.visititems(add)
    return digest.hexdigest()
