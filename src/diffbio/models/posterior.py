"""What is asked of a module about a batch of cells: functions of arrays, compiled once each.

A batch holds `counts`, or, of minified cells, `qz_mean`, `qz_var` and `library`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ..nn.count_vae import CountDistribution, Gaussian
from ..nn.scanvi import SCANVI
from ..nn.scvi import SCVI, Covariates, Drawn, forward_arguments, row_sums
from ..train import dense_on_device

LOG_2PI = 1.8378770664093453

Batch = Mapping[str, Any]


class Posterior(NamedTuple):
    """q of every cell, and what else decoding needs."""

    known: Covariates
    q: Gaussian
    q_library: Gaussian | None
    log_library: jax.Array  # (cells,): observed, or the mean of q_library


class Structure:
    """What a module is beside its arrays. It is hashed and compared once, not for every chunk of cells."""

    def __init__(self, parts: tuple[Any, Any]) -> None:
        self.parts, self.hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self.parts == other.parts)

    @staticmethod
    def split(module: nnx.Module) -> tuple["Structure", list[jax.Array]]:
        """The structure of a module, the same object for all modules that are alike, and its arrays."""
        graph, state = nnx.split(module)
        leaves, tree = jax.tree.flatten(state)
        structure = Structure((graph, tree))
        return _KNOWN.setdefault(structure, structure), leaves

    def merge(self, leaves: list[jax.Array]) -> Any:
        """The module again."""
        graph, tree = self.parts
        return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


_KNOWN: dict[Structure, Structure] = {}  # as many as there are kinds of modules, for which programs are kept, too


@functools.partial(jax.jit, static_argnames=("structure", "function", "options"))
def evaluate(
    structure: Structure,
    leaves: list[jax.Array],
    batch: Batch,
    key: jax.Array,
    arrays: Mapping[str, Any],
    *,
    function: Callable[..., dict[str, jax.Array]],
    options: tuple[tuple[str, Any], ...],
) -> dict[str, jax.Array]:
    """`function(module, batch, key, **arrays, **options)`; one program for every model of a kind."""
    module = structure.merge(leaves)
    return function(module, dense_on_device(batch, keep=frozenset({"counts"})), key, **arrays, **dict(options))


def posterior(module: SCVI, batch: Batch) -> Posterior:
    """q(z | x) and the library of every cell; of minified cells, as they were stored."""
    given = forward_arguments(batch)
    known = _covariates(module, given, given.get("batch_index"))
    if "qz_mean" in batch:
        q = Gaussian(batch["qz_mean"], jnp.log(batch["qz_var"]))
        q_library, log_library = None, jnp.log(jnp.maximum(batch["library"], 1.0))
    else:
        _, _, q_library, log_library = drawn = module.draw(batch["counts"], known, None)  # in eval mode: the means
        q = drawn.q
    return Posterior(_with_types(module, known, q, batch.get("batch_labels")), q, q_library, log_library)


def latents(module: SCVI, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
    """Mean and variance of q(z | x), (cells, latent)."""
    q = posterior(module, batch).q
    return {"mean": q.mean, "var": jnp.exp(q.logvar)}


def library(module: SCVI, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
    """Library sizes, (cells,): their mean under q(l | x) and a draw; both are the sum of the counts if observed."""
    p = posterior(module, batch)
    if p.q_library is None:
        size = row_sums(batch["counts"]) if "counts" in batch else batch["library"]
        return {"mean": size, "sample": size}
    mean, logvar = p.q_library.mean[:, 0], p.q_library.logvar[:, 0]
    return {"mean": jnp.exp(mean + 0.5 * jnp.exp(logvar)), "sample": jnp.exp(_draw(p, key).log_library)}


def elbo(module: SCVI, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
    """Evidence lower bound of the counts by one draw, (cells,), in nats.

    The cell type of every cell is summed over, also where it is known: it bounds log p(x).
    """
    given = forward_arguments(batch)
    if isinstance(module, SCANVI):
        given.pop("y", None)
    loss, kl, _ = module.forward(batch["counts"], **given, key=key)
    return {"elbo": -(loss + kl)}


def reconstruction(module: SCVI, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
    """-log p(x | z) at a draw of z, (cells,), in nats."""
    p, x = posterior(module, batch), batch["counts"]
    drawn, types = _draw(p, key), _types(module, p.known)
    if types is not None:  # of an unlabelled cell the mean over the types it may be
        return {"error": -(types * module.log_prob_of_types(x, drawn, p.known)).sum(-1)}
    return {"error": -module.log_prob(x, module.decode(drawn, p.known))}


def marginal(module: SCVI, batch: Batch, key: jax.Array, *, passes: int, per_pass: int) -> dict[str, jax.Array]:
    """Log p(x) by importance sampling: log mean of p(x, z, ...) / q(z, ... | x) over passes * per_pass draws."""
    p, x = posterior(module, batch), batch["counts"]

    def log_weight(key: jax.Array) -> jax.Array:
        for_draw, for_prior = jax.random.split(key)
        drawn = _draw(p, for_draw)
        prior = log_prior(module, drawn.z, for_prior)
        if _types(module, p.known) is not None:  # the type of every cell is summed over
            log_p = jax.nn.logsumexp(prior + module.log_prob_of_types(x, drawn, p.known), axis=-1)
        else:
            log_p = module.log_prob(x, module.decode(drawn, p.known)) + jax.nn.logsumexp(prior, axis=-1)
        log_q = _log_normal(drawn.z, p.q.mean, p.q.logvar)
        if p.q_library is not None:
            size = drawn.log_library[:, None]
            mean, var = (batch[name].reshape(-1, 1) for name in ("local_l_mean", "local_l_var"))
            log_p += _log_normal(size, mean, jnp.log(var))
            log_q += _log_normal(size, *p.q_library)
        return log_p - log_q

    def one_pass(total: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        weights = jax.vmap(log_weight)(jax.random.split(key, per_pass))
        return jnp.logaddexp(total, jax.nn.logsumexp(weights, axis=0)), None

    start = jnp.full(p.q.mean.shape[0], -jnp.inf)
    total, _ = jax.lax.scan(one_pass, start, jax.random.split(key, passes))
    return {"log_likelihood": total - jnp.log(float(passes * per_pass))}


def log_prior(module: SCVI, z: jax.Array, key: jax.Array) -> jax.Array:
    """Log p(z, c), (cells, types); of SCANVI an unbiased draw of p(z | c), else log N(z; 0, I) in one column."""
    if not isinstance(module, SCANVI):
        return _log_normal(z, 0.0, jnp.zeros_like(z))[:, None]
    n, wide = module.n_labels, jnp.repeat(z, module.n_labels, axis=0)
    label = jnp.tile(jnp.eye(n, dtype=z.dtype), (z.shape[0], 1))
    q = module.encoder_z2_z1(wide, label)
    u = q.mean + jnp.exp(0.5 * q.logvar) * jax.random.normal(key, q.mean.shape, q.mean.dtype)
    log_weight = _log_normal(wide, *module.decoder_z1_z2(u, label)) - _log_normal(u, *q)
    log_weight += _log_normal(u, 0.0, jnp.zeros_like(u))
    return log_weight.reshape(-1, n) + module.log_y_prior[...]


def expression(
    module: SCVI,
    batch: Batch,
    key: jax.Array,
    *,
    genes: jax.Array,
    batches: jax.Array | None,
    library_size: jax.Array | None,
    n_samples: int,
    mean: bool,
) -> dict[str, jax.Array]:
    """Decoded expression at draws of z, (cells, genes), or (cells, samples, genes) without `mean`.

    batches: codes to decode every cell as, and to average over; None takes each cell's own.
    library_size: what gene fractions are multiplied by; None gives expected counts at the cell's own library.
    """
    p = posterior(module, batch)

    def at(draw: Drawn, code: jax.Array | None) -> jax.Array:
        known = p.known if code is None else _as_batch(module, batch, p, code)
        if library_size is not None:
            known = known._replace(log_size=jnp.zeros_like(p.log_library))
        decoded = jnp.exp(module.decode(draw, known).log_rate[:, genes])
        return decoded if library_size is None else decoded * library_size

    def once(key: jax.Array) -> jax.Array:
        draw = _draw(p, key)
        if batches is None:
            return at(draw, None)
        return jax.lax.map(lambda code: at(draw, code), batches).mean(0)

    keys = jax.random.split(key, n_samples)
    if n_samples == 1:
        return {"expression": once(keys[0])}
    if not mean:
        return {"expression": jnp.moveaxis(jax.lax.map(once, keys), 0, 1)}
    start = jnp.zeros((p.q.mean.shape[0], len(genes)))
    total, _ = jax.lax.scan(lambda total, key: (total + once(key), None), start, keys)
    return {"expression": total / n_samples}


def pool(
    module: SCVI,
    batch: Batch,
    key: jax.Array,
    *,
    genes: jax.Array,
    code: jax.Array | None,
    library_size: jax.Array | None,
) -> dict[str, jax.Array]:
    """A draw z of every cell: z, an unbiased draw of log p(z), what it is decoded to, and expression of `genes`.

    code: of the batch that all cells are decoded as. library_size: as of `expression`.
    """
    for_z, for_prior, for_type = jax.random.split(key, 3)
    p = posterior(module, batch)
    known = p.known if code is None else _as_batch(module, batch, p, code)
    known = _of_one_type(module, known, for_type)
    drawn = _draw(p, for_z)
    size = drawn.log_library if known.log_size is None else known.log_size
    decoded = module.decode(drawn, known._replace(log_size=jnp.zeros_like(size)))
    log_fraction, log_theta, pi_logit = (jnp.broadcast_to(x, decoded.log_rate.shape) for x in decoded)
    fraction = jnp.exp(log_fraction[:, genes])
    return {
        "z": drawn.z, "log_prior": jax.nn.logsumexp(log_prior(module, drawn.z, for_prior), axis=-1),
        "log_fraction": log_fraction, "log_theta": log_theta, "pi_logit": pi_logit,
        "expression": fraction * (jnp.exp(size)[:, None] if library_size is None else library_size),
    }


def log_size(module: SCVI, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
    """Log of what gene fractions are multiplied by, (cells,)."""
    p = posterior(module, batch)
    return {"log_size": p.log_library if p.known.log_size is None else p.known.log_size}


def likelihood(
    module: SCVI,
    batch: Batch,
    key: jax.Array,
    *,
    genes: jax.Array,
    code: jax.Array | None,
    n_samples: int,
    size: float | None,
) -> dict[str, jax.Array]:
    """Parameters of p(x | z) at draws of z, (cells, samples, genes) each: mean, dispersions, dropout.

    size: takes the place of every cell's library.
    """
    p = posterior(module, batch)
    known = p.known if code is None else _as_batch(module, batch, p, code)
    if size is not None:
        known = known._replace(log_size=jnp.full_like(p.log_library, jnp.log(size)))

    def once(key: jax.Array) -> CountDistribution:
        for_type, for_z = jax.random.split(key)
        decoded = module.decode(_draw(p, for_z), _of_one_type(module, known, for_type))
        shape = decoded.log_rate.shape
        return CountDistribution(*(jnp.broadcast_to(x, shape)[:, genes] for x in decoded))

    decoded = jax.lax.map(once, jax.random.split(key, n_samples))
    rate, theta, pi = (jnp.moveaxis(x, 0, 1) for x in decoded)
    found = {"mean": jnp.exp(rate)}
    if module.vae.decoder.likelihood != "poisson":
        found["dispersions"] = jnp.exp(theta)
    if module.vae.decoder.likelihood == "zinb":
        found["dropout"] = jax.nn.sigmoid(pi)
    return found


def classes(module: SCANVI, batch: Batch, key: jax.Array, *, draw: bool) -> dict[str, jax.Array]:
    """Log probabilities of the cell types at the mean (or a draw) of q(z | x), at the module's temperature."""
    p = posterior(module, batch)
    z = _draw(p, key).z if draw else p.q.mean
    return {"log_probability": log_classes(module, z, module.temperature[...], batch.get("batch_labels"))}


