"""What every operator promises, as functions of one operator and its data.

`test_operator_contract.py` runs them on every registered operator; `test_mutants.py` runs them on operators
broken on purpose, to show that each check can fail.
"""

import dataclasses
import hashlib
import inspect
import re
import tempfile
import typing
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.test_util import check_grads
from jaxtyping import TypeCheckError
from scipy import sparse

from diffbio.errors import ConfigError, DataError, MissingKeyError
from diffbio.operators.base import Operator, axes, is_float, mode_of, operators_in

GRAD_RTOL = 1e-4  # the bar for finite differences in float64


def run(op, data):
    return op.apply(data, {}, None)[0]


def smooth(out, op):
    return {k: out[k] for k in op.smooth_out if k in out and jnp.issubdtype(out[k].dtype, jnp.floating)}


def in_float64(tree):
    def widen(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(widen, tree)


def float64_copy(op):
    graphdef, state = nnx.split(op)
    return nnx.merge(graphdef, in_float64(state))


def declared_outputs(op, data):
    before = data | {"untouched": 1}
    out, state, metadata = op.apply(dict(before), {"a": 1}, {"b": 2})
    assert state == {"a": 1}
    assert metadata["b"] == 2
    assert all(out[key] is before[key] for key in set(before) - set(op.provided())), "inputs are kept"
    assert set(out) == set(data) | {"untouched"} | set(op.provided())
    sizes = dict(op._fixed_axes())
    for key, wanted in (op.requires | op.provided()).items():
        if key not in out:
            assert key in op.optional, key
            continue
        assert out[key].ndim == len(axes(wanted)), key
        assert out[key].dtype.name in wanted.dtypes, key
        for axis, size in zip(axes(wanted), out[key].shape, strict=True):
            assert sizes.setdefault(axis, size) == size, (key, axis)


def jit_equals_eager(op, data):
    traces = []
    jitted = jax.jit(lambda d: (traces.append(0), run(op, d))[1])
    jitted(data)
    eager = run(op, data)
    for key, value in jitted(data).items():
        np.testing.assert_allclose(value, eager[key], rtol=2e-4, atol=2e-5, err_msg=key)
    assert len(traces) == 1, "compiled more than once for one shape"


def gradient_equals_finite_differences(op, data):
    """Along one random direction each, in float64: with respect to every float input, and to all parameters."""
    with jax.enable_x64(True):
        op, data = float64_copy(op), in_float64(data)
        for key in op.smooth_in:
            if key in data:
                check_reverse(lambda x, key=key: smooth(run(op, data | {key: x}), op), data[key])
        graphdef, params, rest = nnx.split(op, nnx.Param, ...)
        if not jax.tree.leaves(params):
            return
        check_reverse(lambda p: smooth(run(nnx.merge(graphdef, p, rest, copy=True), data), op), params)
        if hasattr(op, "objective"):
            check_reverse(lambda p: nnx.merge(graphdef, p, rest, copy=True).objective(data)[0], params)


def check_reverse(f, x):
    # steps of 1e-6: sharp temperatures have large third derivatives, float64 rounding stays below 1e-8
    check_grads(jax.jit(f), (x,), order=1, modes=["rev"], rtol=GRAD_RTOL, atol=1e-6, eps=1e-6)


def every_parameter_receives_a_gradient(op, data):
    graphdef, params, rest = nnx.split(op, nnx.Param, ...)
    if not jax.tree.leaves(params):
        return
    assert hasattr(op, "objective"), "it has parameters, so it needs an objective"

    def total(p):
        model = nnx.merge(graphdef, p, rest, copy=True)
        out = smooth(run(model, data), op)
        keys = jax.random.split(jax.random.key(7), len(out))
        weighted = sum((jax.random.normal(k, v.shape) * v).sum() for k, v in zip(keys, out.values(), strict=True))
        return weighted + model.objective(data)[0]

    for path, g in nnx.to_flat_state(jax.grad(total)(params)):
        assert jnp.isfinite(g[...]).all(), path
        assert jnp.abs(g[...]).max() > 0, f"no gradient reaches {path}"


def an_input_gradient_is_useful(op, data):
    """Following the gradient of the outputs' spread by Adam changes it: no path is cut."""
    for key in op.smooth_in:
        if key not in data:
            continue
        grad = jax.grad(lambda x, key=key: sum((v**2).sum() for v in smooth(run(op, data | {key: x}), op).values()))
        g = grad(data[key])
        assert jnp.isfinite(g).all(), key
        assert jnp.abs(g).max() > 0, f"no gradient reaches data[{key!r}]"


def cells_may_come_in_any_order(op, data):
    n_cells = next(data[k].shape[0] for k in op.requires if k in data and axes(op.requires[k])[0] == "cells")

    def shuffled(key, value, hint):
        if key in op.cell_numbers:
            value = (value + 1) % n_cells
        return jnp.roll(value, 1, axes(hint).index("cells")) if "cells" in axes(hint) else value

    def shuffle(tree, hints):
        return {k: shuffled(k, v, hints[k]) if k in hints else v for k, v in tree.items()}

    hints = op.requires | op.provided()
    a, b = shuffle(run(op, data), hints), run(op, shuffle(data, op.requires))
    for k in op.provided():
        if axes(hints[k]) == ["edges"]:  # a list of edges is a matrix; the order of the list says nothing
            if k not in op.cell_numbers:
                np.testing.assert_allclose(
                    *(edge_matrix(op, out, hints, k, n_cells) for out in (a, b)), rtol=1e-3, atol=1e-4, err_msg=k
                )
            continue
        np.testing.assert_allclose(a[k], b[k], rtol=1e-3, atol=1e-4, err_msg=k)


def edge_matrix(op, out, hints, weights, n_cells):
    ends = [k for k in hints if axes(hints[k]) == ["edges"] and k in op.cell_numbers]
    return np.asarray(sparse.coo_array((out[weights], tuple(out[k] for k in ends)), shape=(n_cells, n_cells)).todense())


def bad_input_is_named(op, data):
    for key, wanted in op.requires.items():
        if key not in data:
            continue
        if key not in op.optional:
            with pytest.raises(DataError, match=re.escape(repr(key))):
                run(op, {k: v for k, v in data.items() if k != key})
        with pytest.raises(DataError, match=f"{key}.*must be"):
            run(op, data | {key: data[key][None]})
        for i, axis in enumerate(axes(wanted)):
            if axis in op._fixed_axes():
                with pytest.raises(DataError, match=axis):
                    run(op, data | {key: jnp.concatenate([data[key]] * 2, axis=i)})
    float_keys = [k for k in op.requires if k in data and is_float(op.requires[k])]
    for key in float_keys:
        with pytest.raises(DataError, match=f"{key}.*must be"):
            run(op, data | {key: np.array(["text"])})


def degenerate_data_is_finite_or_refused(op, data, hard):
    def degrade(key, x):
        if key not in op.requires or "cells" not in axes(op.requires[key]):
            return x
        i = axes(op.requires[key]).index("cells")
        if hard == "zeros":
            return x * 0
        if hard == "one cell":
            return jnp.take(x, jnp.arange(1), i)
        return jnp.take(x, jnp.zeros(x.shape[i], int), i)

    data = {k: degrade(k, v) for k, v in data.items()}
    try:
        run(op, data)
    except DataError:
        return
    for key in op.smooth_in:
        if key not in data:
            continue
        value, grad = jax.value_and_grad(
            lambda x, key=key: sum(v.sum() for v in smooth(run(op, data | {key: x}), op).values())
        )(data[key])
        assert jnp.isfinite(value), key
        assert jnp.isfinite(grad).all(), key


def dtype_follows_the_input(op, data):
    for key, value in run(op, data).items():
        if key in op.provided() and is_float(op.provides[key]):
            assert value.dtype == jnp.float32, key


def eval_mode_repeats_itself(op, data):
    assert not op.training, "a fresh operator is in eval mode"
    first, second = run(op, data), run(op, data)
    for key in op.provided():
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)
    with mode_of(op, training=True):
        assert all(part.training for part in operators_in(op))
        run(op, data)
    assert not any(part.training for part in operators_in(op))
    third, fourth = run(op, data), run(op, data)  # running statistics may have moved, randomness is off again
    for key in op.provided():
        np.testing.assert_array_equal(third[key], fourth[key], err_msg=key)


