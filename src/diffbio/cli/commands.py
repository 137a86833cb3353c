"""The commands. They import nothing heavy until they run: `--help` answers at once."""

# ruff: noqa: FBT002 - switches are booleans, which typer reads from the signature

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import ConfigError, InputFileError, ModelFileError, OutputError
from .gradients import gradients
from .options import (
    AllowNonInteger,
    Cells,
    Debug,
    Figures,
    Force,
    LabelKey,
    Layer,
    Normalized,
    Output,
    Profile,
    Quiet,
    Stream,
)
from .places import HEADER, check_model, check_places, conclude, held, make, on_disk, settings_from
from .steps import Steps, through
from .streams import say, told
from .trajectory import trajectory

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Differentiable single-cell analysis: correct, embed, cluster and annotate cells.",
    epilog="Exit codes: 0 done, 1 internal error, 2 wrong usage or setting, 3 bad data, 4 unusable "
    "checkpoint or model, 5 cannot write, 6 out of memory, 7 training diverged, 130/143 interrupted.",
)  # fmt: skip

SAVED = f"*/{HEADER}"  # in the folder of a checkpoint


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
    from ..data.datasets import pbmc68k
    from ..data.write import write_results
    from ..report.figures import DEMO_FILES

    strangers = sorted(p.name for p in folder.iterdir() if p.name not in DEMO_FILES) if folder.is_dir() else []
    if strangers:
        msg = f"holds {strangers[0]!r}, which the demo did not make; {folder}; name another folder"
        raise OutputError(msg)
    make(folder)
    cells = folder / "cells.h5ad"
    write_results(pbmc68k(), cells, {}, overwrite=True)
    run_pipeline(
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
    output: Output,
    cells: Annotated[
        Path | None,
        typer.Argument(help="Counts: .h5ad, .zarr, 10x .h5, or a 10x folder. [default: called from --raw]"),
    ] = None,
    batch_key: Annotated[str | None, typer.Option(help="Column of obs to correct for.")] = None,
    label_key: LabelKey = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; options on the line win.")] = None,
    figures: Figures = None,
    layer: Layer = None,
    ambient_profile: Profile = None,
    raw: Annotated[
        Path | None, typer.Option(help="Counts of all droplets: the soup is removed; without CELLS, cells are called.")
    ] = None,
    quality: Annotated[
        bool | None, typer.Option("--quality", help="First weigh cells by depth, genes and mitochondrial share.")
    ] = None,
    doublets: Annotated[str | None, typer.Option(help="First score doublets: scrublet or solo.")] = None,
    doublet_rate: Annotated[
        float | None, typer.Option(help="Share of doublets to expect among the cells. [default: 0.06]")
    ] = None,
    normalize: Annotated[
        str | None, typer.Option(help="Also write normalised counts: shifted_log, cpm or pearson_residuals.")
    ] = None,
    impute: Annotated[str | None, typer.Option(help="Also write imputed counts: diffusion or transformer.")] = None,
    drop_flagged: Annotated[
        bool | None, typer.Option("--drop-flagged", help="Leave out cells of low quality and predicted doublets.")
    ] = None,
    n_top_genes: Annotated[
        int | None, typer.Option(min=0, help="Variable genes to use; 0 uses all. [default: 2000]")
    ] = None,
    integration: Annotated[
        str | None, typer.Option(help="Of the batches: harmony, mmd, wgan, or scvi (VAE alone). [default: harmony]")
    ] = None,
    embedding: Annotated[str | None, typer.Option(help="Map of the cells: umap or phate. [default: umap]")] = None,
    clustering: Annotated[str | None, typer.Option(help="kmeans or communities. [default: kmeans]")] = None,
    n_clusters: Annotated[int | None, typer.Option(help="Number of clusters of kmeans. [default: 10]")] = None,
    resolution: Annotated[
        float | None, typer.Option(help="Of communities: more finds more of them. [default: 1]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the cells at most, in each stage.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Cells in a minibatch; fewer need less memory.")] = None,
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
        "integration": integration, "embedding": embedding, "clustering": clustering, "resolution": resolution,
        "seed": seed, "allow_non_integer": allow_non_integer or None, "raw": raw, "quality": quality,
        "doublets": doublets, "doublet_rate": doublet_rate, "normalize": normalize, "impute": impute,
        "drop_flagged": drop_flagged,
    }  # fmt: skip
    settings |= {name: value for name, value in given.items() if value is not None}
    if settings.get("n_top_genes") == 0:
        settings["n_top_genes"] = None
    run_pipeline(
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
    from ..data.write import write_results

    check_places(cells, output, figures, force=force)
    from ..pipelines.projection import project as projected

    analysis = projected(
        cells, model, on_disk=on_disk(cells, stream), batch_key=batch_key, label_key=label_key, layer=layer,
        ambient_profile=ambient_profile, allow_non_integer=allow_non_integer,
    )  # fmt: skip
    write_results(cells, output, analysis.results(normalized=normalized), overwrite=force)
    conclude(analysis.summary(), [output], figures)


@app.command()
def annotate(
    cells: Cells,
    output: Output,
    reference: Annotated[
        Path | None, typer.Option(help="Annotated cells to learn from. [default: the labelled cells of CELLS]")
    ] = None,
    labels_key: Annotated[
        str | None,
        typer.Option(help="Column of obs with the types; of CELLS, too, if it is there, to compare with."),
    ] = None,
    markers: Annotated[
        Path | None, typer.Option(help="Marker genes by type: .csv, .tsv, .yaml, .json or .gmt.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Folder that --save-model wrote.")] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="celltypist, cellassign or scanvi. [default: celltypist, with --markers cellassign]"),
    ] = None,
    unlabeled_category: Annotated[str, typer.Option(help="Value of labels-key of cells without a type.")] = "Unknown",
    batch_key: Annotated[str | None, typer.Option(help="Column of obs to correct for, in mode scanvi.")] = None,
    other: Annotated[
        str | None, typer.Option(help="With --markers: name of one more type, of cells with the markers of none.")
    ] = None,
    min_confidence: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Cells of lower confidence are called unassigned.")
    ] = 0.0,
    min_probability: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Types of lower probability are not called. [default: 0; multi-label 0.5]"),
    ] = None,
    multi_label: Annotated[
        bool, typer.Option("--multi-label", help="Mode celltypist: a cell may be called several types.")
    ] = False,
    majority_voting: Annotated[
        bool, typer.Option("--majority-voting", help="Groups of like cells take their commonest type.")
    ] = False,
    over_clustering: Annotated[
        str | None, typer.Option(help="Column of obs with these groups. [default: found]")
    ] = None,
    min_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of a group that its commonest type must have.")
    ] = 0.0,
    n_top_genes: Annotated[
        int | None, typer.Option(min=0, help="Genes to train on; 0 uses all. [default: by mode]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the cells at most.")] = None,
    save_model: Annotated[Path | None, typer.Option(help="Folder for the trained annotator.")] = None,
    figures: Figures = None,
    layer: Layer = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything drawn at random.")] = 0,
    stream: Stream = None,
    force: Force = False,
    allow_non_integer: AllowNonInteger = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say which type every cell is: by annotated cells, by marker genes, or by a saved model."""
    from ..data.write import write_results

    check_places(cells, output, figures, force=force)
    if save_model is not None:
        check_model(save_model, force=force)
    from ..annotation import Calling
    from ..annotation import annotate as annotated
    from ..data.tables import tables_of

    calling = Calling(
        min_confidence=min_confidence, min_probability=min_probability, multi_label=multi_label,
        majority_voting=majority_voting, over_clustering=over_clustering, min_share=min_share,
    )  # fmt: skip
    found = annotated(
        cells, mode=mode, reference=reference, labels_key=labels_key, markers=markers, model=model,
        unlabeled_category=unlabeled_category, batch_key=batch_key, other=other, n_top_genes=n_top_genes,
        max_epochs=epochs, calling=calling, layer=layer, on_disk=on_disk(cells, stream), seed=seed,
        allow_non_integer=allow_non_integer, progress=not quiet,
    )  # fmt: skip
    results = found.results(tables_of(cells).obs, seed=seed)
    if save_model is not None:
        found.save(save_model)
    write_results(cells, output, results, overwrite=force)
    conclude(found.summary(results), [output] if save_model is None else [output, save_model], figures)


app.command()(trajectory)
app.command()(gradients)


@app.command()
def models(
    folder: Annotated[Path, typer.Argument(help="A model's folder, or one that holds several.")] = Path(),
    debug: Debug = False,
) -> None:
    """Tell which models lie in a folder: what kind, which types and genes, trained on what."""
    from ..report.models import described

    for line in described(folder):
        say(line)


@app.command()
def report(
    file: Annotated[Path, typer.Argument(help="A file that diffbio run wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write a page about the results in a file: warnings, figures, settings, versions."""
    from ..data.read import read
    from ..report.page import has_results, write_report

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
    from ..report.facts import facts_of

    for line in facts_of(file):
        say(line)


