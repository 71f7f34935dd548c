"""Writes the models as ONNX files for ONNX Runtime and OpenVINO; run in an export environment, or on kgraph."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import models


def _check(path: Path) -> None:
    """Raise ValueError for what no runtime takes: operators that are not ONNX's, constants left as inputs."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    unknown = {n.op_type for n in graph.node if n.domain in ("", "ai.onnx") and not onnx.defs.has(n.op_type)}
    if unknown:
        raise ValueError(f"not operators of ONNX: {sorted(unknown)}")
    inputs = {i.name for i in graph.input} - {i.name for i in graph.initializer}
    if len(inputs) != 1:
        raise ValueError(f"inputs beside the model's own: {sorted(inputs)}")


def _gelu_by_erf() -> None:
    """TensorFlow writes the exact GELU with Erfc, which ONNX has not; with Erf, runtimes recognise and fuse it."""
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        def gelu(x, approximate=True):
            if approximate:
                return tf.nn.gelu(x, approximate=True)
            return 0.5 * x * (1.0 + tf.math.erf(x / tf.cast(2.0**0.5, x.dtype)))

        keras.src.backend.nn.gelu = gelu


def main() -> None:
    folder = Path(sys.argv[1])
    names = sys.argv[2:] or list(models.MODELS)
    folder.mkdir(parents=True, exist_ok=True)
    _gelu_by_erf()
    for name in names:
        path = folder / f"{name}.onnx"
        if path.exists():
            continue
        import keras

        keras.backend.clear_session()
        try:
            model = models.build(name)
            if os.environ.get("KERAS_BACKEND") == "kgraph":
                import kgraph

                kgraph.compile(model).export(path, format="onnx", optimised=False)
            else:
                model(models.example_inputs(name, 1))  # Keras exports only what has been called
                model.export(str(path), format="onnx", verbose=False)
            _check(path)
            print(f"{name}: written", flush=True)
        except Exception as error:
            path.unlink(missing_ok=True)
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    main()
