"""The report draws what the functions on tissue, networks and expression wrote, also from a file that stays on disk."""

import matplotlib.pyplot as plt
import pandas as pd
from tissue_cells import tissue_cells

from diffbio import tl
from diffbio.data import read, write_results
from diffbio.report.figures import drawing, figures_of
from diffbio.report.page import TITLES


def test_figures_of_a_file_on_disk(tmp_path):
    cells = tissue_cells(100)[:, -12:].copy()
    pair = pd.DataFrame({"ligand": ["LIG"], "receptor": ["REC"]})
    tl.ligand_receptor(cells, groupby="cell_type", resource=pair, n_permutations=20)
    tl.switch_de(cells)
    path = write_results(cells, tmp_path / "cells.h5ad", {})
    with drawing():
        drawn = figures_of(read(path, backed=True))
        plt.close("all")
    assert set(drawn) == {"ligand_receptor", "switch_de"}
    assert set(drawn) <= set(TITLES)
