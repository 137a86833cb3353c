"""Writes a saved scvi-tools model, SCVI or SCANVI, as JSON and safetensors, which diffbio reads.

    python export_scvi_tools.py MODEL_FOLDER OUTPUT_FOLDER [--prefix PREFIX]

Run it in the environment of scvi-tools (0.15 or newer); it needs nothing of diffbio. scvi-tools saves models
as pickles, and reading a pickle runs the code in it: use it on models that you trust. Then, in diffbio's
environment, `diffbio.models.from_scvi_tools("OUTPUT_FOLDER")`.
"""

import argparse
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

NOT_KEPT = ("adata", "registry", "datamodule", "use_cuda")  # of the constructor's arguments


def export(folder: str, output: str, prefix: str = "") -> None:
    """Writes the model in `folder` to the new folder `output`."""
    importlib.import_module("scvi")  # the pickle names its classes
    torch = importlib.import_module("torch")
    saved = torch.load(os.path.join(folder, prefix + "model.pt"), map_location="cpu", weights_only=False)
    attributes = saved["attr_dict"]
    registry = attributes["registry_"]
    fields = {name: field["state_registry"] for name, field in registry["field_registries"].items()}
    init = attributes["init_params_"]
    arguments = {**init["non_kwargs"], **{k: v for nested in init["kwargs"].values() for k, v in nested.items()}}
    arrays = {k: v.numpy() for k, v in saved["model_state_dict"].items() if isinstance(v, torch.Tensor)}
    weights = safetensors(arrays)
    header = {
        "format_version": 1,
        "sha256": {"weights.safetensors": hashlib.sha256(weights).hexdigest()},
        "kind": "scvi-tools",
        "model": registry["model_name"],
        "scvi_tools": registry["scvi_version"],
        "is_trained": bool(attributes.get("is_trained_", True)),
        "init_params": {k: v for k, v in arguments.items() if k not in NOT_KEPT},
        "setup_args": registry["setup_args"],
        "var_names": saved["var_names"],
        "batches": fields["batch"]["categorical_mapping"],
        "labels": fields.get("labels", {}).get("categorical_mapping", []),
        "categories": fields.get("extra_categorical_covs", {}).get("mappings", {}),
    }
    os.makedirs(output)
    with open(os.path.join(output, "model.json"), "w", encoding="utf-8") as file:
        json.dump(plain(header), file, indent=1)
    with open(os.path.join(output, "weights.safetensors"), "wb") as file:
        file.write(weights)


def plain(value: Any) -> Any:
    """What JSON can say; of anything else its repr, which diffbio refuses where it matters."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):  # numpy, pandas and torch
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, (str, bool, int, float)) else repr(value)


def safetensors(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The arrays in the safetensors format: length of a JSON header, the header, the raw numbers."""
    header, parts, start = {}, [], 0
    for name, array in arrays.items():
        # weights are float32; counters and masks are not needed in full
        raw = np.ascontiguousarray(array, "<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, start + len(raw)]}
        parts.append(raw)
        start += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


if __name__ == "__main__":
    if os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]  # the folder of this file, whose scvi.py is not scvi-tools
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_folder", help="folder that model.save() wrote")
    parser.add_argument("output_folder", help="folder to write; must not exist")
    parser.add_argument("--prefix", default="", help="the prefix that save() was given")
    given = parser.parse_args()
    export(given.model_folder, given.output_folder, given.prefix)
    print("wrote", given.output_folder)
