"""Operators joined into one: what fits, what is refused, training in stages, and the operators' own contract."""

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import sparse
from toy import Toy, ToyConfig

import diffbio
from diffbio.errors import ConfigError, MissingKeyError, ModelFileError
from diffbio.losses import ClusteringCompactnessLoss
from diffbio.operators.base import to_numpy
from diffbio.operators.normalization import VAENormalizer, VAENormalizerConfig
from diffbio.operators.singlecell import (
    BatchCorrectionConfig,
    DifferentiableDiffusionImputer,
    DifferentiableHarmony,
    DiffusionImputerConfig,
    SoftClusteringConfig,
    SoftKMeansClustering,
)  # fmt: skip
from diffbio.pipelines import Chain, Own, Part, Stage, Term
from diffbio.pipelines.chain_stages import Neighborhoods

N_GENES, N_LATENT = 8, 3


def vae() -> VAENormalizer:
    config = VAENormalizerConfig(n_genes=N_GENES, latent_dim=N_LATENT, hidden_dims=(6,), n_batches=2)
    return VAENormalizer(config, rngs=nnx.Rngs(0))


def harmony() -> DifferentiableHarmony:
    config = BatchCorrectionConfig(n_clusters=2, n_features=N_LATENT, n_batches=2, n_iterations=2)
    return DifferentiableHarmony(config, rngs=nnx.Rngs(0))


def kmeans() -> SoftKMeansClustering:
    return SoftKMeansClustering(SoftClusteringConfig(n_clusters=3, n_features=N_LATENT), rngs=nnx.Rngs(0))


def toy_and_groups(**how) -> Chain:
    toy = Toy(ToyConfig(n_genes=N_GENES, n_latent=N_LATENT), rngs=nnx.Rngs(0))
    return Chain([toy, Part(kmeans(), "groups", reads={"embeddings": "latent"})], **how)


def three_parts(**how) -> Chain:
    parts = [
        vae(), Part(harmony(), reads={"embeddings": "latent_mean"}),
        Part(kmeans(), "groups", reads={"embeddings": "corrected_embeddings"}),
    ]  # fmt: skip
    return Chain(parts, **how)


def cells(n_cells: int = 40) -> dict:
    rng = np.random.default_rng(0)
    rates = np.exp(rng.normal(0, 1, (2, N_GENES)))[np.arange(n_cells) % 2]
    return {"counts": 1.0 + rng.poisson(rates).astype(np.float32), "batch_labels": np.arange(n_cells) % 2}


def test_it_gives_what_the_parts_give_one_after_the_other():
    chain, data = three_parts(), cells()
    assert set(chain.requires) == {"counts", "batch_labels", "library_size"}
    assert chain.optional == {"library_size"}
    found = chain.apply(data)[0]
    first = chain["vae_normalizer"].apply(data)[0]
    second = chain["harmony"].apply({"embeddings": first["latent_mean"], "batch_labels": data["batch_labels"]})[0]
    third = chain["groups"].apply({"embeddings": second["corrected_embeddings"]})[0]
    np.testing.assert_array_equal(found["cluster_assignments"], third["cluster_assignments"])
    assert set(found) == set(data) | set(chain.provides)


