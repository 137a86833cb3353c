"""What `diffbio trajectory` does: velocity, pseudotime, fates, gene trends, transport between days."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, DataError, MissingKeyError
from .streams import progress

if TYPE_CHECKING:
    from anndata import AnnData

GENES_A_FATE = 2  # whose trends are drawn, where none are named
MOST_GENES = 12
CHOICES = {
    "method": ("dpt", "palantir"),
    "kernel": ("connectivity", "pseudotime", "velocity"),
    "velocity": ("steady_state", "stochastic", "dynamical", "none"),
}
KERNEL_OF_VELOCITY = {"velocity": 0.8, "connectivity": 0.2}  # as CellRank's tutorials


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Settings of one run; None leaves a choice to the functions of `tl`.

    root_type: group of cells that the process starts in; the root is the one farthest out.
    root_cell: name of the cell itself.
    label_key: column of `obs` with the groups; None is "cell_type", if it is there.
    terminal_types: groups that the process ends in; None looks for macrostates.
    method: of pseudotime, "dpt" or "palantir".
    kernel: of the chain, "connectivity", "pseudotime" or "velocity"; None takes velocity where there is some.
    velocity: "steady_state", "stochastic", "dynamical" or "none"; None is "steady_state" where both layers are there.
    n_macrostates: how many are looked for.
    time_key: column of `obs` with days: cells are also transported from day to day.
    genes: whose trends are drawn; None takes the strongest drivers of each fate.
    use_rep: key of `obsm`; None is a PCA.
    layer: of the counts.
    seed: of everything drawn at random.
    """

    root_type: str | None = None
    root_cell: str | None = None
    label_key: str | None = None
    terminal_types: tuple[str, ...] | None = None
    method: str | None = None
    kernel: str | None = None
    velocity: str | None = None
    n_macrostates: int | None = None
    time_key: str | None = None
    genes: tuple[str, ...] | None = None
    use_rep: str | None = None
    layer: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for option, choices in CHOICES.items():
            value = getattr(self, option)
            if value is not None and value not in choices:
                msg = f"--{option} must be {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}"
                raise ConfigError(msg)
        if self.root_type is None and self.root_cell is None and self.time_key is None:
            msg = "nothing to go by; name where the process starts with --root-type or --root-cell, or the column of "
            msg += "days with --time-key"
            raise ConfigError(msg)
        if self.root_type is not None and self.root_cell is not None:
            msg = "--root-type and --root-cell both say where the process starts; leave one of them out"
            raise ConfigError(msg)
        if not self.has_root:
            given: dict[str, Any] = {"--terminal-type": self.terminal_types, "--method": self.method}
            given |= {
                "--kernel": self.kernel,
                "--velocity": self.velocity,
                "--n-macrostates": self.n_macrostates,
                "--gene": self.genes,
            }
            for option, value in given.items():
                if value is not None:
                    msg = f"{option} is for pseudotime and fates; name a root with --root-type or --root-cell"
                    raise ConfigError(msg)
        if self.terminal_types is not None and self.n_macrostates is not None:
            msg = "--n-macrostates is for ends that are looked for; leave it out, or --terminal-type"
            raise ConfigError(msg)

    @property
    def has_root(self) -> bool:
        """Whether it is said where the process starts."""
        return self.root_type is not None or self.root_cell is not None


def along(cells: Path, asked: Asked, *, quiet: bool) -> tuple["AnnData", list[str]]:
    """The cells with all results, and what came out in words.

    Raises:
        DiffBioError: of the functions of `tl`, naming a column, group or setting.
    """
    from .. import pl, tl
    from ..data.read import read

    adata = read(cells)
    _check(adata, asked)  # a slip is said before the work
    groups = asked.label_key or ("cell_type" if "cell_type" in adata.obs else None)
    common: dict[str, Any] = {"layer": asked.layer, "random_state": asked.seed}
    lines: list[str] = []
    if asked.time_key is not None:
        progress(f"transporting cells along {asked.time_key}", quiet)
        found = tl.ot_trajectory(adata, asked.time_key, groupby=groups, use_rep=asked.use_rep, **common)
        lines.append(f"plans between {len(found.days)} days: uns['diffbio_ot']")
    if asked.has_root:
        _forget_fates(adata)
        moves, said = _velocity(adata, asked, common, quiet=quiet)
        lines += said
        if not pl.maps_of(adata):
            progress("drawing a map (umap)", quiet)
            tl.embed(adata, use_rep=asked.use_rep, **common)
        lines += _pseudotime(adata, asked, groups, common, quiet=quiet)
        lines += _fates(adata, asked, groups, common, moves=moves, quiet=quiet)
    return adata, lines


def _check(adata: "AnnData", asked: Asked) -> None:
    """Refuses names that the cells do not have."""
    columns = ", ".join(map(str, adata.obs.columns)) or "none"
    label = asked.label_key or "cell_type"
    needed = asked.label_key is not None or asked.root_type is not None or asked.terminal_types is not None
    if needed and label not in adata.obs:
        msg = f"obs has no column {label!r}; name that of the types with --label-key; it has {columns}"
        raise MissingKeyError(msg)
    for name in (asked.root_type, *(asked.terminal_types or ())):
        types = None if name is None else adata.obs[label].astype(str)
        if types is not None and not (types == name).any():
            msg = f"no cell has {label} {name!r}; there are {', '.join(sorted(types.unique())[:12])}"
            raise MissingKeyError(msg)
    wanted: dict[str, tuple[str | None, Any]] = {
        "--root-cell": (asked.root_cell, adata.obs_names),
        "--time-key": (asked.time_key, adata.obs),
    }
    wanted |= {"--use-rep": (asked.use_rep, adata.obsm)}
    wanted |= {f"--gene {gene}": (gene, adata.var_names) for gene in asked.genes or ()}
    for option, (name, there) in wanted.items():
        if name is not None and name not in there:
            msg = f"{option}: the file has no {name!r}; it has {', '.join(map(str, list(there)[:8]))}, ..."
            raise MissingKeyError(msg)


