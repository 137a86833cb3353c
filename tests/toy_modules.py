"""Toy cells for the modules SCVI and SCANVI, their networks once more in numpy, and finite differences."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
from contract import float64_copy
from flax import nnx
from scipy import special, stats

CELLS, GENES, BATCHES, LABELS = 7, 5, 2, 3


def toy_cells(seed=0, cells=CELLS, genes=GENES):
    """A batch as training hands it over: labels hold a code outside 0..2, that is, unlabelled cells."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(1.0, 3.0, (cells, genes)))
    counts[:, 0] += 1  # no empty cell
    return {
        "counts": jnp.asarray(counts, float),
        "batch_labels": jnp.asarray(rng.permutation(np.arange(cells) % BATCHES)),
        "labels": jnp.asarray(rng.permutation(np.arange(cells) % (LABELS + 1))),
        "cat_covs": jnp.asarray(rng.integers(0, 2, (cells, 2))),
        "cont_covs": jnp.asarray(rng.normal(size=(cells, 1)), float),
        "local_l_mean": jnp.asarray(rng.normal(3, 0.3, cells), float),
        "local_l_var": jnp.asarray(rng.uniform(0.2, 0.6, cells), float),
    }


FORWARD = {"batch_labels": "batch_index", "labels": "y"}


def arguments(data, *, without=()):
    """The cells as arguments of `forward`, less the counts."""
    return {FORWARD.get(k, k): v for k, v in data.items() if k != "counts" and k not in without}


