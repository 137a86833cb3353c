import importlib

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

import diffbio
from diffbio.errors import ConfigError, DataError, DataWarning, MissingKeyError


@pytest.fixture(scope="module")
def cells():
    """Counts of 40 genes that rise one after another, at depths that differ more than they do; and points of an arc."""
    rng = np.random.default_rng(0)
    t = rng.permutation(np.linspace(0, 1, 90))
    rate = 20 * np.exp(-((t[:, None] - np.linspace(0, 1, 40)) ** 2) / 0.08) + 1
    adata = anndata.AnnData(rng.poisson(rate).astype(np.float32))
    adata.obs["t"] = t
    adata.obs["stage"] = pd.Categorical(np.where(t < 0.3, "early", np.where(t < 0.7, "middle", "late")))
    adata.obs["day"] = pd.Categorical([str(int(4 * v)) if i % 2 else np.nan for i, v in enumerate(t)])
    arc = np.stack([np.cos(np.pi * t), np.sin(np.pi * t)], axis=1) + 0.03 * rng.normal(size=(90, 2))
    adata.obsm["X_arc"] = arc.astype(np.float32)
    return adata


def test_pseudotime_from_counts_and_a_named_cell(cells):
    root = str(cells.obs_names[int(cells.obs["t"].argmin())])
    found = diffbio.tl.pseudotime(cells, root=root, n_components=6, copy=True)
    time = found.obs["diffbio_pseudotime"]
    assert spearmanr(time, found.obs["t"])[0] > 0.95
    assert found.obsm["X_diffbio_diffmap"].shape == (90, 6)
    record = found.uns["diffbio"]["diffbio_pseudotime"]
    assert record["root_name"] == root
    assert time.iloc[int(record["root"])] == 0
    assert len(record["eigenvalues"]) == 6
    assert found.uns["diffbio"]["pseudotime"]["params"]["root"] == root
    assert "diffbio_pseudotime" not in cells.obs


def test_the_root_is_found_in_a_group(cells):
    found = diffbio.tl.pseudotime(
        cells,
        root_group="early",
        groupby="stage",
        use_rep="X_arc",
        n_branchings=1,
        method="palantir",
        n_neighbors=12,
        copy=True,
    )
    assert found.obs["t"].iloc[found.uns["diffbio"]["diffbio_pseudotime"]["root"]] < 0.05
    assert spearmanr(found.obs["diffbio_pseudotime"], found.obs["t"])[0] > 0.95
    assert isinstance(found.obs["diffbio_branch"].dtype, pd.CategoricalDtype)
    diffbio.tl.pseudotime(found, root=0, use_rep="X_arc")
    assert "diffbio_branch" not in found.obs, "of an earlier call"


def test_what_hides_time_is_regressed_out(cells):
    rng = np.random.default_rng(1)
    hidden = cells.copy()
    hidden.obs["hidden"] = rng.permutation(np.linspace(0, 8, 90))
    points = np.column_stack([hidden.obsm["X_arc"], hidden.obs["hidden"]])
    hidden.obsm["X_hidden"] = points.astype(np.float32)
    root = int(hidden.obs["t"].argmin())
    diffbio.tl.pseudotime(hidden, root=root, use_rep="X_hidden")
    before = spearmanr(hidden.obs["diffbio_pseudotime"], hidden.obs["t"])[0]
    diffbio.tl.pseudotime(hidden, root=root, use_rep="X_hidden", regress_out="hidden")
    assert spearmanr(hidden.obs["diffbio_pseudotime"], hidden.obs["t"])[0] > 0.95 > before + 0.2
    diffbio.tl.pseudotime(hidden, root=root, use_rep="X_hidden", regress_out=["hidden", "depth"])
    assert np.isfinite(hidden.obs["diffbio_pseudotime"]).all()


def test_a_metric_is_learned_from_known_days(cells):
    found = diffbio.tl.pseudotime(
        cells, root=int(cells.obs["t"].argmin()), use_rep="X_arc", time_key="day", max_epochs=2, copy=True
    )
    assert found.uns["diffbio"]["diffbio_pseudotime"]["metric"].shape == (2,)


def test_the_root_is_in_the_part_that_holds_most_of_its_group(cells):
    """The first row of the group, and a few cells more, lie far off in a part of their own."""
    early = np.flatnonzero(cells.obs["stage"] == "early")
    off = np.concatenate([early[:4], np.flatnonzero(cells.obs["stage"] == "late")[:4]])
    parts = cells.copy()
    parts.obsm["X_arc"][off] += 50
    with pytest.warns(DataWarning, match="2 parts of 82, 8 cells"):
        diffbio.tl.pseudotime(
            parts, root_group="early", groupby="stage", use_rep="X_arc", n_neighbors=8, n_components=6
        )
    root = parts.uns["diffbio"]["diffbio_pseudotime"]["root"]
    assert root in early[4:]
    assert parts.obs["t"].iloc[root] < 0.1
    assert np.array_equal(np.flatnonzero(np.isinf(parts.obs["diffbio_pseudotime"])), np.sort(off))


