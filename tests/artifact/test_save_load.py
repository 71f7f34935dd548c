"""A loaded model does what the compiled model does that was saved."""

from __future__ import annotations

import kgraph  # isort: skip  (before Keras)

import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from kgraph.errors import ArtifactError, CompileError, InputError
from kgraph.runtime.artifact_file import ArtifactFile, write_file
from tests.artifact.conftest import MODELS, assert_same, normal


@pytest.mark.parametrize("name", MODELS)
def test_same_bits(name, saved):
    compiled, x, path = saved(name)
    loaded = kgraph.load(path)
    assert loaded.level == "native"
    assert_same(loaded(x), compiled(x))
    leaves = compiled.inputs.flatten(x)
    for rows in (1, 7, 0):
        some = compiled.inputs.pack([np.resize(a, (rows, *a.shape[1:])) for a in leaves])
        assert_same(loaded(some), compiled(some))
    many = compiled.inputs.pack([np.resize(a, (70, *a.shape[1:])) for a in leaves])
    assert_same(loaded.predict(many, batch_size=32), compiled.predict(many, batch_size=32))
    assert [str(t) for t in loaded.inputs.types] == [str(t) for t in compiled.inputs.types]
    assert loaded.inputs.names == compiled.inputs.names


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("level", ["x86-64-v4", "x86-64-v3"])
def test_other_levels(name, level, saved):
    compiled, x, path = saved(name)
    try:
        loaded = kgraph.load(path, level=level)
    except ArtifactError as error:
        pytest.skip(str(error))
    tolerance = 0.02 if name == "narrow" else 2e-5  # bfloat16 has 8 bits, and rounds between the layers
    for got, wanted in zip(keras.tree.flatten(loaded(x)), keras.tree.flatten(compiled(x)), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_allclose(got.astype("float64"), wanted.astype("float64"), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["convolution", "several"])
def test_rebuilt(name, saved, monkeypatch):
    """Where no level fits, the model is compiled again."""
    compiled, x, path = saved(name)
    monkeypatch.setattr("kgraph.runtime.artifact_level.Requirement.missing", lambda self: ["a feature"])
    with pytest.raises(ArtifactError, match=r"runs none of its object code: native needs a feature$"):
        kgraph.load(path, level="native")
    loaded = kgraph.load(path)
    assert loaded.level == "rebuilt"
    assert_same(loaded(x), compiled(x))
    assert len(loaded.explain().kernels) == len(compiled.explain().kernels)
    assert loaded.graph == str(compiled.graph)


def test_code_of_another_version(saved, tmp_path):
    """Code that reads tables of another layout is not used; the model is compiled again."""
    compiled, x, path = saved("dense")
    file = ArtifactFile(path)
    manifest = json.dumps(file.read_json("manifest") | {"layout": 5}).encode()
    sections = [(name, [manifest if name == "manifest" else file.view(name)]) for name in file.sections]
    write_file(tmp_path / "m.kgraph", sections)
    with pytest.raises(ArtifactError, match=r"made for the tables of another version, kgraph 0\."):
        kgraph.load(tmp_path / "m.kgraph", level="native")
    loaded = kgraph.load(tmp_path / "m.kgraph")
    assert loaded.level == "rebuilt"
    assert_same(loaded(x), compiled(x))


def test_nothing_fits(saved, tmp_path, monkeypatch):
    compiled, _, _ = saved("dense")
    compiled.save(tmp_path / "m.kgraph", levels="native", rebuildable=False)
    monkeypatch.setattr("kgraph.runtime.artifact_level.Requirement.missing", lambda self: ["avx1024"])
    with pytest.raises(ArtifactError, match="saved without its graph"):
        kgraph.load(tmp_path / "m.kgraph")
    monkeypatch.setitem(sys.modules, "kgraph.artifact.rebuild", None)
    with pytest.raises(ArtifactError, match=r"native needs avx1024.* install kgraph"):
        kgraph.load(tmp_path / "m.kgraph")
    with pytest.raises(ArtifactError, match="no code for 'x86-64-v9'; there is code for native"):
        kgraph.load(tmp_path / "m.kgraph", level="x86-64-v9")
    with pytest.raises(CompileError, match="unknown"):
        compiled.save(tmp_path / "n.kgraph", levels=["6502"])


def test_out_and_errors(saved):
    compiled, x, path = saved("dense")
    loaded = kgraph.load(path)
    out = np.empty((3, 5), "float32")
    assert loaded(x, out=out) is out
    assert_same(out, compiled(x))
    assert_same(loaded(x.astype("float64").tolist()), compiled(x))
    assert_same(loaded(x, training=False), compiled(x))
    for bad, keywords in ((x[:, :5], {}), ("text", {}), (x, {"training": True}), ({"a": x}, {})):
        messages = []
        for model in (compiled, loaded):
            with pytest.raises(InputError) as caught:
                model(bad, **keywords)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_looking_inside(saved):
    compiled, x, path = saved("convolution")
    loaded = kgraph.load(path)
    assert str(loaded.explain()) == str(compiled.explain())
    assert loaded.explain().decisions == compiled.explain().decisions
    profile = loaded.profile(x, repeats=2)
    assert [k.label for k in profile.kernels] == [k.label for k in compiled.profile(x, repeats=2).kernels]
    assert profile.milliseconds > 0
    assert profile.layers
    same = ("native_steps", "host_steps", "kernels", "variants", "specialised")
    assert {k: loaded.stats()[k] for k in same} == {k: compiled.stats()[k] for k in same}
    assert set(loaded.stats()["seconds"]) == {"opening", "programs", "checking weights", "self-test"}
    assert loaded.graph == str(compiled.graph)
    assert "native" in repr(loaded)


def test_weights_are_those_of_the_save(tmp_path):
    model, (x,) = MODELS["dense"]()
    compiled = kgraph.compile(model)
    model.set_weights([w + 1 for w in model.get_weights()])
    wanted = compiled(x)
    compiled.save(tmp_path / "m.kgraph", levels="native")
    loaded = kgraph.load(tmp_path / "m.kgraph")
    model.set_weights([w * 0 for w in model.get_weights()])
    assert_same(loaded(x), wanted)
    assert not np.array_equal(compiled(x), wanted)


def test_frozen_weights(tmp_path):
    model, (x,) = MODELS["dense"]()
    compiled = kgraph.compile(model, freeze=True)
    wanted = compiled(x)
    model.set_weights([w * 0 for w in model.get_weights()])
    compiled.save(tmp_path / "m.kgraph", levels="native")
    assert_same(kgraph.load(tmp_path / "m.kgraph")(x), wanted)


def test_state_goes_on(tmp_path):
    """A model that draws random numbers: the loaded one draws those that the compiled one would have drawn."""
    x = keras.Input((6,))
    model = keras.Model(x, Noise()(layers.Dense(4)(x)))
    compiled = kgraph.compile(model)
    data = normal(3, 6)
    before = compiled(data)
    compiled.save(tmp_path / "m.kgraph")
    loaded, again = kgraph.load(tmp_path / "m.kgraph"), kgraph.load(tmp_path / "m.kgraph", level="native")
    for _ in range(3):
        now = compiled(data)
        assert not np.array_equal(now, before)
        assert_same(loaded(data), now)
        out = np.empty_like(now)
        again(data, out=out)
        assert_same(out, now)
    assert loaded.profile(data, repeats=1).kernels


class Noise(layers.Layer):
    def __init__(self):
        super().__init__()
        self.seed = keras.random.SeedGenerator(3)

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x), seed=self.seed)


