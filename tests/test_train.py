"""The training loop: it learns, stops, resumes to the bit, survives signals and bad steps."""

import os
import signal

import anndata
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import sparse
from toy import Toy, ToyConfig

from diffbio.data.device_source import DeviceSource
from diffbio.data.source import ArraySource, as_source
from diffbio.errors import (
    ConfigError,
    DataError,
    DataWarning,
    ModelFileError,
    OutputError,
    TrainingDivergedError,
    TrainingInterrupted,
)
from diffbio.fitting import fit
from diffbio.history import Progress
from diffbio.operators.base import operators_in
from diffbio.train import Settings, Split

RNG = np.random.default_rng(0)
CELLS = (RNG.poisson(2, (120, 2)) @ RNG.poisson(1.5, (2, 6))).astype(np.float32)


def toy(seed=0):
    return Toy(ToyConfig(), rngs=nnx.Rngs(seed))


def fitted(**settings):
    model = toy()
    settings = {"progress": False, "max_epochs": 6, **settings}
    data = settings.pop("data", {"counts": CELLS})
    history = fit(model, data, **settings)
    return model, history


def weights(model):
    return {k: np.asarray(v[...]) for k, v in model.saved_state().items() if "rngs" not in k}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_it_learns_and_leaves_the_model_fitted_in_eval_mode():
    model, history = fitted(max_epochs=40)
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert history["validation_loss"][history.best_epoch] == min(history["validation_loss"])
    assert model.fitted
    assert not model.training
    assert float(model.seen[...]) > 0


def test_one_seed_gives_the_same_bits_and_another_seed_does_not():
    (a, _), (b, _), (c, _) = fitted(), fitted(), fitted(seed=1)
    assert_same(weights(a), weights(b))
    assert any((weights(a)[k] != weights(c)[k]).any() for k in weights(a))


def test_sparse_and_dense_counts_train_to_the_same_bits():
    dense, _ = fitted()
    for matrix in (sparse.csr_matrix(CELLS), sparse.csc_array(CELLS)):
        assert_same(weights(fitted(data={"counts": matrix})[0]), weights(dense))


def test_compiles_each_function_once(monkeypatch):
    traces = []
    objective = Toy.objective
    monkeypatch.setattr(Toy, "objective", lambda self, *a, **k: (traces.append(1), objective(self, *a, **k))[1])
    fitted(max_epochs=5)
    assert len(traces) <= 3  # shapes, step, evaluation


def validation_loss(model, settings):
    rows = Split.of(len(CELLS), settings, held_out=True).validation
    batches = [rows[i : i + 12] for i in range(0, len(rows), 12)]
    return float(np.mean([model.objective({"counts": jnp.asarray(CELLS[r])})[0] for r in batches]))


def test_early_stopping_keeps_the_best_weights_by_the_loss_of_cells_held_out_in_eval_mode():
    model, history = fitted(max_epochs=300, patience=3, learning_rate=0.05, batch_size=12)
    assert history.stopped_early
    assert len(history) < 300
    assert len(history) - 1 - history.best_epoch == 3
    losses = history["validation_loss"]
    assert losses[history.best_epoch] == min(losses)
    # the model holds those weights, its loss is that of its own mode, and the cells are those held out
    settings = Settings(batch_size=12)
    np.testing.assert_allclose(validation_loss(model, settings), min(losses), rtol=1e-5)
    assert abs(losses[-1] - min(losses)) > 1e-3 * min(losses)


def test_min_delta_counts_as_no_better_what_is_hardly_better():
    _, history = fitted(max_epochs=30, patience=2, min_delta=10.0)
    assert len(history) == 3


def test_cells_held_out_are_not_trained_on_and_the_others_are_shuffled():
    taken = []

    class Watched(ArraySource):
        """Notes what is taken."""

        def take(self, rows):
            taken.append(np.asarray(rows))
            return super().take(rows)

        take_sparse = take

    settings = {"max_epochs": 2, "batch_size": 12, "validation": 0.2}
    fitted(data=Watched({"counts": CELLS}), **settings)
    held_out = Split.of(len(CELLS), Settings(**settings), held_out=True).validation
    assert len(held_out) == 24
    batches = [rows for rows in taken if len(rows) == 12]
    trained = [rows for rows in batches if not np.isin(rows, held_out).any()]
    assert len(trained) >= 16  # two epochs of 8, and the first look
    assert all(np.isin(rows, held_out).all() or not np.isin(rows, held_out).any() for rows in batches)
    first, second = np.concatenate(trained[-16:-8]), np.concatenate(trained[-8:])
    assert sorted(first) == sorted(second) == sorted(set(range(120)) - set(held_out.tolist()))
    assert (first != second).any()
    assert (first != np.sort(first)).any()


