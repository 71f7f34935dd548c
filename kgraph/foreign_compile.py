"""Compiles a `.keras` file to an artifact: the helper process of `kgraph.foreign`, started with Keras on kgraph."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path


def main(folder: Path) -> None:
    """Read `request.json` and `model.keras` in the folder, and write `model.kgraph` there."""
    request = json.loads((folder / "request.json").read_text())
    import keras
    import numpy as np

    import kgraph

    known: dict[str, type] = {}
    for name in request["modules"]:
        known |= _classes(vars(importlib.import_module(name)))
    if request["main"]:
        known |= _classes(runpy.run_path(request["main"], run_name="__mp_main__"))
    with keras.saving.custom_object_scope(known):
        model = keras.saving.load_model(folder / "model.keras", compile=False)
    example = None
    if (folder / "example.npz").exists():
        arrays = list(np.load(folder / "example.npz").values())
        example = arrays[0] if len(arrays) == 1 else arrays
    compiled = kgraph.compile(model, example=example, freeze=True, progress=False, **request["options"])
    if example is not None:
        compiled(example)
    compiled.save(folder / "model.kgraph", levels=["native"], rebuildable=False, self_test=False)


def _classes(names: dict) -> dict[str, type]:
    """Layers among the names of a module, which Keras finds by their names."""
    import keras

    return {k: v for k, v in names.items() if isinstance(v, type) and issubclass(v, keras.Layer)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
