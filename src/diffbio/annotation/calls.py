"""From probabilities of types to calls: likeliest type, unassigned cells, several types, votes of neighbours."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.plain import plain
from ..math.voting import majority_vote, over_cluster
from ..operators.base import Config, setting

UNASSIGNED = "unassigned"
LISTED = 12  # types that the summary counts
LEAST_ALONE = 0.5  # as CellTypist
JOINT = "|"  # between the types of a cell that is called several, as CellTypist writes it


def share(default: float | None) -> Any:
    """A config field in [0, 1]."""
    return setting(default, "in [0, 1]", lambda v: 0 <= v <= 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calling(Config):
    """How probabilities become types.

    min_confidence: a cell whose confidence is lower is called 'unassigned'.
    min_probability: a cell is not called a type of lower probability, but 'unassigned'; None: 0, with multi_label 0.5.
    multi_label: a cell is called every type whose probability, independent of the others', is at least
        min_probability, joined by '|'. Only of mode 'celltypist'.
    majority_voting: a group of like cells, or a cluster of the column over_clustering, takes its commonest type.
    over_clustering: column of `obs`; None: cells are grouped finely by their latent positions,
        about 30 to a group.
    min_share: of its cells that the commonest type of a group must have; else the group is 'Heterogeneous'.
    """

    min_confidence: float = share(0.0)
    min_probability: float | None = share(None)
    multi_label: bool = False
    majority_voting: bool = False
    over_clustering: str | None = None
    min_share: float = share(0.0)


@dataclasses.dataclass
class Annotation:
    """What an annotator says of every cell.

    types: their names. probabilities: (cells, types), rows sum to 1. confidence: (cells,), 0 to 1.
    independent: (cells, types), probability of every type by itself; None where the model has none.
    latent: (cells, latent).
    markers: type -> its top genes, or those that it was told by.
    model: the fitted annotator.
    calling: how these become types.
    truth: name of the type of every cell by labels that training has not seen, "" where there is none.
    record: for `uns["diffbio"]["annotate"]`.
    """

    types: tuple[str, ...]
    probabilities: np.ndarray
    confidence: np.ndarray
    independent: np.ndarray | None
    latent: np.ndarray
    markers: Mapping[str, list[str]]
    model: Any
    calling: Calling
    record: dict[str, Any]
    truth: np.ndarray | None = None

    def results(self, obs: pd.DataFrame, *, seed: int = 0) -> dict[str, Any]:
        """Place -> value, for `data.write`; obs: of the cells."""
        calling = self.calling
        called = self._called(calling)
        sure = self.probabilities.max(1).astype(np.float32)
        found = {
            "obs/diffbio_cell_type": _categorical(called, self.types),
            "obs/diffbio_cell_type_max_prob": sure,
            "obs/diffbio_confidence": self.confidence.astype(np.float32),
            "obsm/diffbio_cell_type_prob": self.probabilities.astype(np.float32),
        }
        if calling.multi_label:
            assert self.independent is not None
            found["obsm/diffbio_cell_type_independent_prob"] = self.independent.astype(np.float32)
        if calling.majority_voting:
            if calling.over_clustering is None:
                groups = over_cluster(self.latent, seed=seed)
            else:
                groups = pd.factorize(obs[calling.over_clustering])[0]
            voted, _ = majority_vote(called, groups, min_share=calling.min_share, confidence=sure)
            found["obs/diffbio_cell_type_voted"] = _categorical(voted, self.types)
        return found | {"uns/diffbio/annotate": self.record | self._noted(called)}

    def save(self, path: str | Path) -> None:
        """Writes the annotator to a folder, which `model=` and `diffbio annotate --model` read."""
        if hasattr(self.model, "load_query_data"):
            self.model.save(path, overwrite=True)
        else:
            self.model.save(path)

    def summary(self, results: Mapping[str, Any]) -> list[str]:
        """What came out, in a few lines; results: of `results`."""
        called = results["obs/diffbio_cell_type"]
        voted = results.get("obs/diffbio_cell_type_voted", called)
        sizes = pd.Series(called).value_counts()
        shown = ", ".join(f"{name} {size:,}" for name, size in sizes.head(LISTED).items())
        more = f" and {len(sizes) - LISTED} more" if len(sizes) > LISTED else ""
        seconds, device = self.record["seconds"], self.record["device"]
        lines = [
            f"{len(called):,} cells, {len(self.types)} types, mode {self.record['params']['mode']}; {seconds:.0f} s on "
            f"{device}",
            f"called: {shown}{more}; mean confidence {self.confidence.mean():.2f}",
        ]
        if scores := results["uns/diffbio/annotate"].get("scores"):
            lines.append(
                f"against {self.record['params']['labels_key']} of {scores['cells']:,} cells: accuracy "
                f"{scores['accuracy']:.3f}, macro-F1 {scores['macro_f1']:.3f}"
            )
        if (changed := int((np.asarray(voted, object) != np.asarray(called, object)).sum())):
            lines.append(f"majority voting changed {changed:,} cells (diffbio_cell_type_voted)")
        return lines

    def _called(self, calling: Calling) -> np.ndarray:
        names = np.array(self.types, dtype=object)
        if calling.multi_label:
            assert self.independent is not None
            least = LEAST_ALONE if calling.min_probability is None else calling.min_probability
            above = self.independent >= least
            called = np.array([JOINT.join(names[row]) or UNASSIGNED for row in above], dtype=object)
        else:
            called = names[self.probabilities.argmax(1)]
            called[self.probabilities.max(1) < (calling.min_probability or 0.0)] = UNASSIGNED
        called[self.confidence < calling.min_confidence] = UNASSIGNED
        return called

    def _noted(self, called: np.ndarray) -> dict[str, Any]:
        pairs = [(name, gene) for name, genes in self.markers.items() for gene in genes]
        noted = {"scores": self._scores(called)} if self.truth is not None else {}
        return noted | {
            "types": plain(list(self.types)),
            "marker_types": plain([name for name, _ in pairs]),
            "marker_genes": plain([gene for _, gene in pairs]),
            "n_unassigned": int((called == UNASSIGNED).sum()),
            "mean_confidence": float(self.confidence.mean()),
        }

    def _scores(self, called: np.ndarray) -> dict[str, Any]:
        """How the calls agree with the truth; an unassigned cell is a wrong call."""
        from sklearn.metrics import f1_score

        assert self.truth is not None
        rows = self.truth != ""
        truth, called = self.truth[rows].astype(str), called[rows].astype(str)
        f1 = f1_score(truth, called, average="macro", labels=sorted(set(truth)), zero_division=0)
        return plain({"cells": int(rows.sum()), "accuracy": float((truth == called).mean()), "macro_f1": float(f1)})


def _categorical(called: np.ndarray, types: tuple[str, ...]) -> pd.Categorical:
    present = set(called)
    known = [name for name in types if name in present]
    return pd.Categorical(called, categories=[*known, *sorted(present - set(types))])
