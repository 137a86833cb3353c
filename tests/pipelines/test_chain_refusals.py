"""What a chain and its stages refuse, before anything trains, and what they must not confuse."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from toy import Toy, ToyConfig

import diffbio
from diffbio.errors import ConfigError, MissingKeyError, ModelFileError
from diffbio.operators.normalization import (
    DifferentiableUMAP,
    LibrarySizeConfig,
    LibrarySizeNormalizer,
    UMAPConfig,
    VAENormalizer,
    VAENormalizerConfig,
)
from diffbio.operators.singlecell import (
    DifferentiablePseudotime,
    PseudotimeConfig,
    SoftClusteringConfig,
    SoftKMeansClustering,
)
from diffbio.pipelines import Chain, Own, Part, Stage, Term

N_GENES, N_LATENT = 8, 3
COUNTS = 1.0 + np.random.default_rng(0).poisson(3.0, (40, N_GENES)).astype(np.float32)


def toy(seed: int = 0) -> Toy:
    return Toy(ToyConfig(n_genes=N_GENES, n_latent=N_LATENT), rngs=nnx.Rngs(seed))


def groups() -> Part:
    op = SoftKMeansClustering(SoftClusteringConfig(n_clusters=3, n_features=N_LATENT), rngs=nnx.Rngs(0))
    return Part(op, "groups", reads={"embeddings": "latent"})


def chain(**how) -> Chain:
    return Chain([toy(), groups()], **how)


def fit(model, stages, **how):
    data = {"counts": COUNTS, **how.pop("more", {})}
    return diffbio.fit(model, data, stages=stages, progress=False, **how)


def refuses(model, stages, error, match, **how):
    """It says so, and nothing has trained."""
    before = np.array(model["toy"].weights[...])
    with pytest.raises(error, match=match):
        fit(model, stages, **how)
    np.testing.assert_array_equal(model["toy"].weights[...], before)


def test_one_operator_in_two_parts_is_refused():
    both = toy()
    with pytest.raises(ConfigError, match="stands in two parts"):
        Chain([Part(both, "a"), Part(both, "b", reads={"counts": "counts"}, frozen=True)])


@pytest.mark.parametrize("name", ["my.vae", "my/vae"])
def test_a_name_that_paths_could_not_tell_is_refused(name):
    with pytest.raises(ConfigError, match="no dot and no slash"):
        Part(toy(), name)


@pytest.mark.parametrize("name", ["loss", "good_steps", "balance_toy"])
def test_a_loss_called_like_a_column_of_the_history_is_refused(name):
    with pytest.raises(ConfigError, match=f"'{name}' is a column of every history"):
        chain(terms=[Term(name, lambda r: r["latent"].mean())])


def test_a_loss_is_a_number():
    vector = Term("vector", lambda r: r["latent"][:, 0])
    with pytest.raises(ConfigError, match=r"the loss 'vector' gives an array of shape \(40,\)"):
        chain(terms=[vector]).objective({"counts": jnp.asarray(COUNTS)})


def test_a_loss_that_asks_for_what_is_not_there_says_how_to_name_it():
    asks = Term("late", lambda r: (r["latent"][:, 0] * r["day"]).mean())
    with pytest.raises(MissingKeyError, match=r"the loss 'late' asks for 'day'.*reads="):
        fit(chain(terms=[asks]), [Stage(max_epochs=1)], more={"day": np.arange(40.0)})


FIRST = Stage(parts="toy", max_epochs=1)


@pytest.mark.parametrize(
    ("stages", "error", "match", "how"),
    [
        ([FIRST, Stage(parts="groups", max_epochs=0)], ConfigError, "max_epochs must be >= 1", {}),
        ([FIRST, Stage(terms="typo")], MissingKeyError, r"the loss 'typo' of stage 'joint' needs data\['latnt'\]", {}),
        ([FIRST], ConfigError, "objective of 'groups' takes no keywords",
         {"schedules": {"groups.nonsense": lambda epoch: 1.0}}),
        ([Stage(learning_rate={"toy": 1e-2}, terms="toy")], ConfigError, "optimizer= and a learning_rate by parts",
         {"optimizer": optax.adam(1e-3)}),
    ],
    ids=["a setting of a later stage", "a loss of a later stage", "a schedule", "two optimizers"],
)  # fmt: skip
def test_a_plan_is_checked_before_it_begins(stages, error, match, how):
    terms = [Own("toy"), Own("groups"), Term("typo", lambda latent: latent.mean(), reads="latnt")]
    refuses(chain(terms=terms), stages, error, match, **how)


def test_a_stage_of_a_part_that_cannot_learn_is_refused():
    fixed = LibrarySizeNormalizer(LibrarySizeConfig(), rngs=nnx.Rngs(0))
    model = Chain([Part(fixed, "fixed"), Part(toy(), "toy", reads={"counts": "normalized"})])
    refuses(model, [Stage(parts="fixed", max_epochs=5)], ConfigError, "'fixed' has neither an objective")
    assert [row["stage"] for row in fit(model, None, max_epochs=1).rows] == ["1-toy", "2-joint"]


def test_parts_behind_that_a_loss_reads_are_started_from_data():
    spread = Term("spread", lambda centroids: centroids.var(), reads="centroids")
    model = chain(terms=[Own("toy"), spread])
    fit(model, [Stage(parts="toy", terms=("toy", "spread"), max_epochs=1)])
    assert model["groups"].fitted


def test_sorted_cells_do_not_look_like_a_loss_without_a_minimum():
    later = Term("later", lambda latent, day: (jnp.abs(latent[:, 0]) * day).mean(), reads=("latent", "day"))
    model = chain(terms=[Own("toy"), later], balance="uncertainty")
    day = np.repeat([0.0, 1.0], 300)
    data = {"counts": np.tile(COUNTS, (15, 1)), "day": day}
    history = diffbio.fit(model, data, stages=[Stage(max_epochs=1)], progress=False)
    assert history.rows[-1]["balance_later"] > 0


class TestRowNumbers:
    """A root is the number of a row: it means another cell in a minibatch."""

    @staticmethod
    def ordered() -> Chain:
        config = PseudotimeConfig(
            root_cell_index=5, n_neighbors=5, n_diffusion_components=3, learn_metric="linear", n_features=N_LATENT
        )
        part = Part(DifferentiablePseudotime(config, rngs=nnx.Rngs(0)), "order", reads={"embeddings": "latent"})
        return Chain([toy(), part], terms=[Own("order")], inputs=("counts", "time"))

    def test_in_the_config_takes_all_cells_or_is_refused(self):
        more = {"time": np.arange(40.0, dtype=np.float32)}
        history = fit(self.ordered(), [Stage(max_epochs=1, batch_size=8)], more=more)
        assert history.rows[-1]["good_steps"] == 1
        some = [Stage(minibatches="random")]
        refuses(self.ordered(), some, ConfigError, "a part's config holds row numbers", more=more)

    def test_in_the_gradient_report(self):
        data = {"counts": COUNTS, "time": np.arange(40.0, dtype=np.float32)}
        with pytest.raises(ConfigError, match=r"a part's config has row numbers.*batch_size=40"):
            diffbio.gradients(self.ordered(), data, batch_size=8)
        found = diffbio.gradients(self.ordered(), data, batch_size=40, n_batches=2)
        assert found.loc["order", "agreement"] == pytest.approx(1.0)


class TestPairs:
    """UMAP's objective reads neighbours as heads and tails: only its own sampler gives such minibatches."""

    @staticmethod
    def mapped() -> Chain:
        umap = DifferentiableUMAP(UMAPConfig(input_features=N_LATENT, n_neighbors=5), rngs=nnx.Rngs(0))
        return Chain([toy(), Part(umap, "map", reads={"features": "latent"})], terms=[Own("map")])

    @pytest.mark.parametrize("wanted", ["all", "random"])
    def test_other_minibatches_are_refused(self, wanted):
        refuses(self.mapped(), [Stage(minibatches=wanted)], ConfigError, "'map' reads pairs of neighbours")

    def test_the_gradient_report_draws_them_too(self):
        model = self.mapped()
        fit(model, [Stage(parts="toy", max_epochs=1), Stage(parts="map", max_epochs=1)])
        from diffbio.fitting import source_for
        from diffbio.pipelines.gradient_report import minibatches

        source = source_for(model, {"counts": COUNTS})
        rows = minibatches(model, source, np.random.default_rng(0), 16, 3)
        latent = np.asarray(model["toy"].apply({"counts": jnp.asarray(COUNTS)})[0]["latent"])
        apart = np.linalg.norm(latent[:, None] - latent, axis=2)
        pairs = [apart[some[:8], some[8:]].mean() for some in rows]
        assert np.mean(pairs) < 0.8 * apart.mean()


