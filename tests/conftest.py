"""Fixtures that all tests share."""

import os
from pathlib import Path

import pytest

# Many tests compile the same small programs; the user's own cache stays untouched.
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Programs on a handful of cells cost their compilation, not their running: without XLA's optimisation it takes half.
# Demo and benchmarks run optimised.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
os.environ.setdefault("MPLBACKEND", "Agg")


def data_folder() -> Path | None:
    """Where the real data lies: DIFFBIO_DATA, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("DIFFBIO_DATA", Path(__file__).parents[2] / "shared" / "data"))
    return folder if (folder / "pbmc3k.h5ad").is_file() else None


@pytest.fixture(scope="session")
def data_dir() -> Path:
    folder = data_folder()
    if folder is None:
        pytest.skip("real data not found: set DIFFBIO_DATA to the folder that holds pbmc3k.h5ad")
    return folder
