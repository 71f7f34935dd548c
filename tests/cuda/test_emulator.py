"""The emulated GPU: instructions against Python's numbers, and the faults of kernels that it has to find."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kgraph.runtime.cuda.device import Argument
from tests.cuda.emulator import alu
from tests.cuda.emulator.driver import emulated_gpu
from tests.cuda.emulator.machine import Kernel
from tests.cuda.emulator.memory import EmulatedFault, GlobalMemory

WARP = 32
# The address of the thread's element of x in %rd1, of y in %rd2, its number in %r1.
START = """
    ld.param.u64 %rd1, [kernel_param_0];
    ld.param.u64 %rd2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mad.lo.s32 %r1, %r2, %r3, %r1;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd1, %rd1, %rd3;
    add.s64 %rd2, %rd2, %rd3;
"""


def ptx(body: str, before: str = "") -> str:
    return f"""
.version 7.8
.target sm_90
.address_size 64
{before}
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
.maxntid 256, 1, 1
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .f32 %f<40>; .reg .b64 %rd<20>;
    {START}
    {body}
    ret;
}}
"""


def run(body: str, x: np.ndarray, count: int = 0, block: int = WARP, grid: int = 1, before: str = "") -> np.ndarray:
    """What the kernel makes of x: `count` words, by default as many as there are in x."""
    memory = GlobalMemory(1 << 16)
    count = count or x.size
    source, target = memory.allocate(x.nbytes), memory.allocate(4 * count)
    memory.content[source - memory.base :][: x.nbytes] = x.view(np.uint8).reshape(-1)
    Kernel(ptx(body, before), memory).launch(grid, block, 0, [source, target])
    return memory.content[target - memory.base :][: 4 * count].view(np.uint32).copy()


def numbers(count: int = WARP, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 32, count, np.uint32)


# -- instructions -----------------------------------------------------------------------------------------------------
def wrapped(number: int, kind: str) -> int:
    """A Python number as this type holds it."""
    bits = int(kind[1:])
    number %= 1 << bits
    return number - (1 << bits) if kind[0] == "s" and number >> (bits - 1) else number


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGERS = {
    "add": lambda a, b, bits: a + b,
    "sub": lambda a, b, bits: a - b,
    "mul.lo": lambda a, b, bits: a * b,
    "mul.hi": lambda a, b, bits: a * b >> bits,
    "div": lambda a, b, bits: towards_zero(a, b) if b else -1,
    "rem": lambda a, b, bits: a - towards_zero(a, b) * b if b else a,
    "min": lambda a, b, bits: min(a, b),
    "max": lambda a, b, bits: max(a, b),
}


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", INTEGERS)
@given(data=st.data())
def test_integers(name, kind, data):
    bits = int(kind[1:])
    few = st.sampled_from([0, 1, -1, 1 << (bits - 1), (1 << (bits - 1)) - 1])
    a, b = (wrapped(data.draw(few | st.integers(0, (1 << bits) - 1)), kind) for _ in range(2))
    operation = alu.operation(f"{name}.{kind}")
    with np.errstate(all="ignore"):
        (got,) = operation.function(*[np.array([x], alu.DTYPES[kind]) for x in (a, b)])
    assert int(got) == wrapped(INTEGERS[name](a, b, bits), kind)


@pytest.mark.parametrize(
    ("opcode", "operands", "wanted"),
    [
        ("shl.b32", [3, 33], 0),
        ("shl.b32", [3, 31], 1 << 31),
        ("shr.u32", [1 << 31, 40], 0),
        ("shr.s32", [-8, 1], -4),
        ("shr.s32", [-8, 99], -1),
        ("bfi.b32", [0b101, 0xFFFFFFFF, 4, 4], 0xFFFFFF5F),
        ("bfi.b32", [1, 2, 0, 32], 1),
        ("bfe.u32", [0xABCD1234, 8, 8], 0x12),
        ("prmt.b32", [0x33221100, 0x77665544, 0x7410], 0x77441100),
        ("prmt.b32", [0x80, 0, 0xFF98], 0xFF),
        ("clz.b32", [1], 31),
        ("clz.b32", [0], 32),
        ("clz.b64", [1 << 40], 23),
        ("popc.b32", [0xF0F0], 8),
        ("mul.wide.s32", [-2, 1 << 30], -(1 << 31)),
        ("mad.lo.s32", [3, 5, -7], 8),
        ("cvt.rni.s32.f32", [2.5], 2),
        ("cvt.rzi.s32.f32", [-2.9], -2),
        ("cvt.rzi.s32.f32", [3e9], 2**31 - 1),
        ("cvt.rzi.s32.f32", [float("nan")], 0),
        ("cvt.rzi.u32.f32", [-1.0], 0),
        ("cvt.u16.u32", [0x12345], 0x2345),
        ("cvt.s64.s32", [-5], -5),
        ("cvt.sat.u8.s32", [300], 255),
        ("cvt.rn.f32.s32", [16777217], 16777216.0),
        ("cvt.rz.f16.f32", [2049.9], 2048.0),
        ("cvt.rna.tf32.f32", [0x3F801000], 0x3F802000),
        ("cvt.sat.f32.f32", [1.5], 1.0),
        ("fma.rn.f32", [1 + 2**-12, 1 + 2**-12, -1.0], 2**-11 + 2**-24),
        ("fma.rm.f32", [1.0, -(2.0**-30), 1.0], 1 - 2**-24),
        ("add.rz.f32", [1.0, 2.0**-24 * 1.5], 1.0),
        ("mul.ftz.f32", [2.0**-100, 2.0**-40], 0.0),
        ("min.f32", [float("nan"), 2.0], 2.0),
        ("copysign.f32", [-0.0, 3.0], -3.0),
        ("setp.ltu.f32", [float("nan"), 1.0], True),
        ("setp.ne.f32", [float("nan"), 1.0], False),
        ("setp.num.f32", [1.0, float("nan")], False),
        ("selp.b32", [1, 2, False], 2),
    ],
)
def test_operations(opcode, operands, wanted):
    operation = alu.operation(opcode)
    arrays = []
    for x, kind in zip(operands, operation.kinds, strict=True):
        is_bits = kind[0] in "bu" and kind != "bf16"
        arrays.append(np.array([x % (1 << int(kind[1:])) if is_bits else x]).astype(alu.DTYPES[kind]))
    with np.errstate(all="ignore"):
        (got,) = operation.function(*arrays)
    assert got == wanted


def test_carries_go_from_one_word_to_the_next():
    x = numbers(WARP * 2)
    body = """
    ld.param.u64 %rd4, [kernel_param_0]; mul.wide.u32 %rd5, %r1, 8; add.s64 %rd4, %rd4, %rd5;
    ld.param.u64 %rd6, [kernel_param_1]; add.s64 %rd6, %rd6, %rd5;
    ld.global.v2.u32 {%r4, %r5}, [%rd4];
    { .reg .u32 low; mad.lo.cc.u32 low, %r4, %r4, %r5; madc.hi.u32 %r6, %r4, %r4, 0; mov.u32 %r7, low; }
    st.global.v2.u32 [%rd6], {%r7, %r6};
    """
    pairs = x.reshape(-1, 2).astype(object)
    wanted = pairs[:, 0] * pairs[:, 0] + pairs[:, 1]
    np.testing.assert_array_equal(run(body, x).view(np.uint64).astype(object), wanted)


def test_threads_part_and_meet_again():
    """Even threads double their number until it is at least 100, odd ones count down to zero."""
    body = """
    mov.u32 %r4, 0; mov.u32 %r5, %r1; and.b32 %r6, %r1, 1; setp.eq.s32 %p1, %r6, 1;
    @%p1 bra $odd;