HOW = {"validation": 0.0, "batch_size": 40}


class TestCheckpoints:
    """A folder holds the stages of one run."""

    def test_a_new_run_forgets_those_of_an_old_one(self, tmp_path):
        last = Stage(max_epochs=2, learning_rate=1e-2, **HOW)
        other = Chain([toy(0), groups()])
        fit(other, [Stage(parts="toy", max_epochs=1, **HOW), last], checkpoint=tmp_path / "run")
        first = Stage(parts="toy", max_epochs=3, **HOW)
        whole = Chain([toy(7), groups()])
        fit(whole, [first, last])
        part_way, resumed = (Chain([toy(7), groups()]) for _ in range(2))
        fit(part_way, [first], checkpoint=tmp_path / "run")
        fit(resumed, [first, last], checkpoint=tmp_path / "run", resume=True)
        np.testing.assert_array_equal(resumed["toy"].weights[...], whole["toy"].weights[...])

    def test_another_stage_does_not_go_on_from_it(self, tmp_path):
        fit(chain(), [Stage(max_epochs=1, name="j", terms="toy", minibatches="all")], checkpoint=tmp_path / "run")
        other = Stage(max_epochs=2, name="j", terms="groups", learning_rate={"toy": 1e-9})
        with pytest.raises(ModelFileError, match="config differs"):
            fit(chain(), [other], checkpoint=tmp_path / "run", resume=True)


def test_a_loaded_chain_learns_from_losses_on_other_keys(tmp_path):
    vae = VAENormalizer(VAENormalizerConfig(n_genes=N_GENES, latent_dim=N_LATENT, hidden_dims=(6,)), rngs=nnx.Rngs(0))
    Chain([Part(vae, "vae")]).save(tmp_path / "chain")
    day = Term("day", lambda latent, day: ((latent[:, 0] - day) ** 2).mean(), reads=("latent_mean", "day"))
    again = Chain.load(tmp_path / "chain", terms=[day])
    assert "day" in again.requires
    assert "day" in again.optional
