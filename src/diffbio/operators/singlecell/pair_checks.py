"""Checks of ligand-receptor pairs and of the values that they are read from."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...errors import DataError
from ..base import SMALL, Data, checked_finite

HIGHEST = 20.0  # of log(1 + x): e^20 molecules of a gene in a cell are none


def with_subunits(who: str, data: Data) -> Data:
    """`data` whose lr_pairs, if (pairs, 2), are (pairs, 2, 1).

    Raises:
        DataError: names in place of column numbers, or another shape.
    """
    value = data.get("lr_pairs")
    if value is None:
        return data
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if array.dtype.kind in "OUST":
        msg = f"{who}: data['lr_pairs'] must be int (pairs, 2) or (pairs, 2, subunits), columns of data['counts']; got "
        msg += f"{array.ravel()[:1].tolist()}. tl.ligand_receptor takes names, and complexes joined by '_'."
        raise DataError(msg)
    if array.ndim not in (2, 3) or array.shape[1] != 2:
        msg = f"{who}: data['lr_pairs'] must be int (pairs, 2) or (pairs, 2, subunits); got {array.dtype} of shape "
        msg += f"{array.shape}."
        raise DataError(msg)
    return {**data, "lr_pairs": array[..., None] if array.ndim == 2 else array}


def check_pairs(who: str, pairs: Any, n_genes: int) -> None:
    """Refuses columns that are not there, and a ligand or receptor without any; under jit all passes.

    Raises:
        DataError: naming the first such pair.
    """
    if isinstance(pairs, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        values = np.asarray(pairs)
    if values.size and (values.max() >= n_genes or values.min() < -1):
        row = int(np.argwhere((values >= n_genes) | (values < -1))[0, 0])
        odd = values[row][(values[row] >= n_genes) | (values[row] < -1)][0]
        msg = f"{who}: data['lr_pairs'] names column {odd} in pair {row}, but data['counts'] has columns 0 to "
        msg += f"{n_genes - 1}; leave out pairs whose genes are not measured."
        raise DataError(msg)
    empty = (values < 0).all(axis=2).any(axis=1)
    if empty.any():
        msg = f"{who}: data['lr_pairs'] has no gene for the ligand or the receptor of pair {int(empty.argmax())}."
        raise DataError(msg)


def check_normalized(who: str, counts: Any) -> None:
    """Refuses raw counts: values are to be log-normalised; under jit all passes.

    Raises:
        DataError: negative or missing values, whole numbers only, or some too large for a logarithm.
    """
    checked_finite(who, counts, key="counts", fix="pass log-normalised counts", lowest=0.0)
    if isinstance(counts, jax.core.Tracer) or counts.size == 0:
        return
    with jax.ensure_compile_time_eval():
        array = np.asarray(counts) if counts.size <= SMALL else counts
        most = float(array.max())
        whole = most >= 1 and bool((array == (np.round if array is not counts else jnp.round)(array)).all())
    if whole or most > HIGHEST:
        what = "whole numbers only" if whole else f"values up to {most:.6g}"
        msg = f"{who}: data['counts'] must be log-normalised, log(1 + 10,000 x / total of the cell), but holds {what}; "
        msg += "normalise raw counts first (tl.ligand_receptor and tl.communication do)."
        raise DataError(msg)
