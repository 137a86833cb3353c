"""Losses of a chain: the parts' own objectives, functions of what the chain gives, and how they are balanced."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ..errors import ConfigError, MissingKeyError
from ..operators.base import Data

if TYPE_CHECKING:
    from .chain import Chain

BALANCES = ("sum", "uncertainty")
TAKEN = ("loss", "validation_loss", "good_steps", "skipped_steps", "cells_per_second", "epoch", "stage")  # of a history


@dataclasses.dataclass(frozen=True)
class Own:
    """The own objective of a part, on what that part reads.

    part: its name.
    weight: factor.
    name: in the metrics; the part's unless given.
    local: the gradient stays within the part. Otherwise it also reaches the parts before, which then learn to give what
        is easy for this one: an imputer in front of a normaliser that smooth counts are simpler to explain.
    """

    part: str
    weight: float = 1.0
    name: str = ""
    local: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.part)


@dataclasses.dataclass(frozen=True)
class Term:
    """A loss on what the chain gives: one of `diffbio.losses`, or a function of yours.

    name: in the metrics.
    function: of the values of `reads`, in that order, or of the whole dict of results where `reads` is None (the
        chain's inputs and what its parts give); it gives a number.
    reads: keys of the chain, or of the data, as they are after the last part.
    weight: factor.
    """

    name: str
    function: Callable[..., Any]
    reads: tuple[str, ...] | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.reads is not None:
            object.__setattr__(self, "reads", (self.reads,) if isinstance(self.reads, str) else tuple(self.reads))

    def of(self, result: Data) -> jax.Array:
        """Its value.

        Raises:
            MissingKeyError: a key is absent.
            ConfigError: the function gives something else than a number.
        """
        value = jnp.asarray(self._value(result))
        if value.ndim:
            msg = f"Chain: the loss {self.name!r} gives an array of shape {value.shape}; a loss is one number, such as "
            msg += "the mean."
            raise ConfigError(msg)
        return value

    def _value(self, result: Data) -> Any:
        if self.reads is None:
            try:
                return self.function(result)
            except KeyError as error:
                key = error.args[0] if error.args else error
                if key in result:
                    raise
                msg = f"Chain: the loss {self.name!r} asks for {key!r}; there is {', '.join(sorted(result))}. What the "
                msg += f"data holds for a loss alone has to be named: Term(..., reads=(..., {key!r}))."
                raise MissingKeyError(msg) from error
        missing = [key for key in self.reads if key not in result]
        if missing:
            msg = f"Chain: the loss {self.name!r} needs data[{missing[0]!r}]; there is {', '.join(sorted(result))}."
            raise MissingKeyError(msg)
        return self.function(*(result[key] for key in self.reads))


def checked_terms(
    chain: "Chain", terms: Sequence[Own | Term] | None, *, open_inputs: bool, inputs: Sequence[str]
) -> tuple[Own | Term, ...]:
    """The terms; None is the own objective of every part that has one.

    Raises:
        ConfigError: two have one name, or that of a column of every history; a part has no objective, or a key is given
            by nobody.
    """
    if terms is None:
        return tuple(Own(name) for name in chain.names if hasattr(chain[name], "objective"))
    names = [term.name for term in terms]
    if double := sorted({name for name in names if names.count(name) > 1}):
        msg = f"Chain: two terms are called {double[0]!r}; give one another name."
        raise ConfigError(msg)
    if taken := [name for name in names if name in TAKEN or name.startswith(("balance_", "validation_"))]:
        msg = f"Chain: {taken[0]!r} is a column of every history; give that term another name."
        raise ConfigError(msg)
    parts = [term.part for term in terms if isinstance(term, Own)]
    if double := sorted({part for part in parts if parts.count(part) > 1}):
        msg = f"Chain: the own objective of {double[0]!r} is named twice; once with the sum of the weights is enough."
        raise ConfigError(msg)
    for term in terms:
        if isinstance(term, Own):
            if not hasattr(chain[term.part], "objective"):
                able = [name for name in chain.names if hasattr(chain[name], "objective")]
                msg = f"Chain: part {term.part!r} has no objective of its own; {', '.join(able) or 'none'} has."
                raise ConfigError(msg)
        elif not open_inputs:
            known = {*inputs, *chain.provided()}
            for key in term.reads or ():
                if key not in known:
                    msg = f"Chain: the loss {term.name!r} reads {key!r}, which neither the data nor a part gives; "
                    msg += f"there are {', '.join(sorted(known))}."
                    raise ConfigError(msg)
    return tuple(terms)


def balanced(
    values: Mapping[str, jax.Array], weights: Mapping[str, Any], log_variances: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum of weighted terms, and the terms by name.

    With `log_variances` s it is the sum of weight · (exp(-s) L + s) / 2, the likelihood of tasks whose noise is learned
    (Kendall, Gal and Cipolla 2018): its minimum over s weighs a term by 1 / L, so that terms of any scale count
    alike. Terms must be positive; exp(-s) is logged as `balance_<term>`.

    Args:
        values: by name.
        weights: by the same names.
        log_variances: of the terms, in the order of `values`' names in `weights`.
    """
    metrics: dict[str, jax.Array] = dict(values)
    loss = jnp.zeros(())
    for place, (name, weight) in enumerate(weights.items()):
        value = values[name]
        if log_variances is not None:
            scale = jnp.exp(-log_variances[place])
            value = (scale * value + log_variances[place]) / 2
            metrics[f"balance_{name}"] = scale
        loss = loss + weight * value
    return loss, metrics
