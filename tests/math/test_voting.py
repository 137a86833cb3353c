import numpy as np
import pytest

from diffbio.errors import ConfigError, DataError
from diffbio.math.voting import majority_vote, over_cluster


def blobs(n=600, types=3, d=8, seed=0):
    rng = np.random.default_rng(seed)
    kind = rng.integers(types, size=n)
    return (6 * np.eye(types, d)[kind] + rng.normal(size=(n, d))).astype(np.float32), kind


def test_clusters_are_small_and_of_one_kind():
    x, kind = blobs()
    codes = over_cluster(x)
    sizes = np.bincount(codes)
    assert codes.dtype == np.int32
    assert sizes.min() >= 1  # no gaps in the codes
    assert 15 <= sizes.mean() <= 60
    purity = sum(np.bincount(kind[codes == k]).max() for k in range(codes.max() + 1)) / len(x)
    assert purity > 0.99


def test_the_same_seed_gives_the_same_clusters_wherever_the_cells_lie():
    x, _ = blobs()
    codes = over_cluster(x)
    np.testing.assert_array_equal(codes, over_cluster(x))
    assert (codes != over_cluster(x, seed=1)).any()
    moved = over_cluster(np.round(x * 64) / 64 + 4096)  # exact in float32
    np.testing.assert_array_equal(moved, over_cluster(np.round(x * 64) / 64))


def test_the_number_of_clusters():
    x, _ = blobs(100)
    assert len(np.unique(over_cluster(x, n_clusters=7))) == 7
    assert len(np.unique(over_cluster(x, n_clusters=1))) == 1
    assert sorted(over_cluster(x, n_clusters=100)) == list(range(100))
    assert over_cluster(x[:1]).tolist() == [0]
    assert over_cluster(x[:4]).max() == 0
    assert len(np.unique(over_cluster(x))) == 10
    same = over_cluster(np.ones((50, 3)))  # cells that coincide
    assert same.min() == 0
    assert same.max() + 1 == len(np.unique(same))
    for wrong in (0, 101):
        with pytest.raises(ConfigError, match="from 1 to 100 for 100 cells"):
            over_cluster(x, n_clusters=wrong)
    with pytest.raises(DataError, match="holds no cells"):
        over_cluster(x[:0])
    with pytest.raises(DataError, match="NaN or infinity"):
        over_cluster(np.full((3, 2), np.nan))


def test_voting_corrects_stray_labels():
    x, kind = blobs()
    rng = np.random.default_rng(1)
    names = np.array(["B", "NK", "T"])
    stray = np.where(rng.random(len(x)) < 0.2, names[rng.integers(3, size=len(x))], names[kind])
    voted, share = majority_vote(stray, over_cluster(x))
    assert (stray == names[kind]).mean() < 0.9
    assert (voted == names[kind]).mean() > 0.99
    assert share.dtype == np.float32
    assert 0.75 < share.mean() < 1


def test_the_rule_of_a_cluster():
    labels = np.array(["b", "b", "a", "c", "a", "a", "unassigned", "unassigned", "a"], object)
    clusters = np.array(["x", "x", "x", "y", "y", "z", "z", "z", "z"])
    labels_of, share = majority_vote(labels, clusters)
    assert labels_of.tolist() == ["b"] * 3 + ["a"] * 6  # y and z are ties, which go to the first by name
    np.testing.assert_allclose(share, [2 / 3] * 3 + [1 / 2] * 6, rtol=1e-6)
    surer = majority_vote(labels, clusters, confidence=np.array([1, 1, 1, 0.9, 0.8, 0.1, 0.9, 0.9, 0.1]))
    assert surer.labels.tolist() == ["b"] * 3 + ["c"] * 2 + ["unassigned"] * 4
    strict = majority_vote(labels, clusters, min_share=0.6)
    assert strict.labels.tolist() == ["b"] * 3 + ["Heterogeneous"] * 6
    assert majority_vote(labels, clusters, min_share=0.5).labels.tolist() == labels_of.tolist()


def test_voting_does_not_depend_on_order_or_names_of_clusters():
    rng = np.random.default_rng(0)
    labels, clusters = rng.choice(["a", "b", "c"], 200), rng.integers(30, size=200)
    once = majority_vote(labels, clusters)
    order = rng.permutation(200)
    np.testing.assert_array_equal(majority_vote(labels[order], clusters[order]).labels, once.labels[order])
    np.testing.assert_array_equal(majority_vote(labels, -clusters).labels, once.labels)
    np.testing.assert_array_equal(majority_vote(once.labels, clusters).labels, once.labels)  # idempotent
    assert len(majority_vote(np.array([]), np.array([])).labels) == 0


def test_wrong_arguments_are_named():
    with pytest.raises((DataError, TypeError), match=r"2 labels, 1 clusters, 2 confidences|cells"):  # jaxtyping's
        majority_vote(np.array(["a", "b"]), np.array([0]))
    with pytest.raises(ConfigError, match=r"min_share must be from 0 to 1, got 2\.0"):
        majority_vote(np.array(["a"]), np.array([0]), min_share=2.0)
    with pytest.raises(DataError, match="confidence holds NaN"):
        majority_vote(np.array(["a"]), np.array([0]), confidence=np.array([np.nan]))