@pytest.mark.parametrize("stop_after", [1, 9, 14])
def test_resume_is_bit_identical_to_a_run_that_was_never_stopped(tmp_path, stop_after):
    whole, history = fitted(checkpoint=tmp_path / "whole")

    class Stopping(ArraySource):
        """Sends SIGINT after some steps."""

        taken = 0

        def take(self, rows):
            self.taken += 1
            if self.taken == stop_after + 5:  # a few batches are taken before the first step
                os.kill(os.getpid(), signal.SIGINT)
            return super().take(rows)

        take_sparse = take

    with pytest.raises(TrainingInterrupted, match="checkpoint is saved") as caught:
        fitted(data=Stopping({"counts": CELLS}), checkpoint=tmp_path / "part")
    assert caught.value.exit_code == 130
    resumed, again = fitted(checkpoint=tmp_path / "part", resume=True)
    assert_same(weights(resumed), weights(whole))
    assert again["loss"] == history["loss"]


def test_resume_of_a_finished_run_may_go_on_longer(tmp_path):
    whole, _ = fitted(max_epochs=8, checkpoint=tmp_path / "a")
    fitted(max_epochs=5, checkpoint=tmp_path / "b")
    assert_same(weights(fitted(max_epochs=8, checkpoint=tmp_path / "b", resume=True)[0]), weights(whole))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data": {"counts": CELLS + (np.arange(120) == 77)[:, None]}}, "data"),
        ({"seed": 3}, "settings"),
        ({"optimizer": optax.sgd(0.1)}, "optimizer"),
    ],
)
def test_resume_refuses_what_differs(tmp_path, change, named):
    fitted(checkpoint=tmp_path / "a")
    with pytest.raises(ModelFileError, match=named):
        fitted(**{"checkpoint": tmp_path / "a", "resume": True, **change})


def test_resume_refuses_another_version(tmp_path, monkeypatch):
    fitted(checkpoint=tmp_path / "a")
    monkeypatch.setattr("diffbio.train.version", lambda name: "99")
    with pytest.raises(ModelFileError, match="versions differs"):
        fitted(checkpoint=tmp_path / "a", resume=True)


def test_a_checkpoint_replaces_no_saved_model(tmp_path):
    toy().save(tmp_path / "mine")
    with pytest.raises(OutputError, match="choose another path"):
        fitted(checkpoint=tmp_path / "mine")
    assert Toy.load(tmp_path / "mine").config == ToyConfig()


def test_force_goes_on_with_other_settings_and_nothing_else(tmp_path):
    first = {"checkpoint": tmp_path / "a", "max_epochs": 3}
    fitted(**first)
    again = {**first, "resume": True, "max_epochs": 5, "learning_rate": 0.05}
    named = r"'learning_rate': 0.01}, .*'learning_rate': 0.05}.* force=True \(--force\)"
    with pytest.raises(ModelFileError, match=named):
        fitted(**again)
    with pytest.warns(DataWarning, match="it goes on with those of this run"):
        _, history = fitted(**again, force=True)
    assert len(history) == 5
    with pytest.raises(ModelFileError, match="data differs") as caught:
        fitted(**again, force=True, data={"counts": CELLS + 1})
    assert "--force" not in str(caught.value)
    with (
        pytest.warns(DataWarning, match="n_latent"),
        pytest.raises(ModelFileError, match="does not fit this run: an array has shape"),
    ):
        fit(Toy(ToyConfig(n_latent=3), rngs=nnx.Rngs(0)), {"counts": CELLS}, **again, force=True, progress=False)


def test_a_nan_step_is_skipped_and_counted():
    cells = CELLS.copy()
    cells[5] = np.inf
    unchecked = as_source({"counts": cells}, cell_keys={"counts"})
    model, history = fitted(data=unchecked, validation=0)
    assert history["skipped_steps"] == [1.0] * 6
    assert all(np.isfinite(v).all() for v in weights(model).values())


def test_a_run_ends_after_as_many_bad_steps_in_a_row_as_are_allowed():
    cells = CELLS.copy()
    cells[:60] = np.inf
    source = as_source({"counts": cells}, cell_keys={"counts"})
    with pytest.raises(TrainingDivergedError, match="2 steps in a row"):
        fitted(data=source, validation=0, max_bad_steps=2, max_epochs=50, batch_size=12)


def test_a_diverged_run_says_what_to_do():
    with pytest.raises(TrainingDivergedError, match="Lower learning_rate"):
        fitted(data=as_source({"counts": CELLS * np.float32(np.nan)}, cell_keys={"counts"}))


def test_unknown_and_impossible_settings_are_named():
    with pytest.raises(ConfigError, match="bach_size"):
        fitted(bach_size=3)
    with pytest.raises(ConfigError, match="learning_rate must be > 0"):
        fitted(learning_rate=-1.0)
    with pytest.raises(DataError, match="5 genes"):
        fitted(data={"counts": CELLS[:, :5]})
    for name, value in {"max_epochs": 2.5, "batch_size": "10", "learning_rate": None, "seed": True}.items():
        with pytest.raises(ConfigError, match=f"{name} must be a"):
            fitted(**{name: value})
    with pytest.raises(ConfigError, match="leaves none of 120 cells"):
        fitted(validation=0.999)
    with pytest.raises(ConfigError, match="first argument is the model"):
        fit({"counts": CELLS}, toy())