$even:
    add.s32 %r4, %r4, 1; shl.b32 %r5, %r5, 1; or.b32 %r5, %r5, 1;
    setp.lt.u32 %p2, %r5, 100;
    @%p2 bra $even;
    bra.uni $end;
$odd:
    add.s32 %r4, %r4, 1; sub.s32 %r5, %r5, 1;
    setp.ne.s32 %p3, %r5, 0;
    @%p3 bra $odd;
$end:
    st.global.u32 [%rd2], %r4;
    """

    def steps(n: int) -> int:
        if n % 2:
            return n
        count = 0
        while count == 0 or n < 100:
            count, n = count + 1, n * 2 + 1
        return count

    got = run(body, numbers(70), block=35, grid=2)
    assert got.tolist() == [steps(n) for n in range(70)]


def test_functions_are_called():
    before = """
.func (.param .b32 out) twice(.param .b32 twice_param_0)
{
    .reg .b32 %r<4>; .reg .pred %p<2>;
    .local .align 4 .b8 kept[8]; .reg .b64 %SPL;
    mov.u64 %SPL, kept;
    ld.param.u32 %r1, [twice_param_0];
    st.local.u32 [%SPL+4], %r1;
    setp.gt.s32 %p1, %r1, 9;
    @%p1 bra $large;
    ld.local.u32 %r2, [%SPL+4];
    add.s32 %r1, %r1, %r2;
$large:
    st.param.b32 [out+0], %r1;
    ret;
}
"""
    body = """
    { .param .b32 param0; st.param.b32 [param0+0], %r1; .param .b32 retval0;
    call.uni (retval0), twice, (param0);
    ld.param.b32 %r4, [retval0+0]; }
    st.global.u32 [%rd2], %r4;
    """
    assert run(body, numbers(), before=before).tolist() == [2 * n if n <= 9 else n for n in range(WARP)]


# -- warps ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mode", "operands", "source"),
    [
        ("down", "4, 31", lambda n: n + 4 if n + 4 < 32 else n),
        ("up", "3, 0", lambda n: n - 3 if n >= 3 else n),
        ("bfly", "16, 31", lambda n: n ^ 16),
        ("idx", "5, 31", lambda n: 5),
        ("idx", "5, 6175", lambda n: n & 24 | 5),  # among eight lanes: 31 + (24 << 8)
        ("down", "4, 6175", lambda n: n + 4 if n % 8 < 4 else n),
    ],
)
def test_shuffles(mode, operands, source):
    x = numbers(2 * WARP)
    body = f"""
    ld.global.u32 %r4, [%rd1];
    shfl.sync.{mode}.b32 %r5|%p1, %r4, {operands}, -1;
    st.global.u32 [%rd2], %r5;
    """
    wanted = [x[n // WARP * WARP + source(n % WARP)] for n in range(2 * WARP)]
    assert run(body, x, block=2 * WARP).tolist() == wanted


FRAGMENTS = {
    "m16n8k16.row.col.f32.f16.f16.f32": (np.float16, 16, 4, 2),
    "m16n8k16.row.col.f32.bf16.bf16.f32": (ml_dtypes.bfloat16, 16, 4, 2),
    "m16n8k8.row.col.f32.f16.f16.f32": (np.float16, 8, 2, 1),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (np.float32, 8, 4, 2),
}


@pytest.mark.parametrize("shape", FRAGMENTS)
def test_products_on_tensor_cores(shape):
    """Fragments by the formulas of the PTX ISA, element by element."""
    dtype, depth, of_a, of_b = FRAGMENTS[shape]
    generator = np.random.default_rng(0)
    a, b = (generator.integers(-8, 9, s).astype(dtype) for s in ((16, depth), (depth, 8)))
    per = 4 // np.dtype(dtype).itemsize
    x = np.zeros((WARP, of_a + of_b, per), dtype)
    for lane in range(WARP):
        group, inner = lane // 4, lane % 4
        for i in range(of_a * per):
            row = group + 8 * (i // per % 2)
            column = inner * per + i % per + 4 * per * (i // (2 * per))
            x[lane, i // per, i % per] = a[row, column]
        for i in range(of_b * per):
            x[lane, of_a + i // per, i % per] = b[inner * per + i % per + 4 * per * (i // per), group]
    names = [f"%r{10 + i}" for i in range(of_a + of_b)]
    loads = "".join(f"ld.global.u32 {name}, [%rd4+{4 * i}];" for i, name in enumerate(names))
    body = f"""
    ld.param.u64 %rd4, [kernel_param_0]; mul.wide.u32 %rd5, %r1, {4 * (of_a + of_b)}; add.s64 %rd4, %rd4, %rd5;
    ld.param.u64 %rd6, [kernel_param_1]; mul.wide.u32 %rd5, %r1, 16; add.s64 %rd6, %rd6, %rd5;
    {loads}
    mov.f32 %f1, 0f3F800000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
    mma.sync.aligned.{shape} {{%f1, %f2, %f3, %f4}}, {{{", ".join(names[:of_a])}}}, {{{", ".join(names[of_a:])}}},
        {{%f1, %f2, %f3, %f4}};
    st.global.v4.f32 [%rd6], {{%f1, %f2, %f3, %f4}};
    """
    got = run(body, x.view(np.uint32), count=4 * WARP).view(np.float32).reshape(WARP, 4)
    wanted = a.astype(np.float64) @ b.astype(np.float64) + 1
    for lane in range(WARP):
        for i in range(4):
            assert got[lane, i] == wanted[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]


# -- faults -----------------------------------------------------------------------------------------------------------
def exchange(between: str, further: str = "") -> str:
    """Every thread puts its element into shared memory and takes that of the thread at the other end of the block."""
    return f"""
    ld.global.u32 %r4, [%rd1];
    mov.u32 %r5, %tid.x; shl.b32 %r6, %r5, 2; mov.u32 %r7, room; add.s32 %r8, %r7, %r6; cvt.u64.u32 %rd7, %r8;
    st.shared.u32 [%rd7], %r4;
    {between}
    sub.s32 %r9, %r3, %r5; sub.s32 %r9, %r9, 1; shl.b32 %r9, %r9, 2; add.s32 %r9, %r9, %r7; cvt.u64.u32 %rd8, %r9;
    ld.shared.u32 %r10, [%rd8];
    {further}
    st.global.u32 [%rd2], %r10;
    """


ROOM = ".shared .align 4 .b8 room[256];"


def test_a_barrier_puts_threads_in_order():
    x = numbers(128)
    got = run(exchange("bar.sync 0;"), x, block=64, grid=2, before=ROOM)
    np.testing.assert_array_equal(got.reshape(2, 64), x.reshape(2, 64)[:, ::-1])


@pytest.mark.parametrize("between", ["", "bar.warp.sync -1;"])
def test_without_a_barrier_they_race(between):
    with pytest.raises(EmulatedFault, match="threads race: one reads what another one wrote in shared memory"):
        run(exchange(between), numbers(64), block=64, before=ROOM)


def test_within_a_warp_its_own_barrier_suffices():
    x = numbers()
    np.testing.assert_array_equal(run(exchange("bar.warp.sync -1;"), x, before=ROOM), x[::-1])
    with pytest.raises(EmulatedFault, match="threads race"):
        run(exchange(""), x, before=ROOM)


def test_what_is_read_must_not_be_overwritten_too_early():
    again = "{} st.shared.u32 [%rd7], 7;"
    run(exchange("bar.sync 0;", again.format("bar.sync 0;")), numbers(64), block=64, before=ROOM)
    with pytest.raises(EmulatedFault, match="threads race: one writes what another one read"):
        run(exchange("bar.sync 0;", again.format("")), numbers(64), block=64, before=ROOM)


IN_PLACE = """
    ld.param.u64 %rd4, [kernel_param_0];
    ld.global.u32 %r4, [%rd1];
    ld.global.u32 %r5, [%rd4];
    {use}
    add.s32 %r4, %r4, 1;
    st.global.u32 [%rd1], %r4;
    st.global.u32 [%rd2], %r4;
