"""Differentiable single-cell analysis: every step a trainable operator, on JAX and Flax NNX.

`import diffbio` is cheap; what needs JAX is imported when first used.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import losses, models, operators, pipelines, pl, pp, tl
    from .data.read import read as read
    from .fitting import fit as fit
    from .history import History as History
    from .operators.base import Operator as Operator
    from .pipelines.chain import Chain as Chain
    from .pipelines.gradient_report import gradients as gradients

__version__ = "0.1.0"

_MODULES = frozenset({"losses", "models", "operators", "pipelines", "pl", "pp", "tl"})
_PLACES = {"fit": "fitting", "read": "data.read", "History": "history", "Operator": "operators.base"}
_PLACES |= {"Chain": "pipelines.chain", "gradients": "pipelines.gradient_report"}

__all__ = [
    "Chain", "History", "Operator", "fit", "gradients", "losses", "models", "operators", "pipelines", "pl", "pp",
    "read", "tl",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    msg = f"module 'diffbio' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in the user's cache folder, unless told otherwise.

    `DIFFBIO_COMPILATION_CACHE=off` turns it off; JAX's own settings win. A folder that cannot be written
    costs compile time only.
    """
    if os.environ.get("DIFFBIO_COMPILATION_CACHE", "").lower() in {"off", "0", "false"} or "jax" in sys.modules:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):  # no home folder at all
        return
    folder = Path(home) / "diffbio" / "jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


_use_compilation_cache()