def test_clipping_bounds_the_step():
    model, before = toy(), toy()
    settings = {"clip_norm": 1e-3, "max_epochs": 1, "batch_size": 108, "progress": False}
    fit(model, {"counts": CELLS}, optimizer=optax.sgd(1.0), **settings)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, nnx.state(model, nnx.Param), nnx.state(before, nnx.Param)))
    assert 0 < float(moved) <= 1.001e-3


def test_schedules_reach_the_objective():
    runs = [fitted(schedules={"weight": lambda epoch, top=top: jnp.minimum(top, epoch)}) for top in (0.0, 1e4)]
    small, large = ((CELLS @ np.asarray(model.weights[...])) ** 2 for model, _ in runs)
    assert large.mean() < 0.5 * small.mean()  # the weight is on the size of the code
    means = [np.array(history["loss"]) - np.array(history["error"]) for _, history in runs]
    assert means[0].max() == 0  # no weight at all
    assert means[1][0] < means[1][1]  # it grows with the epoch


def test_a_schedule_of_nothing_is_named():
    with pytest.raises(ConfigError, match="schedule 'wight' is no keyword of Toy"):
        fitted(schedules={"wight": lambda epoch: 1.0})


@pytest.mark.parametrize("schedule", [lambda epoch: 0.02 * epoch, lambda epoch: jnp.sin(epoch)])
def test_a_schedule_without_an_end_is_refused(schedule):
    with pytest.raises(ConfigError, match=r"schedule 'weight' is .* at infinity"):
        fitted(schedules={"weight": schedule})


@pytest.mark.parametrize(("value", "said"), [(np.nan, "NaN"), (-1.0, "negative")])
def test_counts_are_checked_before_training(value, said):
    cells = CELLS.copy()
    cells[3, 2] = value
    with pytest.raises(DataError, match=said):
        fitted(data={"counts": cells})


def test_fewer_cells_than_a_batch_and_a_single_cell():
    for n in (1, 3, 11):
        _, history = fitted(data={"counts": CELLS[:n]}, max_epochs=2)
        assert np.isfinite(history["loss"]).all()


def test_one_line_per_epoch_without_a_terminal(capsys):
    fitted(progress=True, max_epochs=3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "epoch 1/3, loss" in lines[0]
    assert "cells/s" in lines[0]


def test_history_plots():
    _, history = fitted()
    assert len(history.plot().lines) == 3
    assert list(history.to_frame().index) == list(range(6))


def test_operators_in_lists_the_operator_itself():
    assert [type(op) for op in operators_in(toy())] == [Toy]


def documented_forms():
    """Every way to write a training step that the docs show."""

    def two_tokens(model, data, optimizer):
        opt_state = optimizer.init(nnx.state(model, nnx.Param))

        @nnx.jit
        def step(model, opt_state):
            loss, grads = nnx.value_and_grad(lambda m: m.objective(data)[0])(model)
            params = nnx.state(model, nnx.Param)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            nnx.update(model, optax.apply_updates(params, updates))
            return loss, opt_state

        for _ in range(20):
            loss, opt_state = step(model, opt_state)
        return loss

    def nnx_optimizer(model, data, optimizer):
        optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            loss, grads = nnx.value_and_grad(lambda m: m.objective(data)[0])(model)
            optimizer.update(model, grads)
            return loss

        for _ in range(20):
            loss = step(model, optimizer)
        return loss

    return {"nnx.jit and nnx.value_and_grad": two_tokens, "nnx.Optimizer": nnx_optimizer}


@pytest.mark.parametrize("form", documented_forms().values(), ids=documented_forms().keys())
def test_documented_training_steps_train(form):
    model = toy()
    model.train_mode()
    before = float(toy().objective({"counts": jnp.asarray(CELLS)})[0])
    assert float(form(model, {"counts": jnp.asarray(CELLS)}, optax.adam(1e-2))) < before


def test_counts_on_the_device_train_to_the_same_bits():
    source = ArraySource({"counts": sparse.csr_array(CELLS)})
    assert_same(weights(fitted(data=DeviceSource(source))[0]), weights(fitted(data=source)[0]))


def test_a_file_read_ahead_resumes_to_the_same_bits(tmp_path, monkeypatch):
    anndata.AnnData(sparse.csr_matrix(CELLS)).write_h5ad(tmp_path / "cells.h5ad")
    settings = {"data": str(tmp_path / "cells.h5ad"), "max_epochs": 4}
    whole, history = fitted(**settings, checkpoint=tmp_path / "whole")
    steps = []
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "step", lambda *_: (steps.append(1), len(steps) == 9 and signal.raise_signal(2)))
        with pytest.raises(TrainingInterrupted):
            fitted(**settings, checkpoint=tmp_path / "part")
    resumed, again = fitted(**settings, checkpoint=tmp_path / "part", resume=True)
    assert_same(weights(resumed), weights(whole))
    assert again["loss"] == history["loss"]
