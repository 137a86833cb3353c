"""How well the gradient of a loss passes through each part of a chain."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..data.source import Source
from ..errors import ConfigError
from ..fitting import source_for
from ..operators.base import Operator, axes, mode_of
from ..train import batch_of, dense_on_device, split
from .chain import Chain
from .chain_cells import read_by
from .chain_stages import REFERENCE_CELLS
from .inference import in_memory
from .joining import Part, Wire
from .single_cell import SingleCellPipeline
from .terms import Own, Term, balanced

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

DEAD, EXPLODING = 1e-6, 1e3  # gains of a part from its outputs to its inputs that are called so
COLUMNS = ("parameters", "out", "into", "gain", "condition", "silent", "signal_to_noise", "agreement", "verdict")

Tree = dict[str, Any]


def gradients(
    chain: Operator,
    data: "Mapping[str, Any] | AnnData | str | Path | Source",
    *,
    keys: Mapping[str, str] | None = None,
    batch_size: int = 128,
    n_batches: int = 8,
    n_probes: int = 32,
    seed: int = 0,
) -> "pd.DataFrame":
    """Measures, for every part, the gradient of the chain's loss that passes through it.

    The loss is `chain.objective`, in eval mode, where it has one, else the mean square of the last part's smooth
    outputs. Of a pipeline it is the sum of the own objectives of its parts; graph clustering is no part.

    Args:
        chain: a `Chain`, a `SingleCellPipeline`, or any operator; it is not changed.
        data: as of `diffbio.fit`.
        keys: as of `diffbio.fit`.
        batch_size: cells in a minibatch; all, where there are fewer.
        n_batches: minibatches that are compared.
        n_probes: random directions in a part's outputs whose gradients into its inputs tell its conditioning.
        seed: of minibatches and probes.

    Returns:
        A row for each part, in order. `parameters`: their number. `out`: norm of the loss' gradient at the outputs of
        the part, mean over minibatches (0: no loss reads what it gives). `into`: the same at its inputs, after it has
        passed. `gain`: the root mean square, over the probes, of the norm at the inputs of a unit gradient at the
        outputs of a cell. `condition`: the largest singular value of the map from those directions to the inputs, over
        `gain`: 1 where all directions pass alike, sqrt(k) where one of k does; of all the directions of a cell where
        they are at most n_probes, else of as many at random, which tells less.
        `silent`: share of the input columns that get no gradient from
        any probe or minibatch. `signal_to_noise`: norm of the mean, over minibatches, of the gradient of the
        parameters (of a part without, at its inputs summed over cells), over the root mean square of the deviations
        from it. `agreement`: mean cosine between pairs of those. `verdict`: "not finite", "dead" (gain below 1e-6),
        "exploding" (above 1e3), "partly silent" (over half of the columns), "noisy" (signal_to_noise below
        2 / sqrt(n_batches): the mean is less than twice what noise alone would make it), else "ok".

    Raises:
        ConfigError: fewer than 2 minibatches, or data that holds row numbers of cells and more cells than batch_size.
        MissingKeyError, DataError: the data does not fit.
    """
    import pandas as pd

    if n_batches < 2 or batch_size < 1 or n_probes < 2:
        msg = f"gradients: n_batches {n_batches} and n_probes {n_probes} must be >= 2, batch_size {batch_size} >= 1."
        raise ConfigError(msg)
    whole = as_chain(chain)
    source = source_for(whole, data, keys)
    source = in_memory(source, REFERENCE_CELLS, seed=seed) if placed_in(whole) else source
    size = min(batch_size, source.n_cells)
    numbered = sorted(whole.cell_numbers & set(source.keys))
    if (numbered or whole.names_cells) and size < source.n_cells:
        who = f"data[{numbered[0]!r}] holds" if numbered else "a part's config has"
        msg = f"gradients: {who} row numbers of cells, which minibatches of {size} do not keep; pass "
        msg += f"batch_size={source.n_cells}: all cells, of which every minibatch is then the same."
        raise ConfigError(msg)
    rng = np.random.default_rng(seed)
    batches = [batch_of(source, rows) for rows in minibatches(whole, source, rng, size, n_batches)]
    with mode_of(whole, training=False):
        graph, params, rest = split(whole)
    run = jax.jit(lambda params, batch: _measured(graph, params, rest, dense_on_device(batch)))
    found = [jax.device_get(run(params, batch)) for batch in batches]

    def probe(params: Any, batch: Any, key: jax.Array) -> dict[str, jax.Array]:
        fresh = nnx.merge(graph, params, rest, copy=True)
        return probed_by_part(fresh, dense_on_device(batch), key, n_probes)

    probed = jax.device_get(jax.jit(probe)(params, batches[0], jax.random.key(seed)))
    rows = {wire.name: _row(wire.name, whole[wire.name], found, probed[wire.name]) for wire in whole.wires}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS))


def minibatches(chain: Chain, source: Source, rng: np.random.Generator, size: int, number: int) -> list[np.ndarray]:
    """Rows of random cells; pairs of neighbours for a part whose objective reads heads and tails (UMAP)."""
    placed = placed_in(chain)
    if not placed:
        return [np.sort(rng.choice(source.n_cells, size, replace=False)) for _ in range(number)]
    sampler: Any = chain[placed[0]].sampler(read_by(chain, source, placed[0]))  # type: ignore[attr-defined]
    rows: list[np.ndarray] = []
    while len(rows) < number:
        rows += list(sampler.order(rng, max(4, size // 2 * 2)))
    return rows[:number]


def placed_in(chain: Chain) -> list[str]:
    """Parts whose objective is a loss, and reads a minibatch by place."""
    return [term.part for term in chain.terms if isinstance(term, Own) and chain[term.part].batches_by_place]


def as_chain(model: Operator) -> Chain:
    """A chain as it is; the parts of a `SingleCellPipeline` joined; another operator as a chain of one part."""
    if isinstance(model, Chain):
        return model
    if not isinstance(model, SingleCellPipeline):
        return Chain([model])
    parts = [] if model.ambient_removal is None else [
        Part(model.ambient_removal, "ambient_removal", writes={"decontaminated_counts": "counts"})
    ]  # fmt: skip
    parts.append(Part(model.vae_normalizer, "vae_normalizer", writes={"latent_mean": "latent"}))
    last = "latent"
    if model.batch_correction is not None:
        first = next(iter(model.batch_correction.requires))
        parts.append(Part(model.batch_correction, "batch_correction", reads={first: last}))
        last = "corrected_embeddings"
    if model.dim_reduction is not None:
        parts.append(Part(model.dim_reduction, "dim_reduction", reads={"features": last}))
    if isinstance(model.clustering, Operator):
        parts.append(Part(model.clustering, "clustering", reads={"embeddings": last}))
    several = model.vae_normalizer.config.n_batches > 1
    inputs = ["counts"] + ["ambient_profile"] * (model.ambient_removal is not None) + ["batch_labels"] * several
    return Chain(parts, inputs=inputs)


def _measured(graph: Any, params: Any, rest: Any, data: Tree) -> dict[str, Tree]:
    """Gradients of the loss: of parameters by part, and at inputs and outputs of every part."""
    chain = nnx.merge(graph, params, rest, copy=True)
    nothing = jax.tree.map(jnp.zeros_like, _smooth_values(chain, data))

    def loss(params: Any, added: Tree) -> jax.Array:
        return _loss(nnx.merge(graph, params, rest, copy=True), data, added)

    of_params, at = jax.grad(loss, argnums=(0, 1))(params, nothing)
    own = {name: of_params["parts"].get(name, {}) for name in chain.names} if "parts" in of_params else {}
    return {"params": {name: jax.tree.leaves(own.get(name, {})) for name in chain.names}, "at": at}


def _smooth_values(chain: Chain, data: Tree) -> Tree:
    """Every float that a part reads and gives along the chain: {"in": {part: {key: value}}, "out": the same}."""
    values: Tree = {"in": {}, "out": {}}

    def look(wire: Wire, read: Tree, outputs: Tree) -> None:
        values["in"][wire.name], values["out"][wire.name] = read, outputs

    _loss(chain, data, {}, look)
    return values


def _loss(chain: Chain, data: Tree, added: Tree, look: Any = None) -> jax.Array:
    """The loss, with `added` to what parts read and give: its gradient is that at these places."""
    result: Tree = {**data, **chain._inputs(data)}
    own = {term.part: term.name for term in chain.terms if isinstance(term, Own)}
    local = {term.part for term in chain.terms if isinstance(term, Own) and term.local}
    values: dict[str, jax.Array] = {}
    outputs: Tree = {}
    for wire in chain.wires:
        part = chain[wire.name]
        read = wire.read(result)
        read = _sum(read, added.get("in", {}).get(wire.name, {}))
        if wire.name in own:
            known = jax.lax.stop_gradient(read) if wire.name in local else read
            values[own[wire.name]] = part.objective(known)[0]  # type: ignore[attr-defined]
        given = part.apply(read)[0]
        outputs = {own_key: given[own_key] for own_key, _ in wire.writes if own_key in given}
        if look is not None:
            look(wire, {k: read[k] for k in part.smooth_in if k in read}, _smooth_out(part, outputs))
        outputs = _sum(outputs, added.get("out", {}).get(wire.name, {}))
        result |= wire.written(outputs)
    if not chain.terms:
        return jnp.asarray(sum((v**2).mean() for v in _smooth_out(chain[chain.names[-1]], outputs).values()))
    values |= {term.name: term.of(result) for term in chain.terms if isinstance(term, Term)}
    learned = None if chain.log_variances is None else chain.log_variances[...]
    return balanced(values, {term.name: term.weight for term in chain.terms}, learned)[0]


def _smooth_out(part: Operator, outputs: Tree) -> Tree:
    return {k: outputs[k] for k in part.smooth_out if k in outputs and jnp.issubdtype(outputs[k].dtype, jnp.floating)}


def _sum(values: Tree, added: Tree) -> Tree:
    return {key: value + added[key] if key in added else value for key, value in values.items()}


def probed_by_part(chain: Chain, data: Tree, key: jax.Array, n_probes: int) -> dict[str, jax.Array]:
    """For every part, the gradients at its inputs of `n_probes` orthonormal directions in its smooth outputs.

    The directions are in the outputs of one cell (the middle one), so that they are all of these where they are no
    more than n_probes; outputs without a row per cell are probed whole.
    """
    values = _smooth_values(chain, data)
    result: Tree = {**data, **chain._inputs(data)}
    found = {}
    for number, wire in enumerate(chain.wires):
        part = chain[wire.name]
        read = wire.read(result)
        given = part.apply(read)[0]
        smooth = values["in"][wire.name]

        def outputs(smooth: Tree, part: Operator = part, read: Tree = read) -> jax.Array:
            out = _smooth_out(part, part.apply({**read, **smooth})[0])
            rows = [v[len(v) // 2] if axes(part.provides[k])[:1] == ["cells"] else v for k, v in out.items()]
            return jnp.concatenate([jnp.ravel(v) for v in rows]) if out else jnp.zeros(1)

        flat, back = jax.vjp(outputs, smooth)
        random = jax.random.normal(jax.random.fold_in(key, number), (flat.size, min(n_probes, flat.size)), flat.dtype)
        directions = jnp.linalg.qr(random)[0].T
        found[wire.name] = jax.lax.map(lambda d, back=back: back(d)[0], directions)
        result |= wire.written(given)
    return found


def _row(name: str, part: Operator, found: list[Any], probed: Tree) -> list[Any]:
    """The columns of `gradients` for one part."""
    into = [flat(batch["at"]["in"][name].values()) for batch in found]
    out = [flat(batch["at"]["out"][name].values()) for batch in found]
    weights = [flat(batch["params"][name]) for batch in found]
    n_parameters = weights[0].size
    by_cell = [_over_cells(part, batch["at"]["in"][name]) for batch in found]
    compared = np.stack(weights if n_parameters else by_cell).astype(np.float64)
    jacobian = np.stack([flat(p) for p in zip(*probed.values(), strict=True)]) if probed else np.zeros((1, 1))
    mean = compared.mean(axis=0)
    noise = np.sqrt(((compared - mean) ** 2).sum(axis=1).mean())
    signal = float(np.linalg.norm(mean) / noise) if noise > 0 else np.inf if np.any(mean) else 0.0
    gain, condition = spread(jacobian)
    silent = silent_share(part, probed, [batch["at"]["in"][name] for batch in found])
    finite = all(np.isfinite(x).all() for x in (*into, *out, *weights, jacobian))
    sizes = [float(np.mean([np.linalg.norm(x) for x in some])) for some in (out, into)]
    verdict = verdict_of(finite, gain, silent)
    if verdict == "ok" and np.any(compared) and signal < 2 / np.sqrt(len(found)):
        verdict = "noisy"
    return [n_parameters, *sizes, gain, condition, silent, signal, _agreement(compared), verdict]


def verdict_of(finite: bool, gain: float, silent: float) -> str:  # noqa: FBT001
    """On the path through a part, in a word or two."""
    if not finite:
        return "not finite"
    if gain < DEAD:
        return "dead"
    if gain > EXPLODING:
        return "exploding"
    return "partly silent" if silent > 0.5 else "ok"


def spread(jacobian: np.ndarray) -> tuple[float, float]:
    """Root mean square of the singular values, and ratio of the largest to it."""
    if not np.isfinite(jacobian).all():
        return float("nan"), float("nan")
    values = np.linalg.svd(jacobian.astype(np.float64), compute_uv=False)
    gain = float(np.sqrt((values**2).sum() / len(jacobian)))
    return gain, float(values[0] / gain) if gain > 0 else float("inf")


def silent_share(part: Operator, probed: Tree, at: list[Tree]) -> float:
    """Share of the columns (features of cells; entries of what has no cells) that never get a gradient."""
    heard, total = 0, 0
    for key, probes in probed.items():
        any_cell = tuple(i + 1 for i, axis in enumerate(axes(part.requires[key])) if axis == "cells")
        moved = np.any(probes != 0, axis=(0, *any_cell))
        for batch in at:
            moved = moved | np.any(batch[key] != 0, axis=tuple(i - 1 for i in any_cell))
        heard, total = heard + int(moved.sum()), total + moved.size
    return 1 - heard / total if total else 0.0


def _over_cells(part: Operator, at: Tree) -> np.ndarray:
    return flat(
        np.sum(value, axis=axes(part.requires[key]).index("cells")) if "cells" in axes(part.requires[key]) else value
        for key, value in at.items()
    )


def _agreement(compared: np.ndarray) -> float:
    norms = np.linalg.norm(compared, axis=1, keepdims=True)
    if not norms.all() or not np.isfinite(norms).all():
        return float("nan")
    cosines = (compared / norms) @ (compared / norms).T
    return float(cosines[np.triu_indices(len(cosines), 1)].mean())


def flat(arrays: Any) -> np.ndarray:
    """All of them in one row."""
    every = [np.ravel(np.asarray(a)) for a in arrays]
    return np.concatenate(every) if every else np.zeros(0)
