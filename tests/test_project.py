"""The project's own files agree with each other."""

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lock_tool():
    spec = importlib.util.spec_from_file_location("lock", ROOT / "tools" / "lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_constraints_equal_the_lock():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pinned = [pin.replace('"', "'") for pin in lock_tool().pins((ROOT / "requirements.lock").read_text())]
    assert pinned == project["tool"]["uv"]["constraint-dependencies"]


def test_the_lock_is_hashed_and_names_no_registry():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert text.count("--hash=sha256:") >= len(lock_tool().pins(text))


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 40


def test_import_and_help_load_no_jax():
    check = "import diffbio, diffbio.cli, sys; print('jax' in sys.modules or 'anndata' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_public_names_import():
    import diffbio

    for name in diffbio.__all__:
        assert getattr(diffbio, name) is not None
