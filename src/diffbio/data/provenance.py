"""What a result was made from: settings, versions and the fingerprint of the input."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from scipy import sparse

from .plain import plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

PACKAGES = ("diffbio", "jax", "flax", "optax", "numpy", "scipy", "anndata")


def provenance(
    *,
    params: Mapping[str, Any],
    seed: int,
    data: str | Path | AnnData | None = None,
    device: str = "cpu",
    seconds: float = 0.0,
    started: datetime | None = None,
    converged: bool | None = None,
    skipped: Sequence[str] = (),
    unfitted: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the entry of `uns["diffbio"][function]`, in plain types.

    Parameters
    ----------
    params
        All settings, None included.
    seed
        What the random numbers were made from.
    data
        The input, for its `fingerprint`.
    device, seconds, started, converged
        Where it ran, how long, since when (UTC; default now less `seconds`), and whether training converged.
    skipped, unfitted
        Stages that did not run; outputs that come from untrained weights.
    warnings
        Texts shown to the user.
    """
    begun = started or datetime.fromtimestamp(datetime.now(UTC).timestamp() - seconds, UTC)
    return {
        "params": plain(dict(params)),
        "seed": int(seed),
        "versions": versions(),
        "input_sha256": "" if data is None else fingerprint(data),
        "device": device,
        "started": begun.isoformat(timespec="seconds"),
        "seconds": float(seconds),
        "converged": "none" if converged is None else bool(converged),
        "skipped": plain(list(skipped)),
        "unfitted": plain(list(unfitted)),
        "warnings": plain(list(warnings)),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide the numbers; those not installed are left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def fingerprint(data: str | Path | AnnData) -> str:
    """Return the sha256 of a file, of all files of a folder, or of X and the names of an AnnData."""
    digest = hashlib.sha256()
    if isinstance(data, str | Path):
        path = Path(data)
        files = [path] if path.is_file() else sorted(entry for entry in path.rglob("*") if entry.is_file())
        for file in files:
            if file != path:
                digest.update(str(file.relative_to(path)).encode() + b"\0")
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()
    if data.isbacked and not data.is_view:
        return fingerprint(str(data.filename))
    matrix: Any = data.X
    parts = [matrix]
    if sparse.issparse(matrix):
        rows = cast("Any", sparse.csr_array)(matrix)
        parts = [rows.data, rows.indices, rows.indptr]
    for part in parts:
        array = np.ascontiguousarray(part)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes() if array.dtype.hasobject else memoryview(array).cast("B"))
    for names in (data.obs_names, data.var_names):
        digest.update("\n".join(map(str, names)).encode())
    return digest.hexdigest()
