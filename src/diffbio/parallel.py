"""Training on several devices and in several processes, by JAX's own sharding.

A minibatch is split over the devices, the weights are on all of them, and the compiled step is the very same:
XLA adds what has to be exchanged. So the loss, its gradient, the statistics of batch norm and the random draws
are those of the whole minibatch, and the loss curve is that of one device but for the order of sums.
"""

import atexit
import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .errors import ConfigError, DataWarning, ProcessLostError
from .math.sparse import SparseRows, blocks_in_turn

type Devices = int | Sequence[jax.Device] | None

READ_AHEAD = 8  # batches of a file that a thread may hold ready: a stretch of the file is read at once
ASK_EVERY = 8  # steps between two looks at whether another process was told to stop
ANSWERS_WAITING = 3  # looks under way, so that nobody waits for an answer
GLOO = "Gloo "  # what exchanges between CPUs, as its errors call it
LOST = (
    "fit: another process of this run has ended or cannot be reached, and training cannot go on without it: its own "
    "output says why. Start all processes again, with checkpoint= and resume=True to go on from the last checkpoint."
)
END_SECONDS = 60  # that a process waits at its end for the others


class Part(NamedTuple):
    """A part of a batch, for sources that bring several kinds of cells together."""

    prefix: str  # of its keys
    source: Any
    rows: np.ndarray
    fixed: Mapping[str, np.ndarray]  # per-cell arrays in place of the source's


def batch_of(source: Any, rows: np.ndarray) -> Mapping[str, Any]:
    """A batch for the device: sparse where the source can give it so."""
    taken: Mapping[str, Any] = getattr(source, "take_sparse", source.take)(rows)
    return taken


def parts_of(source: Any, rows: np.ndarray) -> list[Part]:
    """What a batch of `source` is made of."""
    parts: list[Part] = source.parts(rows) if hasattr(source, "parts") else [Part("", source, rows, {})]
    return parts


