"""DifferentiableVelocity beyond its contract: what each mode means, what is refused, training of the ODE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import spearmanr

from diffbio import fit
from diffbio.errors import ConfigError, DataError
from diffbio.math.splicing_kinetics import Kinetics, curve
from diffbio.math.velocity_graph import distinct_candidates
from diffbio.operators.singlecell import DifferentiableVelocity, VelocityConfig

N, G = 60, 6


@pytest.fixture(scope="module")
def course():
    """Cells along one course, neighbours in time, little noise; and the times."""
    rng = np.random.default_rng(0)
    time = np.sort(rng.uniform(0, 1, N))
    genes = Kinetics(
        log_level=jnp.log(jnp.asarray(rng.uniform(20, 40, G))),
        log_beta=jnp.log(jnp.asarray(rng.uniform(4, 8, G))),
        log_ratio=jnp.log(jnp.asarray(rng.uniform(0.6, 1.6, G))),
        on=jnp.asarray([-0.1, 0.0, 0.1, 0.2, 0.3, -0.2]),
        log_span=jnp.log(jnp.asarray([2.0, 0.4, 0.4, 2.0, 0.4, 0.5])),
        log_scale=jnp.zeros(G),
    )
    u, s = jax.vmap(lambda t: curve(genes, t, width=0.0))(jnp.asarray(time))
    near = np.argsort(np.abs(time[:, None] - time), axis=1)[:, 1:8]
    noisy = [np.maximum(np.asarray(x) + 0.3 * rng.normal(size=x.shape), 0.01) for x in (u, s)]
    data = {"unspliced": noisy[0], "spliced": noisy[1], "neighbor_indices": near}
    return {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in data.items()}, time


def made(mode, **settings):
    config = VelocityConfig(n_genes=G, kinetics_model=mode, normalize=False, n_neighbors=8, **settings)
    return DifferentiableVelocity(config, rngs=nnx.Rngs(0))


def run(op, data):
    return op.apply(data)[0]


def test_cells_at_steady_state_do_not_move(course):
    data, _ = course
    ratio = np.linspace(0.2, 2, G).astype(np.float32)
    found = run(made("steady_state"), data | {"unspliced": data["spliced"] * ratio})
    np.testing.assert_allclose(found["gamma"], ratio, rtol=1e-4)
    np.testing.assert_allclose(found["velocity"], 0, atol=1e-3)


@pytest.mark.parametrize("mode", ["steady_state", "stochastic"])
def test_direction_and_time_without_a_root(course, mode):
    data, time = course
    found = run(made(mode), data)
    rows, columns, weights = (np.asarray(found[f"transition_{k}"]) for k in ("rows", "columns", "weights"))
    ahead = np.zeros(N)
    np.add.at(ahead, rows, weights * (time[columns] - time[rows]))
    assert np.mean(ahead[(time > 0.1) & (time < 0.8)] > 0) > 0.8
    assert spearmanr(found["latent_time"], time).statistic > 0.9
    np.testing.assert_array_equal(found["beta"], 1)


def test_projection_goes_along_the_velocity(course):
    data, _ = course
    short, long = (run(made("steady_state", dt=dt), data) for dt in (1e-3, 0.5))
    moved = (short["projected_spliced"] - long["projected_spliced"]) / -0.499
    assert np.corrcoef(moved.ravel(), short["velocity"].ravel())[0, 1] > 0.95


def test_stochastic_gradient_equals_finite_differences(course):
    data, _ = course
    with jax.enable_x64(True):
        op = made("stochastic", reach=1)
        near = {"neighbor_indices": jnp.asarray(data["neighbor_indices"])}
        x, fixed = (jnp.asarray(data[k], jnp.float64) for k in ("spliced", "unspliced"))
        rng = np.random.default_rng(1)
        way = jnp.asarray(rng.normal(size=x.shape))
        weight = {k: jnp.asarray(rng.normal(size=s)) for k, s in (("velocity", (N, G)), ("latent_time", (N,)))}

        @jax.jit
        def f(x):
            found = op(x, fixed, **near)
            return sum((weight[k] * found[k]).sum() for k in weight)

        numeric = (f(x + 1e-6 * way) - f(x - 1e-6 * way)) / 2e-6
        np.testing.assert_allclose((jax.jit(jax.grad(f))(x) * way).sum(), numeric, rtol=1e-4)


def test_neural_ode_learns_the_course(course):
    data, time = course
    op = made("neural_ode", hidden_dim=8, n_steps=8, dt=0.125)
    moments = op.for_training(data)
    op.init_from(moments)
    before = float(op.objective(moments)[0])
    _, _, metadata = op.apply(data)
    assert "velocity" in metadata["unfitted"]
    fit(op, data, progress=False, max_epochs=150, batch_size=30)
    assert float(op.objective(moments)[0]) < 0.3 * before
    found, _, metadata = op.apply(data)
    assert not metadata
    assert spearmanr(found["latent_time"], time).statistic > 0.95
    early = (time > 0.3) & (time < 0.5)
    assert np.asarray(found["velocity"])[early, 3].mean() > 0  # this gene is switched on at 0.2, and stays on


def test_other_modes_have_nothing_to_train():
    assert not hasattr(made("steady_state"), "objective")
    assert made("dynamical").fitted


@pytest.mark.parametrize("settings", [{"hidden_dim": 8}, {"n_steps": 4}, {"switch_width": 0.1}, {"n_iterations": 3}])
def test_settings_of_another_mode_are_refused(settings):
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} is for kinetics_model"):
        made("steady_state", **settings)


def test_what_cannot_work_is_refused(course):
    data, _ = course
    op = made("steady_state")
    with pytest.raises(DataError, match=r"'unspliced'.* no counts at all"):
        run(op, data | {"unspliced": data["unspliced"] * 0})
    with pytest.raises(DataError, match=r"'spliced'.*row 0"):
        run(op, data | {"spliced": -data["spliced"]})
    with pytest.raises(DataError, match="row numbers from 0 to 59"):
        run(op, data | {"neighbor_indices": data["neighbor_indices"] + 60})
    few = {k: v[:5] for k, v in data.items() if k != "neighbor_indices"}
    with pytest.raises(DataError, match=r"n_neighbors is 8.*only 5 cells"):
        run(op, few)


def test_short_lists_give_the_same_chain(course):
    data, _ = course
    op = made("steady_state")
    short = distinct_candidates(data["neighbor_indices"].astype(np.int32))
    chains = []
    for found in (run(op, data), run(op, data | {"candidate_indices": short})):
        chain = np.zeros((N, N))
        np.add.at(chain, (found["transition_rows"], found["transition_columns"]), found["transition_weights"])
        chains.append(chain)
    np.testing.assert_allclose(*chains, atol=1e-6)
    with pytest.raises(DataError, match=r"candidate_indices.* row numbers from 0 to 59"):
        run(op, data | {"candidate_indices": short + N})
