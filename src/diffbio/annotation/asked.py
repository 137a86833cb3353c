"""What a user asks of an annotator's training."""

import dataclasses
from typing import Any

from ..data.names import column_of, label_codes
from ..errors import ConfigError, DataError
from ..pipelines.run import Checked

# what labels say of a cell whose type is not known
WORDS = ("unknown", "unlabeled", "unlabelled", "unassigned", "undetermined", "none", "nan", "na")
UNKNOWN = ("", *(form for word in WORDS for form in (word, word.capitalize(), word.upper())))
RESERVED = ("Heterogeneous",)  # what majority voting calls


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
        values = set(column_of(cells.obs, self.labels_key).astype(str))
        if self.unlabeled_category not in values | set(UNKNOWN):
            msg = (
                f"annotate: unlabeled_category {self.unlabeled_category!r} is not a value of obs[{self.labels_key!r}], "
                f"which holds {', '.join(sorted(values)[:8])}."
            )
            raise ConfigError(msg)
        if odd := values & set(RESERVED):
            msg = f"annotate: {odd.pop()!r} in obs[{self.labels_key!r}] is what majority voting writes; rename it."
            raise DataError(msg)
        return label_codes(cells.obs, self.labels_key, unknown=(self.unlabeled_category, *UNKNOWN))

    def fit_settings(self) -> dict[str, Any]:
        """Those of `diffbio.fit`."""
        given = {} if self.max_epochs is None else {"max_epochs": self.max_epochs}
        return {"seed": self.seed, "progress": self.progress, **given}
