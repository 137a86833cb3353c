"""Simulated counts of single cells by the Splat model, with a gradient to every parameter."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ...errors import ConfigError, DataError
from ...math import splat
from ...math.count_sampling import gamma_draws, poisson_draws, thinned
from ...math.splat_estimates import KNOTS, estimate_kept, estimate_splat
from ...math.splat_fit import Moments, entry_moments, statistics_distance
from ..base import Data, Operator, axes, checked_counts, checked_finite
from .simulation_config import SimulationConfig as SimulationConfig

POSITIVE = frozenset({
    "mean_shape", "mean_rate", "out_fac_scale", "lib_scale", "de_fac_scale", "path_sigma_fac", "batch_fac_scale",
    "bcv_common", "bcv_df", "ambient_scale",
})  # fmt: skip
PROBABILITIES = frozenset({
    "out_prob", "de_prob", "de_down_prob", "path_skew", "path_nonlinear_prob", "doublet_prob", "ambient_fraction"
})  # fmt: skip
LOWEST = 1e-7  # of a uniform draw: its logarithm is finite


class SimulatedCells(TypedDict):
    """What `DifferentiableSimulator` adds."""

    counts: Int[Array, "cells genes"]
    expected_counts: Float[Array, "cells genes"]  # mean of the counts before the gamma noise, choices relaxed
    cell_means: Float[Array, "cells genes"]  # mean of the Poisson law that the counts were drawn from, choices hard
    group_labels: Int[Array, " cells"]  # group or path; of a doublet, that of its first cell
    batch_labels: Int[Array, " cells"]
    doublets: Bool[Array, " cells"]
    library_size: Float[Array, " cells"]  # expected total, before dropout; of a doublet, of both its cells
    path_position: Float[Array, " cells"]  # from 0, start of the cell's path, to 1; with `path_from`
    gene_means: Float[Array, " genes"]  # in Splatter's units: before scaling to the library size
    de_factors: Float[Array, "groups genes"]  # of a path, at its end
    de_mask: Bool[Array, "groups genes"]  # genes of another mean than at the origin
    batch_factors: Float[Array, "batches genes"]


class Genes(NamedTuple):
    """What all cells of a data set share, in logs."""

    means: Float[Array, " genes"]
    ends: Float[Array, "groups genes"]
    table: Float[Array, "paths steps genes"] | None
    batches: Float[Array, "batches genes"]
    loadings: Float[Array, "programs genes"]
    noise: Float[Array, " genes"]  # spread of the BCV trend, or a dispersion of each gene's own
    soup: Float[Array, " genes"]  # shares of genes in the ambient RNA


class Cells(NamedTuple):
    """What is drawn for each cell; two of a kind where a droplet may hold two cells."""

    groups: list[tuple[Array, Array]]  # labels, relaxed weights
    batch: tuple[Array, Array]
    positions: list[Array]
    normals: Float[Array, "cells draws"]
    is_doublet: tuple[Array, Array]


class Entries(NamedTuple):
    """The law of every count: Gamma(shape) noise of mean `own`, plus `soup`, Poisson, kept with probability `keep`."""

    own: Float[Array, "cells genes"]
    soup: Float[Array, "cells genes"]
    shape: Float[Array, "cells genes"]
    library: Float[Array, " cells"]


class DifferentiableSimulator(Operator):
    """Draws counts x ~ Poisson(Gamma(mean_ig, BCV_ig)), mean_ig = L_i p_ig, by Splatter's model (Zappia 2017).

    p_ig is the share of gene g: its mean (gamma law with outliers) times factors of cell i's batch, group or place on
    a path, and continuous programmes, scaled to sum to 1. L_i is the library size. Doublets add a second cell, ambient
    RNA replaces a share of the molecules, dropout loses counts, more of low means.

    A cell is a function of a key and its number (`cell_ids`): cells 1000 to 2000 are the same however they are asked
    for, and a data set of any size comes in pieces (`diffbio.data.write_simulated`). In eval mode the key is the one
    the operator was made with; in train mode each call draws a new data set. With `counts`, simulated cell i gets the
    total of real cell i, its twin; with `library_size`, that.

    Gradients reach every parameter through `expected_counts` and the other smooth outputs:
      gene means with outliers, DE and batch factors, BCV spread: quantiles at fixed uniforms, so the derivative is the
        implicit one, unbiased, of `out_prob`, `de_prob` and `de_down_prob` too;
      library sizes, bridges, programmes, ambient share: location and scale of normals; path positions: a quantile;
      group, batch, doublet, and whether a gene leaves its path's line: relaxed (Gumbel-softmax, binary concrete) at
        temperature `relaxation`, biased by as much; `counts`, `cell_means` and labels take the hard choice;
      dropout: its probability at the mean, no draw;
      gamma noise: `cell_means` carries the implicit derivative of the gamma law (Figurnov 2018);
      Poisson: `counts` are whole numbers without a gradient.
    `objective` compares moments, where the Poisson and the gamma noise are summed exactly.

    `init_from` estimates the parameters from counts: Splatter's way (`gene_values="drawn"`), or a mean, dispersion and
    group factors for each gene, from clusters of cells ("kept"). `diffbio.fit` goes on by gradient, until means,
    variances, zeros, library sizes and correlations match. Differences from Splatter: bridges are of log factors;
    positions on paths are continuous; outliers are scaled from the median of the law, not of the draw.
    """

    config: SimulationConfig
    init_cells: ClassVar[int | None] = 4000
    fit_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 10, "batch_size": 500, "learning_rate": 3e-3, "patience": 5
    }  # fmt: skip
    rough_out: ClassVar[dict[str, str]] = {
        "cell_means": "a rejection sampler's path is not smooth; the implicit gradient is right in expectation"
    }

    def __init__(self, config: SimulationConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.fitted = False
        self.start_seed = nnx.BatchStat(jax.random.randint(rngs.params(), (), 0, 2**31 - 1))
        self.noise = rngs.fork()
        kept = config.gene_values == "kept"
        splatters: dict[str, Any] = {
            "mean_shape": config.mean_shape, "mean_rate": config.mean_rate, "lib_loc": config.lib_loc,
            "lib_scale": config.lib_scale, "bcv_common": config.bcv_common, "bcv_df": config.bcv_df,
        }  # fmt: skip
        if config.out_prob > 0:
            splatters |= {"out_prob": config.out_prob, "out_fac_loc": config.out_fac_loc,
                          "out_fac_scale": config.out_fac_scale}  # fmt: skip
        if self._has_factors:
            splatters |= {"de_prob": config.de_prob, "de_down_prob": config.de_down_prob,
                          "de_fac_loc": config.de_fac_loc, "de_fac_scale": config.de_fac_scale}  # fmt: skip
        others: dict[str, Any] = {}
        if config.path_from is not None:
            others |= {"path_skew": config.path_skew, "path_nonlinear_prob": config.path_nonlinear_prob,
                       "path_sigma_fac": config.path_sigma_fac}  # fmt: skip
        if config.n_batches > 1:
            others |= {"batch_fac_loc": config.batch_fac_loc, "batch_fac_scale": config.batch_fac_scale}
        if config.dropout_type != "none":
            others |= {"dropout_mid": config.dropout_mid, "dropout_shape": config.dropout_shape}
        if config.doublet_prob > 0:
            others |= {"doublet_prob": config.doublet_prob}
        if config.ambient_fraction > 0:
            others |= {"ambient_fraction": config.ambient_fraction, "ambient_scale": config.ambient_scale}
        if config.n_groups > 1:
            others["group_logits"] = np.log(config.group_prob or np.full(config.n_groups, 1 / config.n_groups))
        if config.n_batches > 1:
            others["batch_logits"] = np.log(config.batch_prob or np.full(config.n_batches, 1 / config.n_batches))
        self.raw = nnx.Dict({name: nnx.Param(_free(name, v)) for name, v in (splatters | others).items()})
        if config.n_programs:
            draws = jax.random.normal(rngs.params(), (config.n_programs, config.n_genes))
            self.raw["loadings"] = nnx.Param(config.program_scale * draws)
        if kept:
            self._keep(splatters)

    @property
    def _has_factors(self) -> bool:
        return self.config.n_groups > 1 or self.config.path_from is not None

    def _keep(self, splatters: Mapping[str, Any]) -> None:
        """Parameters of each gene in place of the laws of genes and libraries, of which they are a draw."""
        genes = self._genes(self._key())
        normals = jax.scipy.special.ndtri((jnp.arange(KNOTS) + 0.5) / KNOTS)
        log_library = jnp.log(self._library(normals)[0])
        bcv = (self.value("bcv_common") + jnp.exp(-genes.means / 2)) * jnp.exp(genes.noise)
        for name in splatters:
            del self.raw[name]
        self.raw["log_gene_means"] = nnx.Param(genes.means)
        self.raw["log_dispersions"] = nnx.Param(2 * jnp.log(bcv))
        self.raw["log_libraries"] = nnx.Param(jnp.tile(log_library, (self.config.n_groups, 1)))
        if self.config.n_groups > 1:
            self.raw["log_group_factors"] = nnx.Param(genes.ends)

    def value(self, name: str) -> Array:
        """The parameter `name` in its own units (Splatter's), differentiable."""
        raw = self.raw[name][...]
        if name in POSITIVE:
            return jnp.exp(raw)
        return jax.nn.sigmoid(raw) if name in PROBABILITIES else raw

    def values(self) -> dict[str, np.ndarray]:
        """All parameters in their own units."""
        return {name: np.asarray(self.value(name)) for name in self.raw}

    def set_values(self, values: Mapping[str, Any]) -> None:
        """Sets parameters, given in their own units; names that this simulator does not have are left out.

        Raises:
            ConfigError: a value is out of its range, or not of the parameter's shape; nothing is set.
        """
        given = {name: value for name, value in values.items() if name in self.raw}
        for name, value in given.items():
            _check_value(name, np.asarray(value), self.raw[name][...].shape)
        for name, value in given.items():
            like = self.raw[name][...]
            self.raw[name][...] = jnp.broadcast_to(_free(name, value), like.shape).astype(like.dtype)

    def __call__(
        self,
        counts: Float[Array, "cells genes"] | None = None,
        cell_ids: Int[Array, " cells"] | None = None,
        library_size: Float[Array, " cells"] | None = None,
    ) -> SimulatedCells:
        """Simulates `config.n_cells` cells, or those of the numbers `cell_ids`, or a twin for each of `counts`."""
        library = library_size
        if counts is not None:
            counts = checked_counts("DifferentiableSimulator", counts)
            library = counts.sum(axis=1) if library is None else library
        if library_size is not None:
            checked_finite("DifferentiableSimulator", library_size, key="library_size", lowest=0.0)
        if cell_ids is None:
            cell_ids = jnp.arange(self.config.n_cells if library is None else len(library))
        return self.simulate(self._key(), cell_ids, library)

    def simulate(self, key: Array, cell_ids: Int[Array, " cells"], library: Array | None = None) -> SimulatedCells:
        """Cells `cell_ids` of the data set that belongs to `key`; of these `library` totals, if given."""
        return self._drawn(self._genes(key), key, cell_ids, library)

    def pieces(self, n_cells: int, *, chunk: int = 1024, seed: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Cells 0 to n_cells as numpy arrays, `chunk` at a time: what `SimulatedCells` has a row per cell of.

        All but the two float matrices; what belongs to genes is in the first piece too.

        Args:
            n_cells: in all.
            chunk: cells at a time; the cells do not depend on it.
            seed: of the data set; None is the operator's own, whose cells a call in eval mode gives.
        """
        key = jax.random.key(self.start_seed[...] if seed is None else seed)
        graph, state = nnx.split(self)
        genes = _made_genes(graph, state, key)
        for start in range(0, n_cells, chunk):
            # the last piece has the size of all others, so that nothing is compiled twice
            found = _made_cells(graph, state, genes, key, jnp.arange(start, start + min(chunk, n_cells)))
            kept = min(chunk, n_cells - start)
            by_cell = {name for name in found if axes(self.provides[name])[0] == "cells"}
            yield {
                name: np.asarray(value)[:kept] if name in by_cell else np.asarray(value)
                for name, value in found.items()
                if start == 0 or name in by_cell
            }

    def _drawn(self, genes: Genes, key: Array, cell_ids: Array, library: Array | None) -> SimulatedCells:
        keys = _per_cell(jax.random.fold_in(key, 1), cell_ids)
        cells = self._cells(keys)
        relaxed = self._entries(genes, cells, library, hard=False)
        hard = self._entries(genes, cells, library, hard=True)
        labels, batches = cells.groups[0][0], cells.batch[0]
        means = hard.own * gamma_draws(_part(keys, 2), hard.shape) / hard.shape
        drawn = poisson_draws(_part(keys, 3), means + hard.soup)
        if self.config.dropout_type != "none":
            lost = self._dropout(means + hard.soup, cell_ids, labels, batches)
            drawn = thinned(_part(keys, 4), drawn, 1 - lost)
        out: dict[str, Array] = {
            "counts": drawn,
            "expected_counts": self._kept_mean(relaxed, cells, cell_ids),
            "cell_means": means + hard.soup,
            "group_labels": labels,
            "batch_labels": batches,
            "doublets": cells.is_doublet[0],
            "library_size": relaxed.library,
            "path_position": cells.positions[0] if cells.positions else jnp.zeros_like(relaxed.library),
            "gene_means": jnp.exp(genes.means),
            "de_factors": jnp.exp(genes.ends),
            "de_mask": genes.ends != 0,
            "batch_factors": jnp.exp(genes.batches),
        }
        return {key: out[key] for key in self.provided()}  # type: ignore[return-value]

    def provided(self) -> dict[str, Any]:
        """`path_position` only where there are paths."""
        left_out = {"path_position"} if self.config.path_from is None else set()
        return {key: hint for key, hint in type(self).provides.items() if key not in left_out}

    def _fixed_axes(self) -> dict[str, int]:
        """The number of cells is that of the inputs, `n_cells` where there are none."""
        return {axis: size for axis, size in super()._fixed_axes().items() if axis != "cells"}

    def _key(self) -> Array:
        return self.noise.noise() if self.training else jax.random.key(self.start_seed[...])

    def _genes(self, key: Array) -> Genes:
        """Draws what belongs to genes."""
        config = self.config
        g, k, b = config.n_genes, config.n_groups, config.n_batches
        dtype = jax.tree.leaves(nnx.state(self.raw))[0].dtype
        keys = jax.random.split(jax.random.fold_in(key, 0), 7)

        def uniforms(i: int, *shape: int) -> Array:
            return jax.random.uniform(keys[i], shape, dtype, LOWEST, 1.0)

        if config.gene_values == "kept" and "log_gene_means" in self.raw:
            means, noise = self.value("log_gene_means"), self.value("log_dispersions")
            ends = self.value("log_group_factors") if k > 1 else jnp.zeros((1, g), dtype)
        else:
            means, noise = self._drawn_means(uniforms(0, g), uniforms(1, g))
            ends = None
        drawn, batches = self._factors(uniforms(2, k, g) if ends is None else None, uniforms(5, b, g))
        ends = drawn if ends is None else ends
        table = None if config.path_from is None else self._paths(ends, keys[3], uniforms(4, k, g))
        if table is not None:
            ends = table[:, -1]
        loadings = self.value("loadings") if config.n_programs else jnp.zeros((0, g), dtype)
        shares = jax.nn.softmax(means + ends, axis=-1)
        weights = jax.nn.softmax(self.value("group_logits")) if k > 1 else jnp.ones(1, dtype)
        return Genes(means, ends, table, batches, loadings, noise, weights @ shares)

    def _drawn_means(self, u: Array, u_noise: Array) -> tuple[Array, Array]:
        """Log of gene means, and of sqrt(df / chi²_df), the spread of the BCV; one call finds all gamma quantiles."""
        shape, rate, half = self.value("mean_shape"), self.value("mean_rate"), self.value("bcv_df") / 2
        outliers = self.config.out_prob > 0
        first = jnp.full((1,), 0.5, u.dtype) if outliers else u
        shapes = jnp.concatenate([jnp.broadcast_to(shape, first.shape), jnp.broadcast_to(half, u_noise.shape)])
        found = splat.log_gamma_quantiles(jnp.concatenate([first, u_noise]), shapes)
        noise = (jnp.log(half) - found[len(first) :]) / 2
        if not outliers:
            return found[: len(first)] - jnp.log(rate), noise
        means = splat.log_gene_means(
            u, shape=shape, rate=rate, log_median=found[0], out_prob=self.value("out_prob"),
            out_loc=self.value("out_fac_loc"), out_scale=self.value("out_fac_scale"),
        )  # fmt: skip
        return means, noise

    def _factors(self, u_groups: Array | None, u_batches: Array) -> tuple[Array, Array]:
        """Log factors of groups (none without uniforms for them) and of batches; one call finds all quantiles."""
        laws: list[tuple[Array, ...]] = []
        if u_groups is not None and self._has_factors:
            names = ("de_prob", "de_down_prob", "de_fac_loc", "de_fac_scale")
            laws.append((u_groups, *(self.value(name) for name in names)))
        if len(u_batches) > 1:
            one = jnp.ones((), u_batches.dtype)
            laws.append((u_batches, one, one / 2, self.value("batch_fac_loc"), self.value("batch_fac_scale")))
        groups = jnp.zeros_like(u_batches[:0] if u_groups is None else u_groups)
        batches = jnp.zeros_like(u_batches)
        if not laws:
            return groups, batches
        rows = [[jnp.broadcast_to(value, len(law[0]))[:, None] for value in law[1:]] for law in laws]
        prob, down, loc, scale = (jnp.concatenate(column) for column in zip(*rows, strict=True))
        found = splat.log_factors(jnp.concatenate([law[0] for law in laws]), prob=prob, down=down, loc=loc, scale=scale)
        if u_groups is not None and self._has_factors:
            groups, found = found[: len(u_groups)], found[len(u_groups) :]
        if len(u_batches) > 1 and not self.config.batch_rm_effect:
            batches = found
        return groups, batches

    def _paths(self, ends: Array, key: Array, u: Array) -> Array:
        config = self.config
        assert config.path_from is not None
        _, leaves = splat.gate(u, self._column("path_nonlinear_prob"), config.relaxation)
        noise = jax.random.normal(key, (config.path_n_steps - 1, *ends.shape), ends.dtype)
        return splat.path_table(ends, config.path_from, sigma=self._column("path_sigma_fac") * leaves, noise=noise)

    def _column(self, name: str) -> Array:
        """A parameter with one value, or as a column with one for each group or batch."""
        value = self.value(name)
        return value[:, None] if value.ndim else value

    def _cells(self, keys: Array) -> Cells:
        """Draws what belongs to cells."""
        config = self.config
        dtype = jax.tree.leaves(nnx.state(self.raw))[0].dtype
        k, b = config.n_groups, config.n_batches
        n_kinds = 2 if config.doublet_prob > 0 else 1
        n_uniform, n_normal = n_kinds * (k + 1) + b + 1, 3 + n_kinds * config.n_programs

        def draw(key: Array) -> tuple[Array, Array]:
            first, second = jax.random.split(key)
            return (jax.random.uniform(first, (n_uniform,), dtype, LOWEST, 1.0),
                    jax.random.normal(second, (n_normal,), dtype))  # fmt: skip

        uniform, normals = jax.vmap(draw)(_part(keys, 1))
        gumbel = -jnp.log(-jnp.log(jnp.clip(uniform, LOWEST, 1 - LOWEST)))

        def chosen(start: int, size: int, name: str) -> tuple[Array, Array]:
            logits = self.value(name) if size > 1 else jnp.zeros(1, dtype)
            return splat.choice(gumbel[:, start : start + size], logits, config.relaxation)

        groups = [chosen(j * k, k, "group_logits") for j in range(n_kinds)]
        batch = chosen(n_kinds * k, b, "batch_logits")
        places = uniform[:, n_kinds * k + b :]
        positions = []
        if config.path_from is not None:
            skew = self.value("path_skew")
            for j, (labels, _) in enumerate(groups):
                positions.append(splat.path_position(places[:, j], skew[labels] if skew.ndim else skew))
        nobody = (jnp.zeros(len(keys), bool), jnp.zeros(len(keys), dtype))
        doublet = nobody
        if config.doublet_prob > 0:
            u = jnp.clip(places[:, -1], LOWEST, 1 - LOWEST)
            doublet = splat.gate(u, self.value("doublet_prob"), config.relaxation)
        return Cells(groups, batch, positions, normals, doublet)

    def _entries(self, genes: Genes, cells: Cells, library: Array | None, *, hard: bool) -> Entries:
        """The law of every count, with hard or relaxed choices."""
        config, picked = self.config, 0 if hard else 1
        r = config.n_programs
        log_batch = _picked(genes.batches, cells.batch[picked])
        totals = self._library(cells.normals[:, :1], [group[picked] for group in cells.groups], cells.normals[:, 1:2])
        shares = []
        for j, group in enumerate(cells.groups):
            activity = cells.normals[:, 3 + j * r : 3 + (j + 1) * r]
            state = self._state(genes, group[picked], cells.positions[j] if cells.positions else None)
            program = activity @ genes.loadings - (genes.loadings**2).sum(axis=0) / 2  # of mean 1
            shares.append(jax.nn.softmax(genes.means + log_batch + state + program, axis=-1))
        second = cells.is_doublet[picked].astype(genes.means.dtype) if config.doublet_prob > 0 else None
        if library is not None:
            library = library.astype(genes.means.dtype)
            mixed = shares[0] if second is None else (shares[0] + second[:, None] * shares[1]) / (1 + second[:, None])
            own, total = library[:, None] * mixed, library
        elif second is None:
            own, total = totals[0][:, None] * shares[0], totals[0]
        else:
            extra = second * totals[1]
            own, total = totals[0][:, None] * shares[0] + extra[:, None] * shares[1], totals[0] + extra
        soup = jnp.zeros_like(own)
        if config.ambient_fraction > 0:
            logit = self.raw["ambient_fraction"][...] + self.value("ambient_scale") * cells.normals[:, 2]
            part = jax.nn.sigmoid(logit)[:, None]
            own, soup = (1 - part) * own, part * total[:, None] * genes.soup
        if config.gene_values == "kept":
            shape = jnp.broadcast_to(jnp.exp(-genes.noise), own.shape)
        else:
            shape = splat.trend_shape(own, self.value("bcv_common"), jnp.exp(genes.noise))
        return Entries(own, soup, shape, total)

    def _state(self, genes: Genes, group: Array, position: Array | None) -> Array:
        """Log factors of the cells' groups, or places on paths; `group` holds labels or weights."""
        if genes.table is None or position is None:
            return _picked(genes.ends, group)
        if group.ndim == 1:
            group = jax.nn.one_hot(group, len(genes.table), dtype=position.dtype)
        paths = [group[:, k : k + 1] * splat.along(path, position) for k, path in enumerate(genes.table)]
        return functools.reduce(jnp.add, paths)

    def _library(self, normals: Array, groups: list[Array] | None = None, again: Array | None = None) -> list[Array]:
        """Library sizes of the first and second cells of droplets."""
        draws = [normals if normals.ndim == 1 else normals[:, 0]]
        if again is not None and groups is not None and len(groups) > 1:
            draws.append(again[:, 0])
        if "log_libraries" not in self.raw:
            loc, scale = self.value("lib_loc"), self.value("lib_scale")
            if self.config.lib_norm:
                return [jnp.maximum(loc + scale * z, 1.0) for z in draws]
            return [jnp.exp(loc + scale * z) for z in draws]
        assert groups is not None
        table = self.value("log_libraries")
        totals = []
        for z, group in zip(draws, groups, strict=True):
            place = jnp.clip(jax.scipy.special.ndtr(z) * KNOTS - 0.5, 0.0, KNOTS - 1.0)
            knot = jnp.clip(jax.lax.stop_gradient(place).astype(int), 0, KNOTS - 2)
            part = place - knot
            if group.ndim == 1:
                low, high = table[group, knot], table[group, knot + 1]
            else:
                low, high = (group * table[:, knot].T).sum(-1), (group * table[:, knot + 1].T).sum(-1)
            totals.append(jnp.exp((1 - part) * low + part * high))
        return totals

    def _dropout(self, mean: Array, cell_ids: Array, group: Array, batch: Array) -> Array:
        """Probability that a count is lost; `group` and `batch` hold labels or weights."""
        mid, kind = self.value("dropout_mid"), self.config.dropout_type
        if kind in ("group", "batch"):
            mid = _picked(mid[:, None], group if kind == "group" else batch)
        elif kind == "cell":
            mid = mid[cell_ids % len(mid)][:, None]
        return splat.dropout_probability(mean, mid, self.value("dropout_shape"))

    def _kept_mean(self, entries: Entries, cells: Cells, cell_ids: Array) -> Array:
        mean = entries.own + entries.soup
        return mean * (1 - self._lost(mean, cells, cell_ids))

    def _lost(self, mean: Array, cells: Cells, cell_ids: Array) -> Array | float:
        if self.config.dropout_type == "none":
            return 0.0
        return self._dropout(mean, cell_ids, cells.groups[0][1], cells.batch[1])

    def moments(self, key: Array, cell_ids: Int[Array, " cells"]) -> Moments:
        """Mean, variance and probability of zero of every count given its cell, choices relaxed."""
        cells = self._cells(_per_cell(jax.random.fold_in(key, 1), cell_ids))
        entries = self._entries(self._genes(key), cells, None, hard=False)
        lost = self._lost(entries.own + entries.soup, cells, cell_ids)
        return entry_moments(entries.own, entries.soup, entries.shape, lost)

    def objective(self, data: Data) -> tuple[Array, dict[str, Array]]:
        """How far simulated statistics are from those of `data["counts"]`; see `statistics_distance`.

        As many cells are simulated as there are real ones; new ones in each call in train mode.
        """
        counts = self._read("counts", data)
        self._check_axes({"counts": counts})
        key = self._key()
        simulated = self.moments(key, jnp.arange(len(counts)))
        normals = jax.random.normal(jax.random.fold_in(key, 2), (len(counts),), counts.dtype)
        terms = statistics_distance(simulated, counts, normals, genes_match=self.config.gene_values == "kept")
        return sum(terms.values()), terms  # type: ignore[return-value]

    def init_from(self, data: Data) -> None:
        """Estimates the parameters from `data["counts"]`; what cannot be seen in counts keeps its value.

        Drawn genes: Splatter's own estimates (splatEstimate), of gene means, library sizes, outliers, BCV and dropout.
        Kept genes: those of `estimate_kept`.

        Raises:
            DataError: counts are missing, or too few cells or genes have any.
        """
        counts = np.asarray(checked_counts("DifferentiableSimulator", self._read("counts", data)))
        self._check_axes({"counts": jnp.asarray(counts)})
        used = counts.sum(axis=1) > 0
        if used.sum() < 2 or (counts.sum(axis=0) > 0).sum() < 2:
            msg = "DifferentiableSimulator: data['counts'] needs two cells and two genes with counts to estimate from."
            raise DataError(msg)
        config, seed = self.config, int(self.start_seed[...])
        if config.gene_values == "kept":
            self.set_values(estimate_kept(counts[used], config.n_groups, config.n_programs, seed=seed))
        else:
            self.set_values(estimate_splat(counts[used], lib_norm=config.lib_norm))
        self.fitted = True

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableSimulator", Data]]:
        """Two branching paths with everything that can happen to counts, and genes that keep their values."""
        counts = jax.random.poisson(jax.random.key(2), jnp.exp(jax.random.normal(jax.random.key(3), (12, 10)) + 1.0))
        data: Data = {"counts": counts.astype(jnp.float32), "cell_ids": jnp.arange(12) * 3 + 5}
        everything = SimulationConfig(
            n_cells=9, n_genes=10, n_groups=2, n_batches=2, lib_loc=6.0, out_prob=0.2, de_prob=0.5, path_from=(0, 1),
            path_n_steps=5, path_nonlinear_prob=0.5, group_prob=(0.4, 0.6), batch_prob=(0.3, 0.7),
            dropout_type="batch", dropout_mid=(1.0, 0.5), doublet_prob=0.3, ambient_fraction=0.1, n_programs=1,
            relaxation=0.7,
        )  # fmt: skip
        kept = SimulationConfig(n_cells=9, n_genes=10, n_groups=2, lib_loc=5.0, gene_values="kept", n_programs=1)
        return {
            "paths": (cls(everything, rngs=nnx.Rngs(0)), data),
            "kept genes": (cls(kept, rngs=nnx.Rngs(0)), data),
        }


@functools.partial(jax.jit, static_argnums=0)
def _made_genes(graph: Any, state: Any, key: Array) -> Genes:
    op: DifferentiableSimulator = nnx.merge(graph, state)
    return op._genes(key)


@functools.partial(jax.jit, static_argnums=0)
def _made_cells(graph: Any, state: Any, genes: Genes, key: Array, ids: Array) -> dict[str, Array]:
    """One piece; what only relaxed choices need is not computed."""
    op: DifferentiableSimulator = nnx.merge(graph, state)
    found: dict[str, Any] = dict(op._drawn(genes, key, ids, None))
    return {name: value for name, value in found.items() if name not in ("expected_counts", "cell_means")}


def _check_value(name: str, value: np.ndarray, shape: tuple[int, ...]) -> None:
    low = 0.0 if name in POSITIVE | PROBABILITIES else -np.inf
    high = 1.0 if name in PROBABILITIES else np.inf
    if not ((low < value) & (value < high)).all():
        msg = f"DifferentiableSimulator: {name} must lie strictly between {low:g} and {high:g}, got {value}."
        raise ConfigError(msg)
    fits = [size in (1, wanted) for size, wanted in zip(value.shape[::-1], shape[::-1], strict=False)]
    if len(value.shape) > len(shape) or not all(fits):
        msg = f"DifferentiableSimulator: {name} must have the shape {shape}, got {value.shape}."
        raise ConfigError(msg)


def _free(name: str, value: Any) -> Array:
    """A parameter as it is stored: the logarithm of a positive one, the logit of a probability."""
    array = jnp.asarray(value, jnp.result_type(float))
    if name in POSITIVE:
        return jnp.log(array)
    return jnp.log(array) - jnp.log1p(-array) if name in PROBABILITIES else array


@jax.jit
def _per_cell(key: Array, cell_ids: Array) -> Array:
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(cell_ids)


@jax.jit
def _part(keys: Array, part: Any) -> Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, part))(keys)


def _picked(table: Float[Array, "options genes"], choice: Array) -> Float[Array, "cells genes"]:
    """Rows of `table` by label, or their mix by weights."""
    return table[choice] if choice.ndim == 1 else choice @ table
