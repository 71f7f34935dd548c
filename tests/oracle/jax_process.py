"""Keras on JAX in a process of its own: writes the outputs of models, in float32 and in float64, to files.

Usage: python jax_process.py <float32|float64> <folder> <name>... with the environment's KERAS_BACKEND=jax.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
for folder in (ROOT, ROOT / "benchmarks", ROOT / "tests" / "oracle"):
    sys.path.insert(0, str(folder))


def application(name: str):
    """An architecture of keras.applications and the inputs of one call at batch 1.

    Without the last softmax: with random weights the logits of deep networks are large, and the softmax would say 1 for
    one class whatever the rest computes.
    """
    import keras
    import numpy as np

    model = getattr(keras.applications, name)(weights=None, classifier_activation=None)
    shape = [1, *(224 if d is None else d for d in model.input_shape[1:])]
    x = np.random.default_rng(1).random(shape).astype("float32")
    # Some architectures hold their own rescaling from 0..255.
    if any(layer.__class__.__name__ in ("Rescaling", "Normalization") for layer in model.layers[:6]):
        x *= 255
    return model, x


def built(name: str):
    """(model with reproducible weights, inputs) for a small model or an application."""
    import models as benchmark_models

    if name[0].isupper():
        model, x = application(name)
    else:
        import small_models

        model, x = small_models.MODELS[name]()
    benchmark_models.fill_weights(model)
    return model, x


def evaluated(name: str, precision: str) -> list | dict:
    """The flat outputs of a model; what a run `<module>.<name>` of `tests.oracle.<module>_runs` gives by name.

    What follows an `@` in the name tells versions of the run apart.
    """
    import jax
    import keras
    import numpy as np

    def widened(a):
        return a.astype("float64") if precision == "float64" and a.dtype.kind == "f" else a

    if "@" in name:
        module, run = name.split("@")[0].split(".", 1)
        return importlib.import_module(f"tests.oracle.{module}_runs").run(run, widened)
    model, x = built(name)
    x = keras.tree.map_structure(widened, x)
    trainable = [v.value for v in model.trainable_variables]
    other = [v.value for v in model.non_trainable_variables]
    outputs, _ = jax.jit(lambda t, o, x: model.stateless_call(t, o, x, training=False))(trainable, other, x)
    leaves = [np.asarray(leaf) for leaf in keras.tree.flatten(outputs)]
    return [leaf.astype("float32") if leaf.dtype.name in ("bfloat16", "float16") else leaf for leaf in leaves]


def main() -> None:
    precision, folder, *names = sys.argv[1:]
    if precision == "float64":
        os.environ["JAX_ENABLE_X64"] = "1"
    if all("@" in name for name in names) or (precision == "float64" and not any(name[0].isupper() for name in names)):
        # Small models take longer to compile than to run. The float32 results of models keep JAX's usual code.
        os.environ.setdefault("XLA_FLAGS", FAST_COMPILE)
    import keras
    import numpy as np

    if precision == "float64":
        _force_float64(keras)
    for name in names:
        path = Path(folder) / f"{name}.{precision}.npz"
        if path.exists():
            continue
        keras.backend.clear_session()
        start = time.perf_counter()
        try:
            leaves = evaluated(name, precision)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, **leaves) if isinstance(leaves, dict) else np.savez(temporary, *leaves)
        temporary.rename(path)
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)


def _force_float64(keras) -> None:
    """Every layer and tensor that asks for a float of any width gets float64."""
    keras.config.set_floatx("float64")
    policy = keras.dtype_policies.DTypePolicy
    original = policy.__init__

    def init(self, name=None, *args, **kwargs):
        original(self, "float64" if name is None or "float" in str(name) else name, *args, **kwargs)

    policy.__init__ = init
    create = keras.Input

    def wide_input(*args, dtype=None, **kwargs):
        return create(*args, dtype="float64" if dtype is None or "float" in str(dtype) else dtype, **kwargs)

    keras.Input = wide_input
    # Keras' promotion of (float64, float32) is float32, which normalisation layers ask for.
    promote = keras.src.backend.common.dtypes.result_type

    def wide_promotion(*dtypes):
        result = promote(*dtypes)
        return "float64" if "float" in result else result

    for name, module in list(sys.modules.items()):
        if name.startswith("keras.src") and getattr(module, "result_type", None) is promote:
            module.result_type = wide_promotion
    cast = keras.ops.cast
    keras.ops.cast = lambda x, dtype: cast(x, "float64" if "float" in str(dtype) else dtype)


if __name__ == "__main__":
    main()
