"""How a chain is trained: which parts learn, for how long, with which losses, as data."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from flax import nnx

from .. import storage
from ..data.source import ArraySource, Source
from ..errors import ConfigError, MissingKeyError
from ..fitting import gathered, optimizer_of, positions_of
from ..history import History
from ..operators.all_cells import AllCells
from ..operators.base import Operator, axes
from ..train import Sampler, Schedule, Settings, batch_of, dense_on_device, train
from .chain_cells import Neighborhoods, points_of, read_by
from .inference import in_memory
from .stages import PerCell, forget
from .terms import Own, Term

if TYPE_CHECKING:
    from .chain import Chain
    from .joining import Wire

# A part is started from at most this many cells (a random choice), and parts on a graph of all cells see so many.
REFERENCE_CELLS = 50_000
JOINT = {"max_epochs": 20, "batch_size": 256, "learning_rate": 3e-4, "validation": 0.0}  # refines, does not undo
MINIBATCHES = ("random", "neighborhoods", "all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of training.

    parts: names of those that learn; () is all that are not frozen.
    terms: names of the losses; None: for a single part its own objective, else all of the chain's.
    max_epochs, batch_size, learning_rate, validation, patience: as of `diffbio.fit`; None is what the part prefers,
        and for several parts `chain_stages.JOINT`. learning_rate may be a dict by the parts' names, for three numbers
        of one part want larger steps than ten thousand weights of another; parts not in it have that of
        `diffbio.fit`, else what is preferred.
    minibatches: which cells come together. "random"; "neighborhoods", patches of neighbouring cells in what the first
        part on a graph reads: there a part on a graph sees each cell's neighbours, and cuts the graph at the rim of the
        patch; "all", one batch of all cells: exact, with memory for all of them. None: "all" up to batch_size cells;
        beyond, "neighborhoods" if a part works on a graph of the cells, else "random".
    name: in the history.
    """

    parts: tuple[str, ...] = ()
    terms: tuple[str, ...] | None = None
    max_epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | Mapping[str, float] | None = None
    validation: float | None = None
    patience: int | None = None
    minibatches: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for field in ("parts", "terms"):
            value = getattr(self, field)
            if value is not None:
                object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
        if self.minibatches is not None and self.minibatches not in MINIBATCHES:
            msg = f"Stage: minibatches must be one of {', '.join(map(repr, MINIBATCHES))}, got {self.minibatches!r}."
            raise ConfigError(msg)
        if not self.name:
            object.__setattr__(self, "name", "+".join(self.parts) or "joint")


def default_stages(chain: "Chain") -> tuple[Stage, ...]:
    """Every part by its own objective on what the ones before give, then all jointly."""
    alone = tuple(Stage(parts=(name,)) for name in chain.names if chain.learns(name) and can_learn(chain[name]))
    own_alone = len(chain.names) == 1 and all(isinstance(term, Own) for term in chain.terms)
    return alone if own_alone or not chain.terms else (*alone, Stage())


def fit_chain(
    chain: "Chain",
    source: Source,
    *,
    settings: Mapping[str, Any],
    stages: Sequence[Stage] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    schedules: Mapping[str, Schedule] | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
) -> History:
    """Trains the stages one after the other; at the end, parts that start from data see all the cells once more.

    With `stages`, parts that have been trained go on from where they are; without, all start anew.

    `settings` are the user's, for every stage that does not say otherwise itself.

    Raises:
        ConfigError: a stage or a schedule names a part or term that is not there, or a stage has nothing to train.
        MissingKeyError: a loss of a stage reads what neither the data nor a part gives.
    """
    planned = default_stages(chain) if stages is None else tuple(stages)
    check_stages(chain, planned, source.keys)
    chain.check_scheduled(schedules or {})
    reference = in_memory(source, REFERENCE_CELLS, seed=int(settings.get("seed", 0)))
    if optimizer is not None and any(rates_of(stage) for stage in planned):
        msg = "fit: optimizer= and a learning_rate by parts in a stage contradict each other; leave one out."
        raise ConfigError(msg)
    run = _Run(chain, source, reference, dict(settings), optimizer, schedules, checkpoint, resume, force, progress)
    for stage in planned:  # says what is wrong before anything trains, or a checkpoint is lost
        run.settings_of(stage, JOINT, stage.parts[0] if stage.parts else "")
    if checkpoint is not None and not resume:
        forget(Path(checkpoint))
    if stages is not None:  # a schedule goes on from what is there
        run.started |= {name for name in chain.names if chain[name].fitted}
    try:
        for number, stage in enumerate(planned):
            run.stage(stage, f"{number + 1}-{stage.name}")
    finally:  # an interrupted stage must not go on holding parts and terms
        chain.learning = chain.active = None
        chain.stage = ""
    run.start(chain.names, again=True)
    chain.fitted = all(chain[name].fitted for name in chain.names)
    chain.eval_mode()
    return History(run.rows, settings=run.chosen)