def log_classes(
    module: SCANVI, z: jax.Array, temperature: jax.Array | float, batch_labels: jax.Array | None
) -> jax.Array:
    """Log q(c | z), or of a classifier that knows batches log q(c | z, batch); (cells, types)."""
    known = () if getattr(module.classifier, "by_batch", None) is None else (batch_labels,)
    return module.log_class_probabilities(z, temperature, *known)


def _draw(p: Posterior, key: jax.Array) -> Drawn:
    for_z, for_library = jax.random.split(key)
    noise = jax.random.normal(for_z, p.q.mean.shape, p.q.mean.dtype)
    z, size = p.q.mean + jnp.exp(0.5 * p.q.logvar) * noise, p.log_library
    if p.q_library is not None:
        spread = jnp.exp(0.5 * p.q_library.logvar[:, 0])
        size = p.q_library.mean[:, 0] + spread * jax.random.normal(for_library, size.shape, size.dtype)
    return Drawn(p.q, z, p.q_library, size)


def _covariates(module: SCVI, given: Mapping[str, Any], batch_index: jax.Array | None) -> Covariates:
    rest = (given.get("y"), given.get("cat_covs"), given.get("cont_covs"), given.get("size_factor"))
    return module.covariates(batch_index, *rest)


def _as_batch(module: SCVI, batch: Batch, p: Posterior, code: jax.Array) -> Covariates:
    """The covariates as if every cell were of batch `code`."""
    known = _covariates(module, forward_arguments(batch), jnp.full(p.log_library.shape, code))
    return _with_types(module, known, p.q, batch.get("batch_labels"))


