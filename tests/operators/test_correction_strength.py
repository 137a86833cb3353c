"""How far cells follow a correction: the ends of the scale, and that its own objective finds the right share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import diffbio
from diffbio.errors import ConfigError, DataError
from diffbio.operators.base import Operator
from diffbio.operators.singlecell import CorrectionStrength, CorrectionStrengthConfig


def make(**settings):
    return CorrectionStrength(CorrectionStrengthConfig(**settings), rngs=nnx.Rngs(0))


def shifted(n=120, taken=2.5):
    """Two batches a shift apart, and a correction of the second that takes out `taken` times that."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 2
    shift = labels[:, None].astype(np.float32) * np.array([3.0, 0, 0], np.float32)
    cells = rng.normal(size=(n, 3)).astype(np.float32) + shift
    return {"embeddings": cells, "corrected_embeddings": cells - taken * shift, "batch_labels": labels}


def blended(op, data):
    return np.asarray(op.apply(data)[0]["blended_embeddings"])


def test_from_no_correction_to_all_of_it_each_batch_by_its_own_share():
    data = shifted()
    np.testing.assert_array_equal(blended(make(strength=0.0), data), data["embeddings"])
    np.testing.assert_allclose(blended(make(), data), data["corrected_embeddings"], atol=1e-5)
    op = make()
    op.strength[...] = jnp.array([1.0, 0.4])
    np.testing.assert_allclose(blended(op, data), blended(make(strength=0.4), data), atol=1e-5)


def test_its_objective_finds_the_share_that_mixes_the_batches(tmp_path):
    data = shifted()
    op = make(strength=1.0)
    history = diffbio.fit(op, data, max_epochs=120, validation=0.0, progress=False)
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]
    np.testing.assert_allclose(op.strength[...][1], 1 / 2.5, atol=0.12)
    op.save(tmp_path / "strength")
    np.testing.assert_array_equal(blended(Operator.load(tmp_path / "strength"), data), blended(op, data))


def test_labels_out_of_range_are_refused_and_stay_under_jit():
    data, op = shifted(8), make()
    odd = {**data, "batch_labels": np.array([0, 1, -1, 2, 0, 1, 0, 1])}
    with pytest.raises(DataError, match="holds label -1, but n_batches is 2"):
        op.apply(odd)
    got = jax.jit(lambda d: op.apply(d)[0]["blended_embeddings"])(odd)
    np.testing.assert_array_equal(got[2:4], data["embeddings"][2:4])
    with pytest.raises(ConfigError, match="n_batches must be >= 2"):
        make(n_batches=1)
