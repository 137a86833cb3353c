"""Any operators joined into one, by the keys that they declare."""

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from .. import storage
from ..data.source import Source
from ..errors import ConfigError, MissingKeyError, ModelFileError
from ..history import History
from ..operators.base import REGISTRY, Data, Operator, Unfitted, is_float, json_config, operators_in, to_numpy
from .joining import Part, Wire, default_inputs, joined_parts
from .terms import BALANCES, Own, Term, balanced, checked_terms

# Kind of an input that no part declares, such as a day that a loss reads; a matrix with a row per cell will do as well.
UNDECLARED = Float[Array, " cells"]


class Chain(Operator):
    """Operators one after the other, each reading what is there by then; one gradient through them all.

    `diffbio.fit(chain, data)` trains each part by its own objective on what the parts before give, then all of them
    jointly on `terms`; `stages=` says otherwise (`diffbio.pipelines.Stage`).
    """

    def __init__(
        self,
        parts: Sequence[Operator | Part],
        *,
        terms: Sequence[Own | Term] | None = None,
        inputs: Sequence[str] | None = None,
        balance: str = "sum",
    ) -> None:
        """Joins the parts; what does not fit is said here, before any data is there.

        Args:
            parts: in the order in which they run.
            terms: losses of joint training; None is the own objective of every part that has one.
            inputs: keys that the data holds. None: what the first part reads, what later parts read beside floats
                (labels) or can do without, and what a term reads that no part gives.
            balance: of the terms: "sum" by their weights; "uncertainty", weights learned (Kendall, Gal and Cipolla
                2018, equation 7), logged as `balance_<term>`.

        Raises:
            ConfigError: a key that a part needs is given by none before it, naming who could give it; kinds or
                numbers of axes of the two sides differ; two parts have one name or operator; a term reads what
                nobody gives.
        """
        named = [part if isinstance(part, Part) else Part(part) for part in parts]
        if not named:
            msg = "Chain: it needs at least one part."
            raise ConfigError(msg)
        names = [part.name for part in named]
        if double := sorted({name for name in names if names.count(name) > 1}):
            msg = f"Chain: {names.count(double[0])} parts are called {double[0]!r}; name them: Part(op, name=...)."
            raise ConfigError(msg)
        if len({id(part.operator) for part in named}) < len(named):
            msg = "Chain: one operator stands in two parts, which would share its weights; make a second one."
            raise ConfigError(msg)
        if balance not in BALANCES:
            msg = f"Chain: balance must be one of {', '.join(map(repr, BALANCES))}, got {balance!r}."
            raise ConfigError(msg)
        self.parts = nnx.Dict({part.name: part.operator for part in named})
        given = default_inputs(named) if inputs is None else tuple(inputs)
        self.wires = tuple(joined_parts(named, given))
        self.frozen = tuple(part.name for part in named if part.frozen)
        self.terms = checked_terms(self, terms, open_inputs=inputs is None, inputs=given)
        self.balance = balance
        extra = [key for term in self.terms if isinstance(term, Term) for key in term.reads or ()]
        self.inputs = tuple(dict.fromkeys((*given, *(k for k in extra if k not in self.provided()))))
        n_terms = len(self.terms)
        self.log_variances = nnx.data(nnx.Param(jnp.zeros(n_terms)) if balance == "uncertainty" and n_terms else None)
        self.learning: tuple[str, ...] | None = None  # of the stage that runs: parts; None is all but the frozen ones
        self.active: tuple[str, ...] | None = None  # and terms; None is all
        self.stage: str = ""  # and what else of it a checkpoint has to match
        self.fitted = all(part.operator.fitted for part in named)

    def __getitem__(self, name: str) -> Operator:
        """The operator of that name."""
        if name not in self.parts:
            msg = f"Chain: there is no part {name!r}; there are {', '.join(self.names)}."
            raise ConfigError(msg)
        found: Operator = self.parts[name]
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parts, in order."""
        return tuple(wire.name for wire in self.wires)

    @property
    def config(self) -> str:  # type: ignore[override]
        """The parts with their settings, and the terms: a text, as checkpoints compare it."""
        parts = {wire.name: str(self[wire.name].config) for wire in self.wires}
        local = {term.name: " local" for term in self.terms if isinstance(term, Own) and term.local}
        terms = [f"{term.name} x {term.weight:g}{local.get(term.name, '')}" for term in self.terms]
        wires = [list(wire[:3]) for wire in self.wires]  # what is frozen may change between runs
        stage = {"stage": [self.learning, self.active, self.stage]} if self.stage else {}
        return json.dumps({"parts": parts, "terms": terms, "balance": self.balance, "wires": wires, **stage})

    @property
    def requires(self) -> dict[str, Any]:  # type: ignore[override]
        """Keys that the data holds, with their kinds."""
        known: dict[str, Any] = {}
        for wire in self.wires:
            for own, key in wire.reads:
                if key in self.inputs:
                    known.setdefault(key, self[wire.name].requires[own])
        return {key: known.get(key, UNDECLARED) for key in self.inputs}

    @property
    def optional(self) -> frozenset[str]:  # type: ignore[override]
        """Inputs that no part needs, and those that only terms read: a loss is not wanted of new cells."""
        needed = {
            key for wire in self.wires for own, key in wire.reads if own not in self[wire.name].optional
        }  # fmt: skip
        return frozenset(set(self.inputs) - needed)

    @property
    def cell_numbers(self) -> frozenset[str]:  # type: ignore[override]
        """Inputs that hold row numbers of cells."""
        return frozenset(key for wire in self.wires for own, key in wire.reads if own in self[wire.name].cell_numbers)

    @property
    def names_cells(self) -> bool:
        """Whether a part's setting is the row number of a cell."""
        return any(self[name].names_cells for name in self.names)

    @property
    def graph_of_cells(self) -> bool:  # type: ignore[override]
        """Whether a part makes or reads a graph of the cells."""
        return any(self[name].graph_of_cells for name in self.names)

    @property
    def smooth_in(self) -> list[str]:  # type: ignore[override]
        """Float inputs of which every reader has an honest gradient."""
        rough = {key for wire in self.wires for own, key in wire.reads if own in self[wire.name].rough_in}
        return [key for key, hint in self.requires.items() if is_float(hint) and key not in rough]

    @property
    def smooth_out(self) -> list[str]:  # type: ignore[override]
        """Float outputs with an honest gradient."""
        last = {key: own in self[w.name].smooth_out for w in self.wires for own, key in w.writes}
        return [key for key, smooth in last.items() if smooth]

    @property
    def provides(self) -> dict[str, Any]:  # type: ignore[override]
        """Keys that the chain adds, with their kinds."""
        return {key: self[wire.name].provided()[own] for wire in self.wires for own, key in wire.writes}

    def provided(self) -> dict[str, Any]:
        """As `provides`."""
        return self.provides

    def apply(self, data: Data, state: Any = None, metadata: Any = None) -> tuple[Data, Any, Any]:
        """Runs all parts on `data`; see `Operator.apply`.

        Raises:
            MissingKeyError: a required key is absent.
            DataError: an array has another kind, rank or size than declared.
        """
        result = {**data, **self._inputs(data)}
        unfitted: tuple[str, ...] = ()
        for wire in self.wires:
            part = self[wire.name]
            outputs, state, said = part.apply(_read(wire, part, result), state, None)
            result |= wire.written(outputs)
            marked = set((said or {}).get("unfitted", ()))
            unfitted += tuple(key for own, key in wire.writes if own in marked)
        if unfitted:
            before = metadata.get("unfitted", ()) if metadata else ()
            metadata = {**(metadata or {}), "unfitted": Unfitted((*before, *dict.fromkeys(unfitted)))}
        return {key: result[key] for key in (*data, *self.provides)}, state, metadata

    def objective(self, data: Data, **scheduled: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The balanced sum of the terms; each stands in the metrics by its name.

        scheduled: "<part>.<keyword>" of the part's own objective, such as "vae_normalizer.kl_weight", and
            "weight.<term>", which multiplies that of the term.

        Raises:
            ConfigError: `scheduled` names no part or term.
            MissingKeyError: a key that a term reads is absent.
        """
        self.check_scheduled(scheduled)
        result: Data = {**data, **self._inputs(data)}
        asked = [term for term in self.terms if self.active is None or term.name in self.active]
        own = {term.part: term for term in asked if isinstance(term, Own)}
        values: dict[str, jax.Array] = {}
        last = max((self.names.index(name) for name in own), default=-1)
        if any(isinstance(term, Term) for term in asked):
            last = len(self.wires) - 1
        for number, wire in enumerate(self.wires[: last + 1]):
            part = self[wire.name]
            read = _read(wire, part, result)
            if wire.name in own:
                start = f"{wire.name}."
                keywords = {k.removeprefix(start): v for k, v in scheduled.items() if k.startswith(start)}
                known = jax.lax.stop_gradient(read) if own[wire.name].local else read
                values[own[wire.name].name] = part.objective(known, **keywords)[0]  # type: ignore[attr-defined]
            if number < last or any(isinstance(term, Term) for term in asked):
                outputs = part.apply(read)[0]
                result |= wire.written(outputs)
        for term in asked:
            if isinstance(term, Term):
                values[term.name] = term.of(result)
        weights = {term.name: term.weight * scheduled.get(f"weight.{term.name}", 1.0) for term in asked}
        learned = None if self.log_variances is None else self.log_variances[...]
        places = [self._term_names.index(term.name) for term in asked]
        return balanced(values, weights, None if learned is None else learned[jnp.asarray(places, int)])

    def check_scheduled(self, scheduled: Mapping[str, Any]) -> None:
        """Refuses a schedule of what is not there.

        Raises:
            ConfigError: naming it, and what there is.
        """
        for name in scheduled:
            start, _, rest = name.partition(".")
            taken = keywords_of(self[start]) if start in self.names else ()
            if rest not in taken and not (start == "weight" and rest in self._term_names):
                msg = f"Chain: {name!r} schedules nothing; there are the parts {', '.join(self.names)} "
                msg += f"(<part>.<keyword>) and the terms {', '.join(self._term_names)} (weight.<term>)."
                if start in self.names:
                    msg += f" The objective of {start!r} takes {', '.join(taken) or 'no keywords'}."
                raise ConfigError(msg)

    def train_mode(self) -> None:
        """As of every operator, but parts that do not learn stay as they are: no dropout, statistics at rest."""
        super().train_mode()
        for name in self.names:
            if not self.learns(name):
                self[name].eval_mode()

    def learns(self, name: str) -> bool:
        """Whether the parameters of that part move in the stage that runs."""
        return name not in self.frozen and (self.learning is None or name in self.learning)

    @property
    def held_in_fit(self) -> tuple[str, ...]:  # type: ignore[override]
        """Paths of parameters that stay."""
        held = [f"parts/{name}/" for name in self.names if not self.learns(name)]
        inner = [f"parts/{name}/{path}" for name in self.names for path in self[name].held_in_fit]
        return (*held, *inner)

    @property
    def schedules(self) -> dict[str, Any]:
        """Those of the parts, by "<part>.<keyword>", as far as their objectives are terms."""
        own = [term.part for term in self.terms if isinstance(term, Own)]
        return {
            f"{name}.{keyword}": schedule
            for name in own
            for keyword, schedule in getattr(self[name], "schedules", {}).items()
        }

    def fit_stages(self, source: Source, **how: Any) -> History:
        """What `diffbio.fit` runs: see `diffbio.pipelines.chain_stages`."""
        from .chain_stages import fit_chain

        return fit_chain(self, source, **how)

    def save(self, path: str | Path) -> Path:
        """Writes settings and weights of all parts to the folder `path`, atomically; not the functions of terms."""
        parts = [
            {
                "name": wire.name, "operator": type(op).__name__, "config": dataclasses.asdict(op.config),
                "header": op._header(), "reads": dict(wire.reads), "writes": dict(wire.writes), "frozen": wire.frozen,
            }
            for wire, op in ((wire, self[wire.name]) for wire in self.wires)
        ]  # fmt: skip
        terms = [
            [term.name, term.weight, *((term.part, term.local) if isinstance(term, Own) else (None, False))]
            for term in self.terms
        ]
        header = {
            "operator": "Chain", "parts": parts, "inputs": list(self.inputs), "balance": self.balance, "terms": terms,
            "fitted": [part.fitted for part in operators_in(self)],
        }  # fmt: skip
        return storage.save_folder(path, header, {k: to_numpy(v) for k, v in self.saved_state().items()})

    @classmethod
    def load(cls, path: str | Path, *, terms: Sequence[Own | Term] | None = None) -> Self:
        """Reads a chain that `save` wrote.

        Args:
            path: the folder.
            terms: losses to go on training with; None takes those of the saved ones that are parts' own objectives.
                They may read further keys of the data.

        Raises:
            ModelFileError: the folder is damaged, or holds something else.
        """
        header, arrays = storage.load_folder(path)
        if header.get("operator") != "Chain":
            msg = f"load: {path} holds {header.get('operator')!r}, not a Chain."
            raise ModelFileError(msg)
        try:
            parts = [_part(said) for said in header["parts"]]
            saved = [(str(name), float(weight), part, bool(local)) for name, weight, part, local in header["terms"]]
            own = [
                Own(part, weight=weight, name=name, local=local)
                for name, weight, part, local in saved if part is not None
            ]  # fmt: skip
            balance, inputs = str(header["balance"]), list(header["inputs"])
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            msg = f"load: {path} does not describe a Chain: {error}"
            raise ModelFileError(msg) from error
        given = {part.writes.get(key, key) for part in parts for key in part.operator.provided()}
        read = [key for term in terms or () if isinstance(term, Term) for key in term.reads or ()]
        inputs = [*inputs, *dict.fromkeys(key for key in read if key not in (*given, *inputs))]
        chain = cls(parts, terms=own if terms is None else terms, inputs=inputs, balance=balance)
        if [term.name for term in chain.terms] != [name for name, *_ in saved]:
            arrays.pop("log_variances", None)  # a balance of other terms says nothing
            if chain.log_variances is not None:
                arrays["log_variances"] = to_numpy(chain.log_variances)
        chain.restore(arrays, where=str(path))
        for part, fitted in zip(operators_in(chain), header.get("fitted", []), strict=False):
            part.fitted = bool(fitted)
        return chain

    @property
    def _term_names(self) -> tuple[str, ...]:
        return tuple(term.name for term in self.terms)

    def _fixed_axes(self) -> dict[str, int]:
        return {}

    def _read(self, key: str, data: Data) -> jax.Array:
        value = data.get(key)
        if self.requires[key] is UNDECLARED and isinstance(value, np.ndarray | jax.Array) and value.ndim > 1:
            return jnp.asarray(value, jnp.result_type(float))
        return super()._read(key, data)

    def _inputs(self, data: Data) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = {}
        for key in self.inputs:
            if key in data or key not in self.optional:
                found[key] = self._read(key, data)
        written: set[str] = set()
        for wire in self.wires:  # a part knows its own sizes
            own = {own: found[key] for own, key in wire.reads if key in found and key not in written}
            self[wire.name]._check_axes(own)
            written |= {key for _, key in wire.writes}
        return found


def keywords_of(part: Operator) -> tuple[str, ...]:
    """What a schedule of the part's objective may be called."""
    taken = inspect.signature(part.objective).parameters if hasattr(part, "objective") else {}
    return tuple(name for name, parameter in taken.items() if parameter.kind == inspect.Parameter.KEYWORD_ONLY)


def _read(wire: Wire, part: Operator, result: Data) -> Data:
    """What a part reads, by its own names; an optional key may be absent."""
    missing = [key for own, key in wire.reads if key not in result and own not in part.optional]
    if missing:
        msg = f"Chain: part {wire.name!r} needs data[{missing[0]!r}]; there is {', '.join(sorted(result))}."
        raise MissingKeyError(msg)
    return wire.read(result)


def _part(said: Mapping[str, Any]) -> Part:
    """The part that `Chain.save` described, with fresh weights."""
    found: Any = REGISTRY[said["operator"]]
    op = found(found.config_class()(**json_config(said["config"])), rngs=nnx.Rngs(0))
    op._adapt(said["header"])
    return Part(op, said["name"], reads=said["reads"], writes=said["writes"], frozen=said["frozen"])
