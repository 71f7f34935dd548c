"""One engine on a GPU in one process: inference on arrays that lie on the device, training through `fit`.

Run by `benchmarks.gpu`, inside of `worker.py`. float32 is float32 in all engines: TF32 is switched off.
"""

from __future__ import annotations

import os
import time

import models
import numpy as np
import training_session

# Seconds of calls between two waits for the device, so that a sample is made of more than starting and waiting.
SAMPLE_SECONDS = 0.05
MIB = 1 << 20


def device_name() -> str:
    """The name of kgraph's device."""
    return os.environ.get("KGRAPH_BENCH_DEVICE", "cuda")


def load_kgraph(name: str, batch: int):
    import kgraph
    from kgraph.runtime.cuda.device import device_for

    model = models.build(name)
    start = time.perf_counter()
    compiled = kgraph.compile(model, target=device_name())
    device = device_for(device_name())
    x = kgraph.DeviceArray.copy_of(device, models.example_inputs(name, batch))
    compiled(x).numpy()
    return lambda: compiled(x), lambda y: device.synchronize(), time.perf_counter() - start, compiled


def load_jax(name: str, batch: int):
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    model = models.build(name)
    start = time.perf_counter()
    trainable = [v.value for v in model.trainable_variables]
    other = [v.value for v in model.non_trainable_variables]
    forward = jax.jit(lambda t, o, x: model.stateless_call(t, o, x, training=False)[0])
    x = jax.device_put(models.example_inputs(name, batch))
    forward(trainable, other, x).block_until_ready()
    return lambda: forward(trainable, other, x), lambda y: y.block_until_ready(), time.perf_counter() - start, None


def load_torch(name: str, batch: int):
    import torch

    torch.backends.cudnn.allow_tf32 = False
    model = models.build(name)
    start = time.perf_counter()
    forward = torch.compile(model)
    x = torch.from_numpy(models.example_inputs(name, batch)).cuda()

    def call():
        with torch.no_grad():
            return forward(x, training=False)

    call()
    torch.cuda.synchronize()
    return call, lambda y: torch.cuda.synchronize(), time.perf_counter() - start, None


LOADERS = {"kgraph-gpu": load_kgraph, "jax-gpu": load_jax, "torch-compile-gpu": load_torch}


class Inference:
    """One case on one engine."""

    def __init__(self, engine: str, case: dict):
        self.call, self.wait, seconds, self.compiled = LOADERS[engine](case["model"], case["batch"])
        self.loaded = {"compile_s": seconds}
        if self.compiled is not None:
            self.loaded["host_steps"] = self.compiled.stats()["host_steps"]

    def time(self, seconds: float) -> dict:
        """Milliseconds per call: samples of many calls with one wait at their end."""
        start = time.perf_counter()
        self.wait(self.call())
        group = max(1, int(SAMPLE_SECONDS / max(time.perf_counter() - start, 1e-6)))
        samples = []
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline or len(samples) < 3:
            start = time.perf_counter()
            for _ in range(group):
                result = self.call()
            self.wait(result)
            samples.append((time.perf_counter() - start) / group * 1e3)
        return {"ms": samples}

    def result(self, path: str) -> dict:
        y = self.call()
        np.save(path, y.cpu().numpy() if hasattr(y, "cpu") else np.asarray(y))
        return {}


class Training(training_session.Training):
    """A case of training; `fit` of the peers runs on the GPU by itself."""

    def __init__(self, engine: str, case: dict):
        if engine == "kgraph-gpu":
            import kgraph

            kgraph.set_device(device_name())
        elif engine == "jax-gpu":
            import jax

            jax.config.update("jax_default_matmul_precision", "highest")
        else:
            import torch

            torch.backends.cudnn.allow_tf32 = False
        super().__init__("torch-compile" if engine == "torch-compile-gpu" else engine.removesuffix("-gpu"), case)


class Limits:
    """What kgraph's kernels reach of the device's copy bandwidth, and what a call costs beside its kernels."""

    def __init__(self, engine: str, case: dict):
        self.loaded: dict = {}
        self.megabytes = case["batch"]

    def time(self, seconds: float) -> dict:
        import keras

        import kgraph
        from kgraph.runtime.cuda.device import device_for

        device = device_for(device_name())
        nbytes = max(int(self.megabytes * MIB) // 4096, 1) * 4096
        source, target = device.allocate(nbytes), device.allocate(nbytes)
        out = {
            "device": device.name,
            "copy_gbs": self._rate(device, lambda: device.copy(target, source, nbytes), nbytes),
        }
        device.release(source)
        device.release(target)
        rows = nbytes // 4096
        for label, layer in {
            "relu": keras.layers.ReLU(),
            "gelu": keras.layers.Activation("gelu"),
            "layer_norm": keras.layers.LayerNormalization(),
            "rms_norm": keras.layers.RMSNormalization(),
            "softmax": keras.layers.Softmax(),
        }.items():
            compiled = kgraph.compile(keras.Sequential([keras.Input((1024,)), layer]), target=device_name())
            x = kgraph.DeviceArray.copy_of(device, np.random.default_rng(0).random((rows, 1024), np.float32))
            compiled(x)
            out[f"{label}_gbs"] = self._rate(device, lambda compiled=compiled, x=x: compiled(x), nbytes)
        compiled = kgraph.compile(models.build("tiny_mlp"), target=device_name())
        x = kgraph.DeviceArray.copy_of(device, models.example_inputs("tiny_mlp", 1))
        compiled(x)
        launches = compiled.stats()["native_steps"]
        out["us_per_step"] = 1e3 * self._milliseconds(device, lambda: compiled(x), 200) / launches
        return out

    def _rate(self, device, call, nbytes: int) -> float:
        """GB/s of something that reads and writes `nbytes`."""
        return 2 * nbytes / self._milliseconds(device, call, 10) / 1e6

    def _milliseconds(self, device, call, repeats: int) -> float:
        """Per call, on the device's clock; the simulator, where it means nothing, calls once."""
        best = float("inf")
        rounds, repeats = (1, 1) if device.machine == "cuda-simulator" else (3, repeats)
        for _ in range(rounds):
            start = device.mark(timing=True)
            for _ in range(repeats):
                call()
            end = device.mark(timing=True)
            device.synchronize()
            best = min(best, device.milliseconds(start, end) / repeats)
        return max(best, 1e-9)


SESSIONS = {"infer": Inference, "train": Training, "limits": Limits}

__all__ = ["SESSIONS"]