def test_fixed_sizes(tmp_path):
    """A model whose code needs the length: one form per length that it was called with."""
    x = keras.Input((None, 4))
    model = keras.Model(x, Unrolled()(x))
    compiled = kgraph.compile(model)
    with pytest.raises(InputError, match="call it once"):
        compiled.save(tmp_path / "m.kgraph")
    short, long = normal(2, 3, 4), normal(5, 6, 4)
    wanted = compiled(short), compiled(long)
    compiled.save(tmp_path / "m.kgraph", levels="native")
    loaded = kgraph.load(tmp_path / "m.kgraph")
    assert_same((loaded(short), loaded(long)), wanted)
    assert loaded.stats()["variants"] == 2
    assert loaded.stats()["specialised"] == compiled.stats()["specialised"]
    with pytest.raises(InputError, match=r"was saved for the sizes .*=3; .*=6, this call has .*=4"):
        loaded(normal(2, 4, 4))


class Unrolled(layers.Layer):
    def call(self, x):
        return sum(x[:, i] * i for i in range(int(x.shape[1])))

    def compute_output_shape(self, shape):
        return (shape[0], shape[2])


def test_host_steps(tmp_path, monkeypatch):
    """Steps on NumPy need the package's references; loading says so where they are not installed."""
    x = keras.Input((3, 3))
    y = keras.ops.matmul(x, keras.ops.transpose(x, (0, 2, 1))) + keras.ops.eye(3) * 9.0
    compiled = kgraph.compile(keras.Model(x, keras.ops.cholesky(y)))
    assert compiled.stats()["host_steps"] >= 1
    with pytest.warns(UserWarning, match="steps that run on NumPy .*cholesky"):
        compiled.save(tmp_path / "m.kgraph", levels="native")
    data = normal(4, 3, 3)
    assert_same(kgraph.load(tmp_path / "m.kgraph")(data), compiled(data))
    monkeypatch.setitem(sys.modules, "kgraph.artifact.host_steps", None)
    with pytest.raises(ArtifactError, match="steps that run on NumPy, for which the runtime alone does not suffice"):
        kgraph.load(tmp_path / "m.kgraph")


