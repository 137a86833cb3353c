from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from diffbio.data.plain import plain, to_numpy


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "none"),
        (True, True),
        (np.bool_(True), True),
        (np.float32(0.5), 0.5),
        (2**70, str(2**70)),
        (Path("a") / "b", "a/b"),
        ({"a/b": {1: None}}, {"a|b": {"1": "none"}}),
        ([1, "x", None], '[1, "x", null]'),
        ([{"a": 1}], '[{"a": 1}]'),
        (np.array(3), 3),
        (len, str(len)),
    ],
)
def test_values(value, expected):
    result = plain(value)
    assert result == expected
    assert type(result) is type(expected)


def test_lists_become_arrays():
    assert plain((1, 2.5)).tolist() == [1.0, 2.5]
    assert plain({"b", "a"}).tolist() == ["a", "b"]
    assert plain([]).tolist() == []
    assert plain([2**70]).tolist() == [str(2**70)]
    assert plain(sparse.coo_matrix(np.eye(2))).format == "csr"


def test_small_floats_of_machine_learning():
    dtypes = pytest.importorskip("ml_dtypes")
    array = to_numpy(np.array([1.5, 2.0], dtypes.bfloat16))
    assert array.dtype == np.float32
    assert array.tolist() == [1.5, 2.0]
