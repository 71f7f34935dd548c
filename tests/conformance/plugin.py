"""A pytest plugin under which the tests of Keras and of KerasHub run, on kgraph or on another backend.

It does what the `conftest.py` of Keras' repository does (the wheel leaves it out), limits each test's time, writes each
test's outcome to a file as soon as it is known, and, on kgraph, changes three things for the tests alone:

- They see the backend's name "kgraph", where Keras itself sees "numpy": many tests skip themselves on a backend called
  "numpy" because Keras' own one cannot train. `NAMES` lists the exceptions.
- Tests that differentiate with the backend's framework do so with kgraph's gradients, and those that make sparse
  tensors of it make kgraph's (`jax_branch`).
- Each layer that a test hands to `TestCase.run_layer_test` also goes through `kgraph.compile` (`compiled_layers`),
  and so do KerasHub's models, with a training step (`compiled_models`).

Settings come from the environment, so that the plugin works in the peers' environments too:
KERAS_BACKEND; CONFORMANCE_PACKAGE, the package whose tests these are;
CONFORMANCE_RESULTS, the folder in which each test file has a file of outcomes (one JSON object a line);
CONFORMANCE_TIMEOUT, the seconds of the processor that a test may take; CONFORMANCE_GIVEN, a folder of outcomes on
another backend: a test that passed there is not run, its outcome is "given".
"""

from __future__ import annotations

import collections
import faulthandler
import json
import os
import re
import signal
import sys
import time
import types
from pathlib import Path

import pytest

from tests.conformance import jax_branch
from tests.conformance.runner import below_source

ON_KGRAPH = os.environ.get("KERAS_BACKEND") == "kgraph"
PACKAGE = os.environ.get("CONFORMANCE_PACKAGE", "keras")
TIMEOUT = float(os.environ.get("CONFORMANCE_TIMEOUT", "120"))
RESULTS = os.environ.get("CONFORMANCE_RESULTS")
GIVEN = os.environ.get("CONFORMANCE_GIVEN")
# Places in the tests (module, function or class) that ask for the backend's name for what kgraph shares with another
# one, and know no "kgraph": the name that fits there.
NAMES = {
    ("keras.src.trainers.trainer_test", "<module>"): "numpy",  # the trainer's class
    ("keras.src.trainers.trainer_test", "__getitem__"): "jax",  # the CPU's name, for a device scope
    ("keras.src.trainers.data_adapters.tf_dataset_adapter_test", "TestTFDatasetAdapter"): "numpy",  # makes NumPy arrays
    ("keras.src.trainers.data_adapters.tf_dataset_adapter_test", "test_tf_sparse_tensors"): "numpy",
    ("keras.src.ops.core_test", "test_is_tensor"): "numpy",  # tensors are NumPy arrays
    ("keras.src.ops.math_test", "test_istft"): "jax",  # the ends of the inverse, where windows do not overlap
    ("keras.src.ops.image_test", "test_gaussian_blur_even_kernel_size"): "numpy",  # a test of the NumPy backend alone
    ("keras.src.utils.backend_utils_test", "test_dynamic_backend"): "numpy",  # which stands for the running backend
}


# -- what Keras' conftest does -----------------------------------------------------------------------------------------
# Keras keeps 32 bits as the default where a test switches JAX to 64.
os.environ.setdefault("JAX_DEFAULT_DTYPE_BITS", "32")

if ON_KGRAPH:
    import kgraph  # noqa: F401


def _skip_if_backend(name: str, reason: str):
    from keras.src.backend import backend

    return pytest.mark.skipif(backend() == name, reason=reason)


# Several test modules import this function from their repository's conftest.
sys.modules["conftest"] = types.ModuleType("conftest")
sys.modules["conftest"].skip_if_backend = _skip_if_backend  # type: ignore[attr-defined]


def pytest_configure(config):
    config.addinivalue_line("markers", "requires_trainable_backend: for backends that can train")
    for name in ("requires_tpu", "multi_device"):
        config.addinivalue_line("markers", f"{name}: Keras' own")
    if ON_KGRAPH:
        _name_the_backend()
        jax_branch.install()
        from tests.conformance import compiled_layers, compiled_models

        (compiled_models if PACKAGE == "keras_hub" else compiled_layers).install()


def pytest_collection_modifyitems(config, items):
    known = {test for file in {_file(item.nodeid) for item in items} for test in _known(file)}
    items[:] = [item for item in items if _id(item.nodeid) not in known]
    if GIVEN:
        items[:] = _without_given(items)
    for item in items:
        if item.get_closest_marker("multi_device"):
            item.add_marker(pytest.mark.skip(reason="needs several devices"))
    if ON_KGRAPH:
        for item in items:
            jax_branch.take_off_skips(item)


