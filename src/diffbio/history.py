"""What a training run went through: shown while it runs, kept and plotted afterwards."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class History:
    """One row of numbers per epoch.

    Attributes:
        rows: per epoch: `epoch`, `loss` and its named parts (means over cells), the same with `validation_`
            in front, `good_steps`, `skipped_steps`, `cells_per_second`.
        best_epoch: whose weights the model holds.
        stopped_early: whether the validation loss had stopped falling.
        settings: of a pipeline, what each stage was trained with.
    """

    rows: list[dict[str, float]]
    best_epoch: int = -1
    stopped_early: bool = False
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]

    def columns(self) -> dict[str, np.ndarray]:
        """The rows as columns; a number that a stage does not have is NaN."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        return {
            name: np.asarray([
                str(row.get(name, "")) if name == "stage" else float(row.get(name, np.nan)) for row in self.rows
            ])
            for name in names
        }  # fmt: skip

    def to_frame(self) -> "pd.DataFrame":
        """The rows as a table indexed by epoch."""
        import pandas as pd

        return pd.DataFrame(self.rows).set_index("epoch")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draws training and validation loss against the epoch, of every stage that has trained; returns the axes."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.figure(figsize=(5, 3.2), layout="constrained").subplots()
        stages = list(dict.fromkeys(str(row.get("stage", "")) for row in self.rows))
        for i, stage in enumerate(stages):
            rows = [row for row in self.rows if str(row.get("stage", "")) == stage]
            scale = 1.0 if len(stages) == 1 else abs(rows[0]["loss"]) or 1.0  # losses of stages have own units
            for name, style in (("loss", "-"), ("validation_loss", "--")):
                points = [(row["epoch"], row[name] / scale) for row in rows if name in row]
                if points:
                    kind = "training" if name == "loss" else "validation"
                    ax.plot(*zip(*points, strict=True), style, color=f"C{i}", label=f"{stage} {kind}".strip())
        if self.best_epoch >= 0 and self["validation_loss"]:
            ax.axvline(self.best_epoch, color="0.7", linewidth=0.8, label="kept")
        ax.set(xlabel="epoch", ylabel="loss per cell" if len(stages) == 1 else "loss, as a share of the first")
        ax.legend(frameon=False)
        return ax


class Progress:
    """A bar on a terminal, one line per epoch on stderr elsewhere, nothing when `shown` is False."""

    def __init__(self, label: str, settings: Any, shown: bool) -> None:  # noqa: FBT001
        self.label, self.total, self.shown = label, settings.max_epochs, shown
        self.bar: Any = None
        self.task: Any = None
        self.last = "first epoch compiles"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Progress":
        self.started, self.cells, self.epochs_done, self.drawn = time.perf_counter(), 0, 0, 0.0
        if self.shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")]
            self.bar = self._stack.enter_context(
                Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            )
            self.task = self.bar.add_task(self.label, total=float(self.total), text=self.last)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def step(self, epoch: int, step: int, n_steps: int, cells: int) -> None:
        """Counts one minibatch of `cells` cells."""
        self.cells += cells
        now = time.perf_counter()
        if self.bar is None or now - self.drawn < 0.1:
            return
        self.drawn = now
        rate = self.cells / (now - self.started)
        self.bar.update(self.task, completed=epoch + step / n_steps, text=f"{self.last} | {rate:,.0f} cells/s")

    def epoch(self, row: dict[str, float]) -> None:
        """Notes a finished epoch."""
        self.epochs_done += 1
        parts = [f"loss {row['loss']:.4g}"]
        if "validation_loss" in row:
            parts.append(f"validation {row['validation_loss']:.4g}")
        if row["skipped_steps"]:
            parts.append(f"{row['skipped_steps']:.0f} steps skipped")
        self.last = ", ".join(parts)
        if self.shown and self.bar is None:
            left = (time.perf_counter() - self.started) / self.epochs_done * (self.total - row["epoch"] - 1)
            print(
                f"{self.label}: epoch {row['epoch'] + 1:.0f}/{self.total}, {self.last}, "
                f"{row['cells_per_second']:,.0f} cells/s, at most {left:.0f} s left",
                file=sys.stderr, flush=True,
            )
