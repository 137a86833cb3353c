"""The figure of a time course."""

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest

from diffbio import pl
from diffbio.errors import MissingKeyError


@pytest.fixture
def course():
    """Three groups of two days; two of them are rare."""
    adata = ad.AnnData(np.ones((4, 2), np.float32))
    share = np.array([[0.6, 0.39, 0.005, 0.005], [0.4, 0.59, 0.004, 0.006]])
    flow = np.diag(share[1])[None]
    adata.uns["diffbio_ot"] = {
        "days": np.array([2.0, 4.5]), "groups": np.array(["a", "b", "c", "d"], dtype=object), "share": share,
        "flow": flow, "ancestors": np.stack([np.eye(4), np.eye(4)]),
    }  # fmt: skip
    yield adata
    plt.close("all")


def test_flow_and_ancestors(course):
    flow, heat = pl.ot_trajectory(course)
    assert [text.get_text() for text in flow.get_xticklabels()] == ["day 2", "day 4.5"]
    assert len(flow.patches) == 6  # two groups and the rare ones, on two days
    heights = sorted(bar.get_height() for bar in flow.patches)
    np.testing.assert_allclose(heights, [0.01, 0.01, 0.39, 0.4, 0.59, 0.6])
    assert [text.get_text() for text in heat.get_yticklabels()] == ["a", "b", "other"]
    np.testing.assert_allclose(heat.images[0].get_array(), np.eye(3), atol=1e-12)
    assert heat.get_title() == "ancestors on day 2"
    assert len(pl.ot_trajectory(course, day=2)) == 2


def test_what_is_missing_is_said(course):
    with pytest.raises(MissingKeyError, match=r"no ancestors on day 4\.5; there are on 2"):
        pl.ot_trajectory(course, day=4.5)
    del course.uns["diffbio_ot"]["flow"]
    with pytest.raises(MissingKeyError, match="groupby"):
        pl.ot_trajectory(course)
