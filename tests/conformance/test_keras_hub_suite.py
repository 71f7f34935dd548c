"""How KerasHub's tests are run, on a package of that name with a few tests; `--suite keras_hub` runs its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

import keras
import numpy as np
import pytest

from kgraph.frontend.keras_backend.generation import Generation
from tests.conformance import compiled_models, gaps, report
from tests.conformance.runner import PROJECTS, FileResult, Suite

TEST_CASE = """
import unittest

class TestCase(unittest.TestCase):
    def run_layer_test(self, cls, init_kwargs, input_data, expected_output_shape=None):
        assert cls(**init_kwargs)(input_data).shape == expected_output_shape

    def run_backbone_test(self, cls, init_kwargs, input_data): ...

    def run_task_test(self, cls, init_kwargs, train_data, compile_kwargs=None): ...
"""
TESTS = """
import keras
import numpy as np
import pytest
from keras_hub.src.tests.test_case import TestCase

class Counting(keras.Layer):
    calls = 0

    def call(self, x):
        self.calls += 1
        return x + self.calls

class Layers(TestCase):
    def check(self, cls, **init_kwargs):
        self.run_layer_test(cls, init_kwargs, np.ones((2, 3), "float32"), expected_output_shape=(2, 3))

    def test_a_layer(self):
        self.check(keras.layers.Dense, units=3)

    def test_a_layer_that_differs_when_compiled(self):
        self.check(Counting)

    def test_the_name_of_the_backend(self):
        assert keras.config.backend() == "kgraph"

    @pytest.mark.large
    def test_a_large_one(self):
        pass
"""
CONFTEST = """
def pytest_addoption(parser):
    parser.addoption("--run_large", action="store_true")
