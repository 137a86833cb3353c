"""palantir 1.4.5 on points in .npz files (x, t, root): Spearman correlation of its pseudotime with t, as JSON.

    benchmarks/envs/palantir/bin/python benchmarks/peers/run_palantir.py RESULT.json POINTS.npz ...

500 waypoints, 30 neighbours, 10 components, seed 20; a path that starts at the root, no terminal states but the latest
cell (it wants one; pseudotime does not depend on it but for that cell being a waypoint).
"""

import contextlib
import io
import json
import sys
import time
import warnings

import numpy as np
import palantir
import pandas as pd
from scipy.stats import spearmanr

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    found = {"tree": [], "cpu": []}
    for path in sys.argv[2:]:
        data = np.load(path)
        names = [f"c{i}" for i in range(len(data["x"]))]
        start = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            frame = pd.DataFrame(data["x"].astype(float), index=names)
            maps = palantir.utils.run_diffusion_maps(frame, n_components=10, knn=30, seed=0)
            space = palantir.utils.determine_multiscale_space(maps)
            result = palantir.core.run_palantir(
                space,
                names[int(data["root"])],
                terminal_states=[names[int(data["t"].argmax())]],
                num_waypoints=500,
                knn=30,
                n_jobs=1,
                seed=20,
            )
        found["cpu"].append(round(time.process_time() - start, 1))
        found["tree"].append(round(float(spearmanr(result.pseudotime.to_numpy(), data["t"])[0]), 6))
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
        file.write("\n")