def _without_given(items: list) -> list:
    """The tests that have not passed elsewhere; the others are noted."""
    passed: dict[str, set[str]] = {}
    left = []
    for item in items:
        file, test = _file(item.nodeid), _id(item.nodeid)
        if file not in passed:
            outcomes = _outcomes(Path(GIVEN) / _results_of(file).name)
            passed[file] = {name for name, outcome in outcomes.items() if outcome == "passed"}
        if test in passed[file]:
            _write(file, test=test, outcome="given", reason="")
        else:
            left.append(item)
    return left


# -- the backend's name ------------------------------------------------------------------------------------------------
def _name_the_backend() -> None:
    """Let the test modules see "kgraph" as the backend's name; Keras' own code keeps the name that it knows."""
    import keras
    from keras.src.backend import config

    inner = config.backend

    def backend():
        frame = sys._getframe(1)
        caller = frame.f_globals.get("__name__", "")
        place = (caller, frame.f_code.co_name)
        if place in NAMES:
            return NAMES[place]
        if place in jax_branch.PLACES:
            return "jax"
        of_a_test = caller.endswith("_test") or caller.startswith("keras.src.testing.")
        return "kgraph" if of_a_test else inner()

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("keras") and getattr(module, "backend", None) is inner:
            module.backend = backend
    keras.config.backend = backend


# -- time --------------------------------------------------------------------------------------------------------------
_seconds: collections.Counter = collections.Counter()


def _too_long(signum, frame):
    raise TimeoutError(f"the test took more than {TIMEOUT:g} s of the processor")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    # Time of the processor, since the machine may have other work. A test that waits for nothing, or hangs in native
    # code (which never gets to the signal's handler), ends with its process, and the runner starts another.
    signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, TIMEOUT)
    faulthandler.dump_traceback_later(5 * TIMEOUT, exit=True)
    file = _file(item.nodeid)
    _write(file, test=_id(item.nodeid), outcome="crashed", reason="the process ended during the test")
    start = time.perf_counter()
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        _seconds[file] += time.perf_counter() - start
        if nextitem is None or _file(nextitem.nodeid) != file:
            _write(file, done=True, seconds=round(_seconds[file], 1))


# -- outcomes ----------------------------------------------------------------------------------------------------------
def _id(test: str) -> str:
    """A test's id without the addresses that the parameters of some print."""
    return re.sub("0x[0-9a-f]+", "0x", test)


def _file(test: str) -> str:
    return test.partition("::")[0]


def _results_of(file: str) -> Path:
    name = below_source(file).removesuffix(".py").replace("/", ".")
    return Path(RESULTS or os.devnull) / f"{name}.jsonl"


def _known(file: str) -> set[str]:
    """The tests of a file that an earlier process has run."""
    return set(_outcomes(_results_of(file))) if RESULTS else set()


def _outcomes(path: Path) -> dict[str, str]:
    """Test id -> its last outcome in a file of outcomes."""
    records = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return {record["test"]: record["outcome"] for record in records if "test" in record}


def _write(file: str, **record) -> None:
    if RESULTS:
        with _results_of(file).open("a") as out:
            out.write(json.dumps(record) + "\n")


def _reason(report) -> str:
    """The last line of an error, or the reason of a skip."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return " ".join(text.split())[:400]


_RANK = {"passed": 0, "skipped": 1, "failed": 2}
_worst: dict[str, tuple[str, str]] = {}
_began: dict[str, float] = {}


def _processor_seconds() -> float:
    """Of this process and of those that it has waited for, such as compilers of kernels."""
    return sum(os.times()[:4])


def pytest_runtest_logreport(report):
    if report.when == "setup":
        _worst[report.nodeid] = ("passed", "")
        _began[report.nodeid] = _processor_seconds()
    if report.outcome != "passed":
        before = _worst[report.nodeid]
        if _RANK[report.outcome] > _RANK[before[0]]:
            _worst[report.nodeid] = (report.outcome, _reason(report))
    if report.when == "teardown":
        outcome, reason = _worst.pop(report.nodeid)
        seconds = round(_processor_seconds() - _began.pop(report.nodeid), 2)
        _write(_file(report.nodeid), test=_id(report.nodeid), outcome=outcome, reason=reason, seconds=seconds)


def pytest_collectreport(report):
    if report.outcome != "passed" and report.nodeid:
        outcome = "skipped" if report.skipped else "failed"
        _write(_file(report.nodeid), test=_id(report.nodeid), outcome=outcome, reason=_reason(report))