class OneDevice:
    """Training where JAX computes by default: nothing is split or placed, and nobody else is asked."""

    writes = True  # whether this process writes checkpoints
    jit: Mapping[str, Any] = {}  # what `jax.jit` is told

    def put(self, tree: Any) -> Any:
        """Puts what every device needs whole onto the devices."""
        return tree

    def home(self, tree: Any) -> Any:
        """Brings it back as if it had been computed on one device."""
        return tree

    def batch(self, source: Any, rows: np.ndarray) -> Mapping[str, Any]:
        """The cells `rows`, on their devices; many cells come in blocks for a CPU to take in turn."""
        if blocks_in_turn(len(rows)) == 1 or jax.default_backend() != "cpu":
            return batch_of(source, rows)
        batch: dict[str, Any] = {}
        for prefix, beneath, cells, fixed in parts_of(source, rows):
            n_blocks = blocks_in_turn(len(cells))
            whole = n_blocks == 1 or not hasattr(beneath, "take_blocks")
            taken = batch_of(beneath, cells) if whole else beneath.take_blocks(cells, n_blocks, range(n_blocks))
            for key, value in {**taken, **fixed}.items():
                blocks = isinstance(value, SparseRows) and not whole
                batch[prefix + key] = dataclasses.replace(value, in_turn=True) if blocks else value
        return batch

    def agree(self, identity: Mapping[str, Any], tree: Any) -> None:
        """Refuses to train together what is not the same.

        Raises:
            ConfigError: processes have another model, other weights, data or settings.
        """

    def told(self, row: dict[str, float]) -> dict[str, float]:
        """The numbers of process 0, for decisions that all have to take alike."""
        return row

    def asked(self, number: int | None) -> int | None:
        """A signal that came to any process, some steps later; in all of them after the same step."""
        return number

    def wait(self) -> None:
        """Waits until all processes have come so far."""

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """Says what happened when another process is gone."""
        return contextlib.nullcontext()

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Where this process does without the others for a while."""
        return contextlib.nullcontext()


class ManyDevices(OneDevice):
    """The cells of a batch split over devices, of this process and of others; everything else on all of them.

    devices: in the order of the parts of a batch.
    """

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        self.n = len(devices)
        mesh = Mesh(np.array(devices), ("cells",), axis_types=(AxisType.Auto,))
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.by_cell = NamedSharding(mesh, PartitionSpec("cells"))
        own = [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]
        self.mine = range(own[0], own[-1] + 1)
        self.several = len(own) < self.n  # processes
        self.writes = jax.process_index() == devices[0].process_index
        self.jit = {"out_shardings": self.everywhere}
        self._any = jax.jit(lambda flags: flags.max(), out_shardings=self.everywhere)
        self._answers: deque[jax.Array] = deque()
        self._asked = 0

    def put(self, tree: Any) -> Any:
        """Puts what every device needs whole onto the devices."""
        return jax.tree.map(lambda leaf: _rewrapped(leaf, lambda x: self._placed(np.asarray(x))), tree)

    def home(self, tree: Any) -> Any:
        """Brings it back as if it had been computed on one device."""
        return jax.tree.map(lambda leaf: _rewrapped(leaf, lambda x: jax.numpy.asarray(np.asarray(x))), tree)

    def batch(self, source: Any, rows: np.ndarray) -> Mapping[str, Any]:
        """The cells `rows`, on their devices; of what belongs to other processes nothing is read.

        Cells that the devices cannot share evenly are on every device, whole: the same result, at the price of
        one device.
        """
        batch: dict[str, Any] = {}
        for prefix, beneath, cells, fixed in parts_of(source, rows):
            if len(cells) % self.n:
                taken, own, sharding = beneath.take(cells), slice(None), self.everywhere
            else:
                blocks = np.arange(len(cells)).reshape(self.n, -1)[self.mine]
                own, sharding = slice(blocks[0, 0], blocks[-1, -1] + 1), self.by_cell
                taken = (
                    beneath.take_blocks(cells, self.n, self.mine)
                    if hasattr(beneath, "take_blocks")
                    else beneath.take(cells[own])
                )
            taken = {**taken, **{key: value[own] for key, value in fixed.items()}}
            constants = getattr(beneath, "constants", {})
            for key, value in taken.items():
                where = self.everywhere if key in constants else sharding
                batch[prefix + key] = jax.tree.map(lambda x, where=where: self._placed(x, where), value)
        return batch

    def agree(self, identity: Mapping[str, Any], tree: Any) -> None:
        """Refuses to train together what is not the same.

        Raises:
            ConfigError: processes have another model, other weights, data or settings.
        """
        if not self.several:
            return
        digests = {name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()) for name, value in identity.items()}
        weights = digests["weights, or the checkpoint they come from,"] = hashlib.sha256()
        for leaf in jax.tree.leaves(tree):
            weights.update(np.ascontiguousarray(_numbers(leaf)).tobytes())
        mine = np.stack([np.frombuffer(digest.digest()[:8], np.uint32) for digest in digests.values()])
        everyones = np.asarray(multihost_utils.process_allgather(mine))
        odd = [name for i, name in enumerate(digests) if (everyones[:, i] != everyones[0, i]).any()]
        if odd:
            msg = (
                f"fit: the processes of this run have different {' and '.join(odd)}: start all of them by the same "
                "program, on the same data, with a checkpoint folder that all can read."
            )
            raise ConfigError(msg)

    def told(self, row: dict[str, float]) -> dict[str, float]:
        """The numbers of process 0, for decisions that all have to take alike."""
        if not self.several:
            return row
        numbers = np.array(list(row.values()), np.float32)  # as they come from the device
        return dict(zip(row, map(float, multihost_utils.broadcast_one_to_all(numbers)), strict=True))

    def asked(self, number: int | None) -> int | None:
        """A signal that came to any process, some steps later; in all of them after the same step."""
        if not self.several:
            return number
        self._asked += 1
        if self._asked % ASK_EVERY:
            return None
        flags = np.full(len(self.mine), number or 0, np.int32)
        self._answers.append(self._any(self._placed(flags, self.by_cell)))
        return int(self._answers.popleft()) or None if len(self._answers) > ANSWERS_WAITING else None

    def wait(self) -> None:
        """Waits until all processes have come so far."""
        if self.several:
            multihost_utils.sync_global_devices("diffbio")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Says what happened when another process is gone.

        Raises:
            ProcessLostError: in place of what the exchange with it raised.
        """
        _Others.needed = self.several
        try:
            yield
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # a ValueError where XLA is called directly
            exchange = isinstance(error, jax.errors.JaxRuntimeError) or GLOO in str(error)
            if not (self.several and exchange) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            _Others.lost = True
            msg = f"{LOST} ({str(error).splitlines()[0][:200]})"
            raise ProcessLostError(msg) from error
        finally:
            _Others.needed = False

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Where this process does without the others for a while."""
        before, _Others.needed = _Others.needed, False
        try:
            yield
        finally:
            _Others.needed = before

    def _placed(self, value: Any, where: NamedSharding | None = None) -> jax.Array:
        return jax.make_array_from_process_local_data(where or self.everywhere, np.asarray(value))


def layout_of(devices: Devices, batch_size: int) -> OneDevice:
    """How a run is laid out: on all devices of all processes where there are several, else on those asked for.

    devices: a number of devices, -1 for all that there are, or a list of them; None is JAX's default device.

    Raises:
        ConfigError: there are not so many devices, or they are not those of all processes.

    Warns:
        DataWarning: batch_size is no multiple of their number.
    """
    everyone = jax.devices()
    n = devices if isinstance(devices, int) else None
    if n is not None and (isinstance(n, bool) or not (n == -1 or 1 <= n <= len(everyone))):
        msg = f"fit: devices must be 1 to {len(everyone)} (what JAX has here), -1 for all, or a list, got {devices!r}."
        raise ConfigError(msg)
    chosen = everyone[: len(everyone) if n == -1 else n or 1] if isinstance(devices, int | None) else list(devices)
    if jax.process_count() > 1:
        if devices is not None and set(chosen) != set(everyone):
            msg = f"fit: with several processes, devices must be None or all {len(everyone)} of them."
            raise ConfigError(msg)
        chosen = everyone
    if chosen == everyone[:1]:
        return OneDevice()
    if batch_size % len(chosen):
        better = max(batch_size // len(chosen), 1) * len(chosen)
        warnings.warn(
            f"fit: batch_size {batch_size} is no multiple of the {len(chosen)} devices, so that each computes every "
            f"minibatch whole; take batch_size={better}",
            DataWarning, stacklevel=4,
        )
    return ManyDevices(chosen)


def in_order(take: Callable[[np.ndarray], Any], batches: Sequence[np.ndarray], *, ahead: bool) -> Iterator[Any]:
    """`take(rows)` of every batch; with `ahead` a thread reads the next ones while this one is computed with.

    Close the iterator (contextlib.closing) to stop the thread.
    """
    if not ahead:
        yield from map(take, batches)
        return
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(READ_AHEAD)
    stopped = threading.Event()

    def read() -> None:
        for rows in batches:
            if stopped.is_set():
                return
            try:
                ready.put((take(rows), None))
            except BaseException as error:
                ready.put((None, error))
                return

    reader = threading.Thread(target=read, name="diffbio-reader", daemon=True)
    reader.start()
    try:
        for _ in batches:
            batch, error = ready.get()
            if error is not None:
                raise error
            yield batch
    finally:
        stopped.set()
        while reader.is_alive():  # it may be waiting for room
            with contextlib.suppress(queue.Empty):
                ready.get(timeout=0.01)


def join(
    coordinator: str | None = None,
    n_processes: int | None = None,
    process: int | None = None,
    *,
    heartbeat_seconds: int = 20,
    **options: Any,
) -> None:
    """Makes this process one of several that train together; before anything is computed.

    Calls `jax.distributed.initialize`, so that processes which do not answer for `heartbeat_seconds` count as lost
    and a process whose partner has died ends with an error instead of waiting for it.

    Args:
        coordinator: "host:port" of process 0; None, with the following, as JAX finds it in the environment (Slurm,
            Open MPI, Kubernetes).
        n_processes: how many there are.
        process: the number of this one, from 0.
        heartbeat_seconds: see above.
        options: further arguments of `jax.distributed.initialize`, such as local_device_ids.
    """
    jax.config.update("jax_enable_recoverability", True)  # noqa: FBT003 - else JAX aborts a process before it can say anything
    jax.config.update("jax_enable_preemption_service", False)  # noqa: FBT003 - it would take SIGTERM away from checkpoints
    jax.distributed.initialize(
        coordinator, n_processes, process, heartbeat_timeout_seconds=heartbeat_seconds, **options
    )
    _Others.patience = heartbeat_seconds
    _Others.watch.start()
    atexit.register(_Others.end)


class _Others:
    """What this process knows of the others, and how they end together.

    A partner that has died breaks the connection, which raises an error. One that only falls silent does not: the
    main thread waits for it in XLA, where nothing can be raised, so that a second thread ends the process.
    """

    needed = False  # this process cannot go on without them
    lost = False
    patience = 20  # seconds
    ended = threading.Event()
    watch: threading.Thread

    @classmethod
    def look(cls) -> None:
        """Gives a sign of life every second, and looks for theirs."""
        state = jax._src.distributed.global_state
        client: Any = state.client
        me, others = state.process_id, [i for i in range(state.num_processes) if i != state.process_id]
        signs, silent = dict.fromkeys(others, ""), dict.fromkeys(others, 0)
        beats = 0
        while not cls.ended.wait(1.0):
            beats += 1
            with contextlib.suppress(Exception):  # process 0 is gone: JAX ends this one
                client.key_value_set(f"diffbio/sign/{me}", str(beats), allow_overwrite=True)
            for i in others:
                sign = signs[i]
                with contextlib.suppress(Exception):  # no sign yet
                    sign = client.key_value_try_get(f"diffbio/sign/{i}")
                # looks are counted, not seconds: a machine may have slept
                silent[i] = silent[i] + 1 if sign == signs[i] else 0
                signs[i] = sign
                if silent[i] > cls.patience and cls.needed:
                    print(f"ProcessLostError: {LOST} (process {i} has been silent for {silent[i]} s)", file=sys.stderr)
                    sys.stderr.flush()
                    os._exit(ProcessLostError.exit_code)

    @classmethod
    def end(cls) -> None:
        """Waits for the others, unless something went wrong; process 0 ends last: JAX aborts who cannot reach it."""
        cls.ended.set()
        cls.watch.join()
        client = jax._src.distributed.global_state.client
        if client is None or cls.lost or getattr(sys, "last_exc", None) is not None:
            return
        with contextlib.suppress(Exception):  # a process that has died has said so already
            client.wait_at_barrier("diffbio: end", END_SECONDS * 1000)
            if jax.process_index() > 0:
                jax.distributed.shutdown()
                return
            everyone = list(range(jax.process_count()))
            for _ in range(END_SECONDS * 20):
                if len(client.get_live_nodes(everyone)) < 2:
                    return
                time.sleep(0.05)


_Others.watch = threading.Thread(target=_Others.look, name="diffbio-others", daemon=True)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _numbers(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _rewrapped(leaf: Any, function: Callable[[Any], Any]) -> Any:
    """`function` of an array, or of the data of a random key."""
    if not _is_key(leaf):
        return function(leaf)
    return jax.random.wrap_key_data(function(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
