"""KerasHub's exporter to the format of Transformers, through the finder."""

from __future__ import annotations

import importlib.util
import json

import keras
import numpy as np
import pytest
from keras import ops
from safetensors.numpy import load_file

from kgraph.frontend.install import KerasBackendFinder
from kgraph.ir import np_dtype

NAME = "keras_hub.src.utils.transformers.export.hf_exporter"
EXPORTER = """
MODEL_CONFIGS = {"Backbone": lambda backbone: {"units": backbone.units}}
MODEL_EXPORTERS = {"Backbone": lambda backbone, include_lm_head: backbone.named(include_lm_head)}

def export_backbone(backbone, path, include_lm_head=False):
    raise ValueError("Unsupported backend")

def export(model, path):
    export_backbone(model.backbone, path, include_lm_head=True)
"""


class Backbone(keras.layers.Dense):
    def named(self, head):
        weights = {"kernel": ops.transpose(self.kernel), "bias": self.bias}
        return {**weights, "head": self.kernel} if head else weights


class Task:
    def __init__(self, backbone):
        self.backbone = backbone


@pytest.fixture
def exporter(tmp_path):
    (tmp_path / "hf_exporter.py").write_text(EXPORTER)
    spec = KerasBackendFinder().find_spec(NAME, [str(tmp_path)])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backbones_are_written(exporter, dtype, tmp_path):
    backbone = Backbone(3, dtype=dtype)
    backbone.build((None, 4))
    kernel = np.asarray(backbone.kernel)
    exporter.export_backbone(backbone, tmp_path / "alone")
    exporter.export(Task(backbone), str(tmp_path / "of" / "a task"))
    alone = load_file(tmp_path / "alone" / "model.safetensors")
    assert json.loads((tmp_path / "alone" / "config.json").read_text()) == {"units": 3}
    assert set(alone) == {"kernel", "bias"}
    assert alone["kernel"].dtype == np_dtype(dtype)
    np.testing.assert_array_equal(alone["kernel"], kernel.T)
    np.testing.assert_array_equal(load_file(tmp_path / "of" / "a task" / "model.safetensors")["head"], kernel)


def test_other_backbones_are_refused(exporter, tmp_path):
    with pytest.raises(ValueError, match="not implemented for Dense"):
        exporter.export_backbone(keras.layers.Dense(3), tmp_path / "other")
    assert not (tmp_path / "other").exists()