def save_and_load_round_trip(op, data):
    with tempfile.TemporaryDirectory() as folder:
        op.save(Path(folder) / "model")
        again = Operator.load(Path(folder) / "model")
    assert type(again) is type(op)
    assert again.config == op.config
    assert again.fitted == op.fitted
    before, after = run(op, data), run(again, data)
    for key in op.provided():
        np.testing.assert_array_equal(after[key], before[key], err_msg=key)


def unfitted_outputs_are_marked(op, data):
    has_weights = bool(jax.tree.leaves(nnx.state(op, nnx.Param)))
    assert not (has_weights and op.fitted), "fresh weights are unfitted"
    _, _, metadata = jax.jit(lambda d: op.apply(d, {}, None))(data)
    if not op.fitted:
        assert set(metadata["unfitted"]) == set(op.provided())
        op.mark_fitted()
    assert op.apply(data, {}, None)[2] is None


def training_lowers_the_objective(op, data):
    if not hasattr(op, "objective") or not jax.tree.leaves(nnx.state(op, nnx.Param)):
        return
    graphdef, params, rest = nnx.split(op, nnx.Param, ...)

    @jax.jit
    def step(params, opt_state):
        def loss(p):
            return nnx.merge(graphdef, p, rest, copy=True).objective(data)[0]

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    optimizer = optax.adam(3e-3)
    opt_state, values = optimizer.init(params), []
    for _ in range(30):
        params, opt_state, value = step(params, opt_state)
        values.append(float(value))
    assert np.isfinite(values).all()
    assert min(values[-5:]) < values[0]