def build(cls, *, jitter=0.3, **settings):
    """A small module for the toy cells with weights and running averages away from where they start."""
    known = {
        "n_batch": BATCHES, "n_labels": LABELS, "n_hidden": 4, "n_latent": 2,
        "n_cats_per_cov": (2, 3), "n_continuous_cov": 1, "use_observed_lib_size": True,
    } | settings  # fmt: skip
    model = cls(GENES, **known, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model, nnx.filterlib.Everything())
    rng = np.random.default_rng(1)

    def move(variable):
        x = variable[...]
        if isinstance(variable, nnx.BatchStat):
            return variable.replace(x + jitter * jnp.asarray(rng.uniform(0, 1, x.shape), x.dtype))
        if isinstance(variable, nnx.Param):
            return variable.replace(x + jitter * jnp.asarray(rng.normal(size=x.shape), x.dtype))
        return variable

    state = jax.tree.map(move, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.merge(graph, state)


def total_of(model, data):
    """Random weights on everything `forward` gives (drawn in eval mode) and the objective in train mode.

    Returns the scalar as a function of parameters and counts, and the parameters. Not jitted: run op by op, the
    many modes share their compiled operations.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    rows = jax.random.uniform(jax.random.key(5), (3, len(data["counts"])), minval=0.5, maxval=1.5)

    def total(params, counts):
        model = nnx.merge(graph, params, rest, copy=True)
        parts = model.forward(counts, **arguments(data), key=jax.random.key(3))
        shown = sum((w * part).sum() for w, part in zip(rows, parts, strict=True))
        model.train()
        return shown + 3.0 * model.objective(data | {"counts": counts}, kl_weight=0.7)[0]

    return total, params


def gradients_are_right(model, data, *, one_by_one=None):
    """Reverse gradients equal central differences in float64, by every parameter and by the counts.

    In one step along a direction in which every parameter has the same share of the change, or one by one those
    in the named parts of the model. The counts move where they are not 0: there a ZINB is not continuous.
    """
    with jax.enable_x64(True):
        data = {k: v.astype(jnp.float64) if jnp.issubdtype(v.dtype, jnp.floating) else v for k, v in data.items()}
        total, params = total_of(float64_copy(model), data)
        by_params, by_counts = jax.grad(total, argnums=(0, 1))(params, data["counts"])
        slopes = {path: np.asarray(g[...]) for path, g in nnx.to_flat_state(by_params)} | {
            "counts": np.where(data["counts"] > 0, by_counts, 0.0)
        }
        rng = np.random.default_rng(2)
        steps = {}
        for path, slope in slopes.items():
            assert np.isfinite(slope).all(), path
            assert np.abs(slope).max() > 0, f"no gradient reaches {path}"
            step = rng.normal(size=slope.shape) * (data["counts"] > 0 if path == "counts" else 1.0)
            # a random step, turned towards the slope, so that the change it makes is not small by chance
            step += np.linalg.norm(step) * np.sign((slope * step).sum() or 1.0) * slope / np.linalg.norm(slope)
            steps[path] = step / (slope * step).sum()

        def moved(along, by):
            state = nnx.from_flat_state(
                [(p, v.replace(v[...] + by * along[p]) if p in along else v) for p, v in nnx.to_flat_state(params)]
            )
            return total(state, data["counts"] + by * along.get("counts", 0.0))

        single = [{path: step} for path, step in steps.items() if path[0] in (one_by_one or ())]
        assert bool(single) == bool(one_by_one)
        for along in single or [steps]:
            by = 1e-6 * len(along) / max(1.0, *(np.abs(step).max() for step in along.values()))
            found = (moved(along, by) - moved(along, -by)) / (2 * by)
            np.testing.assert_allclose(found / len(along), 1.0, rtol=1e-4 / len(along), err_msg=str(list(along)))


class InNumpy:
    """The networks of a module in eval mode, written again in numpy and float64 from their definition."""

    def __init__(self, model):
        self.model = model

    @staticmethod
    def linear(layer, x):
        return x @ np.asarray(layer.kernel[...], float) + np.asarray(layer.bias[...], float)

    @staticmethod
    def network(mlp, x, covariates):
        for block in mlp.blocks:
            h = np.concatenate([x, covariates], -1) @ np.asarray(block.linear.kernel[...], float)
            mean, var, scale, bias = (
                np.asarray(v[...], float) for v in (block.norm.mean, block.norm.var, block.norm.scale, block.norm.bias)
            )
            x = np.maximum((h - mean) / np.sqrt(var + 1e-3) * scale + bias, 0)
        return x

    def gaussian(self, encoder, x, covariates=None, *, floor=1e-4):
        """Mean and variance."""
        h = self.network(encoder.network, x, np.zeros((len(x), 0)) if covariates is None else covariates)
        return self.linear(encoder.mean, h), np.exp(self.linear(encoder.logvar, h)) + floor

    def injected(self, data):
        codes = [(data["batch_labels"], BATCHES), (data["cat_covs"][:, 0], 2), (data["cat_covs"][:, 1], 3)]
        return np.concatenate([np.eye(n)[np.asarray(c)] for c, n in codes], -1)

    def log_p_counts(self, z, data):
        """Log p(counts | z) under a ZINB with dispersion 'gene' and the observed library."""
        decoder, x = self.model.vae.decoder, np.asarray(data["counts"], float)
        h = self.network(decoder.network, np.concatenate([z, data["cont_covs"]], -1), self.injected(data))
        mu = x.sum(-1, keepdims=True) * special.softmax(self.linear(decoder.fraction, h), -1)
        theta, pi = (
            np.exp(np.asarray(decoder.log_theta[...], float)),
            special.expit(self.linear(decoder.extra_zeros, h)),
        )
        nb = stats.nbinom.pmf(x, theta, theta / (theta + mu))
        return np.log(np.where(x == 0, pi + (1 - pi) * nb, (1 - pi) * nb)).sum(-1)

    def log_q_class(self, z):
        classifier = self.model.classifier
        h = self.network(classifier.network, z, np.zeros((len(z), 0)))
        return special.log_softmax(self.linear(classifier.logits, h), -1)


def log_normal(x, mean, var):
    return stats.norm.logpdf(x, mean, np.sqrt(var)).sum(-1)


def published(function, lines):
    """Name and default of every argument of `function`, in order, are these."""
    parameters = list(inspect.signature(function).parameters.values())
    free = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    assert [(p.name, p.default) for p in free] == list(lines)
