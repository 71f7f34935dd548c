"""KerasHub's generation on kgraph: a package with the contract of its tasks, imported in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What KerasHub's CausalLM does as far as kgraph is concerned, over a model that counts how often Python runs it.
TASK = """
import keras
from keras import ops


class CausalLM(keras.Model):
    def __init__(self, vocabulary=11, width=8, length=12, **kwargs):
        super().__init__(**kwargs)
        self.embedding = keras.layers.Embedding(vocabulary, width)
        self.mix = keras.layers.Dense(width, activation="tanh")
        self.head = keras.layers.Dense(vocabulary)
        self.seed = keras.random.SeedGenerator(3)
        self.length, self.width, self.runs = length, width, 0
        self.generate_function = None
        self(ops.zeros((1, 1), "int32"))

    def call(self, tokens):
        return self.head(self.mix(self.embedding(tokens)))

    def generate_step(self, inputs, stop_token_ids=None):
        self.runs += 1
        tokens = inputs["token_ids"]
        batch = tokens.shape[0]
        cache = ops.zeros((batch, 2, self.length, self.width))

        def body(tokens, cache, index):
            x = self.embedding(ops.slice(tokens, [0, index - 1], [batch, 1]))
            parts = []
            for layer in range(2):
                part = ops.slice_update(cache[:, layer], [0, index, 0], x)
                parts.append(part)
                x = self.mix(x + ops.mean(part, axis=1, keepdims=True))
            logits = self.head(x)[:, 0]
            if self.sampling:
                logits = logits + keras.random.uniform(logits.shape, seed=self.seed)
            new = ops.cast(ops.argmax(logits, axis=-1)[:, None], tokens.dtype)
            return ops.slice_update(tokens, [0, index], new), ops.stack(parts, axis=1), index + 1

        def go_on(tokens, cache, index):
            if stop_token_ids is None:
                return index < self.length
            stopped = ops.any(ops.equal(tokens, stop_token_ids[0]), axis=-1)
            return ops.logical_and(index < self.length, ops.logical_not(ops.all(stopped)))

        return {"token_ids": ops.while_loop(go_on, body, (tokens, cache, ops.convert_to_tensor(3)))[0]}

    sampling = False

    def make_generate_function(self):
        if self.generate_function is None:
            self.generate_function = self.generate_step
        return self.generate_function

    def generate(self, inputs, stop_token_ids=None):
        return self.make_generate_function()(inputs, stop_token_ids=stop_token_ids)


class Refused(CausalLM):
    def generate_step(self, inputs, stop_token_ids=None):
        self.runs += 1
        return int(ops.sum(inputs["token_ids"]))
"""

BEFORE = """
import warnings
warnings.simplefilter("error")
import numpy as np, keras
keras.utils.set_random_seed(0)
from keras_hub.src.models.causal_lm import CausalLM, Refused
x = {"token_ids": np.pad(np.array([[1, 2, 3], [4, 5, 6]], np.int32), ((0, 0), (0, 9)))}

def eagerly(task, **kwargs):
    return np.asarray(task.generate_step(x, **kwargs)["token_ids"])

def same(a, b):
    np.testing.assert_array_equal(np.asarray(a["token_ids"]), b)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    models = root / "keras_hub" / "src" / "models"
    models.mkdir(parents=True)
    for folder in (models, models.parent, models.parent.parent):
        (folder / "__init__.py").write_text("")
    (models / "causal_lm.py").write_text(TASK)
    return root


def run(package, code: str, backend: str = "kgraph") -> str:
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": f"{ROOT}{os.pathsep}{package}"}
    if backend == "kgraph":
        code = "import kgraph\n" + code
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tasks_compile_their_generation(package):
    run(
        package,
        BEFORE
        + textwrap.dedent("""
        task = CausalLM()
        wanted = eagerly(task)
        task.runs = 0
        for _ in range(3):
            same(task.generate(x), wanted)
        assert task.runs == 1, task.runs                        # one trace
        assert "while_loop" in str(task.generate_function.compiled.explain(x, stop_token_ids=None))

        stop = int(wanted[0, 5])
        same(task.generate(x, stop_token_ids=[stop]), eagerly(task, stop_token_ids=[stop]))

        task.head.set_weights([w * -1 for w in task.head.get_weights()])
        same(task.generate(x), eagerly(task))
        assert not np.array_equal(eagerly(task), wanted)

        task.mix.enable_lora(2)  # other variables: traced again
        task.mix.lora_kernel_b.assign(np.ones((2, 8)))
        same(task.generate(x), eagerly(task))

        task.generate_function, task.run_eagerly = None, True
        task.runs = 0
        task.generate(x), task.generate(x)
        assert task.runs == 2
        """),
    )


def test_samples_follow_the_seed(package):
    run(
        package,
        BEFORE
        + textwrap.dedent("""
        task = CausalLM()
        task.sampling = True
        start = np.asarray(task.seed.state)
        compiled = [np.asarray(task.generate(x)["token_ids"]) for _ in range(3)]
        task.seed.state.assign(start)
        for one in compiled:
            np.testing.assert_array_equal(one, eagerly(task))
        assert any(not np.array_equal(compiled[0], one) for one in compiled[1:])
        """),
    )


def test_what_cannot_be_captured_says_so(package):
    run(
        package,
        BEFORE
        + textwrap.dedent("""
        task = Refused()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert task.generate(x) == task.generate(x) == 21
        (warning,) = seen
        assert "generate() runs op by op" in str(warning.message), warning.message
        """),
    )
