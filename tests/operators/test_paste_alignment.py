"""What the operator finds, and what it refuses; the contract tests its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffbio.errors import ConfigError, DataError, DataWarning
from diffbio.operators.singlecell import DifferentiablePASTEAlignment, PASTEAlignmentConfig
from diffbio.operators.singlecell.paste_alignment import check_converged

N = 30


def make(**settings):
    return DifferentiablePASTEAlignment(PASTEAlignmentConfig(**settings), rngs=nnx.Rngs(0))


def slices(seed=0, turn=2.0):
    rng = np.random.default_rng(seed)
    place = rng.random((N, 2)) * np.sqrt(N)
    counts = rng.poisson(np.exp(1.5 * np.sin(place @ rng.normal(size=(2, 12)) + rng.random(12) * 6) + 1)) + 1.0
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    order = rng.permutation(N)
    data = {
        "slice1_counts": counts, "slice1_coords": place, "slice2_counts": counts[order],
        "slice2_coords": (place @ rotation.T + 5)[order],
    }  # fmt: skip
    return {key: jnp.asarray(value, jnp.float32) for key, value in data.items()}, order, rotation


@pytest.mark.parametrize("alpha", [0.1, 0.9])
def test_a_slice_is_laid_on_itself(alpha):
    data, order, rotation = slices()
    found = make(alpha=alpha).apply(data, {}, None)[0]
    assert (np.asarray(found["transport_plan"]).argmax(axis=0) == order).all()
    np.testing.assert_allclose(found["rotation"], rotation.T, atol=1e-2)
    np.testing.assert_allclose(found["aligned_coords"], data["slice1_coords"][order], atol=0.05)
    np.testing.assert_allclose(found["slice1_in_slice2_coords"][order], data["slice2_coords"], atol=0.05)
    assert found["marginal_error"] < 1e-5
    assert found["objective"] < 0.05 * alpha + 0.05


def test_partial_overlap_couples_what_both_have():
    data, order, _ = slices()
    side = np.asarray(data["slice1_coords"])[:, 0]
    low, high = np.argsort(side)[: 2 * N // 3], np.argsort(side)[N // 3 :]
    of_copy = np.flatnonzero(np.isin(order, high))
    part = {
        "slice1_counts": data["slice1_counts"][low], "slice1_coords": data["slice1_coords"][low],
        "slice2_counts": data["slice2_counts"][of_copy], "slice2_coords": data["slice2_coords"][of_copy],
    }  # fmt: skip
    plan = np.asarray(make(overlap=0.5).apply(part, {}, None)[0]["transport_plan"])
    true = plan[low[:, None] == order[of_copy]].sum()
    assert plan.sum() == pytest.approx(0.5, abs=1e-5)
    assert true > 0.45


def bad(change):
    data = slices()[0]
    return {key: change[key](value) if key in change else value for key, value in data.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slice1_counts": lambda v: v[:2], "slice1_coords": lambda v: v[:2]}, "slice 1 has 2 spots.*at least 3"),
        ({"slice2_counts": lambda v: v.at[4].set(0)}, "1 spots of slice 2 have no counts.*first row 4"),
        ({"slice2_coords": lambda v: v.at[3, 0].set(jnp.nan)}, "finite, but row 3 of slice 2"),
        ({"slice1_coords": lambda v: v * 0}, "slice 1 lie in one place"),
        ({"slice1_counts": lambda v: v.at[0, 0].set(-1)}, "slice1_counts.*row 0, column 0 holds -1"),
        (
            {"slice1_counts": lambda v: v.at[:, ::2].set(0), "slice2_counts": lambda v: v.at[:, 1::2].set(0)},
            "share no genes",
        ),
        (
            {"slice1_coords": lambda v: jnp.tile(v, 2), "slice2_coords": lambda v: jnp.tile(v, 2)},
            "2 or 3 columns, those of slice 1 have 4",
        ),
    ],
)
def test_bad_data_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        make().apply(bad(change), {}, None)


def test_large_slices_are_sent_to_landmarks():
    shapes = {"slice1_counts": (6000, 2), "slice1_coords": (6000, 2), "slice2_counts": (6000, 2)}
    shapes["slice2_coords"] = (6000, 2)
    with pytest.raises(DataError, match=r"6000 x 6000 spots is too large.*tl\.align_slices"):
        jax.eval_shape(
            lambda d: make().apply(d, {}, None)[0], {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
        )


@pytest.mark.parametrize("setting", [{"alpha": 1.5}, {"alpha": -0.1}, {"overlap": 0.0}, {"pseudocount": 0.0}])
def test_bad_settings_are_refused(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        make(**setting)


def test_a_plan_that_does_not_converge_says_so():
    with pytest.warns(DataWarning, match=r"2\.0e-02 of its mass missed"):
        check_converged("Someone", jnp.asarray(0.02), jnp.asarray(0.0))