def read_last(chain: "Chain", terms: Sequence[Any]) -> int:
    """Place of the last part of whose outputs a loss reads something; -1 if none does."""
    read = [term.reads for term in terms if isinstance(term, Term)]
    if None in read:
        return len(chain.wires) - 1
    keys = {key for some in read for key in some or ()}
    return max((i for i, wire in enumerate(chain.wires) if keys & {key for _, key in wire.writes}), default=-1)


def can_learn(part: Operator) -> bool:
    """Whether a stage of that part alone does anything."""
    return hasattr(part, "objective") or hasattr(part, "init_from")


def check_stages(chain: "Chain", stages: Sequence[Stage], keys: Iterable[str]) -> None:
    """Refuses what names nothing; see `fit_chain`. `keys` are those of the data."""
    known = [term.name for term in chain.terms]
    there = {*keys, *chain.provided()}
    for stage in stages:
        for name in stage.parts:
            chain[name]  # says which there are
            if name in chain.frozen:
                msg = f"fit: stage {stage.name!r} is to train {name!r}, which is frozen."
                raise ConfigError(msg)
        for name, rate in rates_of(stage).items():
            chain[name]
            if not rate > 0:
                msg = f"fit: stage {stage.name!r}: learning_rate of {name!r} must be > 0, got {rate!r}."
                raise ConfigError(msg)
        single = len(stage.parts) == 1 and stage.terms is None
        if single and not can_learn(chain[stage.parts[0]]):
            msg = f"fit: stage {stage.name!r} has nothing to train: {stage.parts[0]!r} has neither an objective of its "
            msg += "own nor a start from data; name the losses that train it: Stage(parts=..., terms=...)."
            raise ConfigError(msg)
        for term in () if single else chain.terms:
            if isinstance(term, Term) and (stage.terms is None or term.name in stage.terms):
                for key in term.reads or ():
                    if key not in there:
                        msg = f"fit: the loss {term.name!r} of stage {stage.name!r} needs data[{key!r}]; there is "
                        raise MissingKeyError(msg + f"{', '.join(sorted(there))}.")
        for name in stage.terms or ():
            if name not in known:
                msg = f"fit: stage {stage.name!r} names the loss {name!r}; the chain has {', '.join(known) or 'none'}."
                raise ConfigError(msg)


