"""`DifferentiableGRN`: planted regulation, limits, refusals, and no leak of a gene into itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import diffbio
from diffbio.errors import DataError
from diffbio.operators.singlecell import DifferentiableGRN, GRNInferenceConfig

TFS = jnp.array([0, 1, 2])
TRUE = np.array([0, 0, 1, 1, 2, 2, 2])  # the regulator of genes 3 to 9


def planted(seed=0, n_cells=300):
    """Three regulators that move together in part; each other gene follows one of them, every other one downwards."""
    random = np.random.default_rng(seed)
    drive = random.normal(size=(n_cells, 3)) + 0.8 * random.normal(size=(n_cells, 1))
    signs = np.where(np.arange(7) % 2, -1.0, 1.0)
    log_rate = np.hstack([0.5 * drive, 0.5 * drive[:, TRUE] * signs])
    counts = random.poisson(np.exp(2.5 + log_rate)).astype(np.float32)
    return {"counts": jnp.asarray(counts), "tf_indices": TFS}, signs


def operator(**settings):
    return DifferentiableGRN(
        GRNInferenceConfig(**({"n_tfs": 3, "n_genes": 10, "normalize": False} | settings)), rngs=nnx.Rngs(0)
    )


@pytest.fixture(scope="module")
def trained():
    data, signs = planted()
    op = operator()
    diffbio.fit(op, data, max_epochs=120, progress=False)
    return op, data, signs, jax.jit(lambda d: op.apply(d)[0])(data)


def test_planted_regulators_and_signs_are_found(trained):
    _, _, signs, out = trained
    weights = np.asarray(out["grn_matrix"])[:, 3:]
    np.testing.assert_array_equal(weights.argmax(axis=0), TRUE)
    np.testing.assert_array_equal(np.sign(np.asarray(out["grn_sign"])[TRUE, np.arange(3, 10)]), signs)
    assert (np.asarray(out["explained_variance"])[3:] > 0.2).all()
    drive = np.asarray(standardised(trained[1]["counts"][:, :3]))
    for k in range(3):
        assert np.corrcoef(out["tf_activity"][:, k], drive[:, k])[0, 1] > 0.5


def standardised(x):
    return (x - x.mean(axis=0)) / x.std(axis=0)


def test_a_gene_never_explains_itself_and_attention_is_a_share(trained):
    attention = np.asarray(trained[3]["grn_attention"])
    assert (attention[np.arange(3), np.arange(3)] == 0).all()
    assert (attention.sum(axis=0) <= 1 + 1e-6).all()


def test_shuffled_cells_leave_no_network(trained):
    """Co-expression is what is read: with each gene shuffled alone, attention goes to the background."""
    op, data, _, out = trained
    random = np.random.default_rng(1)
    shuffled = jnp.asarray(random.permuted(np.asarray(data["counts"]), axis=0))
    again = op.apply(data | {"counts": shuffled})[0]
    assert float(again["explained_variance"].max()) < 0.1 < float(out["explained_variance"][3:].min())


def test_zero_temperature_has_one_regulator_of_each_gene_per_head():
    data, _ = planted(n_cells=60)
    attention = operator(num_heads=1, sparsity_temperature=1e-6).apply(data)[0]["grn_attention"]
    values = np.asarray(attention)
    assert np.logical_or(values < 1e-6, values > 1 - 1e-6).all()


def test_price_takes_attention_from_regulators(trained):
    _, data, _, out = trained
    dear = operator(sparsity_lambda=2.0)
    diffbio.fit(dear, data, max_epochs=120, progress=False)
    spent = float(dear.apply(data)[0]["grn_attention"].sum())
    assert spent < 0.3 * float(out["grn_attention"].sum())


def test_a_prior_excludes_and_prefers():
    data, _ = planted(n_cells=60)
    op = operator()
    plain = op.apply(data)[0]["grn_attention"]
    prior = jnp.ones((3, 10)).at[0, 3].set(0.0).at[1, 4].set(50.0)
    out = op.apply(data | {"prior_network": prior})[0]["grn_attention"]
    assert float(out[0, 3]) == 0.0
    assert float(out[1, 4]) > float(plain[1, 4])
    np.testing.assert_allclose(out[:, 5:], plain[:, 5:], rtol=1e-5)


def test_blocks_of_genes_give_the_same(monkeypatch):
    data, _ = planted(n_cells=60)
    op = operator()
    whole, grads = outputs_and_gradient(op, data)
    monkeypatch.setattr("diffbio.nn.regulator_attention.EDGES_AT_ONCE", 17)  # blocks of four genes, the last padded
    blocks, block_grads = outputs_and_gradient(op, data)
    np.testing.assert_allclose(blocks, whole, atol=1e-6)
    np.testing.assert_allclose(block_grads, grads, atol=1e-5)


def outputs_and_gradient(op, data):
    def weights(counts):
        return op.apply(data | {"counts": counts})[0]["grn_matrix"]

    value, back = jax.vjp(weights, data["counts"])
    return value, back(jnp.arange(30.0).reshape(3, 10))[0]


def test_a_constant_gene_has_no_edges_and_is_named():
    data, _ = planted(n_cells=60)
    counts = data["counts"].at[:, 5].set(3.0).at[:, 1].set(1.0)
    out = operator().apply(data | {"counts": counts})[0]
    assert np.asarray(out["varying_genes"]).tolist() == [1, 0, 1, 1, 1, 0, 1, 1, 1, 1]
    assert (np.asarray(out["grn_matrix"])[:, 5] == 0).all()
    assert (np.asarray(out["grn_matrix"])[1] == 0).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tf_indices": jnp.array([0, 1, 10])}, "holds 10"),
        ({"tf_indices": jnp.array([0, 1, 1])}, "more than once"),
        ({"counts": jnp.ones((6, 10))}, "no regulator has two different values"),
        ({"counts": -jnp.ones((6, 10))}, ">= 0"),
        ({"prior_network": jnp.full((3, 10), jnp.nan)}, "prior_network"),
    ],
)
def test_refusals(change, said):
    data, _ = planted(n_cells=6)
    with pytest.raises(DataError, match=said):
        operator().apply(data | change)


def test_drawn_genes_have_the_evidence_they_have_among_all():
    data, _ = planted(n_cells=60)
    op, drawn = operator(), jnp.array([7, 1, 4])  # gene 1 is a regulator
    few, every = (op._evidence(data["counts"], TFS, None, which) for which in (drawn, None))
    for name in ("correlation", "effect", "possible"):
        np.testing.assert_allclose(getattr(few, name), np.asarray(getattr(every, name))[:, drawn], atol=1e-6)
    np.testing.assert_allclose(few.among, every.among, atol=1e-6)
