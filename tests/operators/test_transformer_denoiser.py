import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import diffbio
from diffbio.errors import ConfigError, DataError
from diffbio.losses.molecular_cv import poisson_loss
from diffbio.operators.singlecell import DifferentiableTransformerDenoiser, TransformerDenoiserConfig

GENES = 30


def denoiser(**settings):
    defaults = {"n_genes": GENES, "hidden_dim": 16, "num_heads": 2, "num_layers": 1, "num_latents": 4}
    return DifferentiableTransformerDenoiser(TransformerDenoiserConfig(**defaults | settings), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def simulated():
    """Three types whose genes go together, and molecules of the same cells that nobody has seen."""
    rng = np.random.default_rng(0)
    profiles = np.exp(rng.normal(0.0, 1.0, (3, GENES)))
    rates = profiles[rng.integers(3, size=200)] * rng.gamma(5.0, 0.2, (200, 1))
    seen, unseen = (rng.poisson(rates).astype(np.float32) for _ in range(2))
    return seen, unseen


@pytest.fixture(scope="module")
def trained(simulated):
    op = denoiser()
    diffbio.fit(op, {"counts": simulated[0]}, max_epochs=25, batch_size=40, learning_rate=5e-3, progress=False)
    return op


def imputed(op, counts, **more):
    return np.asarray(op.apply({"counts": jnp.asarray(counts), **more}, {}, None)[0]["imputed_counts"])


def mask_of(counts, ratio):
    return np.random.default_rng(1).random(counts.shape) < ratio


def test_it_foretells_molecules_that_it_has_not_seen_better_than_the_mean_profile(trained, simulated):
    seen, unseen = map(jnp.asarray, simulated)
    profile = jnp.broadcast_to(seen.mean(0), seen.shape)
    ours, mean = (float(poisson_loss(x, unseen)) for x in (jnp.asarray(imputed(trained, seen)), profile))
    raw = float(poisson_loss(seen + 1e-2, unseen))
    assert ours < min(mean, raw) - 0.05


def test_missing_counts_come_from_the_context_of_the_cell(trained, simulated):
    counts = simulated[0]
    mask = mask_of(counts, 0.2)
    filled = imputed(trained, counts, mask=jnp.asarray(mask))
    left = np.where(mask, 0.0, counts)
    by_gene = np.broadcast_to(left.sum(0) / (~mask).sum(0), counts.shape)
    error, of_mean = (((x - counts)[mask] ** 2).sum() for x in (filled, by_gene))
    assert error < 0.8 * of_mean
    np.testing.assert_array_equal(filled[~mask], counts[~mask])  # what is there is kept


def test_what_the_mask_hides_does_not_leak(trained, simulated):
    counts, mask = simulated[0][:20], mask_of(simulated[0][:20], 0.3)
    other = np.where(mask, 1e4 - counts, counts)
    np.testing.assert_array_equal(
        imputed(trained, counts, mask=jnp.asarray(mask))[mask], imputed(trained, other, mask=jnp.asarray(mask))[mask]
    )
    as_numbers = imputed(trained, counts, mask=mask.astype(np.int32))
    np.testing.assert_array_equal(as_numbers, imputed(trained, counts, mask=jnp.asarray(mask)))


def test_the_context_matters_and_reaches_genes_by_attention(trained, simulated):
    counts = jnp.asarray(simulated[0])
    graph, state = nnx.split(trained)
    for parameter in ("write_query", "read_query"):  # the same answer for every gene; the same look at every gene
        blind = nnx.merge(graph, state, copy=True)
        weights = getattr(blind.network, parameter)
        weights = weights.kernel if parameter == "write_query" else weights
        weights[...] = jnp.zeros_like(weights[...])
        assert float(blind.objective({"counts": counts})[0]) > float(trained.objective({"counts": counts})[0])
    silent = nnx.merge(graph, state, copy=True)
    silent.network.write_scale[...] = jnp.zeros(())
    assert float(silent.objective({"counts": counts})[0]) > float(trained.objective({"counts": counts})[0]) + 0.5


def test_genes_may_come_in_any_order(trained, simulated):
    counts = simulated[0][:12]
    order = np.random.default_rng(2).permutation(GENES)
    graph, state = nnx.split(trained)
    shuffled = nnx.merge(graph, state, copy=True)
    for owner, name in ((shuffled, "log_profile"), (shuffled, "log_theta"), (shuffled.network, "embedding")):
        rows = getattr(owner, name)
        rows[...] = rows[...][order]
    np.testing.assert_allclose(imputed(shuffled, counts[:, order]), imputed(trained, counts)[:, order], rtol=1e-3)


def test_a_block_of_cells_at_a_time_gives_what_few_cells_give(trained, simulated):
    counts = jnp.asarray(simulated[0][:13])

    @jax.jit
    def of(x):
        def total(x):
            imputed = trained.apply({"counts": x}, {}, None)[0]["imputed_counts"]
            return jnp.log(imputed).sum(), imputed

        (_, imputed), gradient = jax.value_and_grad(total, has_aux=True)(x)
        return imputed, gradient

    for whole, few in zip(of(counts), of(counts[:5]), strict=True):
        assert whole.shape == counts.shape
        np.testing.assert_allclose(whole[:5], few, rtol=1e-3, atol=1e-5)


def test_molecules_are_held_out_anew_in_train_mode_and_alike_in_eval_mode(simulated):
    op, data = denoiser(), {"counts": jnp.asarray(simulated[0])}
    assert float(op.objective(data)[0]) == float(op.objective(data)[0])
    seen, held_out, visible = op._hold_out(data["counts"], None)
    np.testing.assert_array_equal(seen + held_out, data["counts"])
    assert float(jnp.where(visible > 0, 0.0, seen).sum()) == 0.0
    np.testing.assert_allclose((visible == 0).mean(), 0.15, atol=0.01)
    of_visible = float(seen.sum() / jnp.where(visible > 0, data["counts"], 0.0).sum())
    assert abs(of_visible - 0.8) < 0.02
    op.train_mode()
    assert float(op.objective(data)[0]) != float(op.objective(data)[0])


def test_genes_keep_as_much_of_their_own_count_as_their_dispersion_says(simulated):
    op, counts = denoiser(), simulated[0][:8]
    context = np.asarray(op._expect(op.network.tables(), jnp.asarray(counts), jnp.ones((8, GENES))).log_rate)
    op.log_theta[...] = jnp.full(GENES, -20.0)  # the context says nothing
    np.testing.assert_allclose(imputed(op, counts), counts, rtol=1e-4, atol=1e-4)
    op.log_theta[...] = jnp.full(GENES, 15.0)  # the context says all
    poisson = denoiser(likelihood="poisson")
    np.testing.assert_allclose(imputed(op, counts), imputed(poisson, counts), rtol=1e-3)
    assert np.isfinite(context).all()


def test_attention_between_genes_is_a_distribution(trained, simulated):
    attention = trained.gene_attention({"counts": jnp.asarray(simulated[0][:10])})
    assert attention.shape == (GENES, GENES)
    np.testing.assert_allclose(attention.sum(1), 1.0, rtol=1e-5)
    assert float(attention.std(0).max()) > 1e-4  # genes do not all look at the same


def test_memory_does_not_grow_with_cells_times_genes_times_tokens():
    op = denoiser(n_genes=2000, hidden_dim=64, num_heads=4, num_layers=2, num_latents=8)

    def total(x):
        return op.apply({"counts": x}, {}, None)[0]["imputed_counts"].sum()

    need = [
        jax.jit(jax.grad(total)).lower(jnp.ones((n, 2000))).compile().memory_analysis().temp_size_in_bytes
        for n in (64, 128)
    ]
    assert need[0] < 100e6
    assert need[1] < 1.5 * need[0]


def test_bad_counts_and_settings_are_named():
    op = denoiser()
    counts = np.ones((3, GENES), np.float32)
    counts[1, 2] = np.nan
    with pytest.raises(DataError, match=r"TransformerDenoiser: .*row 1, column 2 holds nan; say by `mask`"):
        imputed(op, counts)
    assert np.isfinite(imputed(op, counts, mask=jnp.isnan(counts))).all()  # missing says so
    with pytest.raises(ConfigError, match="hidden_dim must be a multiple of num_heads"):
        TransformerDenoiserConfig(hidden_dim=10, num_heads=4)
    with pytest.raises(ConfigError, match="both 0"):
        TransformerDenoiserConfig(mask_ratio=0.0, thinning=0.0)