def _types(module: SCVI, known: Covariates) -> jax.Array | None:
    """Where the dispersion is of the cell type: the probabilities of the types of every cell."""
    return known.groups if module.dispersion == "gene-label" and isinstance(module, SCANVI) else None


def _of_one_type(module: SCVI, known: Covariates, key: jax.Array) -> Covariates:
    """Where the dispersion is of the cell type, one type for every cell, drawn from those it may be."""
    types = _types(module, known)
    if types is None:
        return known
    drawn = jax.random.categorical(key, jnp.log(types))
    return known._replace(groups=jax.nn.one_hot(drawn, types.shape[-1], dtype=types.dtype))


def _with_types(module: SCVI, known: Covariates, q: Gaussian, batch_labels: jax.Array | None) -> Covariates:
    """With a dispersion by cell type, as weights the probabilities of the types an unlabelled cell may be."""
    if module.dispersion != "gene-label" or not isinstance(module, SCANVI):
        return known
    likely = jnp.exp(log_classes(module, q.mean, 1.0, batch_labels))
    groups = likely if known.groups is None else known.groups
    return known._replace(groups=jnp.where(groups.sum(-1, keepdims=True) > 0, groups, likely))


def _log_normal(x: jax.Array, mean: jax.Array | float, logvar: jax.Array) -> jax.Array:
    return -0.5 * ((x - mean) ** 2 * jnp.exp(-logvar) + logvar + LOG_2PI).sum(-1)