def test_control_flow(tmp_path):
    """Loops and branches over compiled bodies are no steps on NumPy."""
    x = keras.Input((None, 5))
    compiled = kgraph.compile(keras.Model(x, Loops()(x)))
    compiled.save(tmp_path / "m.kgraph")
    for loaded in (kgraph.load(tmp_path / "m.kgraph"), kgraph.load(tmp_path / "m.kgraph", level="native")):
        for data in (normal(3, 7, 5), normal(1, 2, 5) - 9):
            assert_same(loaded(data), compiled(data))


class Loops(layers.Layer):
    def call(self, x):
        ops = keras.ops
        _, y = ops.while_loop(lambda i, y: i < 4, lambda i, y: (i + 1, ops.tanh(y) * 1.5), (0, x))
        carry, z = ops.scan(lambda c, r: (c + r, ops.sin(c)), ops.zeros_like(x[:, 0]), ops.transpose(y, (1, 0, 2)))
        chosen = ops.cond(ops.sum(x) > 0, lambda: ops.sort(carry, axis=-1), lambda: ops.exp(carry))
        return chosen, z


def test_constants(tmp_path):
    """Constants in the graph, boolean outputs."""
    table = np.arange(40, dtype="float32").reshape(4, 10)

    class Layer(layers.Layer):
        def call(self, x):
            y = keras.ops.matmul(x, keras.ops.convert_to_tensor(table))
            return y > 0, keras.ops.sum(y, axis=-1)

    x = keras.Input((4,))
    compiled = kgraph.compile(keras.Model(x, list(Layer()(x))))
    compiled.save(tmp_path / "m.kgraph")
    data = normal(3, 4)
    assert_same(kgraph.load(tmp_path / "m.kgraph")(data), compiled(data))


def test_threads_and_fork(saved):
    compiled, x, path = saved("recurrent")
    loaded, wanted = kgraph.load(path), compiled(x)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: loaded(x), range(20)):
            assert_same(result, wanted)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if np.array_equal(loaded(x), wanted) else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_options(saved, tmp_path):
    compiled, x, path = saved("dense")
    compiled.save(tmp_path / "m.kgraph", levels=["native"], rebuildable=False, self_test=False)
    assert (tmp_path / "m.kgraph").stat().st_size < path.stat().st_size
    loaded = kgraph.load(tmp_path / "m.kgraph", check_weights=False)
    assert_same(loaded(x), compiled(x))
    assert list(tmp_path.iterdir()) == [tmp_path / "m.kgraph"]


def test_saving_again_leaves_the_mapped_file(saved, tmp_path):
    compiled, x, _ = saved("dense")
    compiled.save(tmp_path / "m.kgraph", levels="native")
    loaded = kgraph.load(tmp_path / "m.kgraph")
    (tmp_path / "other").write_bytes(b"")
    compiled.save(tmp_path / "m.kgraph", levels="x86-64-v2")
    assert_same(loaded(x), compiled(x))
    assert kgraph.load(tmp_path / "m.kgraph").level == "x86-64-v2"


def test_the_same_model_gives_the_same_bytes(tmp_path):
    """In every process, whatever order Python's sets have there."""
    code = (
        "import hashlib, pathlib, sys, kgraph, keras\n"
        "from tests.artifact.conftest import MODELS\n"
        "keras.utils.set_random_seed(7)\n"
        "kgraph.compile(MODELS['several']()[0]).save(sys.argv[1])\n"
        "print(hashlib.sha256(pathlib.Path(sys.argv[1]).read_bytes()).hexdigest())\n"
    )
    digests = set()
    for seed in "12":
        command = [sys.executable, "-c", code, str(tmp_path / "m.kgraph")]
        root, environment = Path(__file__).parents[2], os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
        digests.add(done.stdout.split()[-1])
    assert len(digests) == 1
