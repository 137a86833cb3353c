"""The places that a command writes to: looked at before any work is done, held while it goes on, filled at the end."""

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, InputFileError, OutputError
from .streams import say

HEADER, PAGE = "model.json", "report.html"


def check_places(cells: Path, output: Path, figures: Path | None, *, force: bool) -> None:
    """What can be known of the places to write to before any work is done."""
    from ..data.write import check_output

    if cells.exists() and output.exists() and cells.samefile(output):
        msg = f"is the input itself; {output}; choose another name for the output"
        raise OutputError(msg)
    check_output(output, force, n_bytes=size_of(cells))
    if figures is None:
        return
    make(figures)
    if (figures / PAGE).exists() and not force:
        msg = f"exists; {figures / PAGE}; choose another folder for the figures, or pass --force"
        raise OutputError(msg)


def check_model(folder: Path, *, force: bool) -> None:
    """What can be known of a model's folder before any work is done."""
    if folder.exists() and not (force and (folder / HEADER).is_file()):
        fix = "or pass --force" if (folder / HEADER).is_file() else "it is no model"
        msg = f"exists; {folder}; choose another folder, {fix}"
        raise OutputError(msg)
    if not os.access(next(p for p in folder.absolute().parents if p.exists()), os.W_OK):
        msg = f"cannot be written to; {folder}; choose another folder"
        raise OutputError(msg)


def on_disk(cells: Path, stream: bool | None) -> bool:  # noqa: FBT001
    """Whether the counts stay in the file: as told, else if they are large."""
    from ..data.guard import sniff
    from ..data.tables import should_stream

    if stream and (kind := sniff(cells)) not in ("h5ad", "zarr"):
        msg = f"--stream: a {kind} file is read whole; leave the option out, or save it as .h5ad first; {cells}"
        raise ConfigError(msg)
    if stream is not None:
        return stream
    if large := should_stream(cells):
        say(f"{cells.name} is large: its counts stay on disk (--in-memory loads them)", err=True)
    return large


@contextlib.contextmanager
def held(folder: Path, *, keep: bool) -> Iterator[None]:
    """Makes `folder` and keeps other runs from it: a lock that ends with the process, however it ends."""
    make(folder)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            msg = f"is in use by another run; {folder}; wait for its end, or choose another output"
            raise OutputError(msg) from error
        except OSError:  # some network disks know no locks
            pass
        try:
            yield
        finally:
            if not keep:
                with contextlib.suppress(OSError):  # it holds a checkpoint
                    folder.rmdir()
    finally:
        os.close(place)


def conclude(summary: list[str], written: list[Path], figures: Path | None) -> None:
    """Draws, and says what came out."""
    output = written[0]
    if figures is not None:
        try:
            written = [*written, *draw(output, figures)]
        except OutputError as error:
            error.add_note(f"The results are in {output}; for the page: diffbio report {shlex.quote(str(output))}")
            raise
    for line in summary:
        say(line)
    say("wrote " + ", ".join(str(path) for path in written))


def draw(results: Path, folder: Path) -> list[Path]:
    """Figures and the page of a file of results."""
    from ..data.read import read
    from ..report.figures import save_figures
    from ..report.page import write_report

    adata = read(results, backed=results.suffix == ".h5ad")
    return [*save_figures(adata, folder), write_report(adata, folder / PAGE)]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def make(folder: Path) -> None:
    """Makes a folder if it is not there."""
    if folder.is_file():
        msg = f"is a file; {folder}; choose another folder"
        raise OutputError(msg)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        msg = f"cannot be made ({error.strerror}); {folder}; choose another folder"
        raise OutputError(msg) from error
    if not writable:
        msg = f"cannot be written to; {folder}; choose another folder"
        raise OutputError(msg)


def settings_from(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        ConfigError: it is no mapping of names to values, or gives a name twice.
        InputFileError: it cannot be read.
    """
    from ..data.strict import strict_yaml

    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        msg = f"cannot be read ({error.strerror}); {path}; check the name after --config"
        raise InputFileError(msg) from error
    except UnicodeDecodeError as error:
        msg = f"{path} is not valid YAML: {error}"
        raise ConfigError(msg) from error
    found = strict_yaml(content, path, error=ConfigError, name="setting")
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        msg = f"{path}: expected lines such as 'n_clusters: 12', got {type(found).__name__}"
        raise ConfigError(msg)
    return found
