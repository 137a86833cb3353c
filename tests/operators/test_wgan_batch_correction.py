"""WGAN batch correction: gradients of the right sign, turns of critic and encoder, types kept apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from simulated_batches import cells_in_batches, neighbours_with

import diffbio
from diffbio.fitting import optimizer_of
from diffbio.nn.critic import Critic, separation
from diffbio.operators.base import Alternation
from diffbio.operators.singlecell import DifferentiableWGANBatchCorrection, WGANBatchCorrectionConfig

SMALL = WGANBatchCorrectionConfig(n_genes=12, n_batches=2, hidden_dim=32, latent_dim=8, discriminator_hidden_dim=32)


def operator(**settings):
    return DifferentiableWGANBatchCorrection(dataclasses.replace(SMALL, **settings), rngs=nnx.Rngs(0))


def parts(op):
    """Parameters by path, those of the critic and all others."""
    flat = {"/".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(nnx.state(op, nnx.Param))}
    critic = {p: v for p, v in flat.items() if p.startswith("critic")}
    return critic, {p: v for p, v in flat.items() if p not in critic}


def trained_critic(op, data, steps=100):
    """`op` with a critic that has learned to tell the batches apart, the rest as it was."""
    graph, params, rest = nnx.split(op, nnx.Param, ...)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(lambda p: nnx.merge(graph, p, rest, copy=True).apply(data)[0]["discriminator_loss"])(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        moved = optax.apply_updates(params, updates)
        return {**params, "critic": moved["critic"]}, opt_state

    params = dict(params)
    opt_state = optimizer.init(params)
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
    nnx.update(op, nnx.State(params))
    return op


def test_the_encoder_lowers_what_the_critic_raises():
    data, _ = cells_in_batches(((60, 60), (60, 60)))
    data = {key: jnp.asarray(value) for key, value in data.items()}
    op = operator()  # not started from data: the batches lie apart
    before = float(op.apply(data)[0]["generator_loss"])
    trained_critic(op, data)
    after = float(op.apply(data)[0]["generator_loss"])
    assert after > before + 0.1, "the critic learns to tell the batches apart by lowering discriminator_loss"

    graph, params, rest = nnx.split(op, nnx.Param, ...)

    def output(key):
        return lambda p: nnx.merge(graph, p, rest, copy=True).apply(data)[0][key]

    gradient = jax.grad(output("generator_loss"))(params)
    step = jax.tree.map(lambda p, g: p - 0.05 * g, dict(params), dict(gradient))
    moved = nnx.State({**dict(params), "autoencoder": step["autoencoder"]})
    assert output("generator_loss")(moved) < after - 1e-3, "down its gradient the encoder mixes the batches"

    # in train mode one reverse pass gives each side its own gradient
    plain = dataclasses.replace(op.config, overlap_floor=1e6, displacement_weight=0.0, adversarial_weight=1.0)
    both = DifferentiableWGANBatchCorrection(plain, rngs=nnx.Rngs(0))
    nnx.update(both, nnx.state(op))
    reconstruction = nnx.grad(lambda m: m.objective(data)[0])(both)
    both.train_mode()
    game = nnx.grad(lambda m: m.objective(data)[0])(both)
    mixing = jax.tree.map(jnp.subtract, game["autoencoder"]["encoder"], reconstruction["autoencoder"]["encoder"])
    wanted = gradient["autoencoder"]["encoder"]
    np.testing.assert_allclose(cosine(mixing, wanted), 1.0, atol=0.01)
    apart = jax.grad(output("generator_loss"))(params)["critic"]["last"]
    critic = game["critic"]["last"]
    without_penalty = dataclasses.replace(plain, gradient_penalty=0.0)
    free = DifferentiableWGANBatchCorrection(without_penalty, rngs=nnx.Rngs(0))
    nnx.update(free, nnx.state(op))
    free.train_mode()
    alone = nnx.grad(lambda m: m.objective(data)[0])(free)["critic"]["last"]
    np.testing.assert_allclose(cosine(alone, apart), -1.0, atol=0.01)
    assert cosine(critic, apart) != pytest.approx(-1.0, abs=1e-4), "the penalty holds the critic back"


def cosine(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_critic_and_encoder_take_turns():
    data, _ = cells_in_batches(((20, 20), (20, 20)))
    op = operator(n_critic=3)
    op.init_from(data)
    op.train_mode()
    optimizer = optimizer_of(op, 1e-2)
    params = nnx.state(op, nnx.Param)
    opt_state = optimizer.init(params)
    moved = []
    ones = jax.tree.map(jnp.ones_like, params)
    for _ in range(6):
        updates, opt_state = optimizer.update(ones, opt_state, params)
        flat = {"/".join(map(str, p)): np.abs(v[...]).max() for p, v in nnx.to_flat_state(updates)}
        encoder = [v > 0 for p, v in flat.items() if p.startswith("autoencoder/encoder")]
        assert all(v > 0 for p, v in flat.items() if not p.startswith("autoencoder/encoder"))
        assert len(set(encoder)) == 1
        moved.append(encoder[0])
    assert moved == [False, False, True, False, False, True]


def test_fit_trains_by_the_schedule_that_an_operator_brings(monkeypatch):
    data, _ = cells_in_batches(((20, 20), (20, 20)))
    op = operator()
    never = Alternation(rare=("autoencoder", "critic"), every=10**6, first_moment=0.5)
    monkeypatch.setattr(DifferentiableWGANBatchCorrection, "alternation", never)
    op.init_from(data)
    before = nnx.to_pure_dict(nnx.state(op, nnx.Param))
    diffbio.fit(op, data, max_epochs=1, progress=False)
    after = nnx.to_pure_dict(nnx.state(op, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, before, after)



def test_unbalanced_types_and_one_that_a_batch_lacks_stay_apart():
    data, kind = cells_in_batches(((200, 40, 60), (40, 160, 0)), seed=1)
    op = operator(overlap_floor=0.05)
    batch, shared = data["batch_labels"], kind < 2
    history = diffbio.fit(op, data, max_epochs=15, batch_size=120, progress=False)
    assert all(np.isfinite(list(row.values())).all() for row in history.rows)
    z = np.asarray(op.apply(data)[0]["corrected_embeddings"])
    assert neighbours_with(z, kind).mean() > 0.97
    assert neighbours_with(z, kind)[~shared].mean() > 0.9
    # within a type, the share of neighbours of one's own batch nears what its cells would give by chance
    for one in (0, 1):
        cells = kind == one
        share = np.bincount(batch[cells], minlength=2) / cells.sum()
        mixed = neighbours_with(z[cells], batch[cells]).mean() - (share**2).sum()
        raw = neighbours_with(data["expression"][cells], batch[cells]).mean() - (share**2).sum()
        assert mixed < 0.6 * raw


def test_separation_is_a_distance_of_two_batches():
    scores = jnp.asarray([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    batch = jnp.eye(2)[jnp.asarray([0, 0, 1])]
    # the difference of scores is 1 and 3 in batch 0, on average 2, and -5 in batch 1
    assert separation(scores, batch) == 7.0
    weights = jnp.asarray([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    assert separation(scores, batch, weights) == 8.0  # the first cell is left out
    assert separation(scores, jnp.eye(2)[jnp.zeros(3, int)]) == 0.0  # one batch alone
    assert separation(scores + 4.0, batch) == 7.0


def test_a_critic_of_slope_one_has_no_penalty():
    critic = Critic(3, 4, 2, rngs=nnx.Rngs(0))
    z = jax.random.normal(jax.random.key(0), (6, 3))
    contrast = jnp.asarray([[1.0, -1.0]] * 4 + [[0.0, 0.0]] * 2)
    slopes = jax.vmap(jax.jacrev(lambda x: critic(x[None])[0]))(z)[:4]
    wanted = ((jnp.linalg.norm(slopes[:, 0] - slopes[:, 1], axis=-1) - 1) ** 2).mean()
    np.testing.assert_allclose(critic.steepness(z, contrast), wanted, rtol=1e-5)
    frozen = nnx.grad(lambda c: c.frozen()(z).sum())(critic)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(frozen))
