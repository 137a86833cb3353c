from datetime import UTC, datetime, timedelta

import numpy as np

from diffbio.data import fingerprint, provenance


def test_entry():
    entry = provenance(params={"n": 3}, seed=np.int64(7), seconds=60.0, converged=True)
    assert entry["seed"] == 7
    assert type(entry["seed"]) is int
    assert entry["versions"]["numpy"] == np.__version__
    assert entry["converged"] is True
    started = datetime.fromisoformat(entry["started"])
    assert abs(datetime.now(UTC) - timedelta(seconds=60) - started) < timedelta(seconds=10)


def test_fingerprint_sees_every_part(tmp_path, small, h5ad):
    base = fingerprint(small)
    assert fingerprint(small.copy()) == base
    changed = small.copy()
    changed.X.data[0] += 1
    renamed = small.copy()
    renamed.obs_names = [f"other{i}" for i in range(90)]
    assert len({base, fingerprint(changed), fingerprint(renamed), fingerprint(small[:, ::-1].copy())}) == 4
    assert fingerprint(h5ad) == fingerprint(str(h5ad)) != base
    small.write_zarr(tmp_path / "a.zarr")
    one = fingerprint(tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "note").write_text("x")
    assert fingerprint(tmp_path / "a.zarr") != one
