"""SCANVI behind another operator: one loss, whose gradients reach both."""

import jax
import jax.numpy as jnp
import numpy as np
from contract import float64_copy
from flax import nnx
from toy_modules import CELLS, GENES, arguments, build, toy_cells

from diffbio.nn import SCANVI
from diffbio.operators.singlecell import AmbientRemovalConfig, DifferentiableAmbientRemoval

PROFILE = jnp.full(GENES, 1 / GENES)


class CleanThenAnnotate(nnx.Module):
    def __init__(self):
        config = AmbientRemovalConfig(n_genes=GENES, latent_dim=2, hidden_dims=(6,), temperature=5.0)
        self.clean = DifferentiableAmbientRemoval(config, rngs=nnx.Rngs(0))
        self.annotate = build(SCANVI, reconstruction_loss="nb")

    def loss(self, data, counts):
        cleaned = self.clean(counts, PROFILE.astype(counts.dtype))["decontaminated_counts"]
        return self.annotate.objective(data | {"counts": cleaned})[0]


def test_gradients_of_one_loss_through_ambient_removal_and_scanvi():
    with jax.enable_x64(True):
        model = float64_copy(CleanThenAnnotate())
        data = {k: v.astype(jnp.float64) if k in {"counts", "cont_covs"} else v for k, v in toy_cells().items()}
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, counts):
            return nnx.merge(graph, params, rest, copy=True).loss(data, counts)

        by_params, by_counts = jax.grad(loss, argnums=(0, 1))(params, data["counts"])
        rng = np.random.default_rng(0)
        flat = dict(nnx.to_flat_state(params))
        groups = {part: [p for p in flat if p[0] == part] for part in ("clean", "annotate")}
        assert all(groups.values())
        for part, paths in groups.items():
            step = {p: rng.normal(size=flat[p][...].shape) for p in paths}

            def moved(by, step=step):
                leaves = [(p, v.replace(v[...] + by * step[p]) if p in step else v) for p, v in flat.items()]
                return loss(nnx.from_flat_state(leaves), data["counts"])

            slope = sum((np.asarray(dict(nnx.to_flat_state(by_params))[p][...]) * step[p]).sum() for p in paths)
            assert abs(slope) > 1e-3, part
            np.testing.assert_allclose((moved(1e-6) - moved(-1e-6)) / 2e-6, slope, rtol=1e-4, err_msg=part)
        step = rng.normal(size=(CELLS, GENES)) * np.asarray(data["counts"] > 0)
        found = (loss(params, data["counts"] + 1e-6 * step) - loss(params, data["counts"] - 1e-6 * step)) / 2e-6
        np.testing.assert_allclose(found, (by_counts * step).sum(), rtol=1e-4)


def test_outputs_have_gradients_by_the_counts():
    """Class probabilities, latent means and gene fractions: finite differences in float64."""
    with jax.enable_x64(True):
        model = float64_copy(build(SCANVI))
        data = {k: v.astype(jnp.float64) if k in {"counts", "cont_covs"} else v for k, v in toy_cells().items()}
        known = arguments(data, without=("local_l_mean", "local_l_var"))
        outputs = {
            "classes": model.classify,
            "latent": lambda x: model.get_latents(x)[0],
            "u": lambda x: model.get_latents_u(x, data["labels"]),
            "fractions": lambda x: model.inference(x, **known)["px_scale"],
            "rates": lambda x: model.inference(x, **known)["px_rate"],
        }
        step = np.random.default_rng(0).normal(size=(CELLS, GENES))
        for name, function in outputs.items():
            found = (function(data["counts"] + 1e-6 * step) - function(data["counts"] - 1e-6 * step)) / 2e-6
            slopes = jax.jvp(function, (data["counts"],), (jnp.asarray(step),))[1]
            assert np.abs(slopes).max() > 1e-3, name
            np.testing.assert_allclose(found, slopes, rtol=1e-4, atol=1e-4 * np.abs(slopes).max(), err_msg=name)
            weight = np.random.default_rng(1).normal(size=slopes.shape)
            back = jax.grad(lambda x, f=function, w=weight: (w * f(x)).sum())(data["counts"])
            np.testing.assert_allclose((back * step).sum(), (weight * slopes).sum(), rtol=1e-8, err_msg=name)


def test_the_bound_alone_rewards_removing_counts():
    """Why an operator in front needs a loss of its own: fewer molecules take fewer nats."""
    model, data = build(SCANVI), toy_cells()
    whole, half = (sum(model.forward(x, **arguments(data))[:1]).mean() for x in (data["counts"], data["counts"] / 2))
    assert half < whole
