"""What operators on a graph of all cells are trained with: one minibatch, of all cells."""

import numpy as np


class AllCells:
    """One minibatch an epoch, all cells in their order: they are each other's neighbours."""

    def __init__(self, n_cells: int) -> None:
        self.n_cells = n_cells

    def order(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """Row numbers, (1, cells); nothing is drawn, and no batch is smaller."""
        del rng, batch_size
        return np.arange(self.n_cells)[None]