"""


def test_tests_of_a_checkout_run(tmp_path):
    source = tmp_path / "checkout"
    for name, text in {
        "conftest.py": CONFTEST,
        "keras_hub/__init__.py": "",
        "keras_hub/src/tests/test_case.py": TEST_CASE,
        "keras_hub/src/layers/some_test.py": TESTS,
    }.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    suite = Suite("kgraph", Path(sys.executable), tmp_path, project=PROJECTS["keras_hub"], source=source)
    files = suite.files(["layers"])
    assert files == ["keras_hub/src/layers/some_test.py"]
    (result,) = suite.run(files)
    assert result.done
    outcomes = {test.rpartition("::")[2]: outcome for test, outcome in result.tests.items()}
    assert outcomes == {
        "test_a_layer": ("passed", ""),
        "test_a_layer_that_differs_when_compiled": outcomes["test_a_layer_that_differs_when_compiled"],
        "test_the_name_of_the_backend": ("passed", ""),
        "test_a_large_one": ("passed", ""),
    }
    outcome, reason = outcomes["test_a_layer_that_differs_when_compiled"]
    assert outcome == "failed"
    assert "Counting, compiled" in reason
    gap = gaps.Gap("layers/some_test.py::Layers::test_a_layer_that*", "kgraph", "counts")
    assert gaps.complaints([result], [gap]) == []


def test_sections_of_projects_are_apart(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("\n".join([*report.MARKS["keras"], *report.MARKS["keras_hub"], ""]))
    result = FileResult("keras_hub/src/layers/some_test.py", {"a": ("passed", "")}, done=True)
    report.write_readme(report.readme_section([result], [result], "keras_hub"), path)
    text = path.read_text()
    assert text.startswith("\n".join([*report.MARKS["keras"], report.MARKS["keras_hub"][0], "| folder"]))
    assert "| layers | 1 of 1 | 1 |" in text


def test_entries_have_categories():
    assert all(gap.reason and gap.category in gaps.CATEGORIES for gap in gaps.load("keras_hub"))


# -- models ------------------------------------------------------------------------------------------------------------
class Backbone(keras.Model):
    def __init__(self, layer=None):
        tokens = keras.Input((None,), dtype="int32")
        embedding = keras.layers.Embedding(7, 4)
        x = embedding(tokens)
        super().__init__(tokens, x if layer is None else layer(x))
        self.token_embedding = embedding


class ByTheLength(keras.Layer):
    """Adds the length that it sees in Python, wrongly for the second one: the compiled call keeps the traced one."""

    def call(self, x):
        known = isinstance(x.shape[1], int)
        return x + (x.shape[1] if known else 0)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


class Task(keras.Sequential):
    def __init__(self, layer):
        super().__init__([keras.Input((3,)), layer, keras.layers.Dense(2)])
        self.preprocessor = lambda x, y: (x, y)
        self.compile(optimizer="adam")

    def compile(self, optimizer, loss="mse", **kwargs):
        assert self.preprocessor is not None
        super().compile(optimizer, loss, **kwargs)

    def fit(self, *args, **kwargs):
        assert self.preprocessor is None
        return super().fit(*args, **kwargs)


class OtherInTheSecondStep(keras.Layer):
    """Multiplies by 2 in the second of the training steps that call it, which is the compiled one."""

    steps = 0

    def call(self, x, training=False):
        self.steps += bool(training)
        return x * 2 if training and self.steps == 2 else x


def test_backbones_are_called_with_two_lengths():
    x = np.array([[1, 2, 3, 4], [0, 6, 5, 4]])
    compiled_models.check_backbone(Backbone, {}, x)
    with pytest.raises(AssertionError, match="Backbone, compiled"):
        compiled_models.check_backbone(Backbone, {"layer": ByTheLength()}, x)


def test_steps_of_fit_are_compared():
    data = np.eye(3, dtype="float32"), [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    compiled_models.check_task(Task, {"layer": keras.layers.Dense(3, "relu")}, data, {"loss": "mse"})
    with pytest.raises(AssertionError, match=r"change of .* in a step of fit"):
        compiled_models.check_task(Task, {"layer": OtherInTheSecondStep()}, data, {"loss": "mse"})


class Images(keras.Sequential):
    """Keeps what it is called with op by op."""

    seen: ClassVar[list] = []

    def __init__(self):
        super().__init__([keras.Input((2, 2, 3)), keras.layers.Lambda(self.keep), keras.layers.Flatten()])
        self.token_embedding = None

    def keep(self, x):
        if isinstance(x, np.ndarray):
            self.seen.append(np.asarray(x))
        return x


def test_images_of_one_colour_become_noise():
    images = np.ones((2, 2, 2, 3), "float32"), np.arange(24, dtype="float32").reshape(2, 2, 2, 3)
    for x in images:
        compiled_models.check_backbone(Images, {}, x)
    noise, same = Images.seen
    assert noise.shape == images[0].shape
    assert np.unique(noise).size == noise.size
    assert np.array_equal(same, images[1])


class Draws(keras.Model):
    """Generates noise; the second trace of it, which is the eager call, may give twice as much."""

    def __init__(self, doubles):
        super().__init__()
        self.seeds, self.doubles, self.steps = keras.random.SeedGenerator(0), doubles, 0

    def generate_step(self, x):
        self.steps += 1
        noise = keras.random.normal(x.shape, seed=self.seeds)
        return x + (noise * 2 if self.doubles and self.steps == 2 else noise)


def test_what_tasks_generate_is_compared():
    call = compiled_models.checked_generation(Generation.__call__)
    generation, x = Generation(Draws(doubles=False)), np.ones((2, 3), "float32")
    first = call(generation, x)
    assert np.any(first != call(generation, x)), "the same seeds"
    with pytest.raises(AssertionError, match="Draws, what it generates"):
        call(Generation(Draws(doubles=True)), x)


class Largest(keras.Model):
    """Generates the index of the largest weight; the traced step gives the one before."""

    def __init__(self, last):
        super().__init__()
        self.numbers, self.steps = self.add_weight((9,)), 0
        self.numbers.assign([1.0] * 8 + [last])

    def generate_step(self, x):
        self.steps += 1
        largest = keras.ops.argmax(self.numbers + x, axis=-1)
        return largest - 1 if self.steps == 1 else largest


def test_tokens_that_hang_on_rounding_may_differ():
    call, x = compiled_models.checked_generation(Generation.__call__), np.zeros((1, 1), "float32")
    assert call(Generation(Largest(1.0000001)), x) == [7]
    with pytest.raises(AssertionError, match="Largest, what it generates"):
        call(Generation(Largest(1.1)), x)
