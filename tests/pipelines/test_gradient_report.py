"""The report names what is dead, exploding, silent, noisy or not finite, and gives known numbers on linear parts."""

import dataclasses
from typing import TypedDict

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float
from toy import Toy, ToyConfig

import diffbio
from diffbio.errors import ConfigError
from diffbio.operators.base import Config, Operator, positive
from diffbio.operators.singlecell import DifferentiablePseudotime, SoftClusteringConfig, SoftKMeansClustering
from diffbio.pipelines import Chain, Own, Part, Term, create_single_cell_pipeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledConfig(Config):
    """Settings of `Scaled`.

    factor: of the first column.
    """

    factor: float = positive(1.0)


class Given(TypedDict):
    y: Float[Array, "cells features"]


class Scaled(Operator):
    """A diagonal map: `factor` on the first column, 1 on the others."""

    def __init__(self, config: ScaledConfig):
        self.config = config

    def __call__(self, x: Float[Array, "cells features"]) -> Given:
        return {"y": x * jnp.where(jnp.arange(x.shape[1]) == 0, self.config.factor, 1.0)}


class Odd(Scaled):
    """Of the same map, the parts that go wrong."""

    how: str = "dead"

    def __call__(self, x: Float[Array, "cells features"]) -> Given:
        if self.how == "dead":
            return {"y": jnp.round(x)}
        if self.how == "exploding":
            return {"y": x * 1e5}
        if self.how == "silent":
            return {"y": x[:, :1]}
        return {"y": jnp.sqrt(x - x)}


def data(n_cells: int = 64, n_features: int = 4) -> dict:
    return {"x": np.random.default_rng(0).normal(size=(n_cells, n_features)).astype(np.float32)}


def odd(how: str) -> Odd:
    made = Odd(ScaledConfig())
    made.how = how
    return made


def test_linear_parts_have_the_gain_and_condition_of_their_matrix():
    one, two = Part(Scaled(ScaledConfig(factor=10.0)), "one"), Part(Scaled(ScaledConfig()), "two", reads={"x": "y"})
    chain = Chain([one, two], terms=[Term("square", lambda r: 0.5 * (r["y"] ** 2).sum())])
    found = diffbio.gradients(chain, data(1, 4), n_probes=4, n_batches=2)
    assert list(found.index) == ["one", "two"]
    np.testing.assert_allclose(
        found.loc["one", ["gain", "condition"]].astype(float), [np.sqrt(103 / 4), 10 / np.sqrt(103 / 4)], rtol=1e-4
    )
    np.testing.assert_allclose(found.loc["two", ["gain", "condition"]].astype(float), [1, 1], rtol=1e-4)
    x = data(1, 4)["x"][0]
    scaled = x * [10, 1, 1, 1]
    np.testing.assert_allclose(found.loc["two", "out"], np.linalg.norm(scaled), rtol=1e-4)
    np.testing.assert_allclose(found.loc["one", "into"], np.linalg.norm(scaled * [10, 1, 1, 1]), rtol=1e-4)
    assert (found["verdict"] == "ok").all()
    assert np.isinf(found.loc["one", "signal_to_noise"]), "both minibatches are the one cell"


@pytest.mark.parametrize(("how", "verdict"), [
    ("dead", "dead"), ("exploding", "exploding"), ("silent", "partly silent"), ("nan", "not finite"),
])  # fmt: skip
def test_what_goes_wrong_is_named(how, verdict):
    chain = Chain([odd(how)], terms=[Term("mean", lambda r: r["y"].mean())])
    assert diffbio.gradients(chain, data()).loc["odd", "verdict"] == verdict


def test_gradients_that_contradict_each_other_are_noisy():
    chain = Chain([Scaled(ScaledConfig())], terms=[Term("signs", lambda r: (r["y"] ** 2).sum())])
    found = diffbio.gradients(chain, data(4000, 3), batch_size=16, n_batches=32)
    assert found.loc["scaled", "verdict"] == "noisy", "the mean of x is 0"
    shifted = {"x": data(4000, 3)["x"] + 5}
    found = diffbio.gradients(chain, shifted, batch_size=16, n_batches=32)
    assert found.loc["scaled", "verdict"] == "ok"
    assert found.loc["scaled", "agreement"] > 0.9


def test_the_pipeline_is_told_part_by_part():
    pipeline = create_single_cell_pipeline(
        n_genes=8, n_clusters=3, latent_dim=3, hidden_dims=(6,), n_batches=2, batch_correction_clusters=2,
        batch_correction_iterations=2,
    )  # fmt: skip
    counts = np.random.default_rng(0).poisson(3.0, (40, 8)).astype(np.float32)
    cells = {"counts": counts, "ambient_profile": np.full(8, 1 / 8, np.float32), "batch_labels": np.arange(40) % 2}
    found = diffbio.gradients(pipeline, cells, batch_size=16, n_batches=3)
    assert list(found.index) == ["ambient_removal", "vae_normalizer", "batch_correction", "dim_reduction", "clustering"]
    assert (found["parameters"][["ambient_removal", "vae_normalizer", "dim_reduction"]] > 0).all()
    assert np.isfinite(found["gain"]).all()
    assert set(found["verdict"]) <= {"ok", "noisy"}
    with pytest.raises(ConfigError, match="n_batches 1"):
        diffbio.gradients(pipeline, cells, n_batches=1)


def test_a_local_objective_sends_nothing_to_the_parts_before_it():
    toy = Toy(ToyConfig(n_genes=4, n_latent=2), rngs=nnx.Rngs(0))
    groups = SoftKMeansClustering(SoftClusteringConfig(n_clusters=2, n_features=2), rngs=nnx.Rngs(0))
    data = {"counts": np.random.default_rng(0).poisson(3.0, (24, 4)).astype(np.float32)}
    out = {}
    for local in (False, True):
        parts = [Part(toy, "toy"), Part(groups, "groups", reads={"embeddings": "latent"})]
        chain = Chain(parts, terms=[Own("groups", local=local)])
        out[local] = diffbio.gradients(chain, data, batch_size=8, n_batches=2).loc["toy", "out"]
    assert out[False] > 0
    assert out[True] == 0


def test_row_numbers_of_cells_are_refused():
    op, data = DifferentiablePseudotime.examples()["dpt"]
    with pytest.raises(ConfigError, match="row numbers of cells"):
        diffbio.gradients(op, {key: np.asarray(value) for key, value in data.items()}, batch_size=4, n_batches=2)
