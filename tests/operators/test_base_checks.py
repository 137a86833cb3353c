"""The check of values that the operators share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffbio.errors import DataError
from diffbio.operators import base


@pytest.mark.parametrize("small", [1, 1000])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0])
def test_the_first_wrong_count_is_named(wrong: float, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "SMALL", small)
    counts = jnp.ones((5, 4)).at[2, 3].set(wrong).at[4, 0].set(np.nan)
    with pytest.raises(DataError, match=r"^Me: data\['counts'\] must be finite and >= 0, but row 2, column 3 holds"):
        base.checked_counts("Me", counts)
    with pytest.raises(DataError, match=r"^Me: data\['depth'\] .* but row 2 holds .*; do this\.$"):
        base.checked_counts("Me", counts[:, 3], key="depth", fix="do this")


def test_right_values_come_back_and_negative_ones_are_finite() -> None:
    values = jnp.array([[0.0, -1.0]])
    assert base.checked_finite("Me", values, key="x") is values
    assert base.checked_counts("Me", -values[:, :0]).size == 0
    with pytest.raises(DataError, match="must be finite, but row 1 holds -inf"):
        base.checked_finite("Me", np.array([0.0, -np.inf]), key="x")


def test_traced_values_pass_and_constants_of_a_jitted_function_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "SMALL", 1)
    bad = jnp.array([-1.0, np.nan])
    jax.jit(lambda x: base.checked_counts("Me", x))(bad)
    jax.grad(lambda x: base.checked_counts("Me", x).sum())(bad)
    with pytest.raises(DataError):
        jax.jit(lambda x: x + base.checked_counts("Me", bad).sum())(1.0)
