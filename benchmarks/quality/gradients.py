"""How well gradients pass through each operator: the table of docs/gradients.md.

    uv run python -m benchmarks.quality.gradients

Every operator on its contract example (tens of cells, fresh or data-started weights): up to 32 orthonormal directions
in the smooth outputs of one cell are pulled back to its float inputs. Columns as of `diffbio.gradients`.
"""

from __future__ import annotations

import sys
import warnings

import jax
import numpy as np

PROBES = 32


def rows(wanted: tuple[str, ...] = ()) -> list[tuple[str, str, float, float, float]]:
    """Operator, example, gain, condition, silent share."""
    import diffbio.operators.singlecell  # noqa: F401 - registers all
    from diffbio.operators.base import REGISTRY
    from diffbio.pipelines import Chain
    from diffbio.pipelines.gradient_report import flat, probed_by_part, silent_share, spread

    found = []
    for name, kind in sorted(REGISTRY.items()):
        if not kind.__module__.startswith("diffbio.operators") or (wanted and name not in wanted):
            continue
        for example, (op, data) in kind.examples().items():
            if not any(key in data for key in op.smooth_in) or not op.smooth_out:
                continue
            chain = Chain([op], inputs=[key for key in op.requires if key in data])
            probes = jax.jit(lambda data, key, chain=chain: probed_by_part(chain, data, key, PROBES))(
                data, jax.random.key(0)
            )[chain.names[0]]
            probes = jax.device_get(probes)
            jacobian = np.stack([flat(one) for one in zip(*probes.values(), strict=True)])
            gain, condition = spread(jacobian)
            found.append((name, example, gain, condition, silent_share(op, probes, [])))
            print(f"  {name}: {example}", file=sys.stderr)
    return found


def main() -> None:
    """Prints the table."""
    warnings.simplefilter("ignore")
    print(f"{'operator':<42} {'example':<34} {'gain':>9} {'condition':>9} {'silent':>7}")
    for name, example, gain, condition, silent in rows(tuple(sys.argv[1:])):
        print(f"{name:<42} {example:<34} {gain:>9.3g} {condition:>9.3g} {silent:>7.0%}")


if __name__ == "__main__":
    main()