@pytest.mark.parametrize(
    "promise",
    [
        contract.declared_outputs, contract.jit_equals_eager, contract.gradient_equals_finite_differences,
        contract.every_parameter_receives_a_gradient, contract.an_input_gradient_is_useful,
        contract.cells_may_come_in_any_order, contract.eval_mode_repeats_itself, contract.training_lowers_the_objective,
        contract.unfitted_outputs_are_marked, contract.dtype_follows_the_input,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_it_keeps_the_contract_of_an_operator(promise):
    data = {k: jnp.asarray(v) for k, v in cells(12).items() if k == "counts"}
    promise(toy_and_groups(balance="uncertainty"), data)


def test_a_key_that_nobody_gives_is_refused_with_who_could():
    with pytest.raises(ConfigError, match=r"'groups' needs 'embeddings'.*vae_normalizer's 'latent_mean'.*inputs="):
        Chain([vae(), Part(kmeans(), "groups")])
    with pytest.raises(ConfigError, match=r"Operators that give it: .*DifferentiableHarmony"):
        Chain([vae(), Part(kmeans(), reads={"embeddings": "corrected_embeddings"})])
    one = Part(kmeans(), "one", reads={"embeddings": "latent_mean"}, writes={"cluster_labels": "z"})
    with pytest.raises(ConfigError, match=r"float \(cells, features\), but 'one' gives 'z' as int \(cells\)"):
        Chain([vae(), one, Part(kmeans(), "two", reads={"embeddings": "z"})])
    with pytest.raises(ConfigError, match="2 parts are called 'vae_normalizer'"):
        Chain([vae(), vae()])
    with pytest.raises(ConfigError, match="reads names 'nonsense'"):
        Part(kmeans(), reads={"nonsense": "latent"})
    with pytest.raises(MissingKeyError, match="counts"):
        toy_and_groups().apply({"other": 1})


def test_a_loss_at_any_point_trains_what_comes_before_it():
    compact = Term("compact", ClusteringCompactnessLoss(), reads=("latent", "cluster_assignments"), weight=0.1)
    by_user = Term("spread", lambda result: (result["latent"] ** 2).mean())
    chain = toy_and_groups(terms=[Own("toy"), compact, by_user])
    data = {"counts": jnp.asarray(cells()["counts"])}
    loss, metrics = chain.objective(data)
    assert set(metrics) == {"toy", "compact", "spread"}
    np.testing.assert_allclose(loss, metrics["toy"] + 0.1 * metrics["compact"] + metrics["spread"], rtol=1e-6)
    doubled = chain.objective(data, **{"weight.spread": 3.0})[0]
    np.testing.assert_allclose(doubled - loss, 2 * metrics["spread"], rtol=1e-4)
    graph, params, rest = nnx.split(chain, nnx.Param, ...)
    for name in ("compact", "spread"):
        gradient = jax.grad(lambda p, n=name: nnx.merge(graph, p, rest, copy=True).objective(data)[1][n])(params)
        assert np.abs(gradient["parts"]["toy"]["weights"][...]).max() > 0, name
    with pytest.raises(ConfigError, match="'day', which neither the data nor a part gives"):
        toy_and_groups(terms=[Term("order", jnp.mean, reads="day")], inputs=("counts",))
    with pytest.raises(MissingKeyError, match="'order' needs data\\['day'\\]"):
        toy_and_groups(terms=[Term("order", jnp.mean, reads="day")]).objective(data)


LEARNED = (("toy", "weights"), ("groups", "centroids"))


def test_a_local_objective_leaves_the_parts_before_alone():
    first = Toy(ToyConfig(n_genes=N_GENES, n_latent=N_GENES), rngs=nnx.Rngs(1))
    second = Toy(ToyConfig(n_genes=N_GENES, n_latent=N_LATENT), rngs=nnx.Rngs(0))
    joined = Part(second, "second", reads={"counts": "latent"}, writes={"latent": "z"})
    data = {"counts": jnp.asarray(cells()["counts"])}
    found = {}
    for local in (False, True):
        chain = Chain([Part(first, "first"), joined], terms=[Own("second", local=local)])
        graph, params, rest = nnx.split(chain, nnx.Param, ...)
        loss = jax.grad(lambda p, g=graph, r=rest: nnx.merge(g, p, r, copy=True).objective(data)[0])
        found[local] = {k: np.abs(v["weights"][...]).max() for k, v in loss(params)["parts"].items()}
    assert found[False]["first"] > 0
    assert found[True]["first"] == 0
    assert found[False]["second"] == found[True]["second"] > 0


def test_a_stage_with_a_learning_rate_for_each_part():
    chain = toy_and_groups(terms=[Own("toy"), Own("groups")])
    diffbio.fit(chain, cells(), stages=[Stage(parts="toy", max_epochs=1), Stage(parts="groups")], progress=False)
    before = {name: np.asarray(nnx.to_pure_dict(nnx.state(chain[name], nnx.Param))[key]) for name, key in LEARNED}
    rates = {"toy": 1e-9, "groups": 1e-2}
    how = {"max_epochs": 1, "batch_size": 1000}  # one step: Adam's first is the rate itself
    diffbio.fit(chain, cells(), stages=[Stage(learning_rate=rates, **how)], progress=False)
    after = {name: np.asarray(nnx.to_pure_dict(nnx.state(chain[name], nnx.Param))[key]) for name, key in LEARNED}
    assert np.abs(after["toy"] - before["toy"]).max() < 1e-7
    np.testing.assert_allclose(np.abs(after["groups"] - before["groups"]).max(), 1e-2, rtol=1e-3)
    with pytest.raises(ConfigError, match=r"learning_rate of 'toy' must be > 0"):
        diffbio.fit(chain, cells(), stages=[Stage(learning_rate={"toy": 0.0})], progress=False)
    with pytest.raises(ConfigError, match="there is no part 'toi'"):
        diffbio.fit(chain, cells(), stages=[Stage(learning_rate={"toi": 1.0})], progress=False)


def test_learned_balance_weighs_a_term_by_the_inverse_of_its_size():
    terms = [
        Term("large", lambda r: 10.0 + 0 * r["latent"].sum()),
        Term("small", lambda r: 0.1 + 0 * r["latent"].sum()),
    ]
    chain = toy_and_groups(terms=terms, balance="uncertainty")
    data = {"counts": cells()["counts"]}
    history = diffbio.fit(
        chain, data, stages=[Stage(max_epochs=400, learning_rate=0.05, batch_size=40)], progress=False
    )
    np.testing.assert_allclose(history.rows[-1]["balance_large"], 1 / 10, rtol=0.05)
    np.testing.assert_allclose(history.rows[-1]["balance_small"], 1 / 0.1, rtol=0.05)


def test_what_is_frozen_or_not_in_the_stage_stays_and_the_rest_learns():
    data = {"counts": cells()["counts"]}
    chain = toy_and_groups()
    diffbio.fit(chain, data, stages=[Stage(parts="toy", max_epochs=1), Stage(parts="groups")], progress=False)
    before = {k: to_numpy(v) for k, v in chain.saved_state().items()}
    diffbio.fit(chain, data, stages=[Stage(parts="toy", terms=("toy", "groups"), max_epochs=2)], progress=False)
    after = {k: to_numpy(v) for k, v in chain.saved_state().items()}
    moved = {k for k in before if before[k].dtype == np.float32 and not np.array_equal(before[k], after[k])}
    assert "parts/toy/weights" in moved
    assert not any(key.startswith("parts/groups") for key in moved)
    frozen = Chain([Part(Toy(ToyConfig(n_genes=N_GENES, n_latent=N_LATENT), rngs=nnx.Rngs(0)), frozen=True),
                    Part(kmeans(), "groups", reads={"embeddings": "latent"})])  # fmt: skip
    weights = np.array(frozen["toy"].weights[...])
    seen = float(frozen["toy"].seen[...])
    diffbio.fit(frozen, data, max_epochs=2, progress=False)
    np.testing.assert_array_equal(weights, frozen["toy"].weights[...])
    assert float(frozen["toy"].seen[...]) == seen, "statistics of a frozen part rest"
    with pytest.raises(ConfigError, match="is frozen"):
        diffbio.fit(frozen, data, stages=[Stage(parts="toy")], progress=False)


def test_a_part_that_no_stage_has_trained_stays_unfitted_and_is_started_when_its_turn_comes():
    data, chain = {"counts": cells()["counts"]}, toy_and_groups()
    diffbio.fit(chain, data, stages=[Stage(parts="toy", max_epochs=1)], progress=False)
    assert not chain["groups"].fitted
    assert not chain.fitted
    born = np.array(chain["groups"].centroids[...])
    diffbio.fit(chain, data, stages=[Stage(parts="groups", max_epochs=1, learning_rate=1e-9)], progress=False)
    assert np.abs(np.asarray(chain["groups"].centroids[...]) - born).max() > 1e-3, "k-means has put them"
    assert chain.fitted


def test_a_part_between_those_of_the_stages_is_started_before_the_next_one_reads_it(monkeypatch):
    chain, start, seen = three_parts(), SoftKMeansClustering.init_from, []

    def watched(self, data):
        seen.append(chain["harmony"].fitted)
        start(self, data)

    monkeypatch.setattr(SoftKMeansClustering, "init_from", watched)
    stages = [Stage(parts="vae_normalizer", max_epochs=1), Stage(parts="groups", max_epochs=1)]
    diffbio.fit(chain, cells(), stages=stages, progress=False)
    assert seen == [True]


def test_a_chain_of_frozen_parts_has_nothing_to_train():
    toy = Toy(ToyConfig(n_genes=N_GENES, n_latent=N_LATENT), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="nothing to train"):
        diffbio.fit(Chain([Part(toy, frozen=True)]), {"counts": cells()["counts"]}, stages=[Stage()], progress=False)


def test_a_stage_that_fails_lets_go_of_parts_and_terms():
    def broken(latent):
        raise ZeroDivisionError

    terms = [Own("toy"), Term("broken", broken, reads=("latent",))]
    chain = toy_and_groups(terms=terms)
    with pytest.raises(ZeroDivisionError):
        diffbio.fit(chain, {"counts": cells()["counts"]}, stages=[Stage(parts="toy", terms="broken")], progress=False)
    assert chain.learning is None
    assert chain.active is None


def test_default_training_starts_every_part_on_what_the_ones_before_give():
    data = cells(60)
    chain = three_parts()
    history = diffbio.fit(chain, {**data, "counts": sparse.csr_matrix(data["counts"])}, max_epochs=2, progress=False)
    assert {row["stage"] for row in history.rows} == {"1-vae_normalizer", "3-groups", "4-joint"}
    assert chain.fitted
    assert chain.apply(data)[2] is None
    latent = chain.apply(data)[0]["latent_mean"]
    harmony = chain["harmony"].apply({"embeddings": latent, "batch_labels": data["batch_labels"]})[0]
    np.testing.assert_allclose(chain.apply(data)[0]["corrected_embeddings"], harmony["corrected_embeddings"])


def test_it_is_saved_with_its_wiring(tmp_path):
    data = cells()
    chain = three_parts(balance="uncertainty", terms=[Own("groups"), Term("spread", jnp.mean, reads="latent_mean")])
    chain.save(tmp_path / "chain")
    again = Chain.load(tmp_path / "chain")
    for key in chain.provides:
        np.testing.assert_array_equal(again.apply(data)[0][key], chain.apply(data)[0][key])
    assert [term.name for term in again.terms] == ["groups"]
    vae().save(tmp_path / "vae")
    with pytest.raises(ModelFileError, match="not a Chain"):
        Chain.load(tmp_path / "vae")


def test_patches_hold_most_neighbours_and_every_cell_once():
    points = np.random.default_rng(0).normal(size=(400, 2))
    sampler = Neighborhoods(points)
    patches = sampler.order(np.random.default_rng(1), 50)
    assert patches.shape == (8, 50)
    assert len(np.unique(patches)) == 400
    inside = np.mean([np.isin(sampler.indices[patch], patch).mean() for patch in patches])
    assert inside > 0.6  # of a random minibatch 0.125 would be


def test_a_part_on_a_graph_learns_from_patches_of_neighbours():
    data = {"counts": cells(80)["counts"]}
    imputer = DifferentiableDiffusionImputer(
        DiffusionImputerConfig(n_neighbors=3, n_pca_components=3), rngs=nnx.Rngs(0)
    )
    toy = Toy(ToyConfig(n_genes=N_GENES, n_latent=N_LATENT), rngs=nnx.Rngs(0))
    chain = Chain([Part(imputer, "imputer", writes={"imputed_counts": "counts"}), toy], terms=[Own("toy")])
    history = diffbio.fit(chain, data, stages=[Stage(max_epochs=3, batch_size=20, learning_rate=1e-2)], progress=False)
    assert history.rows[0]["good_steps"] == 4
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]


def test_one_loss_of_the_users_trains_the_chain():
    term = Term("spread", lambda result: 1.0 + (result["latent"] ** 2).mean())
    toy = Toy(ToyConfig(n_genes=N_GENES, n_latent=N_LATENT), rngs=nnx.Rngs(0))
    history = diffbio.fit(Chain([toy], terms=[term]), {"counts": cells()["counts"]}, max_epochs=2, progress=False)
    assert history.rows[-1]["stage"] == "2-joint"
    assert "spread" in history.rows[-1]


@pytest.mark.parametrize("terms", [None, ("vae_normalizer",)], ids=["alone", "as a loss of the chain"])
def test_a_users_schedule_reaches_the_part(terms):
    asked = []
    fixed = {"vae_normalizer.kl_weight": lambda epoch: asked.append(epoch) or 0.5}
    stage = Stage(parts="vae_normalizer", terms=terms, max_epochs=1, validation=0.0)
    diffbio.fit(Chain([vae()]), cells(), stages=[stage], schedules=fixed, progress=False)
    assert asked


def test_what_cannot_work_is_refused():
    data = {"counts": cells()["counts"]}
    with pytest.raises(ConfigError, match=r"'weigth\.toy' schedules nothing"):
        diffbio.fit(toy_and_groups(), data, schedules={"weigth.toy": lambda e: 1.0}, max_epochs=1, progress=False)
    negative = [Own("toy"), Term("low", lambda result: -1.0 + 0 * result["latent"].sum())]
    with pytest.raises(ConfigError, match="needs positive losses, but 'low' is -1"):
        diffbio.fit(toy_and_groups(terms=negative, balance="uncertainty"), data, max_epochs=1, progress=False)
    with pytest.raises(ConfigError, match="own objective of 'toy' is named twice"):
        toy_and_groups(terms=[Own("toy"), Own("toy", name="again")])
    with pytest.raises(ConfigError, match="a chain within a chain"):
        Chain([toy_and_groups()])


def test_the_last_step_of_a_part_is_taken():
    """Solo's threshold, say, is found after training: `fit` of the part alone and the chain of it end alike."""
    finished = []

    class Finishing(Toy):
        def positions(self, data):
            return {"latent": self(data["counts"])["latent"]}

        def finish_from(self, positions):
            finished.append(positions["latent"].shape)

    toy = Finishing(ToyConfig(n_genes=N_GENES, n_latent=N_LATENT), rngs=nnx.Rngs(0))
    diffbio.fit(Chain([toy, Part(kmeans(), "groups", reads={"embeddings": "latent"})]), {"counts": cells()["counts"]},
                max_epochs=1, progress=False)  # fmt: skip
    assert finished == [(40, N_LATENT)] * 2, "after its own stage, and after the joint one"
