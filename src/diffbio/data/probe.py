"""A look at every part of an HDF5 file that its library has to decode; run as a process of its own.

On a damaged file libhdf5 can crash instead of raising an error, and take the caller with it. `guard.opened` runs
this file first. It ends with 0 unless the library crashed, or went round in circles until the limit of processor
time: what is wrong otherwise is found and said later.
"""

import contextlib
import os
import resource
import sys
from typing import Any

import h5py

READ_BYTES = 16 << 20  # of an array; of a larger one the index of its chunks is read, not the chunks
BLOCK = 1 << 16  # strings read at once
MAX_DEPTH = 64
SECONDS, BYTES_PER_SECOND = 10, 20e6


def look(group: Any, depth: int = 0) -> None:
    """Reads names, attributes and types of all members, small arrays and all strings; follows no link."""
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            continue
        with contextlib.suppress(Exception):
            member = group[name]
            look_at_attributes(member)
            if isinstance(member, h5py.Dataset):
                look_at_values(member)
            elif depth < MAX_DEPTH:
                look(member, depth + 1)


def look_at_attributes(member: Any) -> None:
    """Reads all attributes."""
    for name in member.attrs:
        with contextlib.suppress(Exception):
            member.attrs[name]


def look_at_values(data: Any) -> None:
    """Reads an array, or of a large one of numbers how it is stored."""
    claimed, stored = int(data.size or 0) * data.dtype.itemsize, int(data.id.get_storage_size())
    if data.external or data.is_virtual or claimed > READ_BYTES + 10**5 * stored:
        return  # refused later
    if data.chunks:
        data.id.get_num_chunks()
    if claimed <= READ_BYTES:
        data[()]
    elif data.dtype.kind not in "biufc" and data.ndim == 1:
        for start in range(0, len(data), BLOCK):
            data[start : start + BLOCK]


if __name__ == "__main__":
    limit = int(SECONDS + os.path.getsize(sys.argv[1]) / BYTES_PER_SECOND)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(Exception), h5py.File(sys.argv[1], "r") as file:
        look_at_attributes(file)
        look(file)
