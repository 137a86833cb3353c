"""Simple networks on the host, gene by gene: importances of trees, and the path of the lasso."""

from collections.abc import Callable

import numpy as np

TREES = ("extra_trees", "random_forest")
LEAST_IN_LEAF = 5  # cells, of extra trees: smaller leaves follow the noise of single cells
PENALTIES, SMALLEST_PENALTY = 30, 0.01  # of the path; the smallest as a share of the one at which all effects are 0


def tree_importances(
    z: np.ndarray, regulators: np.ndarray, *, method: str = "extra_trees", n_trees: int = 100, seed: int = 0
) -> np.ndarray:
    """Importance of every regulator in an ensemble of trees that predicts the gene; those of a gene sum to 1.

    "random_forest" is GENIE3 (Huynh-Thu et al. 2010): the root of the number of regulators is tried at each split.
    "extra_trees" draws the thresholds too (Geurts et al. 2006).

    Args:
        z: (cells, genes) expression, or its ranks. Only the random forest splits ranks as it splits what they rank.
        regulators: (tfs,) columns of z. A regulator is left out for itself.
        method: one of the two.
        n_trees: of each gene.
        seed: of the trees.

    Returns:
        (tfs, genes), 0 for genes that do not vary.
    """
    from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor

    def importance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if method == "extra_trees":
            trees = ExtraTreesRegressor(n_trees, max_features="sqrt", min_samples_leaf=LEAST_IN_LEAF, random_state=seed)
        else:
            trees = RandomForestRegressor(n_trees, max_features="sqrt", random_state=seed)
        return np.asarray(trees.fit(x, y).feature_importances_)

    return gene_by_gene(z, regulators, importance)


def lasso_path_importances(z: np.ndarray, regulators: np.ndarray) -> np.ndarray:
    """Mean size of a regulator's coefficient along the path of the lasso, 30 penalties from all zero to 1 % of that.

    Args:
        z: (cells, genes) standardised expression, or ranks.
        regulators: (tfs,) columns of z. A regulator is left out for itself.

    Returns:
        (tfs, genes), 0 for genes that do not vary.
    """
    from sklearn.linear_model import lasso_path

    z = np.asarray(z, np.float64)
    own = z[:, regulators]
    gram, products = own.T @ own, own.T @ z
    grid = np.geomspace(1.0, SMALLEST_PENALTY, PENALTIES)
    found = np.zeros(products.shape)
    for gene in np.flatnonzero(z.std(axis=0) > 0):
        others = np.flatnonzero(regulators != gene)
        product = np.ascontiguousarray(products[others, gene])
        highest = np.abs(product).max(initial=0.0) / len(z)
        if highest > 0:
            x = np.asfortranarray(own[:, others])
            part = np.ascontiguousarray(gram[np.ix_(others, others)])
            _, path, _ = lasso_path(x, z[:, gene], alphas=highest * grid, precompute=part, Xy=product, max_iter=2000)
            found[others, gene] = np.abs(path).mean(axis=1)
    return found


def gene_by_gene(
    z: np.ndarray, regulators: np.ndarray, importance: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """`importance(x, y)` of the other regulators' expression x for each gene y that varies, as (tfs, genes)."""
    own = np.asarray(z[:, regulators], np.float32)
    found = np.zeros((len(regulators), z.shape[1]))
    for gene in np.flatnonzero(z.std(axis=0) > 0):
        others = np.flatnonzero(regulators != gene)
        if len(others):
            found[others, gene] = importance(own[:, others], z[:, gene])
    return found