def settings_are_live_and_documented(cls):
    config = cls.config_class()
    op, _ = next(iter(cls.examples().values()))
    classes = {c for c in cls.__mro__ if issubclass(c, Operator)} | {type(part) for _, part in nnx.iter_modules(op)}
    modules = {inspect.getmodule(c) for c in classes if c.__module__.startswith(("diffbio.operators", cls.__module__))}
    source = "".join(inspect.getsource(m) for m in modules if m is not None)
    sizes = {f"n_{a}" for h in (cls.requires | cls.provides).values() for a in axes(h)}
    for f in dataclasses.fields(config):
        assert f"config.{f.name}" in source or f.name in sizes, f"{f.name} is a dead knob"
        assert f"{f.name}:" in (config.__doc__ or ""), f"{f.name} is undocumented"
        assert f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING, f.name
        if "check" in f.metadata and isinstance(f.default, int | float):
            # where jaxtyping checks the package, it names the field before our own check can
            with pytest.raises((ConfigError, TypeCheckError), match=f.name):
                config(**{f.name: type(f.default)(-1)})
    with pytest.raises((ConfigError, TypeCheckError)):
        config(**{dataclasses.fields(config)[0].name: "nonsense"})
    assert hash(config()) == hash(config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config(), dataclasses.fields(config)[0].name, 1)


def settings_change_results(cls):
    """Another value of any setting shows: in outputs, weights, objective, sampler, or as a refusal of the data."""
    op, data = next(iter(cls.examples().values()))
    before = everything_it_does(op, data)
    for f in dataclasses.fields(op.config):
        try:
            config = dataclasses.replace(op.config, **{f.name: another_value(f, getattr(op.config, f.name))})
        except ConfigError:  # it speaks up where it cannot do anything
            continue
        try:
            after = everything_it_does(cls(config, rngs=nnx.Rngs(0, another=1)), data)
        except DataError:
            continue
        assert after != before, f"{f.name} changes nothing"


def another_value(f, value):
    if isinstance(value, bool):
        return not value
    if value is None:
        return 2 if int in typing.get_args(f.type) else (1, 1)
    if isinstance(value, str) and "wanted" not in f.metadata:
        return "another"
    if isinstance(value, str):
        choices = re.findall("'([^']+)'", f.metadata["wanted"])
        return next(choice for choice in choices if choice != value)
    if isinstance(value, tuple):
        return tuple(v + 1 for v in value)
    return value + 1 if isinstance(value, int) else value * 0.6 + 0.05


def everything_it_does(op, data):
    """A digest of all that is to be seen of an operator: in both modes, before and after its start from data."""
    digest, on_host = hashlib.sha256(), {k: np.asarray(v) for k, v in data.items()}

    def note(tree):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key):
                digest.update(str(path).encode())
                digest.update(np.asarray(leaf).tobytes())

    def look():
        for path, variable in nnx.to_flat_state(nnx.state(op)):
            digest.update(f"{path} {type(variable).__name__}".encode())
        note(nnx.state(op))
        for training in (False, True):
            with mode_of(op, training=training):
                note({k: v for k, v in run(op, data).items() if k in op.provided()})
                if set(op.requires) == op.optional:  # a generator needs no cells to come in, others need one of several
                    with suppress(MissingKeyError):
                        note(run(op, {}))
                if hasattr(op, "objective"):
                    note(op.objective(data))

    look()
    if hasattr(op, "init_from"):
        op.init_from(on_host)
        look()
    if hasattr(op, "sampler"):
        note(op.sampler(on_host).order(np.random.default_rng(0), 8))
    return digest.hexdigest()


def says_what_it_does(cls):
    assert cls.smooth_in or (cls.rough_in and all(cls.rough_in.values())), "no gradient, and no reason given"
    assert cls.__doc__
    assert len(cls.__doc__.splitlines()[0]) <= 110


ON_CASES = [
    declared_outputs,
    jit_equals_eager,
    gradient_equals_finite_differences,
    every_parameter_receives_a_gradient,
    an_input_gradient_is_useful,
    cells_may_come_in_any_order,
    bad_input_is_named,
    dtype_follows_the_input,
    eval_mode_repeats_itself,
    save_and_load_round_trip,
    unfitted_outputs_are_marked,
    training_lowers_the_objective,
]
ON_CLASSES = [settings_are_live_and_documented, says_what_it_does]
DEGENERATE = ["zeros", "duplicates", "one cell"]
