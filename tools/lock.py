"""Writes requirements.lock (pinned, hashed, no URLs) and repeats its pins as uv constraints in pyproject.toml.

Run it as `uv run python tools/lock.py`.
"""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK, PROJECT = ROOT / "requirements.lock", ROOT / "pyproject.toml"
START, END = "constraint-dependencies = [", "]"


def pins(lock: str) -> list[str]:
    """The `name==version ; marker` lines of a lock file, without hashes."""
    return [
        re.sub(r"\s+", " ", line.removesuffix("\\").strip())
        for line in lock.splitlines()
        if re.match(r"[A-Za-z0-9]", line)
    ]


def constraints(project: str) -> list[str]:
    """The constraints that pyproject.toml holds."""
    inside = project.split(START, 1)[1].split(f"\n{END}", 1)[0]
    return re.findall(r'"([^"]+)"', inside)


def with_constraints(project: str, pinned: list[str]) -> str:
    """pyproject.toml with its constraints replaced."""
    before, rest = project.split(START, 1)
    after = rest.split(f"\n{END}", 1)[1] if not rest.startswith(END) else rest.removeprefix(END)
    lines = "".join(f'\n  "{pin.replace(chr(34), chr(39))}",' for pin in pinned)
    return f"{before}{START}{lines}\n{END}{after}"


def main() -> None:
    """Compiles the lock without the old constraints, then writes both files."""
    project = PROJECT.read_text()
    PROJECT.write_text(with_constraints(project, []))
    try:
        command = ["uv", "pip", "compile", "pyproject.toml", "--group", "dev", "--all-extras", "--universal"]
        options = ["--generate-hashes", "--no-header", "--no-annotate", "--quiet", "-o", str(LOCK)]
        subprocess.run([*command, *options], cwd=ROOT, check=True)
    except BaseException:
        PROJECT.write_text(project)
        raise
    PROJECT.write_text(with_constraints(project, pins(LOCK.read_text())))


if __name__ == "__main__":
    main()
