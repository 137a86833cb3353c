"""umap-learn's ParametricUMAP on the digits, in its own environment (make_umap_env.sh), to a JSON line.

Started by `benchmarks/quality/umap.py --peer`, which pins both sides to one core.
"""

import json
import os
import sys
import time

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import tensorflow as tf
import umap
from sklearn.datasets import load_digits
from sklearn.manifold import trustworthiness
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from umap.parametric_umap import ParametricUMAP

tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
tf.random.set_seed(0)
np.random.seed(0)  # noqa: NPY002 - what ParametricUMAP draws from

x, labels = load_digits(return_X_y=True)
x = (x / 16).astype(np.float32)
started = time.process_time()
y = np.asarray(ParametricUMAP(verbose=False, random_state=0).fit(x).embedding_)
seconds = time.process_time() - started
result = {
    "trust": float(trustworthiness(x, y, n_neighbors=15)),
    "accuracy": float(cross_val_score(KNeighborsClassifier(15), y, labels, cv=5).mean()),
    "cpu_s": round(seconds, 1),
    "versions": f"umap-learn {umap.__version__}, tensorflow {tf.__version__}, keras {tf.keras.__version__}",
}
sys.stdout.write(json.dumps(result) + "\n")
