"""One engine in one process: loads a case, then times calls on request (JSON lines on stdin and stdout).

Run by `benchmarks.run` and `benchmarks.train`; not meant to be started by hand.
Only NumPy and the engine itself are imported.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import models


def load_kgraph(case: dict, folder: Path, precision: str = "float32", quantised: str = ""):
    start = time.perf_counter()
    import kgraph

    first = time.perf_counter()
    import keras

    second = time.perf_counter()
    compile_model = kgraph.compile  # loads the compiler
    import_seconds = time.perf_counter() - second + first - start
    model = models.build(case["model"])
    if quantised:
        model.quantize(quantised)
    start = time.perf_counter()
    compiled = compile_model(model, precision=precision)
    x = models.example_inputs(case["model"], case["batch"])
    compiled(x)
    seconds = time.perf_counter() - start
    stats = compiled.stats()
    extra = {"import_s": import_seconds, "keras_import_s": second - first, "stats": stats}
    del keras
    return compiled, seconds, extra


def load_saved(case: dict, folder: Path):
    """A model that `Inference.save` has written; neither Keras nor the compiler is imported."""
    start = time.perf_counter()
    import kgraph

    call = kgraph.load(case["saved"])
    call(models.example_inputs(case["model"], case["batch"]))
    return call, time.perf_counter() - start, {"keras_imported": "keras" in sys.modules}


def load_tensorflow(case: dict, folder: Path, jit: bool = False):
    import tensorflow as tf

    model = models.build(case["model"])
    start = time.perf_counter()
    forward = tf.function(lambda x: model(x, training=False), jit_compile=jit)
    call = lambda x: forward(tf.constant(x)).numpy()
    call(models.example_inputs(case["model"], case["batch"]))
    return call, time.perf_counter() - start, {}


def load_torch(case: dict, folder: Path, jit: bool = False):
    import torch

    model = models.build(case["model"])
    start = time.perf_counter()
    forward = torch.compile(model) if jit else model

    def call(x):
        with torch.no_grad():
            return forward(torch.from_numpy(x), training=False).numpy()

    call(models.example_inputs(case["model"], case["batch"]))
    return call, time.perf_counter() - start, {}


def load_jax(case: dict, folder: Path):
    import jax
    import keras

    model = models.build(case["model"])
    start = time.perf_counter()
    trainable = [v.value for v in model.trainable_variables]
    other = [v.value for v in model.non_trainable_variables]

    @jax.jit
    def forward(trainable, other, x):
        return model.stateless_call(trainable, other, x, training=False)[0]

    def call(x):
        return np.asarray(forward(trainable, other, x))

    call(models.example_inputs(case["model"], case["batch"]))
    del keras
    return call, time.perf_counter() - start, {}


def load_onnxruntime(case: dict, folder: Path, quantised: bool = False):
    import onnxruntime

    path = folder / f"{case['model']}.onnx"
    if quantised:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        path, source = folder / f"{case['model']}-int8.onnx", path
        if not path.exists():
            quantize_dynamic(str(source), str(path), weight_type=QuantType.QInt8)
    start = time.perf_counter()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    call = lambda x: session.run(None, {name: x})[0]
    call(models.example_inputs(case["model"], case["batch"]))
    return call, time.perf_counter() - start, {}


def load_openvino(case: dict, folder: Path):
    import openvino

    start = time.perf_counter()
    core = openvino.Core()
    model = core.read_model(str(folder / f"{case['model']}.onnx"))
    shape = models.example_inputs(case["model"], case["batch"]).shape
    model.reshape(list(shape))
    compiled = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    call = lambda x: request.infer([x])[compiled.output(0)]
    call(models.example_inputs(case["model"], case["batch"]))
    return call, time.perf_counter() - start, {}


LOADERS = {
    "kgraph": load_kgraph,
    "kgraph-one-thread": load_kgraph,
    "kgraph-saved": load_saved,
    "kgraph-bf16": functools.partial(load_kgraph, precision="bf16"),
    "kgraph-int8": functools.partial(load_kgraph, quantised="int8"),
    "tensorflow": load_tensorflow,
    "tensorflow-xla": functools.partial(load_tensorflow, jit=True),
    "torch": load_torch,
    "torch-compile": functools.partial(load_torch, jit=True),
    "jax": load_jax,
    "onnxruntime": load_onnxruntime,
    "onnxruntime-int8": functools.partial(load_onnxruntime, quantised=True),
    "openvino": load_openvino,
}


def peak_mib() -> float:
    """The most memory that this process has had resident; `getrusage` would count that of the process it came from."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def time_calls(call, x, seconds: float) -> list[float]:
    """Milliseconds of single calls for about `seconds`; very short calls are timed in groups."""
    start = time.perf_counter()
    call(x)
    once = max(time.perf_counter() - start, 1e-6)
    group = max(1, int(2e-4 / once))
    samples = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(samples) < 3:
        start = time.perf_counter()
        for _ in range(group):
            call(x)
        samples.append((time.perf_counter() - start) / group * 1e3)
    return samples


class Inference:
    """One case of inference: a function that is called with one array."""

    def __init__(self, engine: str, case: dict, folder: Path):
        self.call, seconds, extra = LOADERS[engine](case, folder)
        self.x = models.example_inputs(case["model"], case["batch"])
        self.loaded = {"compile_s": seconds, **extra}

    def time(self, seconds: float) -> dict:
        return {"ms": time_calls(self.call, self.x, seconds)}

    def result(self, path: str) -> dict:
        np.save(path, np.asarray(self.call(self.x)))
        return {}

    def save(self, path: str) -> dict:
        """Write kgraph's model to a file."""
        self.call.save(path)
        return {}

    def roofline(self) -> dict:
        """Floating-point operations and bytes of one call, together and by kernel, from kgraph's own accounting."""
        profile = self.call.profile(self.x, repeats=20)
        sums = {"flops": profile.flops, "bytes": profile.bytes, "kernel_ms": profile.milliseconds}
        kernels = [
            {"kernel": k.label, "us": k.microseconds, "flops": k.flops, "bytes": k.bytes, "result": k.output}
            for k in profile.kernels
        ]
        return {"profile": sums, "kernels": kernels}


def load(engine: str, case: dict, folder: Path):
    if case["name"].startswith("gpu-"):
        import gpu_session

        return gpu_session.SESSIONS[case["name"].removeprefix("gpu-")](engine, case)
    if case["name"] == "train":
        import training_session

        return training_session.Training(engine, case)
    return Inference(engine, case, folder)


def leave_out_test_packages() -> None:
    """Let imports of packages fail that Keras imports wherever they are installed, at a second and 80 MB.

    kgraph's environment has them for its tests; the peers' environments do without.
    """
    sys.modules.update(dict.fromkeys(("sklearn", "pandas")))


def main() -> None:
    leave_out_test_packages()
    engine, folder = sys.argv[1], Path(sys.argv[2])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print goes to stderr
    session = None
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            if do == "load":
                session = None
                session = load(engine, request["case"], folder)
                reply = session.loaded
            elif do == "memory":
                reply = {"peak_mb": peak_mib()}
            elif do in ("time", "result", "save", "roofline", "program"):
                reply = getattr(session, do)(**request)
            else:
                reply = {"error": f"unknown request {do}"}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(reply) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