def _forget_fates(adata: "AnnData") -> None:
    """What an earlier run has left, and this one may not find."""
    from .. import slots

    adata.obsm.pop(slots.FATE_PROB, None)
    adata.obsm.pop(slots.MACROSTATE_PROB, None)
    adata.varm.pop(slots.DRIVER_GENES, None)
    adata.uns.pop(slots.GENE_TRENDS, None)
    if slots.MACROSTATE in adata.obs:
        obs: Any = adata.obs
        obs.drop(columns=slots.MACROSTATE, inplace=True)


def _velocity(adata: "AnnData", asked: Asked, common: dict[str, Any], *, quiet: bool) -> tuple[bool, list[str]]:
    """Whether there are velocities, and what came out."""
    from .. import slots, tl

    there = {"spliced", "unspliced"} <= set(adata.layers)
    mode = asked.velocity or ("steady_state" if there else "none")
    if mode == "none":
        if asked.kernel == "velocity":
            msg = "--kernel velocity needs velocities; leave out --velocity none, and give cells with layers 'spliced' "
            msg += "and 'unspliced'"
            raise ConfigError(msg)
        return False, []
    progress(f"velocities ({mode})", quiet)
    tl.velocity(adata, mode=mode, use_rep=asked.use_rep, **common)
    used = int(np.asarray(adata.var[slots.VELOCITY_GENES]).sum())
    confidence = float(np.nanmean(adata.obs[slots.VELOCITY_CONFIDENCE]))
    return True, [f"velocity of {used:,} genes, mean confidence {confidence:.2f}: layers[{slots.VELOCITY!r}]"]


def _pseudotime(
    adata: "AnnData", asked: Asked, groups: str | None, common: dict[str, Any], *, quiet: bool
) -> list[str]:
    from .. import pl, slots, tl

    progress("pseudotime", quiet)
    where: dict[str, Any] = {"root": asked.root_cell}
    if asked.root_type is not None:
        where = {"root_group": asked.root_type, "groupby": groups}
    tl.pseudotime(adata, method=asked.method or "dpt", use_rep=asked.use_rep, **where, **common)
    times = np.asarray(adata.obs[slots.PSEUDOTIME], float)
    lines = [f"pseudotime from {pl.record_of(adata, slots.PSEUDOTIME)['root_name']}: obs[{slots.PSEUDOTIME!r}]"]
    if apart := int(np.isinf(times).sum()):
        lines.append(f"{apart:,} cells are not connected with the root; their pseudotime is infinite")
    return lines


def _fates(
    adata: "AnnData", asked: Asked, groups: str | None, common: dict[str, Any], *, moves: bool, quiet: bool
) -> list[str]:
    from .. import slots, tl
    from ..tl.fate import fate_table

    progress("fates", quiet)
    kernel: Any = asked.kernel or (KERNEL_OF_VELOCITY if moves else "pseudotime")
    settings: dict[str, Any] = {"kernel": kernel, "random_state": asked.seed}
    if kernel != "velocity":
        settings |= {"use_rep": asked.use_rep, "layer": asked.layer}
    if asked.terminal_types is not None and groups is not None:
        tl.fate(adata, terminal_states=_ends(adata, groups, asked.terminal_types), **settings)
    else:
        try:
            tl.fate(adata, n_macrostates=asked.n_macrostates, groupby=groups, **settings)
        except (ConfigError, DataError) as error:  # the rest of the run stays of use
            return [f"no fates: {error}", "name the ends with --terminal-type"]
    shares = fate_table(adata, None, "diffbio trajectory")
    means = ", ".join(f"{name} {mean:.0%}" for name, mean in shares.mean().items())
    lines = [f"fates (mean probability): {means}: obsm[{slots.FATE_PROB!r}]"]
    if shares.shape[1] > 1:
        tl.driver_genes(adata, **common)
    genes = list(asked.genes or _strongest(adata))
    if genes:
        tl.gene_trends(adata, genes, **common)
        lines.append("trends of " + ", ".join(genes))
    return lines


def _ends(adata: "AnnData", groups: str, types: tuple[str, ...]) -> dict[str, list[str]]:
    """Names of the cells of each type that the process ends in."""
    column = adata.obs[groups].astype(str)
    return {name: [str(cell) for cell in adata.obs_names[column == name]] for name in types}


def _strongest(adata: "AnnData") -> list[str]:
    """Genes that go most with each fate."""
    from .. import slots
    from ..tl.fate import fate_table

    if slots.DRIVER_GENES not in adata.varm:
        return []
    table: Any = adata.varm[slots.DRIVER_GENES]
    names = [
        str(gene)
        for fate in fate_table(adata, None, "diffbio trajectory").columns
        for gene in table[f"{fate}_corr"].dropna().nlargest(GENES_A_FATE).index
    ]
    return list(dict.fromkeys(names))[:MOST_GENES]