def test_training_starts_from_the_root_that_was_found_and_finds_it_again(cells, monkeypatch):
    """Two columns are orders of their own; training, played here, turns from the one to the other."""
    numbered = cells.copy()
    numbered.obs["number"] = np.where(cells.obs["t"] < 0.3, 0, 1)
    group = np.flatnonzero(numbered.obs["number"] == 0)
    other = np.random.default_rng(2).permutation(np.linspace(0, 1, 90))
    numbered.obsm["X_two"] = np.column_stack([3 * cells.obs["t"], 0.3 * other]).astype(np.float32)
    seen = {}

    def turned(op, data, **settings):
        seen.update(settings, root=int(data["root_cell_index"]))
        op.learned[...] = np.array([-40.0, 0.0], np.float32)
        op.mark_fitted()

    monkeypatch.setattr(importlib.import_module("diffbio.tl.pseudotime"), "fit", turned)
    diffbio.tl.pseudotime(
        numbered, root_group=0, groupby="number", use_rep="X_two", n_components=6, time_key="t", max_epochs=3
    )
    assert seen["max_epochs"] == 3
    assert seen["root"] != group[0]
    assert cells.obs["t"].iloc[seen["root"]] < 0.05
    root = numbered.uns["diffbio"]["diffbio_pseudotime"]["root"]
    ends = group[other[group].argmin()], group[other[group].argmax()]
    assert root in ends
    assert root != seen["root"]
    assert numbered.obs["diffbio_pseudotime"].iloc[root] == 0


@pytest.mark.parametrize(
    ("times", "held"), [([np.nan, -1.0, np.inf], 0), ([3.0, 3.0, np.nan], 1), ([3.0, np.inf, -2.0], 1)]
)
def test_times_that_cannot_be_trained_on_are_refused(cells, times, held):
    unknown = cells.copy()
    unknown.obs["day"] = np.resize(times, 90)
    with pytest.raises(DataError, match=rf"obs\['day'\] \(time_key\) .* it holds {held}\."):
        diffbio.tl.pseudotime(unknown, root=0, use_rep="X_arc", time_key="day")


@pytest.mark.parametrize("n", [0, 1, 14])
def test_too_few_cells_are_refused_by_the_number_needed(cells, n):
    with pytest.raises(DataError, match=rf"tl\.pseudotime: n_neighbors 15 .* at least 15 cells; there are {n}\."):
        diffbio.tl.pseudotime(cells[:n].copy(), root=0)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        ({}, ConfigError, "neither"),
        ({"root": 0, "root_group": "early"}, ConfigError, "both"),
        ({"root": "nobody"}, MissingKeyError, "0 cells are named 'nobody'"),
        ({"root": 3.7}, ConfigError, r"an integer; got 3\.7"),
        ({"root": True}, ConfigError, "an integer; got True"),
        ({"root": 0, "time_key": "t", "max_epochs": 0}, ConfigError, "max_epochs must be an integer >= 1.* got 0"),
        ({"root": 0, "regress_out": []}, ConfigError, "regress_out names no column"),
        ({"root_group": "nan", "groupby": "day"}, MissingKeyError, "there are 0, 1, 2, 3"),
        ({"root": 90}, ConfigError, "row numbers of 90 cells are 0 to 89"),
        ({"root_group": "never", "groupby": "stage"}, MissingKeyError, "there are early, late, middle"),
        ({"root_group": "early"}, MissingKeyError, "no column 'cell_type'"),
        ({"root": 0, "method": "monocle"}, ConfigError, "'dpt', 'palantir'"),
        ({"root": 0, "n_waypoints": 5}, ConfigError, "n_waypoints does nothing"),
        ({"root": 0, "learn_metric": "linear"}, ConfigError, "learn_metric does nothing"),
        ({"root": 0, "regress_out": "absent", "use_rep": "X_arc"}, MissingKeyError, "no column 'absent'"),
        ({"root": 0, "regress_out": "stage", "use_rep": "X_arc"}, DataError, "must hold numbers"),
        ({"root": 0, "regress_out": "day", "use_rep": "X_arc"}, DataError, "missing or infinite in cell 0"),
    ],
)
def test_what_would_not_work_is_refused(cells, call, error, said):
    with pytest.raises(error, match=said):
        diffbio.tl.pseudotime(cells, copy=True, **call)


def test_figures(cells):
    found = diffbio.tl.pseudotime(cells, root=3, use_rep="X_arc", n_branchings=1, copy=True)
    found.obs.loc[found.obs_names[5], "diffbio_pseudotime"] = np.inf
    axes = diffbio.pl.pseudotime(found, basis="X_arc", groupby="stage")
    assert [ax.get_title() for ax in axes] == [
        "pseudotime (1 cells not connected with the root)", "branches", "by group",
    ]  # fmt: skip
    star = axes[0].lines[0].get_xydata()[0]
    np.testing.assert_allclose(star, found.obsm["X_arc"][3], rtol=1e-6)
    moved = found[::-1].copy()  # the root has another row number
    star = diffbio.pl.pseudotime(moved, basis="X_arc")[0].lines[0].get_xydata()[0]
    np.testing.assert_allclose(star, found.obsm["X_arc"][3], rtol=1e-6)
    assert not diffbio.pl.pseudotime(found[10:].copy(), basis="X_arc")[0].lines, "the root is not among them"
    moved.obs_names = ["3"] * 90
    assert not diffbio.pl.pseudotime(moved, basis="X_arc")[0].lines, "which of them is the root is not known"
    labels = [label.get_text() for label in axes[2].get_yticklabels()]
    medians = found.obs.groupby("stage", observed=True)["diffbio_pseudotime"].median()
    assert labels == list(medians.sort_values().index)
    found.obs = found.obs.drop(columns="diffbio_branch")
    assert len(diffbio.pl.pseudotime(found)) == 1
    with pytest.raises(MissingKeyError, match="diffbio_pseudotime"):
        diffbio.pl.pseudotime(cells)
    with pytest.raises(MissingKeyError, match="X_nothing"):
        diffbio.pl.pseudotime(found, basis="X_nothing")
    del found.obsm["X_diffbio_diffmap"]
    with pytest.raises(MissingKeyError, match=r"no map and no 'X_diffbio_diffmap'; call tl\.embed"):
        diffbio.pl.pseudotime(found)
    plt.close("all")
