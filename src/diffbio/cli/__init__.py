"""The `diffbio` command line."""

import sys
from typing import Any, NoReturn

import typer

from ..errors import DiffBioError
from .commands import app
from .places import settings_from as settings_from
from .streams import Terminated as Terminated
from .streams import fail, flush, signals, warnings_shown


def main() -> NoReturn:
    """Runs the command line and exits."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Runs one command; returns its exit code. Errors become one line on stderr."""
    debug = "--debug" in arguments
    usage_error: Any = typer.BadParameter.__mro__[1]  # click's, which typer carries under a private name
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a name in another alphabet must not end a run in a C locale
    try:
        with signals(), warnings_shown(debug=debug):
            code = app(arguments, prog_name="diffbio", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except usage_error as error:
        fail(f"{error.format_message()}; see diffbio {_command(arguments)}--help")
        return 2
    except (typer.Abort, KeyboardInterrupt, Terminated) as error:
        code = 143 if isinstance(error, Terminated) else 130
        fail(f"stopped by {'SIGTERM' if code == 143 else 'SIGINT'}; nothing was written")
        return code
    except BaseException as error:
        if isinstance(error, SystemExit):
            return error.code if isinstance(error.code, int) else 1
        if debug:
            raise
        code, message = explain(error)
        fail(message)
        return code
    finally:
        flush()


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and one-line message for an error."""
    parts = [str(error), *getattr(error, "__notes__", [])]
    text = " ".join(". ".join([*(p.rstrip(".") for p in parts[:-1]), parts[-1]]).split()) or type(error).__name__
    if isinstance(error, DiffBioError):
        return error.exit_code, text
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        return 6, (
            f"out of memory ({text[:160]}); pass a smaller --batch-size, fewer genes (--n-top-genes), or "
            "--stream to leave the counts on disk"
        )
    if isinstance(error, OSError):
        where = f"; {error.filename}" if error.filename else ""
        return 5, f"{error.strerror or text}{where}; free space, or choose another place"
    return 1, (
        f"internal error, {type(error).__name__}: {text[:300]}; this is a fault of diffbio; run again with "
        "--debug and report the traceback with the output of diffbio doctor"
    )


def _command(arguments: list[str]) -> str:
    names = {getattr(command.callback, "__name__", "") for command in app.registered_commands}
    return f"{arguments[0]} " if arguments and arguments[0] in names else ""
