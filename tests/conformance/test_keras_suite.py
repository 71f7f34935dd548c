"""A fast part of Keras' own tests, unmodified, on kgraph; `python -m tests.conformance` runs them all."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.conformance import compiled_layers, gaps, report
from tests.conformance.runner import FileResult, Suite

# Files that need nothing but Keras' own dependencies, and are done in seconds.
FILES = """
activations/activations_test.py
callbacks/early_stopping_test.py
callbacks/lambda_callback_test.py
constraints/constraints_test.py
initializers/constant_initializers_test.py
initializers/random_initializers_test.py
layers/activations/prelu_test.py
layers/activations/softmax_test.py
layers/attention/attention_test.py
layers/convolutional/separable_conv_test.py
layers/core/embedding_test.py
layers/core/wrapper_test.py
layers/merging/merging_test.py
layers/normalization/batch_normalization_test.py
layers/normalization/group_normalization_test.py
layers/pooling/max_pooling_test.py
layers/regularization/dropout_test.py
layers/reshaping/reshape_test.py
layers/rnn/simple_rnn_test.py
losses/losses_test.py
metrics/accuracy_metrics_test.py
metrics/regression_metrics_test.py
models/sequential_test.py
optimizers/adam_test.py
optimizers/lion_test.py
optimizers/optimizer_test.py
quantizers/gptq_config_test.py
regularizers/regularizers_test.py
saving/serialization_lib_test.py
trainers/compile_utils_test.py
""".split()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[FileResult]:
    suite = Suite("kgraph", Path(sys.executable), tmp_path_factory.mktemp("conformance"))
    return suite.run(suite.files(FILES))


def test_results_and_gaps_agree(results):
    wrong = gaps.complaints(results, gaps.load())
    assert not wrong, "\n".join(wrong)


def test_every_file_ran(results):
    tally = Counter(outcome for result in results for outcome, _ in result.tests.values())
    assert all(result.done and result.tests for result in results), [r.file for r in results if not r.tests]
    assert tally["passed"] > 10 * tally["skipped"], tally


# -- layers, compiled --------------------------------------------------------------------------------------------------
class Counting(keras.Layer):
    """Gives something else at each trace and at each eager call, which no compiled layer can follow."""

    calls = 0

    def call(self, x):
        self.calls += 1
        return x + self.calls


def test_a_layer_that_differs_when_compiled_is_found():
    x = np.ones((2, 3), "float32")
    compiled_layers.check(keras.layers.BatchNormalization, {}, {"training": True}, x)
    compiled_layers.check(keras.layers.Dropout, {"rate": 0.5}, {"training": True}, x)
    with pytest.raises(AssertionError, match="Counting, compiled"):
        compiled_layers.check(Counting, {}, {}, x)


# -- the check itself --------------------------------------------------------------------------------------------------
FILE = "keras/src/layers/some_test.py"
ENTRY = gaps.Gap("layers/some_test.py::Some::test_*_sparse", "sparse", "sparse tensors")


@pytest.mark.parametrize(
    ("outcomes", "entries", "expected"),
    [
        ({"test_a": "passed", "test_b": "skipped"}, [], []),
        ({"test_a": "failed"}, [], ["test_a failed and has no entry"]),
        ({"test_a": "crashed"}, [], ["test_a crashed and has no entry"]),
        ({"test_a": "passed", "test_b_sparse": "failed"}, [ENTRY], []),
        ({"test_a_sparse": "failed", "test_b_sparse": "passed"}, [ENTRY], ["test_b_sparse passed; the entry"]),
        ({"test_a": "passed"}, [ENTRY], ["names no test"]),
    ],
)
def test_the_check_of_gaps(outcomes, entries, expected):
    result = FileResult(FILE, {f"{FILE}::Some::{name}": (outcome, "why") for name, outcome in outcomes.items()})
    found = gaps.complaints([result], entries)
    assert len(found) == len(expected)
    assert all(text in line for text, line in zip(expected, found))


def test_entries_of_files_that_did_not_run_are_no_complaint():
    assert gaps.complaints([FileResult("keras/src/other_test.py")], [ENTRY]) == []


def test_what_passed_elsewhere_is_not_run_again(tmp_path):
    ours = Suite("kgraph", Path(sys.executable), tmp_path)
    file = ours.files(["constraints/constraints_test.py"])[0]
    tests = [f"{file}::ConstraintsTest::{name}" for name in ("test_max_norm", "test_non_neg")]
    ours.path_of(file).write_text(
        "".join(json.dumps({"test": t, "outcome": "passed", "reason": ""}) + "\n" for t in tests)
    )
    beside = Suite("kgraph", ours.python, tmp_path, given=ours).run([file])[0]
    outcomes = Counter(outcome for outcome, _ in beside.tests.values())
    assert {t: o for t, (o, _) in beside.tests.items() if t in tests} == dict.fromkeys(tests, "given")
    assert beside.done
    assert outcomes["passed"] > 10
    assert report.counts([beside])["constraints"]["passed"] == outcomes["passed"] + 2


def test_counts_and_differences():
    ours = FileResult(
        FILE, {"a": ("passed", ""), "b": ("skipped", "no sparse tensors"), "c": ("crashed", "killed")}, done=True
    )
    peer = FileResult(FILE, dict.fromkeys("abc", ("passed", "")), done=True)
    assert report.counts([ours]) == {"layers": Counter(passed=1, failed=1, skipped=1)}
    assert report.only_on([peer], [ours]) == {"no sparse tensors": 1, "crashed": 1}
    assert "| layers | 1 | 1 | 1 |" in report.table([ours])
    assert "| layers | 1 of 1 | 1 | 1 | 1 | 3 | 0 | 0 | 2 |" in report.comparison([ours], [peer])
    peer.done = False
    assert "layers" not in report.comparison([ours], [peer])


def test_slow_tests_are_listed():
    passed = ("passed", "")
    ours = FileResult(FILE, dict.fromkeys("abcd", passed), {"a": 31.0, "b": 29.0, "c": 4.0, "d": 90.0})
    peer = FileResult(FILE, {**dict.fromkeys("abc", passed), "d": ("failed", "")}, {"a": 10, "b": 10, "c": 0.1, "d": 1})
    assert report.slower([ours], [peer]) == [("a", 31.0, 10)]


def test_the_section_of_the_readme_is_replaced(tmp_path):
    path = tmp_path / "README.md"
    begin, end = report.MARKS["keras"]
    path.write_text(f"before\n{begin}\nyesterday's\n{end}\nafter\n")
    result = FileResult(FILE, {f"{FILE}::a": ("passed", "")}, done=True)
    report.write_readme(report.readme_section([result], [result]), path)
    text = path.read_text()
    assert text.startswith(f"before\n{begin}\n| folder")
    assert text.endswith(f"{end}\nafter\n")
    assert "yesterday" not in text
    path.write_text("no marks")
    with pytest.raises(ValueError, match="no place"):
        report.write_readme(report.readme_section([result], [result]), path)
