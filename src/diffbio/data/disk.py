"""HDF5 files written through Python: libhdf5 crashes at the end of a process that met a full disk."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import h5py


class Disk(io.FileIO):
    """A file that keeps the first error of writing to itself, for `check` to raise, and takes what comes after."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write all of `data`, or note that it cannot be."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        with self._noting():
            while rest:
                rest = rest[super().write(rest) :]
        return size

    def truncate(self, size: int | None = None, /) -> int:
        """Cut or extend, or note that it cannot be."""
        with self._noting():
            super().truncate(size)
        return size or 0

    def check(self) -> None:
        """Raise the first error there was."""
        if self.error is not None:
            raise self.error

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error


@contextlib.contextmanager
def opened_for_writing(path: Path, mode: str) -> Iterator[tuple[h5py.File, Disk]]:
    """Open an HDF5 file in mode "w" or "r+"; what was written is on the disk when the block ends without an error."""
    import h5py

    with Disk(path, f"{mode.removesuffix('+')}+") as disk:
        try:
            with h5py.File(disk, mode) as file:
                yield file, disk
        except Exception:
            disk.check()  # where writes were lost, another error comes of it
            raise
        disk.check()
