"""Models of scvi-tools, read by ours: stored numbers of scvi-tools itself (benchmarks/peers/make_scvi_oracle.py)."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load

from diffbio import models
from diffbio.errors import DataError, ModelFileError
from diffbio.models import export_scvi_tools, from_scvi_tools

ORACLES = Path(__file__).parents[1] / "oracles" / "scvi_tools"
CASES = sorted(path.stem for path in ORACLES.glob("*.npz"))


def expected_of(case):
    with np.load(ORACLES / f"{case}.npz", allow_pickle=False) as stored:
        return dict(stored)


def cells_of(stored):
    obs = pd.DataFrame({k.removeprefix("obs_"): v for k, v in stored.items() if k.startswith("obs_")})
    obs.index = [f"cell{i}" for i in range(len(obs))]
    var = pd.DataFrame(index=[f"gene{i}" for i in range(stored["counts"].shape[1])])
    return anndata.AnnData(stored["counts"].astype(np.float32), obs=obs, var=var)


def read(case):
    stored = expected_of(case)
    adata = cells_of(stored)
    return from_scvi_tools(ORACLES / case, adata), adata, stored


def close(ours, theirs, name):
    """Within 1e-4 of the numbers' size."""
    scale = np.abs(theirs).mean()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * scale, err_msg=name)


def arguments(model, *, unlabelled):
    columns = model.cells().columns
    found = {{"batch_labels": "batch_index", "labels": "y"}.get(k, k): jnp.asarray(v) for k, v in columns.items()}
    return {k: v for k, v in found.items() if not (unlabelled and k == "y")}


def test_there_are_cases_of_both_models():
    assert len(CASES) == 6
    assert {type(from_scvi_tools(ORACLES / case)).__name__ for case in CASES} == {"SCVI", "SCANVI"}


@pytest.mark.parametrize("case", CASES)
def test_module_computes_what_scvi_tools_computes(case):
    model, _, stored = read(case)
    # scvi-tools' bound sums over the types for labelled cells, too
    given = arguments(model, unlabelled=isinstance(model, models.SCANVI))
    counts = jnp.asarray(stored["counts"], jnp.float32)
    known = {k: v for k, v in given.items() if not k.startswith("local")}
    found = model.module.inference(counts, **known)
    for name in ("qz_m", "qz_v", "ql_m", "ql_v", "px_scale", "px_rate", "px_r", "px_dropout"):
        if name in stored:
            close(np.broadcast_to(found[name], stored[name].shape), stored[name], name)
    reconstruction, kl, _ = model.module.forward(counts, **given)
    if isinstance(model, models.SCANVI):
        close(reconstruction, stored["reconstruction"], "reconstruction")
        close(kl, stored["kl"], "kl")
    else:  # the divergence of the library stands beside the reconstruction in ours
        close(reconstruction + kl, stored["reconstruction"] + stored["kl"], "elbo")


@pytest.mark.parametrize("case", CASES)
def test_model_answers_what_scvi_tools_answers(case):
    model, adata, stored = read(case)
    assert model.is_trained
    close(model.get_latent_representation(), stored["latent"], "latent")
    if isinstance(model, models.SCANVI):
        probabilities = model.predict(soft=True)
        assert list(probabilities.columns) == list(stored["types"])
        close(probabilities.to_numpy(), stored["probabilities"], "probabilities")
        # cells with a known type keep their code
        codes = model.cells().columns["labels"]
        known = np.asarray(adata.obs["type"]) != "unknown"
        assert (np.asarray(stored["types"])[codes[known]] == np.asarray(adata.obs["type"])[known]).all()
        assert (codes[~known] == len(stored["types"])).all()


def test_a_model_read_can_be_saved_and_trained_further(tmp_path):
    model, adata, stored = read("scvi_latent_library")
    model.save(tmp_path / "ours")
    again = models.SCVI.load(tmp_path / "ours", adata)
    close(again.get_latent_representation(), stored["latent"], "latent")
    before = float(model.get_elbo())
    model.train(max_epochs=30, train_size=1.0, batch_size=24, early_stopping=False, progress=False)
    assert float(model.get_elbo()) > before


def test_reading_needs_no_data_and_checks_what_it_is_given():
    model, adata, _ = read("scvi")
    alone = from_scvi_tools(ORACLES / "scvi")
    assert alone.registry == model.registry
    assert alone.registry.batches == ("one", "two")
    assert alone.registry.categories == {"donor": ("x", "y", "z")}
    with pytest.raises(DataError, match="without data"):
        alone.get_latent_representation()
    other = adata.copy()
    other.obs["batch"] = "three"
    with pytest.raises(DataError, match="'three'"):
        from_scvi_tools(ORACLES / "scvi", other)


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


