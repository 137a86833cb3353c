"""The contract of every operator, and the registry that the contract tests walk."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import numbers
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from .. import storage
from ..errors import ConfigError, DataError, MissingKeyError, ModelFileError
from ..math.sparse import SparseRows

REGISTRY: dict[str, type[Operator]] = {}

Data = dict[str, Any]

FLOATS = getattr(Float, "dtypes")  # noqa: B009 - jaxtyping's types are something else to a type checker
INTEGERS = getattr(Int, "dtypes")  # noqa: B009

SMALL = 1_000_000  # values that are looked over at once by numpy; more by the device, without a copy


@jax.tree_util.register_static
class Unfitted(tuple[str, ...]):
    """Names of outputs that come from untrained weights; static, so that it passes through `jax.jit`."""

    __slots__ = ()


class Alternation(typing.NamedTuple):
    """A game's schedule, as an operator's attribute `alternation`: part of the parameters moves at some steps only."""

    rare: tuple[str, ...]  # starts of the paths of these parameters
    every: int  # they move at every so-many-th step, the others at each
    first_moment: float  # of Adam: gradients of an adversary turn, a long memory makes both sides circle


def setting(default: Any, wanted: str, check: Any) -> Any:
    """A config field with a rule: `check(value)` must hold, `wanted` says it in words."""
    return dataclasses.field(default=default, metadata={"check": check, "wanted": wanted})


def positive(default: Any = dataclasses.MISSING) -> Any:
    """A config field that must be > 0 (each entry, for a tuple)."""
    return setting(default, "> 0", lambda v: all(x > 0 for x in v) if isinstance(v, tuple) else v > 0)


def nonnegative(default: Any = dataclasses.MISSING) -> Any:
    """A config field that must be >= 0."""
    return setting(default, ">= 0", lambda v: v >= 0)


def fraction(default: Any = dataclasses.MISSING) -> Any:
    """A config field in [0, 1)."""
    return setting(default, "in [0, 1)", lambda v: 0 <= v < 1)


def one_of(default: str, *choices: str) -> Any:
    """A config field that takes one of a few words; the first is the default."""
    everything = (default, *choices)
    return setting(default, "one of " + ", ".join(map(repr, everything)), lambda v: v in everything)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Frozen, hashable settings. Lists become tuples, so that `hidden_dims=[32, 16]` hashes.

    Raises:
        ConfigError: a value is of the wrong type or out of its range, naming the field.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            plain = tuple(value) if isinstance(value, list) else value
            if isinstance(plain, np.generic):  # numpy's numbers are welcome and become Python's
                plain = plain.item()
            if plain is not value:
                object.__setattr__(self, f.name, value := plain)
            where = f"{type(self).__name__}.{f.name}"
            if not _is_a(value, hints[f.name]):
                msg = f"{where} must be {_say_type(hints[f.name])}, got {value!r}."
                raise ConfigError(msg)
            if value is not None and "check" in f.metadata and not f.metadata["check"](value):
                msg = f"{where} must be {f.metadata['wanted']}, got {value!r}."
                raise ConfigError(msg)


class Operator(nnx.Module):
    """Maps a dict of arrays to the same dict with new entries.

    The signature of `__call__` is the contract: its parameters are the keys that `apply` reads, with
    jaxtyping shapes (a default of None marks an optional key); the TypedDict it returns lists the keys
    that it adds. The size of axis `genes` is `config.n_genes` if there is one, else that of the first
    array that has the axis. Checks, messages, docs and the contract tests derive from this.

    A fresh operator is in eval mode: deterministic, no key needed. `train_mode()` turns on sampling and
    dropout, drawn from the operator's own `nnx.Rngs`.

    What can be trained defines `objective(data, **schedules) -> (loss, metrics)`. What starts from data
    defines `init_from(data)`. What has a last step after training defines `positions(data)`, small arrays with a row
    per cell, and `finish_from(positions)`, which gets those of all cells on the host. What `for_training(data)` gives
    is trained on in place of a dict of the user's. Until trained, `fitted` is False and `apply` names the outputs in
    `metadata["unfitted"]`.
    """

    config: Config
    fitted: bool = True  # False in an operator with untrained weights
    training: bool = False
    requires: ClassVar[dict[str, Any]]
    optional: ClassVar[frozenset[str]]
    provides: ClassVar[dict[str, Any]]
    rough_in: ClassVar[dict[str, str]] = {}  # float inputs without an honest gradient -> why
    rough_out: ClassVar[dict[str, str]] = {}  # float outputs without one -> why
    smooth_in: ClassVar[list[str]]
    smooth_out: ClassVar[list[str]]
    init_cells: ClassVar[int | None] = None  # how many cells init_from wants to see at most; None: all
    cell_numbers: ClassVar[frozenset[str]] = frozenset()  # inputs that hold row numbers of cells
    graph_of_cells: ClassVar[bool] = False  # what it gives for a cell hangs on which other cells are there
    batches_by_place: ClassVar[bool] = False  # `objective` reads a minibatch by place: only its `sampler` draws it
    sparse_keys: ClassVar[frozenset[str]] = frozenset()  # inputs that `objective` takes as `SparseRows` too
    held_in_fit: tuple[str, ...] = ()  # paths of parameters that diffbio.fit leaves where init_from has set them
    fit_defaults: ClassVar[Mapping[str, Any]] = {}  # arguments of diffbio.fit that suit the method

    if typing.TYPE_CHECKING:
        __call__: Callable[..., Any]  # each subclass declares its own keys and shapes

    @property
    def names_cells(self) -> bool:
        """Whether a setting is the row number of a cell: minibatches do not keep those."""
        return False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" not in cls.__dict__:
            return  # a step in between, that declares nothing of its own
        hints = typing.get_type_hints(cls.__call__)
        cls.provides = typing.get_type_hints(hints.pop("return"))
        cls.requires = {key: _not_none(hint) for key, hint in hints.items()}
        cls.optional = frozenset(key for key, hint in hints.items() if NoneType in typing.get_args(hint))
        cls.smooth_in = [k for k, h in cls.requires.items() if is_float(h) and k not in cls.rough_in]
        cls.smooth_out = [k for k, h in cls.provides.items() if is_float(h) and k not in cls.rough_out]
        REGISTRY[cls.__name__] = cls

    def apply(self, data: Data, state: Any = None, metadata: Any = None) -> tuple[Data, Any, Any]:
        """Runs the operator on `data`: returns (data and the declared outputs, state, metadata).

        `state` passes through. `metadata` passes through too, except that an operator that needs
        training and has had none adds `metadata["unfitted"]`, the names of its outputs.

        Raises:
            MissingKeyError: a required key is absent.
            DataError: an array has another kind, rank or size than declared.
        """
        inputs = self._inputs(data)
        outputs: Mapping[str, Any] = self(**inputs)
        if not self.fitted:
            before = metadata.get("unfitted", ()) if metadata else ()
            metadata = {**(metadata or {}), "unfitted": Unfitted((*before, *outputs))}
        return {**data, **outputs}, state, metadata

    def train_mode(self) -> None:
        """Turns on sampling and dropout, here and in every part."""
        self.train()
        self._set_training(True)  # noqa: FBT003

    def eval_mode(self) -> None:
        """Turns off sampling and dropout, here and in every part: the same input gives the same output."""
        self.eval()
        self._set_training(False)  # noqa: FBT003

    def for_training(self, data: Data) -> Data:
        """`data` with one row per cell wherever it speaks of cells, so that minibatches can be cut from it."""
        return data

    def mark_fitted(self) -> None:
        """Says that the weights come from training; `diffbio.fit` calls it, a training loop of your own should."""
        for part in operators_in(self):
            part.fitted = True

    @classmethod
    def examples(cls) -> dict[str, tuple[Self, Data]]:
        """Small operators with data, one per mode; tests, docs and benchmarks use them."""
        msg = f"{cls.__name__} has no examples; add them, the contract tests run on them."
        raise TypeError(msg)

    @classmethod
    def config_class(cls) -> type[Config]:
        """The class of this operator's settings."""
        found = typing.get_type_hints(cls.__init__)["config"]
        assert isinstance(found, type)
        return found

    def save(self, path: str | Path) -> Path:
        """Writes settings and weights to the folder `path` (model.json, weights.safetensors), atomically."""
        header = {
            "operator": type(self).__name__,
            "config": dataclasses.asdict(self.config),
            "fitted": [part.fitted for part in operators_in(self)],
            **self._header(),
        }
        return storage.save_folder(path, header, {k: to_numpy(v) for k, v in self.saved_state().items()})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads an operator that `save` wrote; `Operator.load` finds the class by its name.

        Raises:
            ModelFileError: the folder is damaged or does not hold this operator.
        """
        header, arrays = storage.load_folder(path)
        name = str(header.get("operator"))
        found = cls if cls.__name__ == name else REGISTRY.get(name)  # a class of that name may be defined twice
        if found is None or not issubclass(found, cls):
            msg = f"load: {path} holds {header.get('operator')!r}, not a {cls.__name__}."
            raise ModelFileError(msg)
        try:
            config = found.config_class()(**json_config(header["config"]))
        except (KeyError, TypeError, ConfigError) as error:
            msg = f"load: the settings in {path} do not fit {found.__name__}: {error}"
            raise ModelFileError(msg) from error
        op = typing.cast(type[Any], found)(config, rngs=nnx.Rngs(0))
        assert isinstance(op, cls)
        op._adapt(header)
        op.restore(arrays, where=str(path))
        for part, fitted in zip(operators_in(op), header.get("fitted", []), strict=False):
            part.fitted = bool(fitted)
        return op

    def saved_state(self) -> dict[str, nnx.Variable[Any]]:
        """Everything a copy needs to give the same results, by name: parameters, statistics, random streams."""
        return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(self))}

    def restore(self, arrays: dict[str, np.ndarray], *, where: str) -> None:
        """Takes over what `saved_state` gave, from arrays by name; `where` they come from, for messages.

        Raises:
            ModelFileError: names or shapes differ.
        """
        # arrays fitted to data (a stored reference, say) may have another size than in a fresh operator
        own = self.saved_state()
        if set(own) != set(arrays):
            odd = sorted(set(own) ^ set(arrays))
            msg = f"load: weights in {where} differ from {type(self).__name__} in {odd[:4]}."
            raise ModelFileError(msg)
        flat = dict(nnx.to_flat_state(nnx.state(self)))
        for path, leaf in flat.items():
            value = arrays["/".join(map(str, path))]
            if isinstance(leaf, nnx.Param) and value.shape != leaf.shape:
                msg = f"load: {where}: {'/'.join(map(str, path))} has shape {value.shape}, expected {leaf.shape}."
                raise ModelFileError(msg)
            leaf.set_value(from_numpy(value, like=leaf[...]))
        nnx.update(self, nnx.from_flat_state(flat))

    def provided(self) -> dict[str, Any]:
        """The outputs this instance gives: all that the class declares, unless a part is switched off."""
        return type(self).provides

    def _header(self) -> dict[str, Any]:
        """What beside the settings `load` needs to build the same shapes."""
        return {}

    def _adapt(self, header: Mapping[str, Any]) -> None:
        """Builds the shapes that `_header` describes."""

    def _set_training(self, training: bool) -> None:  # noqa: FBT001
        for part in operators_in(self):
            part.training = training

    def _inputs(self, data: Data) -> dict[str, jax.Array]:
        """The declared inputs out of `data`, as arrays of the declared kind, sizes checked."""
        inputs = {k: self._read(k, data) for k in self.requires if k in data or k not in self.optional}
        self._check_axes(inputs)
        return inputs

    def _read(self, key: str, data: Data) -> jax.Array:
        wanted = self.requires[key]
        if data.get(key) is None:
            has = ", ".join(sorted(data)) or "nothing"
            msg = f"{type(self).__name__} needs data[{key!r}], {say(wanted)}; data has {has}."
            raise MissingKeyError(msg)
        value = data[key].dense() if isinstance(data[key], SparseRows) else data[key]
        try:
            array = value if isinstance(value, jax.Array) else jnp.asarray(value)
        except (TypeError, ValueError) as error:
            msg = f"{type(self).__name__}: data[{key!r}] must be {say(wanted)}; got {type(value).__name__}."
            raise DataError(msg) from error
        if is_float(wanted) and not jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(jnp.result_type(float))  # integer counts are welcome
        if array.ndim != len(axes(wanted)) or array.dtype.name not in wanted.dtypes:
            msg = (
                f"{type(self).__name__}: data[{key!r}] must be {say(wanted)}; "
                f"got {array.dtype} of shape {array.shape}."
            )
            raise DataError(msg)
        return array

    def _check_axes(self, inputs: dict[str, jax.Array]) -> None:
        known = {axis: (size, f"config.n_{axis}") for axis, size in self._fixed_axes().items()}
        for key, array in inputs.items():
            for axis, size in zip(axes(self.requires[key]), array.shape, strict=True):
                expected, said_by = known.setdefault(axis, (size, f"data[{key!r}]"))
                if size != expected:
                    msg = (
                        f"{type(self).__name__}: data[{key!r}] has {size} {axis}, "
                        f"but {said_by} says {expected}."
                    )
                    raise DataError(msg)

    def _fixed_axes(self) -> dict[str, int]:
        return {
            f.name[2:]: getattr(self.config, f.name)
            for f in dataclasses.fields(self.config)
            if f.name.startswith("n_") and getattr(self.config, f.name) is not None
        }


def operators_in(module: nnx.Module) -> list[Operator]:
    """The operator and all operators inside it, in a fixed order."""
    return [part for _, part in nnx.iter_modules(module) if isinstance(part, Operator)]


@contextlib.contextmanager
def mode_of(op: Operator, *, training: bool) -> Iterator[None]:
    """Puts `op` into train or eval mode for the block, and back."""
    before = op.training
    (op.train_mode if training else op.eval_mode)()
    try:
        yield
    finally:
        (op.train_mode if before else op.eval_mode)()


def checked_counts(who: str, counts: Any, *, key: str = "counts", fix: str = "pass raw counts") -> Any:
    """`counts`, if all are finite and >= 0; under jit or grad, where values are not known, they pass.

    Args:
        who: the operator's name, for the message.
        counts: (cells, genes) or (cells,).
        key: their name in data.
        fix: what the message tells the user to do.

    Raises:
        DataError: naming the first entry that is not, row by row.
    """
    return checked_finite(who, counts, key=key, fix=fix, lowest=0.0)


def checked_finite(
    who: str, values: Any, *, key: str, fix: str = "leave such rows out or fill them", lowest: float = -np.inf
) -> Any:
    """`values`, if all are finite and >= lowest; see `checked_counts`."""
    if isinstance(values, jax.core.Tracer) or values.size == 0:
        return values
    with jax.ensure_compile_time_eval():  # constants of a jitted function are known too
        array = np.asarray(values) if values.size <= SMALL else values
        least, most = float(array.min()), float(array.max())  # NaN if there is one
    if np.isfinite(least) and np.isfinite(most) and least >= lowest:
        return values
    array = np.asarray(values)
    first = np.argwhere(~(np.isfinite(array) & (array >= lowest)))[0]
    where = f"row {first[0]}" + (f", column {first[1]}" if len(first) > 1 else "")
    wanted = "finite" if lowest == -np.inf else f"finite and >= {lowest:g}"
    msg = f"{who}: data[{key!r}] must be {wanted}, but {where} holds {float(array[tuple(first)]):g}; {fix}."
    raise DataError(msg)


def axes(hint: Any) -> list[str]:
    """Axis names of a jaxtyping hint: Float[Array, "cells genes"] -> ["cells", "genes"]."""
    return str(hint.dim_str).split()


def is_float(hint: Any) -> bool:
    """Whether a jaxtyping hint is a float array (hints are not subclasses of Float)."""
    return bool(getattr(hint, "dtypes", None) == FLOATS)


def is_int(hint: Any) -> bool:
    """Whether a jaxtyping hint is an integer array."""
    return bool(getattr(hint, "dtypes", None) == INTEGERS)


def say(hint: Any) -> str:
    """A hint in words: "float (cells, genes)"."""
    return f"{hint.__name__.split('[')[0].lower()} ({', '.join(axes(hint))})"


def to_numpy(variable: nnx.Variable[Any]) -> np.ndarray:
    """A variable's value as numpy; a random key as its words."""
    value = variable[...]
    return np.asarray(jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value)


def from_numpy(value: np.ndarray, *, like: jax.Array) -> jax.Array:
    """The inverse of `to_numpy`: `like` says whether it is a random key."""
    array = jnp.asarray(value)
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
    return array


def json_config(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back: lists are tuples again."""
    text = json.dumps(settings)
    return {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}


def _not_none(hint: Any) -> Any:
    return next((h for h in typing.get_args(hint) if h is not NoneType), hint)


def _is_a(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, UnionType):
        return any(_is_a(value, h) for h in typing.get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(v, typing.get_args(hint)[0]) for v in value)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if hint is Any:
        return True
    return isinstance(value, origin or hint)


def _say_type(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and typing.get_origin(hint) is None else str(hint)
