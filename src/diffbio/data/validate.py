"""Checks of counts, labels and gene names. Each says what is wrong, where, and what to do."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from diffbio.errors import DataError, DataWarning, MissingKeyError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray


def _warn(message: str) -> None:
    warnings.warn(message, DataWarning, stacklevel=3)


def batch_codes(obs: pd.DataFrame, key: str) -> tuple[NDArray[np.int32], list[str]]:
    """Encode a column of `obs` as integers.

    Returns codes (cells,) in 0 ... n - 1 and the n names: those of a categorical column in its order (names
    that no cell has are left out), else sorted.

    Raises
    ------
    MissingKeyError : no such column; the columns there are get listed.
    DataError : a cell has no value.

    Warns
    -----
    DataWarning : there is only one batch, or every cell is its own.
    """
    import pandas as pd

    if key not in obs:
        msg = f"obs has no column {key!r}; it has {', '.join(map(str, obs.columns)) or 'none'}"
        raise MissingKeyError(msg)
    column = pd.Categorical(obs[key]).remove_unused_categories()
    n_missing = int((column.codes < 0).sum())
    if n_missing:
        first = int(np.argmax(column.codes < 0))
        msg = (
            f"obs[{key!r}]: {n_missing} of {len(obs)} cells have no value, the first is cell {first} "
            f"({obs.index[first]!r}); fill them in or drop those cells"
        )
        raise DataError(msg)
    names = [str(name) for name in column.categories]
    if len(names) == 1:
        _warn(f"obs[{key!r}] holds one value, {names[0]!r}: nothing to correct")
    elif len(names) == len(obs) > 1:
        _warn(f"obs[{key!r}]: every cell has its own value; is it a batch?")
    return column.codes.astype(np.int32), names
