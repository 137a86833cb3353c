"""Names for files that are written beside their place and renamed into it, and what a killed run left of them."""

import contextlib
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
from pathlib import Path

SUFFIX, ASIDE = ".tmp", ".old"


def scratch_beside(path: Path) -> Path:
    """A new name in the folder of `path`, which says whose it is; removes what dead processes left for `path`."""
    remove_stale(path.parent, path.name)
    return path.with_name(f".{path.name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}")


def remove_stale(folder: Path, name: str | None = None) -> None:
    """Removes scratch files and folders (for `name`, or for any) whose process, on this machine, is no more.

    What such a process had put aside (`ASIDE`) comes back, if nothing new stands in its place.
    """
    ours = re.compile(rf"\.(.+)\.{_machine()}-(\d+)-[0-9a-f]{{8}}\{SUFFIX}(\{ASIDE})?")
    with contextlib.suppress(OSError):  # a folder that cannot be listed: nothing to remove
        for left in list(folder.iterdir()):
            found = ours.fullmatch(left.name)
            if not found or name not in (None, found[1]) or _alive(int(found[2])):
                continue
            if found[3] and not (folder / found[1]).exists():
                left.rename(folder / found[1])
            else:
                remove(left)


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@functools.cache
def _machine() -> str:
    """Where a process number means something: the host, and the container on it."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is someone else's
        return True
    return True