@dataclasses.dataclass
class _Run:
    """One `fit` of a chain: what its stages share."""

    chain: "Chain"
    source: Source
    reference: Source
    settings: dict[str, Any]
    optimizer: optax.GradientTransformation | None
    schedules: Mapping[str, Schedule] | None
    checkpoint: str | Path | None
    resume: bool
    force: bool
    progress: bool
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    chosen: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    started: set[str] = dataclasses.field(default_factory=set)

    def stage(self, stage: Stage, label: str) -> None:
        """Starts what has not been started, and trains."""
        chain = self.chain
        learning = stage.parts or tuple(name for name in chain.names if name not in chain.frozen)
        if not learning:
            msg = f"fit: stage {stage.name!r} has nothing to train: all parts are frozen."
            raise ConfigError(msg)
        single = stage.parts[0] if len(stage.parts) == 1 and stage.terms is None else None
        last = max(chain.names.index(name) for name in learning)
        before = [name for name in chain.names[:last] if not hasattr(chain[name], "objective")]  # no stage is theirs
        terms = [] if single else [term for term in chain.terms if stage.terms is None or term.name in stage.terms]
        self.start([*learning, *before, *chain.names[last + 1 : read_last(chain, terms) + 1]])
        if single is not None:
            if hasattr(chain[single], "objective"):
                self.alone(chain[single], single, stage, label)
            chain[single].mark_fitted()
            self.start([n for n in chain.names[last + 1 :] if n in self.started], again=True)
            return
        chain.learning, chain.active = learning, stage.terms
        chain.stage = json.dumps([stage.minibatches, rates_of(stage)])
        if not terms:
            msg = f"fit: stage {stage.name!r} has no loss: the chain's parts have no objective, and no terms are given."
            raise ConfigError(msg)
        chosen = self.settings_of(stage, JOINT)
        together = self.together(stage, terms, chosen)
        self.check_balance(terms, together)
        self.run(chain, self.source, chosen, label, together, schedules=self.schedules or {}, rates=rates_of(stage))
        for name in learning:
            part = chain[name]
            part.mark_fitted()
            if hasattr(part, "finish_from"):
                part.finish_from(positions_of(part, self.source_of(name)))
        later = chain.names[min(chain.names.index(name) for name in learning) :]
        self.start([name for name in later if not hasattr(chain[name], "objective")], again=True)

    def check_balance(self, terms: Sequence[Any], together: Sampler | None) -> None:
        """Refuses a learned balance of terms that are negative on some of the cells: it has no minimum.

        Raises:
            ConfigError: naming the term.
        """
        chain = self.chain
        if chain.log_variances is None:
            return
        chain.eval_mode()
        rng = np.random.default_rng(int(self.settings.get("seed", 0)))
        n_cells = self.source.n_cells
        every = rng.permutation(n_cells)[None, :256] if together is None else together.order(rng, 256)
        batch = dense_on_device(batch_of(self.source, every[0]))
        graph, state = nnx.split(chain)
        found = jax.jit(lambda state, batch: nnx.merge(graph, state).objective(batch)[1])(state, batch)
        for term in terms:
            if float(found[term.name]) < 0:
                msg = f'fit: balance="uncertainty" needs positive losses, but {term.name!r} is {found[term.name]:.4g} '
                msg += 'on some of the cells; add a constant to it, or take balance="sum".'
                raise ConfigError(msg)

    def start(self, names: Sequence[str], *, again: bool = False) -> None:
        """`init_from` of these parts on what the ones before give; `again` those that nothing trains, on all cells."""
        for name in self.chain.names:
            part = self.chain[name]
            due = not hasattr(part, "objective") if again else name not in self.started
            if name in names and name not in self.chain.frozen and due and hasattr(part, "init_from"):
                part.init_from(self.read_by(name, part.init_cells))
                part.mark_fitted()
            if name in names:
                self.started.add(name)

    def wire(self, name: str) -> "Wire":
        """Of a part."""
        return self.chain.wires[self.chain.names.index(name)]

    def read_by(self, name: str, n_cells: int | None = None) -> dict[str, np.ndarray]:
        """What a part reads, of all reference cells, or at most n_cells of them.

        Raises:
            ConfigError: it reads row numbers of cells, which a choice of them does not keep.
        """
        part, n_all = self.chain[name], self.source.n_cells
        numbered = [key for own, key in self.wire(name).reads if own in part.cell_numbers and key in self.source.keys]
        if (numbered or part.names_cells) and (self.reference.n_cells < n_all or (n_cells or n_all) < n_all):
            who = f"data[{numbered[0]!r}]" if numbered else f"the config of {name!r}"
            msg = f"fit: {who} has row numbers of cells, and {n_all} cells are more than the {REFERENCE_CELLS} that a "
            msg += "part sees at once; train on fewer cells."
            raise ConfigError(msg)
        some = in_memory(self.reference, n_cells or REFERENCE_CELLS, seed=int(self.settings.get("seed", 0)))
        return read_by(self.chain, some, name)

    def alone(self, part: Operator, name: str, stage: Stage, label: str) -> None:
        """Trains a part by itself on what the ones before give: they run once, not at every step."""
        wire = self.wire(name)
        streamed = not self.chain.names.index(name) and all(own == key for own, key in wire.reads)
        prepared = type(part).for_training is not Operator.for_training
        source = self.source if streamed and not prepared else self.source_of(name)
        sampler = part.sampler(gathered(source, None)) if hasattr(part, "sampler") else None
        chosen = self.settings_of(stage, part.fit_defaults, name)
        given = {k.removeprefix(f"{name}."): s for k, s in (self.schedules or {}).items() if k.startswith(f"{name}.")}
        self.run(part, source, chosen, label, sampler, schedules=given)
        if hasattr(part, "finish_from"):
            part.finish_from(positions_of(part, source))

    def source_of(self, name: str) -> ArraySource:
        """What a part reads, as it wants it for training."""
        part = self.chain[name]
        data = part.for_training(self.read_by(name))
        per_cell = {key for key in data if key in part.requires and axes(part.requires[key])[:1] == ["cells"]}
        whole = {key: value for key, value in data.items() if key in part.requires and key not in per_cell}
        return ArraySource({key: data[key] for key in per_cell}, whole)

    def settings_of(self, stage: Stage, preferred: Mapping[str, Any], part: str = "") -> Settings:
        """Of a stage, which trains that part alone: its own, else the user's, else what is preferred."""
        fields = ("max_epochs", "batch_size", "learning_rate", "validation", "patience")
        own = {name: getattr(stage, name) for name in fields if getattr(stage, name) is not None}
        if rates := rates_of(stage):
            own = {name: value for name, value in own.items() if name != "learning_rate"}
            own |= {"learning_rate": rates[part]} if part in rates else {}
        return Settings(**{**preferred, **self.settings, **own})

    def run(
        self, model: Operator, source: Source, chosen: Settings, label: str, sampler: Sampler | None, *,
        schedules: Mapping[str, Schedule], rates: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        """The training loop, with what does not learn held where it is; `rates` by the names of parts."""
        folder = None if self.checkpoint is None else Path(self.checkpoint) / label
        optimizer = self.optimizer or optimizer_of(model, chosen.learning_rate) or optax.adam(chosen.learning_rate)
        if rates and self.optimizer is None:
            optimizer = part_by_part(rates, optimizer)
        if model.held_in_fit:
            optimizer = all_but(model.held_in_fit, optimizer)
        own = {**getattr(model, "schedules", {}), **schedules}
        history = train(
            model, source, chosen, optimizer=optimizer, sampler=sampler, schedules=own, checkpoint=folder,
            resume=self.resume and folder is not None and storage.exists(folder), force=self.force,
            progress=self.progress, label=label,
        )  # fmt: skip
        self.chosen[label] = dataclasses.asdict(chosen)
        self.rows += [{"stage": label, **row} for row in history.rows]

    def together(self, stage: Stage, terms: Sequence[Any], chosen: Settings) -> Sampler | None:
        """Who decides which cells come together; None is a shuffle."""
        chain, n_cells = self.chain, self.source.n_cells
        on_graph = [name for name in chain.names if chain[name].graph_of_cells]
        paired = [
            term.part for term in terms
            if isinstance(term, Own) and hasattr(chain[term.part], "sampler") and term.part not in on_graph
        ]  # fmt: skip
        wanted = stage.minibatches
        placed = [term.part for term in terms if isinstance(term, Own) and chain[term.part].batches_by_place]
        numbered = sorted(chain.cell_numbers & set(self.source.keys))
        who = f"data[{numbered[0]!r}]" if numbered else "a part's config" if chain.names_cells else ""
        if placed and (wanted is not None or who or len(placed) > 1):
            msg = f"fit: the objective of {placed[0]!r} reads pairs of neighbours, which it draws itself; in stage "
            msg += f"{stage.name!r} leave out "
            msg += f"minibatches={wanted!r}." if wanted else f"either it or {placed[1] if placed[1:] else who!r}."
            raise ConfigError(msg)
        if who and (wanted not in (None, "all") or n_cells > REFERENCE_CELLS):
            msg = f"fit: {who} holds row numbers of cells, which minibatches do not keep; leave it out, or take "
            msg += f'minibatches="all" and at most {REFERENCE_CELLS} cells.'
            raise ConfigError(msg)
        if who:
            return AllCells(n_cells)
        if n_cells > REFERENCE_CELLS and (wanted == "neighborhoods" or (wanted is None and (paired or on_graph))):
            msg = f"fit: stage {stage.name!r} would choose which of {n_cells} cells come together, which it does for "
            msg += f"at most {REFERENCE_CELLS}; take fewer cells" + ("." if placed else ', or minibatches="random".')
            raise ConfigError(msg)
        if paired and wanted is None:
            first = (placed or paired)[0]
            return PerCell(chain[first].sampler(self.read_by(first)), n_cells)  # type: ignore[attr-defined]
        if wanted is None and on_graph:
            wanted = "all" if n_cells <= chosen.batch_size else "neighborhoods"
        if wanted == "all":
            return AllCells(n_cells)
        if wanted == "neighborhoods":
            first = on_graph[0] if on_graph else chain.names[-1]
            return Neighborhoods(points_of(self.read_by(first), chain[first]))
        return None


def rates_of(stage: Stage) -> dict[str, float]:
    """Learning rates by the parts' names, where the stage has them so."""
    return dict(stage.learning_rate) if isinstance(stage.learning_rate, Mapping) else {}


def part_by_part(rates: Mapping[str, float], other: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam at the rates of the parts; `other` for parameters of the parts that are not named, and of the balance."""

    def kind(path: Any, _leaf: Any) -> str:
        at = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return at[1] if at[0] == "parts" and at[1] in rates else ""

    def kinds(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(kind, params)

    return optax.multi_transform({"": other, **{name: optax.adam(rate) for name, rate in rates.items()}}, kinds)


def all_but(held: Sequence[str], optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` for the parameters whose path does not start with one of `held`; those stay."""

    def kind(path: Any, _leaf: Any) -> bool:
        return (jax.tree_util.keystr(path, simple=True, separator="/") + "/").startswith(tuple(held))

    def kinds(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(kind, params)

    return optax.multi_transform({False: optimizer, True: optax.set_to_zero()}, kinds)
