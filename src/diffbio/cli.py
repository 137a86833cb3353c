"""The `diffbio` command line. Imports nothing heavy until a command needs it: `--help` answers at once."""

# ruff: noqa: FBT002 - switches are booleans, which typer reads from the signature

import contextlib
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from . import __version__
from .errors import ConfigError, DataWarning, DiffBioError, InputFileError, ModelFileError, OutputError

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Differentiable single-cell analysis: correct, embed and cluster cells.",
    epilog="Exit codes: 0 done, 1 internal error, 2 wrong usage or setting, 3 bad data, 4 unusable "
    "checkpoint or model, 5 cannot write, 6 out of memory, 7 training diverged, 130/143 interrupted.",
)  # fmt: skip

HEADER, PAGE = "model.json", "report.html"
SAVED = f"*/{HEADER}"  # in the folder of a checkpoint

AllowNonInteger = Annotated[
    bool, typer.Option("--allow-non-integer", help="Accept counts that are not whole numbers.")
]
Cells = Annotated[Path, typer.Argument(help="Counts: .h5ad, .zarr, 10x .h5, or a 10x folder.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The .h5ad or .zarr to write.")]
Figures = Annotated[Path | None, typer.Option(help="Folder for figures and report.html.")]
LabelKey = Annotated[str | None, typer.Option(help="Column of obs to compare the clusters with.")]
Layer = Annotated[str | None, typer.Option(help="Layer of the counts instead of X.")]
Normalized = Annotated[bool, typer.Option("--normalized", help="Also write the normalised layer.")]
Profile = Annotated[
    str | None, typer.Option(help="Column of var with the soup's gene fractions. [default: ambient_profile]")
]
Stream = Annotated[
    bool | None,
    typer.Option("--stream/--in-memory", help="Leave the counts on disk. [default: if they are large]"),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output file.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Do not show how training goes.")]


def main() -> NoReturn:
    """Runs the command line and exits."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Runs one command; returns its exit code. Errors become one line on stderr."""
    debug = "--debug" in arguments
    usage_error: Any = typer.BadParameter.__mro__[1]  # click's, which typer carries under a private name
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="replace"
            )  # a name in another alphabet must not end a run in a C locale
    try:
        with _signals(), _warnings(debug=debug):
            code = app(arguments, prog_name="diffbio", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except usage_error as error:
        _fail(f"{error.format_message()}; see diffbio {_command(arguments)}--help")
        return 2
    except (typer.Abort, KeyboardInterrupt, _Terminated) as error:
        code = 143 if isinstance(error, _Terminated) else 130
        _fail(f"stopped by {'SIGTERM' if code == 143 else 'SIGINT'}; nothing was written")
        return code
    except BaseException as error:
        if isinstance(error, SystemExit):
            return error.code if isinstance(error.code, int) else 1
        if debug:
            raise
        code, message = explain(error)
        _fail(message)
        return code
    finally:
        _flush()


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


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        say(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        say(context.get_help(), err=True)
        raise typer.Exit(2)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where to write; made if it is not there.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything drawn at random.")] = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Analyse 700 real blood cells, which an installed package carries, and draw the results."""
    from .data.datasets import pbmc68k
    from .data.write import write_results
    from .report.figures import DEMO_FILES

    strangers = (
        sorted(p.name for p in folder.iterdir() if p.name not in DEMO_FILES) if folder.is_dir() else []
    )
    if strangers:
        msg = f"holds {strangers[0]!r}, which the demo did not make; {folder}; name another folder"
        raise OutputError(msg)
    _make(folder)
    cells = folder / "cells.h5ad"
    write_results(pbmc68k(), cells, {}, overwrite=True)
    _run(
        cells,
        folder / "out.h5ad",
        {"label_key": "cell_type", "seed": seed},
        figures=folder,
        force=True,
        quiet=quiet,
    )
    say("now your own cells: diffbio run cells.h5ad -o out.h5ad --batch-key COLUMN --figures figures")


@app.command()
def run(
    cells: Cells,
    output: Output,
    batch_key: Annotated[str | None, typer.Option(help="Column of obs to correct for.")] = None,
    label_key: LabelKey = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; options on the line win.")
    ] = None,
    figures: Figures = None,
    layer: Layer = None,
    ambient_profile: Profile = None,
    n_top_genes: Annotated[
        int | None, typer.Option(min=0, help="Variable genes to use; 0 uses all. [default: 2000]")
    ] = None,
    n_clusters: Annotated[int | None, typer.Option(help="Number of clusters. [default: 10]")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the cells at most, in each stage.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Cells in a minibatch; fewer need less memory.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything drawn at random. [default: 0]")] = None,
    stream: Stream = None,
    normalized: Normalized = False,
    save_model: Annotated[
        Path | None, typer.Option(help="Folder for the fitted pipeline, for diffbio project.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder to save training in. [default: OUTPUT.checkpoint, removed at the end]"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace an existing output file; go on even with other settings."),
    ] = False,
    allow_non_integer: AllowNonInteger = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Correct, embed and cluster cells, and write them with the results to a new file."""
    settings = {} if config is None else settings_from(config)
    given = {
        "batch_key": batch_key, "label_key": label_key, "layer": layer, "ambient_profile": ambient_profile,
        "n_top_genes": n_top_genes, "n_clusters": n_clusters, "max_epochs": epochs, "batch_size": batch_size,
        "seed": seed, "allow_non_integer": allow_non_integer or None,
    }  # fmt: skip
    settings |= {name: value for name, value in given.items() if value is not None}
    if settings.get("n_top_genes") == 0:
        settings["n_top_genes"] = None
    _run(
        cells, output, settings, figures=figures, stream=stream, normalized=normalized, checkpoint=checkpoint,
        resume=resume, force=force, quiet=quiet, save_model=save_model,
    )  # fmt: skip


@app.command()
def project(
    cells: Cells,
    output: Output,
    model: Annotated[Path, typer.Option(help="Folder that diffbio run --save-model wrote.")],
    batch_key: Annotated[
        str | None, typer.Option(help="Column of obs with batches that the model was trained on.")
    ] = None,
    label_key: LabelKey = None,
    figures: Figures = None,
    layer: Layer = None,
    ambient_profile: Profile = None,
    stream: Stream = None,
    normalized: Normalized = False,
    force: Force = False,
    allow_non_integer: AllowNonInteger = False,
    debug: Debug = False,
) -> None:
    """Run new cells through a pipeline that was fitted to others, and write them with the results."""
    from .data.write import write_results

    _check_places(cells, output, figures, force=force)
    from .pipelines.projection import project as projected

    analysis = projected(
        cells, model, on_disk=_on_disk(cells, stream), batch_key=batch_key, label_key=label_key, layer=layer,
        ambient_profile=ambient_profile, allow_non_integer=allow_non_integer,
    )  # fmt: skip
    write_results(cells, output, analysis.results(normalized=normalized), overwrite=force)
    _conclude(analysis, [output], figures)


@app.command()
def report(
    file: Annotated[Path, typer.Argument(help="A file that diffbio run wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write a page about the results in a file: warnings, figures, settings, versions."""
    from .data.read import read
    from .report.page import has_results, write_report

    if output.exists() and not force:
        msg = f"exists; {output}; choose another name, or pass --force"
        raise OutputError(msg)
    adata = read(file, backed=file.suffix == ".h5ad")
    if not has_results(adata):
        msg = f"holds no results of diffbio; {file}; first: diffbio run {shlex.quote(str(file))} -o out.h5ad"
        raise InputFileError(msg)
    say(f"wrote {write_report(adata, output)}")


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="A .h5ad, .zarr, 10x .h5, or a 10x folder.")],
    debug: Debug = False,
) -> None:
    """Tell what is in a file: its size, layers, columns, and whether there are counts."""
    from .report.facts import facts_of

    for line in facts_of(file):
        say(line)


@app.command()
def doctor(debug: Debug = False) -> None:
    """Tell versions, devices and folders, for a bug report."""
    from .report.facts import facts_of_this_machine

    for line in facts_of_this_machine():
        say(line)


def settings_from(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        ConfigError: it is no mapping of names to values, or gives a name twice.
        InputFileError: it cannot be read.
    """
    from .data.strict import strict_yaml

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


def _run(
    cells: Path,
    output: Path,
    settings: dict[str, Any],
    *,
    figures: Path | None,
    stream: bool | None = None,
    normalized: bool = False,
    checkpoint: Path | None = None,
    resume: bool = False,
    force: bool = False,
    quiet: bool = False,
    save_model: Path | None = None,
) -> None:
    """Checks what can be checked, then analyses, writes and draws."""
    from .data.write import write_results

    _check_places(cells, output, figures, force=force)
    if checkpoint is not None:
        _make(checkpoint)
    if save_model is not None:
        _check_model(save_model, force=force)
    folder = checkpoint or output.with_name(f"{output.name}.checkpoint")
    if resume and not any(folder.glob(SAVED)):
        msg = f"no checkpoint to go on from; {folder}; leave out --resume, or name its folder with --checkpoint"
        raise ModelFileError(msg)
    from .errors import TrainingDivergedError, TrainingInterrupted
    from .pipelines.run import analyse, sorted_out
    from .pipelines.stages import forget

    sorted_out(settings)
    with _held(folder, keep=checkpoint is not None):
        try:
            with _told():
                analysis = analyse(
                    cells,
                    on_disk=_on_disk(cells, stream),
                    checkpoint=folder,
                    resume=resume,
                    force=force,
                    progress=not quiet,
                    **settings,
                )
                write_results(cells, output, analysis.results(normalized=normalized), overwrite=force)
                if save_model is not None:
                    analysis.pipeline.save(save_model)
        except (TrainingInterrupted, OutputError, TrainingDivergedError) as error:
            if any(folder.glob(SAVED)):
                # what diverged needs other settings, which a checkpoint takes only with --force
                options = ["--resume", "--force"] if isinstance(error, TrainingDivergedError) else ["--resume"]
                again = shlex.join(["diffbio", *(a for a in sys.argv[1:] if a not in options), *options])
                error.add_note(f"To go on: {again}")
            else:
                forget(folder)
            raise
        if checkpoint is None:
            forget(folder)
    _conclude(analysis, [output] if save_model is None else [output, save_model], figures)


@contextlib.contextmanager
def _held(folder: Path, *, keep: bool) -> Iterator[None]:
    """Makes `folder` and keeps other runs from it: a lock that ends with the process, however it ends."""
    _make(folder)
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


def _check_places(cells: Path, output: Path, figures: Path | None, *, force: bool) -> None:
    """What can be known of the places to write to before any work is done."""
    from .data.write import check_output

    if cells.exists() and output.exists() and cells.samefile(output):
        msg = f"is the input itself; {output}; choose another name for the output"
        raise OutputError(msg)
    check_output(output, force, n_bytes=_size(cells))
    if figures is None:
        return
    _make(figures)
    if (figures / PAGE).exists() and not force:
        msg = f"exists; {figures / PAGE}; choose another folder for the figures, or pass --force"
        raise OutputError(msg)


def _check_model(folder: Path, *, force: bool) -> None:
    if folder.exists() and not (force and (folder / HEADER).is_file()):
        fix = "or pass --force" if (folder / HEADER).is_file() else "it is no model"
        msg = f"exists; {folder}; choose another folder, {fix}"
        raise OutputError(msg)
    if not os.access(next(p for p in folder.absolute().parents if p.exists()), os.W_OK):
        msg = f"cannot be written to; {folder}; choose another folder"
        raise OutputError(msg)


def _on_disk(cells: Path, stream: bool | None) -> bool:  # noqa: FBT001
    """Whether the counts stay in the file: as told, else if they are large."""
    from .data.guard import sniff
    from .data.tables import should_stream

    if stream and (kind := sniff(cells)) not in ("h5ad", "zarr"):
        msg = f"--stream: a {kind} file is read whole; leave the option out, or save it as .h5ad first; {cells}"
        raise ConfigError(msg)
    if stream is not None:
        return stream
    if large := should_stream(cells):
        say(f"{cells.name} is large: its counts stay on disk (--in-memory loads them)", err=True)
    return large


def _conclude(analysis: Any, written: list[Path], figures: Path | None) -> None:
    """Draws, and says what came out."""
    output = written[0]
    if figures is not None:
        try:
            written = [*written, *_draw(output, figures)]
        except OutputError as error:
            error.add_note(f"The results are in {output}; for the page: diffbio report {shlex.quote(str(output))}")
            raise
    for line in analysis.summary():
        say(line)
    say("wrote " + ", ".join(str(path) for path in written))


def _draw(results: Path, folder: Path) -> list[Path]:
    from .data.read import read
    from .report.figures import save_figures
    from .report.page import write_report

    adata = read(results, backed=results.suffix == ".h5ad")
    return [*save_figures(adata, folder), write_report(adata, folder / PAGE)]


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _make(folder: Path) -> None:
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


def say(line: str, *, err: bool = False) -> None:
    """Prints a line; a reader that has gone away (`| head`) does not end the run."""
    stream = sys.stderr if err else sys.stdout
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        _abandon(stream)


def _abandon(stream: Any) -> None:
    """Lets all further output of `stream` go nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except BrokenPipeError:
            _abandon(stream)


def _fail(message: str) -> None:
    if message.startswith("error: "):
        message = message.removeprefix("error: ")
    say(f"error: {' '.join(message.split())}", err=True)


def _command(arguments: list[str]) -> str:
    names = {"demo", "run", "project", "report", "info", "doctor"}
    return f"{arguments[0]} " if arguments and arguments[0] in names else ""


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turns a signal that comes outside a training loop into the error that one inside gives."""
    from .errors import TrainingInterrupted

    try:
        yield
    except (KeyboardInterrupt, _Terminated) as error:
        name, code = ("SIGTERM", 143) if isinstance(error, _Terminated) else ("SIGINT", 130)
        msg = f"stopped by {name}; nothing was written."
        raise TrainingInterrupted(msg, code) from error


class _Terminated(BaseException):
    """SIGTERM came while no training ran."""


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM raises, so that temporary files are removed on the way out."""

    def stop(_number: int, _frame: object) -> None:
        raise _Terminated

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
def _warnings(*, debug: bool) -> Iterator[None]:
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


if __name__ == "__main__":
    main()