"""


def test_reads_whose_values_do_not_matter_are_no_fault():
    """All threads read the first element, which one of them changes."""
    x = numbers(64)
    np.testing.assert_array_equal(run(IN_PLACE.format(use=""), x, block=WARP, grid=2), x + 1)
    with pytest.raises(EmulatedFault, match="one writes what another one read in global memory"):
        run(IN_PLACE.format(use="xor.b32 %r4, %r4, %r5;"), x, block=WARP, grid=2)


def test_all_threads_write_one_place():
    body = "ld.param.u64 %rd4, [kernel_param_1]; st.global.u32 [%rd2], 0; st.global.u32 [%rd4], {};"
    run(body.format(0), numbers())
    with pytest.raises(EmulatedFault, match="different values to one place"):
        run(body.format("%r1"), numbers())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.u32 %r4, [%rd1+4];", "global memory is not there, 1 threads"),
        ("ld.global.u32 %r4, [%rd1+-4];", "global memory is not there, 1 threads"),
        ("ld.global.u16 %rs1, [%rd1+1];", "not aligned to 2 bytes"),
        ("ld.global.v2.u32 {%r4, %r5}, [%rd1];", "not aligned to 8 bytes"),
        ("ld.global.u32 %r4, [%rd3];", "global memory is not there, 32 threads"),
        ("mov.u64 %rd4, room; ld.shared.u32 %r4, [%rd4+256];", "shared memory is not there"),
        ("setp.gt.u32 %p1, %r1, 9; @%p1 bra $end; bar.sync 0;\n$end:", "others of their block have left out"),
        (
            "setp.gt.u32 %p1, %r1, 9; @%p1 bra $end; shfl.sync.down.b32 %r4|%p2, %r1, 1, 31, -1;\n$end:",
            "that never come",
        ),
        (
            "setp.gt.u32 %p1, %r1, 9; @%p1 bra $end; shfl.sync.down.b32 %r4|%p2, %r1, 1, 31, 1023;\n$end:",
            "reads a thread that is not there",
        ),
    ],
)
def test_faults(body, message):
    with pytest.raises(EmulatedFault, match=message):
        run(body, numbers(), before=ROOM)


def test_unknown_instructions_are_told():
    with pytest.raises(ValueError, match=r"atom\.global\.add\.u32 %r4, \[%rd1\], 1"):
        run("atom.global.add.u32 %r4, [%rd1], 1;", numbers())


def test_a_gpu_runs_what_it_is_given():
    """By way of the driver's functions, and in a graph."""
    gpu = emulated_gpu()
    kernel = gpu.load({"k": ptx("ld.global.u32 %r4, [%rd1]; add.s32 %r4, %r4, 1; st.global.u32 [%rd2], %r4;").encode()})
    x = numbers(64)
    source, target = gpu.allocate(x.nbytes), gpu.allocate(x.nbytes)
    gpu.copy_in(source, x)
    arguments = [Argument(a, x.nbytes, "uint32") for a in (source, target)]
    gpu.begin_capture()
    gpu.launch(kernel["k"], 2, WARP, 0, arguments, [])
    gpu.copy(source, target, x.nbytes)
    graph = gpu.end_capture()
    for _ in range(3):
        gpu.replay(graph)
    out = np.empty_like(x)
    gpu.copy_out(out, target)
    np.testing.assert_array_equal(out, x + 3)
    with pytest.raises(EmulatedFault, match="global memory is not there"):
        gpu.launch(kernel["k"], 64, WARP, 0, arguments, [])