@app.command()
def doctor(debug: Debug = False) -> None:
    """Tell versions, devices and folders, for a bug report."""
    from ..report.facts import facts_of_this_machine

    for line in facts_of_this_machine():
        say(line)


def run_pipeline(
    cells: Path | None,
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
    """Checks what can be checked, goes through the steps before the pipeline, then analyses, writes and draws."""
    from ..data.write import write_results

    steps = Steps.among(settings)
    if steps.normalize is not None and normalized:
        msg = "--normalize and --normalized write one layer; leave out --normalized (the VAE's), or the other"
        raise ConfigError(msg)
    first = cells if cells is not None else steps.raw
    if first is None:
        msg = "no cells; give a file of cells, or with --raw that of all droplets, from which cells are called"
        raise InputFileError(msg)
    check_places(first, output, figures, force=force)
    if checkpoint is not None:
        make(checkpoint)
    if save_model is not None:
        check_model(save_model, force=force)
    folder = checkpoint or output.with_name(f"{output.name}.checkpoint")
    if resume and not any(folder.glob(SAVED)):
        msg = f"no checkpoint to go on from; {folder}; leave out --resume, or name its folder with --checkpoint"
        raise ModelFileError(msg)
    from ..errors import TrainingDivergedError, TrainingInterrupted
    from ..pipelines.run import analyse, sorted_out
    from ..pipelines.stages import forget

    sorted_out(settings)
    with held(folder, keep=checkpoint is not None):
        try:
            with told():
                left = on_disk(first, stream) if cells is not None and not steps.in_memory else bool(stream)
                ready = through(cells, steps, on_disk=left, settings=settings, quiet=quiet)
                analysis = analyse(
                    ready.data,
                    on_disk=left,
                    checkpoint=folder,
                    resume=resume,
                    force=force,
                    progress=not quiet,
                    **settings,
                )
                analysis.record["input"] = first.name
                write_results(ready.data, output, analysis.results(normalized=normalized), overwrite=force)
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
    conclude(ready.lines + analysis.summary(), [output] if save_model is None else [output, save_model], figures)
