"""What the command line says, and how signals and warnings reach it."""

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from ..errors import DataWarning


def say(line: str, *, err: bool = False) -> None:
    """Prints a line; a reader that has gone away (`| head`) does not end the run."""
    stream = sys.stderr if err else sys.stdout
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        _abandon(stream)


def progress(what: str, quiet: bool) -> None:  # noqa: FBT001
    """Says on stderr what is going on, unless it is to be quiet."""
    if not quiet:
        say(f"{what} ...", err=True)


def _abandon(stream: Any) -> None:
    """Lets all further output of `stream` go nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def flush() -> None:
    """Writes out what is waiting; a reader that has gone away is no error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except BrokenPipeError:
            _abandon(stream)


def fail(message: str) -> None:
    """Prints an error as one line on stderr."""
    if message.startswith("error: "):
        message = message.removeprefix("error: ")
    say(f"error: {' '.join(message.split())}", err=True)


class Terminated(BaseException):
    """SIGTERM came while no training ran."""


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """SIGTERM raises, so that temporary files are removed on the way out."""

    def stop(_number: int, _frame: object) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def warnings_shown(*, debug: bool) -> Iterator[None]:
    """Shows warnings about the data as `warning: ...`, each once; others are for developers (--debug)."""
    said = set()

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, DataWarning):
            if str(message) in said:
                return
            said.add(str(message))
            say(f"warning: {' '.join(str(message).split())}", err=True)
        elif debug:
            say(warnings.formatwarning(message, category, *where[:2]).rstrip(), err=True)

    with warnings.catch_warnings():
        warnings.resetwarnings()  # PYTHONWARNINGS=error is meant for code under test
        warnings.simplefilter("default" if debug else "ignore")
        warnings.filterwarnings("always", category=DataWarning)
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turns a signal that comes outside a training loop into the error that one inside gives."""
    from ..errors import TrainingInterrupted

    try:
        yield
    except (KeyboardInterrupt, Terminated) as error:
        name, code = ("SIGTERM", 143) if isinstance(error, Terminated) else ("SIGINT", 130)
        msg = f"stopped by {name}; nothing was written."
        raise TrainingInterrupted(msg, code) from error
