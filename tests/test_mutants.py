"""Each promise of the contract can fail: operators broken on purpose, in the ways real code broke, are caught.

Three operators are broken in turn, each in every way.
"""

import dataclasses
import functools
import itertools

import contract
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from diffbio.operators.base import REGISTRY, axes, is_float
from diffbio.operators.normalization import DifferentiableUMAP, VAENormalizer
from diffbio.operators.singlecell import SoftKMeansClustering

BROKEN = [SoftKMeansClustering, DifferentiableUMAP, VAENormalizer]
CAUGHT = (AssertionError, TypeError, pytest.fail.Exception, jax.errors.JAXTypeError)
calls = itertools.count()


def first_float(hints):
    """The first float array with a cells axis."""
    return next(k for k, h in hints.items() if is_float(h) and axes(h)[0] == "cells")


def broken(cls, change, name="Mutant", **members):
    """A subclass of `cls` whose outputs go through `change(operator, inputs, compute)`."""

    @functools.wraps(cls.__call__)
    def call(self, *args, **inputs):
        inputs |= dict(zip(cls.requires, args, strict=False))
        return change(self, inputs, lambda changed: dict(cls.__call__(self, **changed)))

    return type(f"{cls.__name__}{name}", (cls,), {"__call__": call, "__module__": __name__, **members})


def altered(cls, change, **members):
    """A mutant whose first float output is `change(output, operator, first float input)`."""
    key_in, key_out = first_float(cls.requires), first_float(cls.provides)

    def apply(op, inputs, compute):
        out = compute(inputs)
        return out | {key_out: change(out[key_out], op, inputs[key_in])}

    return broken(cls, apply, **members)


def frozen_input(cls, *, leak=0.0):
    """Cuts the gradient to the first float input, but for a leak."""
    key = first_float(cls.requires)

    def apply(_, inputs, compute):
        x = inputs[key]
        return compute(inputs | {key: (1 - leak) * jax.lax.stop_gradient(x) + leak * x})

    return broken(cls, apply)


def missing_output(cls):
    return broken(cls, lambda _, inputs, compute: dict(list(compute(inputs).items())[1:]))


def branch_on_values(cls):
    return altered(cls, lambda out, _, x: out + 1 if bool(x.sum() > 1e9) else out)


def dead_parameter(cls):
    def init(self, config, *, rngs):
        cls.__init__(self, config, rngs=rngs)
        self.extra = nnx.Param(jnp.ones(3))

    init.__annotations__ = cls.__init__.__annotations__
    return type(f"{cls.__name__}Dead", (cls,), {"__init__": init, "__module__": __name__, "__call__": cls.__call__})


def depends_on_the_first_cell(cls):
    return altered(cls, lambda out, _, x: out + x[:1, :1])


def checks_nothing(cls):
    def inputs(self, data):
        return {k: jnp.asarray(data[k]) for k in self.requires if k in data}

    return altered(cls, lambda out, _, x: out, _inputs=inputs)


def loses_precision(cls):
    return altered(cls, lambda out, _, x: out.astype(jnp.float16))


def drifts(cls):
    return altered(cls, lambda out, _, x: out + 0.01 * next(calls))


def unsaved_state(cls):
    mutant = altered(cls, lambda out, op, x: out + getattr(op, "shift", 0.0))

    def examples(_):
        cases = cls.examples.__func__(mutant)
        for op, _ in cases.values():
            op.shift = 1.0
        return cases

    mutant.examples = classmethod(examples)
    return mutant


def claims_to_be_fitted(cls):
    mutant = altered(cls, lambda out, _, x: out)

    def examples(_):
        cases = cls.examples.__func__(mutant)
        for op, _ in cases.values():
            op.fitted = True
        return cases

    mutant.examples = classmethod(examples)
    return mutant


def objective_without_a_slope(cls):
    def objective(self, data, **scheduled):
        loss, metrics = cls.objective(self, data, **scheduled)
        return jax.lax.stop_gradient(loss), metrics

    return altered(cls, lambda out, _, x: out, objective=objective)


def widened(cls, config):
    """`cls` with the settings `config`, which no code reads."""
    mutant = altered(cls, lambda out, _, x: out)

    def examples(_):
        cases = cls.examples.__func__(mutant)
        for op, _ in cases.values():
            op.config = config(**dataclasses.asdict(op.config))
        return cases

    mutant.examples = classmethod(examples)
    return mutant


def unsafe_root(cls):
    return altered(cls, lambda out, _, x: out + jnp.sqrt((x - x.mean(0)) ** 2).sum())


MUTANTS = [
    (contract.declared_outputs, missing_output),
    (contract.jit_equals_eager, branch_on_values),
    (contract.gradient_equals_finite_differences, functools.partial(frozen_input, leak=0.9)),
    (contract.every_parameter_receives_a_gradient, dead_parameter),
    (contract.an_input_gradient_is_useful, frozen_input),
    (contract.cells_may_come_in_any_order, depends_on_the_first_cell),
    (contract.bad_input_is_named, checks_nothing),
    (contract.dtype_follows_the_input, loses_precision),
    (contract.eval_mode_repeats_itself, drifts),
    (contract.save_and_load_round_trip, unsaved_state),
    (contract.unfitted_outputs_are_marked, claims_to_be_fitted),
    (contract.training_lowers_the_objective, objective_without_a_slope),
    (functools.partial(contract.degenerate_data_is_finite_or_refused, hard="duplicates"), unsafe_root),
]


@pytest.fixture(autouse=True)
def _forget_mutants():
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


def named(value):
    return getattr(value, "__name__", getattr(getattr(value, "func", None), "__name__", None))


@pytest.mark.parametrize("cls", BROKEN, ids=named)
@pytest.mark.parametrize(("promise", "mutate"), MUTANTS, ids=named)
def test_a_broken_operator_is_caught(cls, promise, mutate):
    op, data = next(iter(mutate(cls).examples().values()))
    with pytest.raises(CAUGHT):
        promise(op, data)


def test_every_promise_has_a_mutant():
    tried = {named(promise) for promise, _ in MUTANTS}
    assert {f.__name__ for f in contract.ON_CASES} <= tried


@pytest.mark.parametrize("cls", BROKEN, ids=named)
def test_a_dead_or_undocumented_setting_is_caught(cls):
    config = cls.config_class()

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wider(config):
        __doc__ = config.__doc__
        momentum: float = 0.5

    mutant = altered(cls, lambda out, _, x: out)
    mutant.config_class = classmethod(lambda _: Wider)
    with pytest.raises(AssertionError, match="momentum"):
        contract.settings_are_live_and_documented(mutant)
    with pytest.raises(AssertionError, match="momentum changes nothing"):
        contract.settings_change_results(widened(cls, Wider))
    mutant.__doc__ = None
    with pytest.raises(AssertionError):
        contract.says_what_it_does(mutant)
