"""What `diffbio run` does to the cells before the pipeline: calling, quality, doublets, imputation."""

import dataclasses
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .streams import progress

MITOCHONDRIAL = "MT-"  # what the names of mitochondrial genes start with, in man and, in any case, mouse


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps that were asked for.

    raw: file of all droplets; without a file of cells, the cells are called from it.
    quality: whether to weigh cells by library size, detected genes and mitochondrial share.
    doublets: method, "scrublet" or "solo"; None leaves it out.
    doublet_rate: share of the cells that is expected to be doublets; None is the default of `pp.doublets`.
    normalize: method, "shifted_log", "cpm" or "pearson_residuals"; None leaves it out.
    impute: method, "diffusion" or "transformer"; None leaves it out.
    drop_flagged: whether cells of low quality and predicted doublets are left out of the analysis and of the output.
    """

    raw: Path | None = None
    quality: bool = False
    doublets: str | None = None
    doublet_rate: float | None = None
    normalize: str | None = None
    impute: str | None = None
    drop_flagged: bool = False

    def __post_init__(self) -> None:
        known = {
            "doublets": ("scrublet", "solo"),
            "normalize": ("shifted_log", "cpm", "pearson_residuals"),
            "impute": ("diffusion", "transformer"),
        }
        for name, methods in known.items():
            method = getattr(self, name)
            if method is not None and method not in methods:
                msg = f"{name} must be {', '.join(map(repr, methods[:-1]))} or {methods[-1]!r}, got {method!r}."
                raise ConfigError(msg)
        if self.doublet_rate is not None and self.doublets is None:
            msg = "doublet_rate is for --doublets; name a method, scrublet or solo."
            raise ConfigError(msg)
        if self.drop_flagged and not (self.quality or self.doublets):
            msg = "drop_flagged needs something that flags cells: --quality, --doublets, or both."
            raise ConfigError(msg)

    @classmethod
    def among(cls, settings: dict[str, Any]) -> "Steps":
        """Takes the steps out of the settings of a run; the soup of the droplets stays among these."""
        names = {field.name for field in dataclasses.fields(cls)} - {"raw"}
        given = {name: settings.pop(name) for name in names & set(settings)}
        for name in ("quality", "drop_flagged"):
            if not isinstance(given.get(name, False), bool):
                msg = f"{name} must be true or false, got {given[name]!r}."
                raise ConfigError(msg)
        raw = settings.get("raw")
        if raw is not None:
            settings["raw"] = str(raw)
        return cls(raw=None if raw is None else Path(raw), **given)

    @property
    def in_memory(self) -> bool:
        """Whether any of them needs all counts in memory."""
        return self.quality or any(m is not None for m in (self.doublets, self.normalize, self.impute))


@dataclasses.dataclass
class Ready:
    """Cells that went through the steps."""

    data: Any  # AnnData, or the path that was given if no step changed anything
    lines: list[str]  # what came out, for the user


def through(cells: Path | None, steps: Steps, *, on_disk: bool, settings: dict[str, Any], quiet: bool) -> Ready:
    """Runs the steps on a file of cells, or on the cells that are called from all droplets.

    Raises:
        ConfigError: a step needs the counts in memory, and they were to stay on disk.
    """
    if on_disk and (steps.in_memory or cells is None):
        msg = "--quality, --doublets, --normalize, --impute and calling cells need the counts in memory; "
        msg += "pass --in-memory, or run without these steps"
        raise ConfigError(msg)
    if cells is not None and not steps.in_memory:
        return Ready(cells, [])
    if settings.get("allow_non_integer"):
        msg = "--quality, --doublets, --normalize, --impute and calling cells read whole counts; leave them out, or "
        msg += "leave out --allow-non-integer"
        raise ConfigError(msg)
    if cells is None and settings.get("layer") is not None:
        msg = "--layer names counts of cells; cells are called from X of the droplets: leave it out"
        raise ConfigError(msg)
    from .. import pp, slots
    from ..data.read import read

    lines: list[str] = []
    if cells is None:
        assert steps.raw is not None
        adata = read(steps.raw)
        progress("calling cells among the droplets", quiet)
        pp.call_cells(adata, random_state=settings.get("seed", 0))
        n_droplets = adata.n_obs
        adata = adata[adata.obs[slots.IS_CELL].to_numpy()].copy()
        lines.append(f"{adata.n_obs:,} of {n_droplets:,} droplets hold a cell")
    else:
        adata = read(cells)
    common = {"layer": settings.get("layer"), "random_state": settings.get("seed", 0)}
    flagged = None
    more: dict[str, Any]
    if steps.quality:
        progress("weighing cells by their quality", quiet)
        known = adata.var_names.str.upper().str.startswith(MITOCHONDRIAL).any()
        if not known:
            lines.append(f"no gene's name starts with {MITOCHONDRIAL}: quality is by counts and detected genes alone")
        pp.quality(adata, mitochondrial=MITOCHONDRIAL if known else None, batch_key=settings.get("batch_key"), **common)
        flagged = ~adata.obs[slots.QUALITY_PASS].to_numpy()
        lines.append(f"{int(flagged.sum()):,} of {adata.n_obs:,} cells are of low quality")
    if steps.doublets is not None:
        progress(f"scoring doublets ({steps.doublets})", quiet)
        more = {} if steps.doublet_rate is None else {"expected_rate": steps.doublet_rate}
        if steps.doublets == "solo":
            more |= {"max_epochs": settings.get("max_epochs"), "progress": not quiet}
        pp.doublets(adata, method=steps.doublets, batch_key=settings.get("batch_key"), **more, **common)
        double = adata.obs[slots.PREDICTED_DOUBLET].to_numpy()
        lines.append(f"{int(double.sum()):,} of {adata.n_obs:,} cells are predicted doublets")
        flagged = double if flagged is None else flagged | double
    if flagged is not None and steps.drop_flagged:
        if flagged.all():
            msg = "every cell is flagged, so none would be left; run without --drop-flagged and look at the figures"
            raise ConfigError(msg)
        adata = adata[~flagged].copy()
        lines.append(f"left out: {int(flagged.sum()):,} flagged cells; {adata.n_obs:,} remain")
    elif flagged is not None and flagged.any():
        lines.append("flagged cells were kept; --drop-flagged leaves them out")
    if steps.normalize is not None:
        pp.normalize(adata, method=steps.normalize, layer=settings.get("layer"))
        lines.append(f"layers[{slots.NORMALIZED!r}] holds {steps.normalize} values")
    if steps.impute is not None:
        progress(f"imputing ({steps.impute})", quiet)
        genes = None if settings.get("n_top_genes", 2000) is None else _chosen(adata, settings)
        if steps.impute == "diffusion":
            more = {"batch_key": settings.get("batch_key")}  # batches are not averaged into each other
        else:
            more = {"max_epochs": settings.get("max_epochs")}
        pp.impute(adata, method=steps.impute, genes=genes, progress=not quiet, **more, **common)
        n_genes = adata.n_vars if genes is None else len(genes)
        place = "layers" if genes is None else "obsm"
        lines.append(f"{place}[{slots.IMPUTED!r}] holds imputed counts of {n_genes:,} genes")
    return Ready(adata, lines)


def _chosen(adata: Any, settings: dict[str, Any]) -> list[str]:
    """Names of the variable genes that the pipeline will use."""
    from .. import pp, slots

    wanted = settings.get("n_top_genes", 2000)
    if wanted >= adata.n_vars:
        return list(adata.var_names)
    pp.highly_variable(adata, n_top_genes=wanted, batch_key=settings.get("batch_key"), layer=settings.get("layer"))
    return list(adata.var_names[adata.var[slots.VARIABLE].to_numpy()])
