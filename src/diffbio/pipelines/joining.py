"""How parts are joined into a chain by the keys that they read and give, and what is said where they do not fit."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..operators.base import REGISTRY, Operator, axes, is_float, is_int, say


class Part:
    """An operator in a chain: its name there, and what its keys are called.

    Args:
        operator: changed in place by training.
        name: None makes one of its class: `DifferentiableHarmony` is "harmony".
        reads: own key -> key in the chain, for those of other names: {"embeddings": "latent_mean"}.
        writes: the same for what it gives: {"decontaminated_counts": "counts"} replaces the counts for what follows.
        frozen: its parameters stay; gradients still pass through it.
    """

    def __init__(
        self,
        operator: Operator,
        name: str | None = None,
        *,
        reads: Mapping[str, str] | None = None,
        writes: Mapping[str, str] | None = None,
        frozen: bool = False,
    ) -> None:
        if not isinstance(operator, Operator):
            msg = f"Part: expected an Operator, got {type(operator).__name__}."
            raise ConfigError(msg)
        if hasattr(operator, "wires"):
            msg = "Part: a chain within a chain is not supported; join their parts in one."
            raise ConfigError(msg)
        self.operator, self.frozen = operator, frozen
        self.name = name or snake(type(operator).__name__)
        if set(self.name) & set("./"):
            msg = f"Part: a name has no dot and no slash, which paths and schedules need; got {self.name!r}."
            raise ConfigError(msg)
        self.reads, self.writes = dict(reads or {}), dict(writes or {})
        both = ("reads", self.reads, operator.requires), ("writes", self.writes, operator.provided())
        for word, given, own in both:
            for key in given:
                if key not in own:
                    msg = f"Part {self.name!r}: {word} names {key!r}, but {type(operator).__name__} {word} "
                    msg += f"{', '.join(own)}."
                    raise ConfigError(msg)


class Wire(NamedTuple):
    """How a part is joined: hashable, so that a chain compiles once."""

    name: str
    reads: tuple[tuple[str, str], ...]  # own key, key in the chain; keys that are absent in the data are left out
    writes: tuple[tuple[str, str], ...]
    frozen: bool

    def read(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """What the part reads of the chain's results, by its own names."""
        return {own: result[key] for own, key in self.reads if result.get(key) is not None}

    def written(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the part gave, by the chain's names."""
        return {key: outputs[own] for own, key in self.writes if own in outputs}


def snake(name: str) -> str:
    """`DifferentiableUMAP` as "umap", `VAENormalizer` as "vae_normalizer"."""
    short = name.removeprefix("Differentiable") or name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", short).lower()


def default_inputs(parts: Sequence[Part]) -> tuple[str, ...]:
    """What the first part reads; of later ones labels and what they can do without, if nobody before gives it."""
    first = parts[0]
    keys = [first.reads.get(own, own) for own in first.operator.requires]
    given: set[str] = set()
    for part in parts:
        own_keys = {own: part.reads.get(own, own) for own in part.operator.requires}
        op = part.operator
        welcome = [key for own, key in own_keys.items() if is_int(op.requires[own]) or own in op.optional]
        keys += [key for key in welcome if key not in given]
        given |= {part.writes.get(own, own) for own in part.operator.provided()}
    return tuple(dict.fromkeys(keys))


def joined_parts(parts: Sequence[Part], inputs: Sequence[str]) -> Iterable[Wire]:
    """The wires; see the errors of `Chain`."""
    there: dict[str, tuple[str, Any]] = {}  # key -> who gives it, its kind
    for part in parts:
        op, reads = part.operator, []
        for own, wanted in op.requires.items():
            key = part.reads.get(own, own)
            if key in there:
                _check_kind(part, own, wanted, key, *there[key])
            elif key not in inputs:
                if own in op.optional and own not in part.reads:
                    continue
                raise ConfigError(_nobody_gives(part, own, key, wanted, there, inputs))
            reads.append((own, key))
        writes = tuple((own, part.writes.get(own, own)) for own in op.provided())
        there |= {key: (part.name, op.provided()[own]) for own, key in writes}
        yield Wire(part.name, tuple(reads), writes, part.frozen)


def _check_kind(part: Part, own: str, wanted: Any, key: str, giver: str, given: Any) -> None:
    if not _alike(wanted, given):
        msg = f"Chain: {part.name!r} reads {own!r} as {say(wanted)}, but {giver!r} gives {key!r} as {say(given)}."
        raise ConfigError(msg)


def _alike(one: Any, other: Any) -> bool:
    return is_float(one) == is_float(other) and len(axes(one)) == len(axes(other))


def _nobody_gives(
    part: Part, own: str, key: str, wanted: Any, there: Mapping[str, tuple[str, Any]], inputs: Sequence[str]
) -> str:
    """The message: what is missing, and who could provide it."""
    msg = f"Chain: {part.name!r} needs {key!r}, {say(wanted)}, but nothing before it gives that."
    fits = [
        f"{name}'s {found!r}"
        for found, (name, hint) in there.items()
        if _alike(hint, wanted) and axes(hint)[0] == axes(wanted)[0]
    ]
    if fits:
        some = fits[-1].split("'")[-2]
        msg += f" Of its kind there are {', '.join(fits)}: Part(..., reads={{{own!r}: {some!r}}})."
    others = sorted(name for name, cls in REGISTRY.items() if key in cls.provides)
    if others:
        msg += f" Operators that give it: {', '.join(others)}."
    return f"{msg} If the data holds it: inputs={(*inputs, key)!r}."
