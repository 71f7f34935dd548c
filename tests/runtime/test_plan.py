import gc
import pickle
import sys
import weakref

import ml_dtypes
import numpy as np
import pytest

from kgraph.errors import InputError, KGraphError
from kgraph.ir import Dim
from kgraph.runtime import context as context_module
from kgraph.runtime.plan import Buffer, HostStep, NativeStep, Program
from tests.runtime.kernels import HEAVY, N, chain, program


def array(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def double(arrays, sizes):
    return [arrays[0] * 2]


# -- sizes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 100])
def test_any_size_by_one_program(rows):
    p = chain(3, shape=(N, 5))
    x = array(rows, 5)
    (y,) = p([x])
    np.testing.assert_array_equal(y, x + 1 + 1 + 1)
    assert y.dtype == np.float32


def test_symbols_follow_from_affine_axes():
    m = Dim.symbol("M")
    p = program(
        [Buffer("input", (2 * N + 1, m), "float32", name="x"), Buffer("input", (N, m * m), "float32", name="y")],
        [],
        (0, 1),
        (0,),
    )
    assert p.resolve([(7, 4), (3, 16)]) == {"N": 3, "M": 4}
    with pytest.raises(InputError, match=r"y has shape \(3, 15\), expected f32\[N, M\*M\]: axis 1 differs"):
        p.resolve([(7, 4), (3, 15)])
    with pytest.raises(InputError, match="rank"):
        p.resolve([(7,), (3, 16)])
    with pytest.raises(InputError, match="x has shape"):
        p.resolve([(6, 4), (3, 16)])
    with pytest.raises(ValueError, match="do not follow"):
        program([Buffer("input", (N * m,), "float32")], [], (0,), (0,))


def test_wrong_inputs_are_refused():
    p = chain(1, shape=(N, 5))
    with pytest.raises(InputError, match=r"x has shape \(3, 4\), expected f32\[N, 5\]: axis 1 differs"):
        p([array(3, 4)])
    with pytest.raises(InputError, match="x is float64, expected float32"):
        p([np.zeros((3, 5))])
    with pytest.raises(InputError, match="takes 1 arrays, 2"):
        p([array(3, 5), array(3, 5)])
    with pytest.raises(InputError, match="takes 1 arrays, 0"):
        p([])
    (y,) = p([array(3, 5)])
    assert y.shape == (3, 5)


def test_inputs_too_small_for_the_model_are_refused():
    # Two negative sizes have a positive product: nothing may run on them.
    buffers = [Buffer("input", (N, N), "float32"), Buffer("temporary", (N - 2, N - 2), "float32")]
    step = NativeStep("add_one", (0, 1), 1, (N - 2) * (N - 2), label="conv", layers=("a/b",))
    p = program(buffers, [step], (0,), (1,))
    assert p([array(2, 2)])[0].shape == (0, 0)
    with pytest.raises(InputError, match=r"too small.*the result of conv \(a/b\).*\[-1, -1\]"):
        p([array(1, 1)])


def test_any_layout_of_inputs():
    p = chain(1, shape=(N, 6))
    base = array(12, 10)
    bytes_ = np.zeros(4 * 24 + 1, np.uint8)
    unaligned = bytes_[1:].view(np.float32).reshape(4, 6)
    read_only = array(4, 6)
    read_only.flags.writeable = False
    for x in (base[::3, 2:8], base.T[:6, :6], array(4, 6)[::-1], unaligned, read_only, np.asfortranarray(array(4, 6))):
        np.testing.assert_array_equal(p([x])[0], x + 1)
    matrix = array(4, 6).view(np.recarray)
    assert type(p([matrix])[0]) is np.ndarray
    big_endian = array(4, 6).astype(">f4")
    with pytest.raises(InputError):
        p([big_endian])


def test_dims_as_values():
    p = program([Buffer("input", (N,), "float32"), Buffer("dim", (), "int32", value=3 * N + 1)], [], (0,), (1,))
    for n in (1, 5):
        (value,) = p([array(n)])
        assert value == 3 * n + 1
        assert value.shape == ()
        assert value.dtype == np.int32


# -- steps -----------------------------------------------------------------------------------------------------------
def test_operands_of_all_kinds():
    buffers = [
        Buffer("input", (N, 4), "float32"),
        Buffer("param", (8,), "float32", name="w"),
        Buffer("constant", (12,), "float32", value=np.arange(12)),
        Buffer("temporary", (N, 4), "float32"),
        Buffer("temporary", (N, 4), "float32"),
    ]
    steps = [
        NativeStep("multiply_add", (0, 1, 3), 1, 8, sizes=(N,)),
        NativeStep("multiply_add", (3, 2, 4), 1, 8, sizes=(7,)),
    ]
    p = program(buffers, steps, (0,), (4,), (1,))
    x, w = array(2, 4), array(8, seed=1)
    with pytest.raises(InputError, match="parameter 0 was never set"):
        p([x])
    p.set_param(0, w)
    expected = ((x.ravel() * w + 2) * np.arange(8, dtype=np.float32) + 7).reshape(2, 4)
    np.testing.assert_allclose(p([x])[0], expected, rtol=1e-6)


def test_views_share_storage():
    buffers = [
        Buffer("input", (N, 6), "float32"),
        Buffer("temporary", (6 * N,), "float32", alias=0),
        Buffer("temporary", (N * 12,), "float32"),
        Buffer("temporary", (6 * N,), "float32", alias=2),
        Buffer("temporary", (6 * N,), "float32", alias=2, offset=24 * N),
        Buffer("temporary", (2, N, 6), "float32", alias=2),
    ]
    steps = [NativeStep("add_one", (1, 3), 1, 6 * N), NativeStep("add_one", (3, 4), 1, 6 * N)]
    p = program(buffers, steps, (0,), (5,))
    x = array(3, 6)
    np.testing.assert_array_equal(p([x])[0], np.stack([x + 1, x + 1 + 1]))
    assert p.bind({"N": 3}).arena_bytes == 0  # written straight into the output


def test_outputs_never_alias_anything():
    buffers = [
        Buffer("input", (N,), "float32"),
        Buffer("param", (3,), "float32"),
        Buffer("constant", (2,), "float32", value=[1, 2]),
        Buffer("temporary", (N,), "float32"),
        Buffer("temporary", (N, 1), "float32", alias=0),
        Buffer("temporary", (N - 1,), "float32", alias=3, offset=4),
    ]
    w = array(3)
    p = program(buffers, [NativeStep("add_one", (0, 3), 1, N)], (0,), (0, 1, 2, 3, 3, 4, 5), (1,))
    p.set_param(0, w)
    x = array(5, seed=1)
    outs = p([x])
    for out, expected in zip(outs, [x, w, [1, 2], x + 1, x + 1, x[:, None], x[1:] + 1]):
        np.testing.assert_array_equal(out, expected)
        assert out.flags.owndata or out.base is not x
    for i, a in enumerate(outs):
        assert not any(np.shares_memory(a, b) for b in (x, w, *outs[:i]))
        a += 1
    np.testing.assert_array_equal(p([x])[2], [1, 2])


def test_in_place_saves_the_arena():
    x = array(1000)
    kept, merged = chain(6, inplace=False), chain(6)
    np.testing.assert_array_equal(kept([x])[0], merged([x])[0])
    assert kept.bind({"N": 1000}).arena_bytes >= 4000
    assert merged.bind({"N": 1000}).arena_bytes == 0


def test_in_place_spares_what_is_still_read():
    # t = x + 1 ; u = t + 1 (may lie on t, but t is read again) ; v = t * u
    def build(second_reader):
        buffers = [Buffer("input", (N,), "float32")] + [Buffer("temporary", (N,), "float32") for _ in range(3)]
        steps = [
            NativeStep("add_one", (0, 1), 1, N, inplace=((1, 0),)),
            NativeStep("add_one", (1, 2), 1, N, inplace=((1, 0),)),
            NativeStep("multiply_add", (1 if second_reader else 0, 2, 3), 1, N, sizes=(0,), inplace=((2, 1),)),
        ]
        return program(buffers, steps, (0,), (3,))

    x = array(64)
    np.testing.assert_array_equal(build(True)([x])[0], (x + 1) * (x + 1 + 1))
    np.testing.assert_array_equal(build(False)([x])[0], x * (x + 1 + 1))
    assert build(True).bind({"N": 64}).storage.num_in_place == 1
    assert build(False).bind({"N": 64}).storage.num_in_place == 2


def test_in_place_on_an_operand_that_is_read_twice():
    # v = t * t with only the first operand allowed to be overwritten: not in place; with both: in place.
    for pairs, merges in (((2, 0),), 0), (((2, 0), (2, 1)), 1):
        buffers = [Buffer("input", (N,), "float32")] + [Buffer("temporary", (N,), "float32") for _ in range(2)]
        steps = [
            NativeStep("add_one", (0, 1), 1, N),
            NativeStep("multiply_add", (1, 1, 2), 1, N, sizes=(0,), inplace=pairs),
        ]
        p = program(buffers, steps, (0,), (2,))
        assert p.bind({"N": 9}).storage.num_in_place == merges
        np.testing.assert_array_equal(p([array(9)])[0], (array(9) + 1) ** 2)


def test_host_steps_between_kernels():
    seen = []

    def host(arrays, sizes):
        seen.append(dict(sizes))
        return [arrays[0] * 2, arrays[0].sum(keepdims=True)]

    buffers = [Buffer("input", (N,), "float32")] + [Buffer("temporary", (N,), "float32") for _ in range(3)]
    buffers.append(Buffer("temporary", (1,), "float32"))
    steps = [
        NativeStep("add_one", (0, 1), 1, N, label="first", flops=HEAVY),
        HostStep(host, (1, 2, 4), 2, reason="no kernel", label="host"),
        NativeStep("add_one", (2, 3), 1, N, label="last"),
    ]
    p = program(buffers, steps, (0,), (3, 4))
    x = array(10)
    for _ in range(3):
        y, total = p([x])
        np.testing.assert_array_equal(y, (x + 1) * 2 + 1)
        np.testing.assert_allclose(total, (x + 1).sum(), rtol=1e-6)
    assert seen == [{"N": 10}] * 3
    assert [s.host for s in p.bind({"N": 10}).steps] == [False, True, False]
    assert p.bind({"N": 10}).steps[1].reason == "no kernel"
    assert p.stats()["host_steps"] == 1


def test_host_steps_alone_and_other_dtypes():
    buffers = [
        Buffer("input", (N,), "bfloat16"),
        Buffer("temporary", (N,), "bfloat16"),
        Buffer("temporary", (N, 1), "bfloat16", alias=1),
    ]
    p = Program("host", buffers, [HostStep(double, (0, 1), 1)], (0,), (2, 1))
    x = np.arange(4).astype(ml_dtypes.bfloat16)
    a, b = p([x])
    np.testing.assert_array_equal(a, x[:, None] * 2)
    np.testing.assert_array_equal(b, x * 2)
    assert p([x[:0]])[0].shape == (0, 1)


def test_fault_in_a_host_step_reaches_the_caller_and_leaves_the_program_sound():
    def host(arrays, sizes):
        if arrays[0][0] > 5:
            raise ZeroDivisionError("here")
        if arrays[0][0] > 4:
            return [arrays[0][:1]]
        return [arrays[0] * 2]

    buffers = [Buffer("input", (3,), "float32")] + [Buffer("temporary", (3,), "float32") for _ in range(2)]
    p = program(buffers, [NativeStep("add_one", (0, 1), 1, 3), HostStep(host, (1, 2), 1, label="odd")], (0,), (2,))
    with pytest.raises(ZeroDivisionError, match="here"):
        p([np.full(3, 9, np.float32)])
    with pytest.raises(KGraphError, match=r"host step odd gave shape \(1,\), expected \(3,\)"):
        p([np.full(3, 4, np.float32)])
    np.testing.assert_array_equal(p([np.zeros(3, np.float32)])[0], [2, 2, 2])


# -- out= ------------------------------------------------------------------------------------------------------------
def test_out_is_filled_and_returned():
    p = chain(2, shape=(N, 4))
    x = array(5, 4)
    y = np.zeros((5, 4), np.float32)
    (r,) = p([x], out=[y])
    assert r is y
    np.testing.assert_array_equal(y, x + 1 + 1)
    assert p([x], out=[None])[0] is not y


def test_out_of_any_layout_or_overlapping_the_input():
    p = chain(2, shape=(N, 4), inplace=False)
    big = np.zeros((10, 8), np.float32)
    x = array(5, 4)
    p([x], out=[big[::2, ::2]])
    np.testing.assert_array_equal(big[::2, ::2], x + 1 + 1)
    assert big.sum() == pytest.approx((x + 2).sum(), abs=1e-3)
    same = x.copy()
    p([same], out=[same])
    np.testing.assert_array_equal(same, x + 1 + 1)
    memory = array(6, 4)
    before = memory.copy()
    p([memory[:5]], out=[memory[1:]])
    np.testing.assert_array_equal(memory[1:], before[:5] + 1 + 1)


def test_out_in_the_memory_of_a_parameter():
    p = weighted()
    memory = array(3 * 64)
    w = memory[64:128]
    p.set_param(0, w)
    x = array(64, seed=1)
    for start in (0, 1, 40, 64, 100, 127, 128):
        before = w.copy()
        (y,) = p([x], out=[memory[start : start + 64]])
        np.testing.assert_array_equal(y, x * before)
        assert p.holds(memory[start : start + 64]) == (0 < start < 128)


def test_wrong_out_is_refused():
    p = chain(1)
    x = array(4)
    for bad in (np.zeros(4), np.zeros(5, np.float32), [1, 2, 3, 4]):
        with pytest.raises(InputError, match=r"out\[0\]"):
            p([x], out=[bad])
    with pytest.raises(InputError, match="has 1 outputs"):
        p([x], out=[])
    frozen = np.zeros(4, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(InputError, match="read-only"):
        p([x], out=[frozen])


# -- parameters, memory ----------------------------------------------------------------------------------------------
def weighted():
    buffers = [
        Buffer("input", (N,), "float32"),
        Buffer("param", (64,), "float32"),
        Buffer("temporary", (N,), "float32"),
    ]
    return program(buffers, [NativeStep("multiply_add", (0, 1, 2), 1, N, sizes=(0,))], (0,), (2,), (1,))


def test_parameters_can_be_swapped():
    p = weighted()
    x = np.ones(64, np.float32)
    for i in range(5):
        p.set_param(0, np.full(64, i, np.float32))
        np.testing.assert_array_equal(p([x])[0], np.full(64, i))
    with pytest.raises(InputError, match="parameter 0"):
        p.set_param(0, np.zeros(64))
    strided = array(128)[::2]
    p.set_param(0, strided)
    np.testing.assert_array_equal(p([x])[0], strided)
    own = np.zeros(64, np.float32)
    p.set_param(0, own)
    own += 3
    np.testing.assert_array_equal(p([x])[0], np.full(64, 3))


def test_old_parameters_are_freed():
    p = weighted()
    old = np.full(64, 2, np.float32)
    watch = weakref.ref(old)
    p.set_param(0, old)
    p([np.ones(64, np.float32)])
    del old
    p.set_param(0, np.zeros(64, np.float32))
    gc.collect()
    assert watch() is None


def test_bindings_and_memory_are_bounded():
    p = chain(5, inplace=False, shape=(N, 1000))
    for n in range(1, 200):
        p([np.zeros((n, 1000), np.float32)])
    stats = p.stats()
    assert stats["bindings"] == 16
    often = p.bind({"N": 199})
    for n in range(200, 240):
        p([np.zeros((n, 1000), np.float32)])
        p([np.zeros((199, 1000), np.float32)])
    assert p.bind({"N": 199}) is often


def test_idle_arenas_are_trimmed(monkeypatch):
    import kgraph.runtime.plan as plan

    monkeypatch.setattr(plan, "_IDLE_ARENA_BYTES", 1 << 20)
    p = chain(5, inplace=False, shape=(N, 1000))
    for n in range(100, 116):
        p([np.zeros((n, 1000), np.float32)])
    assert p.stats()["arena_bytes"] < (3 << 20)


def test_memory_is_flat_over_many_calls():
    p = weighted()
    p.set_param(0, array(64))
    x = array(64)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    for _ in range(2000):
        p([x])
    gc.collect()
    before, blocks = resident(), sys.getallocatedblocks()
    for i in range(100_000):
        p([x])
        if i % 100 == 0:
            p.set_param(0, array(64))
    gc.collect()
    assert resident() - before < 1 << 20
    assert sys.getallocatedblocks() - blocks < 200
    assert p.stats()["contexts"] == 1


def test_pickle():
    p = chain(2)
    q = pickle.loads(pickle.dumps(p))
    np.testing.assert_array_equal(q([array(5)])[0], p([array(5)])[0])


def test_inconsistent_programs_are_refused():
    x, t = Buffer("input", (N,), "float32"), Buffer("temporary", (N,), "float32")
    with pytest.raises(ValueError, match="reads buffer 1 before it is written"):
        program([x, t, t], [NativeStep("add_one", (1, 2), 1, N)], (0,), (2,))
    with pytest.raises(ValueError, match="writes a input"):
        program([x, t], [NativeStep("add_one", (0, 0), 1, N)], (0,), (0,))
    with pytest.raises(ValueError, match="never written"):
        program([x, t], [], (0,), (1,))
    with pytest.raises(ValueError, match="no kernel"):
        Program("p", [x, t], [NativeStep("add_one", (0, 1), 1, N)], (0,), (1,))
    loop = [x, Buffer("temporary", (N,), "float32", alias=2), Buffer("temporary", (N,), "float32", alias=1)]
    with pytest.raises(ValueError, match="view of itself"):
        program(loop, [], (0,), (1,))


def test_without_numpys_object_layout(monkeypatch):
    monkeypatch.setattr(context_module, "EXTERNAL_OFFSET", -1)
    p = weighted()
    p.set_param(0, array(64))
    np.testing.assert_array_equal(p([array(64, seed=1)])[0], array(64) * array(64, seed=1))


def test_runtime_imports_no_compiler():
    import os
    import subprocess

    code = "import sys, kgraph.runtime.plan; print([m for m in sys.modules if m.split('.')[0] in "
    code += "('keras', 'numba', 'llvmlite') or m.startswith(('kgraph.codegen', 'kgraph.passes', 'kgraph.ops'))])"
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONPATH": root})
    assert out.stdout.strip() == b"[]", out


def test_profile():
    p = chain(4, shape=(N,), flops=HEAVY)
    x = array(2000)
    (y,), times = p.profile([x])
    np.testing.assert_array_equal(y, x + 1 + 1 + 1 + 1)
    assert [t.label for t in times] == ["add_0", "add_1", "add_2", "add_3"]
    assert all(0 < t.nanoseconds < 1e8 for t in times)
    assert times[0].flops == HEAVY
