"""Planted effects are found; what cannot be is refused."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import diffbio
from diffbio.errors import ConfigError, DataError, DataWarning
from diffbio.operators.singlecell import CellCommunicationConfig, DifferentiableCellCommunication


@pytest.fixture(scope="module")
def planted():
    """300 cells, 12 genes: genes 8 and 9 rise where a neighbour has gene 0 and the cell has gene 4."""
    rng = np.random.default_rng(0)
    counts = rng.gamma(0.6, 1.0, (300, 12)) * (rng.uniform(size=(300, 12)) < 0.6)
    senders = np.stack([np.roll(np.arange(300), step) for step in (1, 2, -1, -2)], 1)
    graph = np.stack([senders.ravel(), np.repeat(np.arange(300), 4)])
    values = np.log1p(3 * counts)
    signal = values[:, 4] * values[senders, 0].mean(1)
    values[:, 8:10] += 2.5 * signal[:, None]
    pairs = np.array([[0, 4], [0, 5], [1, 4], [1, 5], [2, 6], [3, 7]])
    data = {"counts": values.astype(np.float32), "lr_pairs": pairs, "spatial_graph": graph}
    config = CellCommunicationConfig(n_genes=12, n_lr_pairs=6, hidden_dim=4, num_heads=2, n_pathways=2)
    op = DifferentiableCellCommunication(config, rngs=nnx.Rngs(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # that values are log-normalised is meant
        diffbio.fit(op, data, max_epochs=150, progress=False)
    return op, data, op.apply(data)[0]


def test_the_pair_that_acts_is_the_strongest_and_its_response_is_found(planted):
    _, _, found = planted
    strengths = np.asarray(found["pair_strengths"])
    assert strengths.argmax() == 0
    assert strengths[0] > 5 * np.sort(strengths)[-2]
    assert set(np.argsort(-np.abs(np.asarray(found["pair_responses"][0])))[:2]) == {8, 9}


def test_scores_are_factors_and_sum_to_what_a_receiver_gets(planted):
    op, data, found = planted
    parts = op.summary(**{key: jnp.asarray(data[key]) for key in ("counts", "spatial_graph")},
                       lr_pairs=jnp.asarray(data["lr_pairs"])[..., None])  # fmt: skip
    senders, receivers = data["spatial_graph"]
    edge = np.asarray(parts["edge_attention"]).mean(1)
    scores = edge[:, None] * np.asarray(parts["ligand"])[senders] * np.asarray(parts["receptor"])[receivers]
    np.testing.assert_allclose(found["communication_scores"], scores, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(np.add.reduceat(found["edge_attention"], np.arange(0, 1200, 4)), 1.0, rtol=1e-5)
    assert (np.asarray(found["pathway_weights"]) >= 0).all()


def test_no_gene_predicts_itself(planted):
    op, data, found = planted
    other = data["counts"].copy()
    other[0, 11] += 1.0  # a gene of no pair: cell 0's own prediction of it must stay
    again = op.apply(data | {"counts": other})[0]
    assert again["predicted_expression"][0, 11] == pytest.approx(float(found["predicted_expression"][0, 11]), abs=1e-4)
    receptors = data["lr_pairs"][:, 1]
    np.testing.assert_array_equal(np.asarray(found["pair_responses"])[np.arange(6), receptors], 0.0)


def test_bad_graphs_and_settings_are_refused(planted):
    op, data, _ = planted
    graph = data["spatial_graph"]
    for change, message in (
        ({"spatial_graph": np.where(graph == 299, 300, graph)}, "holds 300"),
        ({"spatial_graph": np.array([[3], [3]])}, "from cell 3 to itself"),
        ({"counts": np.round(5 * data["counts"])}, "log-normalised"),
        ({"lr_pairs": data["lr_pairs"][:5]}, "lr_pairs"),
    ):
        with pytest.raises(DataError, match=message):
            op.apply(data | change)
    with pytest.raises(ConfigError, match="multiple of num_heads"):
        CellCommunicationConfig(hidden_dim=6, num_heads=4)
