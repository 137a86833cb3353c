"""What training as one gains: the joint version beside the same steps fitted one after another, on unseen cells.

    uv run python -m benchmarks.quality.trained_as_one                      # all rows, 5 seeds; what is stored is kept
    uv run python -m benchmarks.quality.trained_as_one --rows ordering      # one of them
    uv run python -m benchmarks.quality.trained_as_one --stored             # print what is stored, run nothing
    uv run python -m benchmarks.quality.trained_as_one --again              # run everything anew

Each row is a module `joint_<row>.py` beside this one, whose docstring says what is trained, on what and how long. A
seed is a division of the cells and the first weights; all arms of a seed share both. A bar is met where the mean
difference between joint and the arm it has to beat is above zero beyond its 95 % interval (Student's t, paired over
seeds). Exit code 1 if one is missed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import json
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
from benchmarks.quality.integration_data import RESULTS
from scipy.stats import t as student

ROWS = ("integration", "ordering", "preprocessing", "few_labels")
SEEDS = (0, 1, 2, 3, 4)
JOINT = "joint"


def module_of(row: str) -> ModuleType:
    """The module that measures a row: TITLE, MEASURE, DATA, ARMS, BEAT and `measured(name, seed)`."""
    return importlib.import_module(f"benchmarks.quality.joint_{row}")


def recipe(module: ModuleType) -> str:
    """Short hash of the module's code, without its docstrings and comments: tells scores of older code."""
    tree = ast.parse(Path(str(module.__file__)).read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not is_text(part)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]


def is_text(node: ast.AST) -> bool:
    """Whether it is a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def stored(row: str) -> dict[str, dict[str, float]]:
    """Scores by "<data> <seed>"."""
    path = RESULTS / f"joint_{row}.json"
    runs: dict[str, dict[str, float]] = json.loads(path.read_text())["runs"] if path.exists() else {}
    return runs


def store(row: str, key: str, scores: dict[str, float], made_by: str) -> None:
    """Adds the scores of one data set and seed."""
    runs = {**stored(row), key: {name: round(value, 5) for name, value in scores.items()}}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(runs[name])}" for name in sorted(runs))
    path = RESULTS / f"joint_{row}.json"
    path.write_text(f'{{"recipe": "{made_by}", "runs": {{\n{lines}\n}}}}\n')


def made_by(row: str) -> str:
    """Hash of the text that made the stored scores."""
    path = RESULTS / f"joint_{row}.json"
    return str(json.loads(path.read_text())["recipe"]) if path.exists() else ""


def run(row: str, module: ModuleType, seeds: list[int], data: list[str], *, again: bool) -> None:
    """Measures what is not stored yet, or all of it."""
    wanted = recipe(module)
    for name in data:
        for seed in seeds:
            key = f"{name} {seed}"
            if key in stored(row) and not again:
                continue
            start = time.process_time()
            scores = module.measured(name, seed)
            store(row, key, scores, wanted)
            told = ", ".join(f"{arm} {scores[arm]:.3f}" for arm in module.ARMS if arm in scores)
            print(f"  {key}: {told}; {time.process_time() - start:.0f} CPU-s", file=sys.stderr, flush=True)


def paired(joint: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Mean difference and half the width of its 95 % interval, Student's t over seeds."""
    gap = joint - other
    if len(gap) < 2:
        return float(gap.mean()), float("nan")
    half = float(student.ppf(0.975, len(gap) - 1)) * gap.std(ddof=1) / np.sqrt(len(gap))
    return float(gap.mean()), float(half)


def table(module: ModuleType, runs: dict[str, dict[str, float]], seeds: list[int], data: list[str]) -> list[bool]:
    """Prints a row's table; whether each bar is met."""
    gaps = [f"joint - {arm}" for arm in module.BEAT]
    print(f"\n{module.TITLE}: {module.MEASURE}; mean (lowest to highest) over seeds")
    print(f"| data | seeds | {' | '.join((*module.ARMS, *gaps))} | bar |")
    print("|---" * (3 + len(module.ARMS) + len(gaps)) + "|")
    met = []
    for name in data:
        chosen = [runs[f"{name} {seed}"] for seed in seeds if f"{name} {seed}" in runs]
        if not chosen:
            continue
        arms = {arm: np.array([run[arm] for run in chosen]) for arm in module.ARMS if arm in chosen[0]}
        cells = [
            f"{arms[arm].mean():.3f} ({arms[arm].min():.3f} to {arms[arm].max():.3f})" if arm in arms else ""
            for arm in module.ARMS
        ]
        differences = [paired(arms[JOINT], arms[arm]) for arm in module.BEAT]
        cells += [f"{mean:+.3f} ± {half:.3f}" for mean, half in differences]
        met.append(all(mean > half for mean, half in differences))
        above = all(mean > 0 for mean, _ in differences)
        said = "met" if met[-1] else "above, within noise" if above else "**missed**"
        print(f"| {name} | {len(chosen)} | {' | '.join(cells)} | {said} |")
    return met


def main() -> int:
    """Runs what is asked for and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--data", nargs="+", help="of the rows' data sets; all unless given")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--again", action="store_true", help="run also what is stored")
    parser.add_argument("--stored", action="store_true", help="run nothing, print what is stored")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    met: list[bool] = []
    for row in asked.rows:
        module = module_of(row)
        data = [name for name in module.DATA if asked.data is None or name in asked.data]
        if not asked.stored:
            run(row, module, asked.seeds, data, again=asked.again)
        met += table(module, stored(row), asked.seeds, data)
        if made_by(row) not in ("", recipe(module)):
            print(f"the text of joint_{row}.py has changed since these were measured; --again measures anew")
    return int(not all(met))


if __name__ == "__main__":
    sys.exit(main())
