"""How well gradients pass through each operator: the table of docs/gradients.md.

    uv run python -m benchmarks.quality.gradients                     # print it, some minutes
    uv run python -m benchmarks.quality.gradients DifferentiableUMAP  # of some operators
    uv run python -m benchmarks.quality.gradients --write             # print it, and put it into the page

Every operator on its contract examples (tens of cells, fresh or data-started weights): up to 32 orthonormal directions
in the smooth outputs of one cell are pulled back to its float inputs. Columns as of `diffbio.gradients`.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from benchmarks.quality.integration_data import REPO

PROBES = 32
PAGE = REPO / "docs" / "gradients.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
COLUMNS = ("operator", "example", "gain", "conditioning", "silent", "verdict")


def examples() -> Iterator[tuple[str, str, Any, Any]]:
    """Operator's name, example's, operator and data, of all that take and give floats with a gradient."""
    import diffbio.operators.normalization
    import diffbio.operators.singlecell  # noqa: F401 - registers all
    from diffbio.operators.base import REGISTRY

    for name, kind in sorted(REGISTRY.items()):
        if kind.__module__.startswith("diffbio.operators"):
            for example, (op, data) in kind.examples().items():
                if any(key in data for key in op.smooth_in) and op.smooth_out:
                    yield name, example, op, data


def row(name: str, example: str, op: Any, data: Any) -> list[str]:
    """Of the table."""
    from diffbio.pipelines import Chain
    from diffbio.pipelines.gradient_report import flat, probed_by_part, silent_share, spread, verdict_of

    chain = Chain([op], terms=[], inputs=[key for key in op.requires if key in data])
    run = jax.jit(lambda data, key: probed_by_part(chain, data, key, PROBES))
    probes = jax.device_get(run(data, jax.random.key(0))[chain.names[0]])
    jacobian = np.stack([flat(one) for one in zip(*probes.values(), strict=True)])
    gain, condition = spread(jacobian)
    silent = silent_share(op, probes, [])
    said = verdict_of(bool(np.isfinite(jacobian).all()), gain, silent)
    return [name, example, f"{gain:.2g}", f"{condition:.2g}", f"{silent:.0%}", said]


def table(wanted: list[str]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, example, op, data in examples():
        if not wanted or name in wanted:
            lines.append(f"| {' | '.join(row(name, example, op, data))} |")
            print(f"  {name}: {example}", file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", help="all unless named")
    parser.add_argument("--write", action="store_true", help="into the page")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    found = table(asked.operators)
    print(found)
    if asked.write and not asked.operators:
        text = PAGE.read_text()
        PAGE.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{found}\n{END}", text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
