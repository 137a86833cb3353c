"""What the AnnData functions share: they work in place or on a copy, and write down what they did."""

import functools
import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Concatenate

from .data.provenance import provenance
from .data.write import add_results
from .errors import DataWarning
from .slots import target_of

if TYPE_CHECKING:
    from anndata import AnnData


def recorded[**P](
    function: Callable[Concatenate["AnnData", P], None],
) -> Callable[Concatenate["AnnData", P], Any]:
    """Makes an AnnData function out of one that writes into its argument.

    `copy=True` works on a copy in memory and returns it; `uns["diffbio"][name]` says with which settings, seed and
    versions, when, how long and on what device, and what was warned of.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(adata: "AnnData", *args: P.args, **kwargs: P.kwargs) -> Any:
        given = signature.bind(adata, *args, **kwargs)
        given.apply_defaults()
        settings = {name: value for name, value in given.arguments.items() if value is not adata}
        copied = bool(settings.pop("copy", False))
        target = target_of(adata, copy=copied)
        with recording() as record:
            function(target, *args, **kwargs)
        entry = provenance(params=_said(settings), seed=settings.get("random_state", 0), data=target, **record)
        add_results(target, {f"uns/diffbio/{function.__name__}": entry})
        return target if copied else None

    return wrapped


@contextmanager
def recording() -> Iterator[dict[str, Any]]:
    """A dict that holds, after the block, `started`, `seconds`, `device` and `warnings`, for `provenance`.

    Warnings are shown when they come, as ever.
    """
    record: dict[str, Any] = {"started": datetime.now(UTC), "warnings": []}
    begun = time.perf_counter()
    with warnings.catch_warnings():  # also forgets what was shown before: each record has its own
        show = warnings.showwarning

        def kept_and_shown(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, DataWarning) and str(message) not in record["warnings"]:
                record["warnings"].append(str(message))
            show(message, category, *where, **more)

        warnings.showwarning = kept_and_shown
        yield record
    record |= {"seconds": round(time.perf_counter() - begun, 3), "device": device()}


def device() -> str:
    """The device that JAX computes on, such as "cpu" or "gpu: NVIDIA H100"."""
    import jax

    first = jax.devices()[0]
    return first.platform if first.platform == "cpu" else f"{first.platform}: {first.device_kind}"


def _said(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they are recorded: an array or an AnnData by its shape only."""
    return {
        name: f"{type(value).__name__} of shape {tuple(value.shape)}" if hasattr(value, "shape") else value
        for name, value in settings.items()
    }
