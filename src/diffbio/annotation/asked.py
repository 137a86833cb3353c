"""What a user asks of an annotator's training."""

import dataclasses
from typing import Any

from ..data.names import label_codes
from ..pipelines.run import Checked

UNKNOWN = ("Unknown", "unknown", "NA", "nan", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Settings of the training; see `tl.annotate`."""

    labels_key: str | None = None
    unlabeled_category: str = "Unknown"
    batch_key: str | None = None
    other: str | None = None
    n_top_genes: int | None = None
    max_epochs: int | None = None
    seed: int = 0
    progress: bool = False

    def labels(self, cells: Checked) -> tuple[Any, list[str]]:
        """Codes of the cells' types, -1 where it is not known, and the names of the types."""
        assert self.labels_key is not None
        return label_codes(cells.obs, self.labels_key, unknown=(self.unlabeled_category, *UNKNOWN))

    def fit_settings(self) -> dict[str, Any]:
        """Those of `diffbio.fit`."""
        given = {} if self.max_epochs is None else {"max_epochs": self.max_epochs}
        return {"seed": self.seed, "progress": self.progress, **given}
