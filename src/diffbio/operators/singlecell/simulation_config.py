"""Settings of the simulator: Splatter's parameters under their names, and what is added to them."""

import dataclasses
from typing import Any

from ...errors import ConfigError
from ..base import Config, nonnegative, one_of, positive, setting


def _each(value: Any, holds: Any) -> bool:
    return all(holds(x) for x in (value if isinstance(value, tuple) else (value,)))


def probability(default: Any) -> Any:
    """A config field strictly between 0 and 1 (each entry, for a tuple): its logit is a parameter."""
    return setting(default, "strictly between 0 and 1", lambda v: _each(v, lambda x: 0 < x < 1))


def share(default: Any) -> Any:
    """A config field in [0, 1); 0 leaves the part out."""
    return setting(default, "in [0, 1)", lambda v: 0 <= v < 1)


def weights() -> Any:
    """A config field of positive weights that sum to 1, or None for equal ones."""
    return setting(None, "positive and sum to 1", lambda v: all(x > 0 for x in v) and abs(sum(v) - 1) < 1e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulationConfig(Config):
    """Settings of `DifferentiableSimulator`; names and defaults are Splatter's, where it has them.

    Where a tuple is allowed it has one value per group (or path), per batch for `batch_fac_*`.

    n_cells: simulated by a call without `cell_ids` and `counts`.
    n_genes: number of genes.
    n_groups: groups, or paths if `path_from` is given.
    n_batches: batches.
    gene_values: "drawn": a gene's mean comes from the gamma law, its noise from the BCV trend, as in Splatter. "kept":
        each gene has parameters of its own (mean, dispersion, factor in every group), so that `init_from` makes
        simulated gene j the copy of real gene j; they start as a draw.
    mean_shape: shape of the gamma law of gene means.
    mean_rate: its rate.
    out_prob: share of outlier genes, whose mean is a factor times the median; 0 for none.
    out_fac_loc: mean of the log of that factor.
    out_fac_scale: its standard deviation.
    lib_loc: mean of log library sizes (of library sizes, if `lib_norm`).
    lib_scale: their standard deviation.
    lib_norm: library sizes are normal, not log-normal.
    group_prob: shares of the groups; None is equal.
    de_prob: share of genes that change in a group (or along a path).
    de_down_prob: share of these that go down.
    de_fac_loc: mean of the log factor.
    de_fac_scale: its standard deviation.
    path_from: a number for each path: 0 starts at the origin, k at the end of path k (1 is the first); None simulates
        groups.
    path_n_steps: steps of a path's Brownian bridge; cells lie at any place between.
    path_skew: in (0, 1); 0.5 spreads cells evenly, more puts them near the start.
    path_nonlinear_prob: share of genes that leave the straight line.
    path_sigma_fac: how far, the bridge's standard deviation in log factors.
    batch_prob: shares of the batches; None is equal.
    batch_fac_loc: mean of the log of a batch's factor on a gene.
    batch_fac_scale: its standard deviation.
    batch_rm_effect: leaves the effect out and all other draws as they are: the truth to correct to.
    bcv_common: biological coefficient of variation of genes of high mean.
    bcv_df: degrees of freedom of its spread over genes.
    dropout_type: what has a midpoint of its own: "none" is no dropout, "experiment" one for all.
    dropout_mid: log mean at which half of the counts are lost; a tuple for "batch", "group" or "cell" (there the cell
        of number i takes entry i modulo its length).
    dropout_shape: slope of the logistic; below 0, genes of low mean lose more.
    doublet_prob: share of droplets with two cells.
    ambient_fraction: median share of a cell's molecules that comes from the ambient soup; 0 for none.
    ambient_scale: standard deviation over cells of its logit.
    n_programs: continuous programmes, each a standard normal activity per cell times loadings of genes: correlation
        of genes beyond groups.
    program_scale: standard deviation of the loadings as they are drawn.
    relaxation: temperature of the relaxed choices (group, batch, doublet) in `expected_counts`; 0+ is a hard choice.
    """

    n_cells: int = positive(500)
    n_genes: int = positive(200)
    n_groups: int = positive(3)
    n_batches: int = positive(1)
    gene_values: str = one_of("drawn", "kept")
    mean_shape: float = positive(0.6)
    mean_rate: float = positive(0.3)
    out_prob: float = share(0.05)
    out_fac_loc: float = 4.0
    out_fac_scale: float = positive(0.5)
    lib_loc: float = positive(11.0)
    lib_scale: float = positive(0.2)
    lib_norm: bool = False
    group_prob: tuple[float, ...] | None = weights()
    de_prob: float | tuple[float, ...] = probability(0.1)
    de_down_prob: float | tuple[float, ...] = probability(0.5)
    de_fac_loc: float | tuple[float, ...] = 0.1
    de_fac_scale: float | tuple[float, ...] = positive(0.4)
    path_from: tuple[int, ...] | None = None
    path_n_steps: int = setting(100, ">= 2", lambda v: v >= 2)
    path_skew: float | tuple[float, ...] = probability(0.5)
    path_nonlinear_prob: float | tuple[float, ...] = probability(0.1)
    path_sigma_fac: float | tuple[float, ...] = positive(0.8)
    batch_prob: tuple[float, ...] | None = weights()
    batch_fac_loc: float | tuple[float, ...] = 0.1
    batch_fac_scale: float | tuple[float, ...] = positive(0.1)
    batch_rm_effect: bool = False
    bcv_common: float = positive(0.1)
    bcv_df: float = positive(60.0)
    dropout_type: str = one_of("none", "experiment", "batch", "group", "cell")
    dropout_mid: float | tuple[float, ...] = 0.0
    dropout_shape: float = -1.0
    doublet_prob: float = share(0.0)
    ambient_fraction: float = share(0.0)
    ambient_scale: float = positive(0.5)
    n_programs: int = nonnegative(0)
    program_scale: float = positive(0.3)
    relaxation: float = positive(0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("group_prob", "de_prob", "de_down_prob", "de_fac_loc", "de_fac_scale"):
            self._has_length(name, self.n_groups, "n_groups")
        for name in ("path_from", "path_skew", "path_nonlinear_prob", "path_sigma_fac"):
            self._has_length(name, self.n_groups, "n_groups")
        for name in ("batch_prob", "batch_fac_loc", "batch_fac_scale"):
            self._has_length(name, self.n_batches, "n_batches")
        self._check_paths()
        self._check_dropout()
        self._needs("n_batches > 1", self.n_batches > 1, "batch_prob", "batch_fac_loc", "batch_fac_scale",
                    "batch_rm_effect")  # fmt: skip
        self._needs("n_groups > 1 or path_from", self.n_groups > 1 or self.path_from is not None, "group_prob",
                    "de_prob", "de_down_prob", "de_fac_loc", "de_fac_scale")  # fmt: skip
        self._needs("out_prob > 0", self.out_prob > 0, "out_fac_loc", "out_fac_scale")
        self._needs("ambient_fraction > 0", self.ambient_fraction > 0, "ambient_scale")
        self._needs("n_programs > 0", self.n_programs > 0, "program_scale")

    def _check_paths(self) -> None:
        self._needs("path_from", self.path_from is not None, "path_n_steps", "path_skew", "path_nonlinear_prob",
                    "path_sigma_fac")  # fmt: skip
        if self.path_from is None:
            return
        if any(not 0 <= start <= k for k, start in enumerate(self.path_from)):
            msg = (
                "SimulationConfig.path_from must name for each path 0 or an earlier path, the first being 1; "
                f"got {self.path_from}."
            )
            raise ConfigError(msg)
        if self.gene_values == "kept":
            msg = "SimulationConfig.path_from goes with gene_values='drawn': groups found in data have no order."
            raise ConfigError(msg)

    def _check_dropout(self) -> None:
        self._needs("a dropout_type", self.dropout_type != "none", "dropout_mid", "dropout_shape")
        if self.dropout_type in ("batch", "group", "cell"):
            length = {"batch": self.n_batches, "group": self.n_groups, "cell": None}[self.dropout_type]
            if not isinstance(self.dropout_mid, tuple) or (length is not None and len(self.dropout_mid) != length):
                size = "" if length is None else f"of length {length} "
                msg = (
                    f"SimulationConfig.dropout_mid must be a tuple {size}with dropout_type={self.dropout_type!r}; "
                    f"got {self.dropout_mid!r}."
                )
                raise ConfigError(msg)
        elif isinstance(self.dropout_mid, tuple):
            msg = f"SimulationConfig.dropout_mid must be one number with dropout_type={self.dropout_type!r}."
            raise ConfigError(msg)

    def _has_length(self, name: str, length: int, wanted: str) -> None:
        value = getattr(self, name)
        if isinstance(value, tuple) and len(value) != length:
            msg = f"SimulationConfig.{name} must have {wanted} = {length} values, got {len(value)}."
            raise ConfigError(msg)

    def _needs(self, what: str, given: bool, *names: str) -> None:  # noqa: FBT001
        """Refuses settings that would do nothing."""
        for field in dataclasses.fields(self):
            if field.name in names and not given and getattr(self, field.name) != field.default:
                msg = f"SimulationConfig.{field.name} does nothing without {what}."
                raise ConfigError(msg)