def test_a_pickle_is_refused_with_the_command_that_exports_it(tmp_path, capsys):
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelFileError, match="never reads") as refused:
        from_scvi_tools(tmp_path)
    assert "boom" not in capsys.readouterr().out
    script = str(refused.value).split("python ")[1].split()[0]
    assert Path(script) == Path(export_scvi_tools.__file__)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "TOTALVI"}, "holds a TOTALVI; SCVI and SCANVI can be read"),
        ({"kind": "model"}, "is a model of diffbio; read it with SCVI.load"),
        ({"init_params": {"latent_distribution": "ln"}}, "latent_distribution='ln', which diffbio does not have"),
        ({"init_params": {"batch_representation": "embedding"}}, "batch_representation='embedding'"),
        ({"init_params": {"var_activation": "softplus"}}, "var_activation='softplus'"),
        ({"init_params": {"new_knob": 1}}, "has the arguments new_knob, which diffbio does not know"),
        ({"init_params": {"n_hidden": 7}}, "of the exported model has shape"),
        ({"init_params": {"n_layers": 3}}, "lacks 'z_encoder.encoder.fc_layers.Layer 1.0.weight'"),
    ],
)
def test_a_model_without_counterpart_is_refused(tmp_path, change, message):
    folder = shutil.copytree(ORACLES / "scvi", tmp_path / "model")
    header = json.loads((folder / "model.json").read_text())
    header |= {k: header[k] | v if isinstance(v, dict) else v for k, v in change.items()}
    (folder / "model.json").write_text(json.dumps(header))
    with pytest.raises(ModelFileError, match=message):
        from_scvi_tools(folder)


def test_a_damaged_export_is_refused(tmp_path):
    folder = shutil.copytree(ORACLES / "scvi", tmp_path / "model")
    weights = bytearray((folder / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(weights)
    with pytest.raises(ModelFileError, match="damaged"):
        from_scvi_tools(folder)


def test_the_script_writes_safetensors():
    arrays = {"a b": np.arange(6.0, dtype=np.float32).reshape(2, 3).T, "scalar": np.float64(2.0)}
    back = load(export_scvi_tools.safetensors(arrays))
    for name, value in arrays.items():
        np.testing.assert_array_equal(back[name], value)
        assert back[name].dtype == np.float32


TORCH = """
import pickle
class Tensor:
    def __init__(self, value): self.value = value
    def numpy(self): return self.value
def load(path, map_location, weights_only):
    saved = pickle.load(open(path, "rb"))
    saved["model_state_dict"] = {k: Tensor(v) for k, v in saved["model_state_dict"].items()} | {"pyro": {}}
    return saved
"""


def test_the_script_runs_by_itself_where_scvi_tools_is(tmp_path):
    """With stand-ins for torch and scvi-tools: what it reads goes to where `from_scvi_tools` finds it."""
    (tmp_path / "scvi.py").write_text("")
    (tmp_path / "torch.py").write_text(TORCH)
    header = json.loads((ORACLES / "scanvi" / "model.json").read_text())
    names = {"categorical_mapping": np.array(header["labels"], object)}
    fields = {
        "batch": {"categorical_mapping": np.array(header["batches"], object)},
        "labels": names,
        "extra_categorical_covs": {"mappings": {"donor": np.array(["x", "y", "z"], object)}},
    }
    saved = {
        "var_names": np.array(header["var_names"], object),
        "model_state_dict": load((ORACLES / "scanvi" / "weights.safetensors").read_bytes()),
        "attr_dict": {
            "is_trained_": True,
            "init_params_": {
                "non_kwargs": {"n_hidden": 6, "n_latent": np.int64(3), "adata": None},
                "kwargs": {"model_kwargs": {"dispersion": "gene-cell"}},
            },
            "registry_": {
                "model_name": "SCANVI", "scvi_version": "1.4.2", "setup_args": header["setup_args"],
                "field_registries": {name: {"state_registry": field} for name, field in fields.items()},
            },
        },
    }  # fmt: skip
    (tmp_path / "p_model.pt").write_bytes(pickle.dumps(saved))
    command = [sys.executable, export_scvi_tools.__file__, tmp_path, tmp_path / "out", "--prefix", "p_"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    stored = expected_of("scanvi")
    found = from_scvi_tools(tmp_path / "out", cells_of(stored))
    close(found.get_latent_representation(), stored["latent"], "latent")
    close(found.predict(soft=True).to_numpy(), stored["probabilities"], "probabilities")
