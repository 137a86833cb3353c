"""What `tl.ot_trajectory` returns: descendants, ancestors and fates of cells, and the population in between."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import ConfigError, DataError, MissingKeyError
from ..math import couplings
from ..math.couplings import CellCoupling
from ..math.ot import MOST_DENSE

if TYPE_CHECKING:
    import pandas as pd


class Population(NamedTuple):
    """Cells at a time that was not measured: rows of values, and the share of the population that each stands for."""

    values: np.ndarray  # (points, columns)
    weights: np.ndarray  # (points,), sum 1


def logs(mass: np.ndarray) -> np.ndarray:
    """Logarithms of masses, -inf of 0."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(mass, float))


def shares_of(log_mass: np.ndarray) -> np.ndarray:
    """Masses over their sum."""
    mass = np.exp(log_mass - log_mass.max())
    return np.asarray(mass / mass.sum())


class OTTrajectory:
    """Couplings between consecutive time points; those between others are their products.

    `days` are the time points, in order; `cells[k]` the row numbers of the cells of day k; `growth` (cells,) the
    descendants that each has at the next day, NaN on the last. Nothing here holds an array of cells by cells, unless
    `transport` is asked for one.
    """

    def __init__(
        self, names: Any, days: Sequence[float], cells: Sequence[np.ndarray], steps: Sequence[CellCoupling],
        growth: np.ndarray,
    ) -> None:  # fmt: skip
        self.names, self.days, self.cells = names, tuple(days), list(cells)
        self.steps, self.growth = list(steps), growth

    def transport(self, t0: float, t1: float) -> "pd.DataFrame":
        """The coupling of two days, (cells, later cells): row i sums to the number of descendants of cell i.

        Raises:
            ConfigError: t0 is not before t1.
            DataError: too many pairs for an array; use `descendants`, `ancestors` or `fates`.
            MissingKeyError: no such day.
        """
        import pandas as pd

        first, last = self._span(t0, t1)
        shape = len(self.cells[first]), len(self.cells[last])
        if shape[0] * shape[1] > MOST_DENSE:
            msg = f"transport: {shape[0]} x {shape[1]} cells are too many for an array (at most {MOST_DENSE:,} pairs); "
            msg += "ask for descendants, ancestors or fates."
            raise DataError(msg)
        plan = couplings.dense(self.steps[first])
        for step in self.steps[first + 1 : last]:
            plan = couplings.push(step, plan.T).T
        return pd.DataFrame(plan, index=self.names[self.cells[first]], columns=self.names[self.cells[last]])

    def descendants(self, cells: Any, day: float | None = None) -> "pd.Series":
        """Where the descendants of some cells are on a later day: shares of its cells, sum 1.

        Args:
            cells: names, row numbers or a mask of cells of one day.
            day: of the descendants; None is the last.
        """
        return self._moved("descendants", cells, self.days[-1] if day is None else day, forward=True)

    def ancestors(self, cells: Any, day: float | None = None) -> "pd.Series":
        """Where the ancestors of some cells are on an earlier day: shares of its cells, sum 1.

        Args:
            cells: names, row numbers or a mask of cells of one day.
            day: of the ancestors; None is the first.
        """
        return self._moved("ancestors", cells, self.days[0] if day is None else day, forward=False)

    def fates(self, groups: Any, day: float | None = None) -> "pd.DataFrame":
        """Share of each cell's descendants on the last day that are in each group, (cells, groups); rows sum to 1.

        The rows are the cells of one day: of the first one, unless `day` names another.

        Args:
            groups: (cells of all days,), such as `adata.obs["cell_type"]`; missing values are left out.
            day: of the cells whose fates are asked for; None is the first day, not all of them.

        Raises:
            DataError: groups of another length, or none of the last day's cells has a group.
            MissingKeyError: no such day.
        """
        import pandas as pd

        first = self._number(self.days[0] if day is None else day)
        kinds, indicator = self._indicator(groups, len(self.days) - 1)
        if not indicator.any():
            msg = f"fates: none of the {len(indicator)} cells of the last day, {self.days[-1]:g}, has a group."
            raise DataError(msg)
        shares, _ = self.averaged(indicator, logs(indicator.any(axis=1)), len(self.days) - 1, first)
        return pd.DataFrame(shares, index=self.names[self.cells[first]], columns=kinds)

    def interpolate(
        self, values: Any, time: float, *, form: str = "expected", smooth: bool = True,
        between: tuple[float, float] | None = None, n_cells: int = 1000, random_state: int = 0,
    ) -> Population:  # fmt: skip
        """The population at any time in between, described by `values` such as principal components.

        "expected" puts a point for every cell of both days: each early cell moves towards the mean of its descendants,
        each late one stands on its way from the mean of its ancestors. "sampled" draws pairs of a cell and its
        descendant, as wot does, each at (1 - s) x + s y. A cell counts in proportion to its growth to the power s.

        Args:
            values: (cells of all days, columns).
            time: between two of the days.
            form: "expected" or "sampled".
            smooth: of "expected": whether points move along a curve through the means of their ancestors and
                descendants on all days (monotone cubic, Fritsch & Carlson 1980) or straight; with two days these agree.
            between: two days to move straight between; None is the days next to `time`, all of them for the curve.
            n_cells: of "sampled".
            random_state: seed of "sampled".

        Raises:
            ConfigError: a time outside, an unknown form, or "sampled" between days that are not neighbours.
        """
        values = np.asarray(values, float)
        values = values[:, None] if values.ndim == 1 else values
        if len(values) != len(self.names):
            msg = f"interpolate: values have {len(values)} rows, but the trajectory has {len(self.names)} cells."
            raise DataError(msg)
        first, last = self._around(time) if between is None else self._span(*between)
        share = (time - self.days[first]) / (self.days[last] - self.days[first])
        if not 0 <= share <= 1 or form not in ("expected", "sampled") or (form == "sampled" and last > first + 1):
            msg = (
                f"interpolate: cannot go from day {self.days[first]:g} to {self.days[last]:g} at time {time:g} in form "
            )
            msg += f'{form!r}; the time must lie between them, form is "expected", or "sampled" for neighbouring days.'
            raise ConfigError(msg)
        log_grown = self._log_reached(np.zeros(len(self.cells[last])), last, first)
        early, late = shares_of(share * log_grown), shares_of(self._log_reached((share - 1) * log_grown, first, last))
        if form == "sampled":
            i, j = couplings.pairs(self.steps[first], early, n_cells, random_state)
            x, y = values[self.cells[first]][i], values[self.cells[last]][j]
            return Population((1 - share) * x + share * y, np.full(n_cells, 1 / n_cells))
        knots = range(len(self.days)) if smooth and between is None else (first, last)
        points = [self._way(values, number, knots, time) for number in (first, last)]
        weights = (1 - share) * early, share * late
        return Population(np.concatenate(points), np.concatenate(weights))

    def carried(self, values: np.ndarray, start: int, end: int) -> np.ndarray:
        """Values of the cells of day number `start` through the couplings to those of day `end`, summed, not averaged.

        Forwards these are masses and where they arrive, backwards what the descendants hold.
        """
        for step in self.steps[start:end]:
            values = couplings.push(step, values)
        for step in reversed(self.steps[end:start]):
            values = couplings.pull(step, values)
        return values

    def averaged(self, values: np.ndarray, log_mass: np.ndarray, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Means over the relatives on day number `start` of each cell of day `end`, and the log of their mass.

        Finite also for cells so far from all others that the couplings give them no mass in double precision.

        Args:
            values: (cells of day `start`, columns).
            log_mass: (cells of day `start`,), by which these count; -inf is not at all.
            start: number of the day of the relatives.
            end: of the cells.
        """
        for step in self.steps[start:end]:
            values, log_mass = couplings.averages_back(step, values, log_mass)
        for step in reversed(self.steps[end:start]):
            values, log_mass = couplings.averages(step, values, log_mass)
        return values, log_mass

    def _log_reached(self, log_mass: np.ndarray, start: int, end: int) -> np.ndarray:
        return self.averaged(np.empty((len(log_mass), 0)), log_mass, start, end)[1]

    def _way(self, values: np.ndarray, number: int, knots: Any, time: float) -> np.ndarray:
        """Where cells of one day are at `time`: at each knot they are the mean of their relatives there."""
        from scipy.interpolate import PchipInterpolator

        stops = []
        for knot in knots:
            there = values[self.cells[knot]]
            stops.append(self.averaged(there, np.zeros(len(there)), knot, number)[0])
        return np.asarray(PchipInterpolator([self.days[k] for k in knots], np.stack(stops))(time))

    def _moved(self, who: str, cells: Any, day: float, *, forward: bool) -> "pd.Series":
        import pandas as pd

        number, mask = self._rows(who, cells)
        other = self._number(day)
        if other < number if forward else other > number:
            word = "after" if forward else "before"
            msg = f"{who}: day {day:g} is not {word} day {self.days[number]:g}, that of the cells."
            raise ConfigError(msg)
        found = shares_of(self._log_reached(logs(mask), number, other))
        return pd.Series(found, index=self.names[self.cells[other]])

    def _rows(self, who: str, cells: Any) -> tuple[int, np.ndarray]:
        """Number of the day of some cells, and which of its cells they are (1.0 or 0.0)."""
        asked = np.atleast_1d(np.asarray(cells))
        if asked.dtype == bool and len(asked) == len(self.names):
            rows = np.flatnonzero(asked)
        elif np.issubdtype(asked.dtype, np.integer):
            rows = asked
        else:
            rows = self.names.get_indexer(asked.astype(str))
            if (rows < 0).any():
                msg = f"{who}: there is no cell {str(asked[rows < 0][0])!r}."
                raise MissingKeyError(msg)
        if len(rows) == 0 or rows.min() < 0 or rows.max() >= len(self.names):
            msg = f"{who}: no cells, or row numbers beyond the {len(self.names)} cells there are."
            raise DataError(msg)
        masks = [np.isin(own, rows).astype(float) for own in self.cells]
        days = [k for k, mask in enumerate(masks) if mask.any()]
        if len(days) > 1:
            msg = f"{who}: the cells are of days {self.days[days[0]]:g} and {self.days[days[1]]:g}; pass those of one."
            raise DataError(msg)
        return days[0], masks[days[0]]

    def _indicator(self, groups: Any, number: int) -> tuple[list[str], np.ndarray]:
        import pandas as pd

        found = pd.Categorical(groups)
        if len(found) != len(self.names):
            msg = f"fates: groups have {len(found)} entries, but the trajectory has {len(self.names)} cells."
            raise DataError(msg)
        codes = np.asarray(found.codes)[self.cells[number]]
        return [str(name) for name in found.categories], (codes[:, None] == np.arange(len(found.categories))).astype(
            float
        )

    def _number(self, day: float) -> int:
        if day not in self.days:
            msg = f"there is no day {day}; there are {', '.join(f'{d:g}' for d in self.days)}"
            raise MissingKeyError(msg)
        return self.days.index(day)

    def _span(self, t0: float, t1: float) -> tuple[int, int]:
        first, last = self._number(t0), self._number(t1)
        if first >= last:
            msg = f"the first day must be before the second, got {t0:g} and {t1:g}."
            raise ConfigError(msg)
        return first, last

    def _around(self, time: float) -> tuple[int, int]:
        last = int(np.clip(np.searchsorted(self.days, time), 1, len(self.days) - 1))
        return last - 1, last
