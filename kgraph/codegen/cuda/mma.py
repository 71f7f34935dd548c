"""What kernels call for tensor cores: `mma.sync` as inline PTX, and what goes into its registers.

A warp multiplies together. Each of its lanes holds parts of A[16, depth], of B[depth, 8] and of the sums C[16, 8]: lane
4g + t holds elements of rows g and g + 8 of A, of column g of B, and of columns 2t and 2t + 1 of C. Operands are 32-bit
words, each with two half floats that follow each other along the depth, or with one float32 rounded to TF32.

The simulator's lanes take turns: there every lane leaves its words in shared memory, and computes its own sums from all
of them between two barriers (`multiply_lanes`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LANES = 32
ROWS, COLUMNS = 16, 8


class Instruction(NamedTuple):
    """ptx: shape and types of `mma.sync.aligned`. depth: of A and B. packed: elements of a word.

    a: for each word of a lane's part of A, its row and its first depth from the lane's own ones, which are g and
    t * packed; b: the depths of the words of B. oldest: compute capability that knows it.
    """

    ptx: str
    depth: int
    packed: int
    a: tuple[tuple[int, int], ...]
    b: tuple[int, ...]
    oldest: tuple[int, int]


_FOUR = ((0, 0), (8, 0), (0, 8), (8, 8))
# By the name of the function that kernels call; of those for one dtype the first that the device knows is taken.
INSTRUCTIONS = {
    "mma_float16": Instruction("m16n8k16.row.col.f32.f16.f16.f32", 16, 2, _FOUR, (0, 8), (8, 0)),
    "mma_bfloat16": Instruction("m16n8k16.row.col.f32.bf16.bf16.f32", 16, 2, _FOUR, (0, 8), (8, 0)),
    "mma_float16_short": Instruction("m16n8k8.row.col.f32.f16.f16.f32", 8, 2, _FOUR[:2], (0,), (7, 5)),
    "mma_tfloat32": Instruction(
        "m16n8k8.row.col.f32.tf32.tf32.f32", 8, 1, ((0, 0), (8, 0), (0, 4), (8, 4)), (0, 4), (8, 0)
    ),
}
_BY_DTYPE = {
    "float16": ("mma_float16", "mma_float16_short"),
    "bfloat16": ("mma_bfloat16",),
    "float32": ("mma_tfloat32",),
}


def instruction_for(dtype: str, accumulate: str, target) -> str:
    """The function that multiplies elements of `dtype` on the target's tensor cores; "" where there is none.

    float32 is multiplied so only where it may be rounded.
    """
    if accumulate != "float32" or (dtype == "float32" and not target.tf32):
        return ""
    names = _BY_DTYPE.get(dtype, ())
    return next((name for name in names if target.capability >= INSTRUCTIONS[name].oldest), "")


def simulated_functions() -> dict:
    """The functions on NumPy's scalars and arrays."""

    def put_half(words, index, bits):
        words.view(np.uint16)[int(index)] = bits

    def to_tfloat32(x):
        bits = np.float32(x).view(np.uint32)
        if not np.isfinite(x):
            return bits
        # To nearest, ties away from zero; the exponent takes the carry.
        return np.uint32((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000))

    return {"put_half": put_half, "to_tfloat32": to_tfloat32, "multiply_lanes": multiply_lanes}


def multiply_lanes(name: str, words: np.ndarray, thread: int, sums: tuple) -> tuple:
    """The sums of a thread after its warp has multiplied.

    words: of all threads of the block, those of A and then those of B. sums: of the thread before.
    """
    instruction = INSTRUCTIONS[name]
    count = len(instruction.a) + len(instruction.b)
    lane = int(thread) % LANES
    warp = words[(int(thread) - lane) * count :][: LANES * count].reshape(LANES, count)
    a, b = np.zeros((ROWS, instruction.depth)), np.zeros((instruction.depth, COLUMNS))
    for other in range(LANES):
        group, member = divmod(other, 4)
        values = _unpacked(name, warp[other])
        # The tables of the PTX ISA, "Matrix fragments for mma.m16n8k16" and "... m16n8k8".
        first, second = (values[: len(instruction.a)], values[len(instruction.a) :])
        for i, value in enumerate(first.reshape(-1)):
            if instruction.packed == 2:
                row = group if i % 4 < 2 else group + 8
                column = 2 * member + i % 2 + (8 if i >= 4 else 0)
            else:
                row = group if i % 2 == 0 else group + 8
                column = member + (4 if i >= 2 else 0)
            a[row, column] = value
        for i, value in enumerate(second.reshape(-1)):
            row = 2 * member + i % 2 + (8 if i >= 2 else 0) if instruction.packed == 2 else member + 4 * i
            b[row, group] = value
    group, member = divmod(lane, 4)
    rows, columns = (group, group, group + 8, group + 8), (2 * member, 2 * member + 1) * 2
    return tuple(np.float32(c + a[r] @ b[:, n]) for c, r, n in zip(sums, rows, columns, strict=True))


def _unpacked(name: str, words: np.ndarray) -> np.ndarray:
    """The elements of words, [words, elements of a word]."""
    words = np.ascontiguousarray(words)
    if name.startswith("mma_float16"):
        return words.view(np.float16).reshape(len(words), 2).astype(np.float64)
    if name == "mma_bfloat16":
        wide = words.view(np.uint16).astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).reshape(len(words), 2).astype(np.float64)
    return (words & np.uint32(0xFFFFE000)).view(np.float32).reshape(len(words), 1).astype(np.float64)


def compiled_functions() -> dict:
    """The functions as Numba's intrinsics."""
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    word, single = ir.IntType(32), ir.FloatType()

    def multiply(instruction: Instruction):
        counts = len(instruction.a), len(instruction.b), 4
        numbers = iter(range(4, 4 + sum(counts)))
        groups = [", ".join(f"${next(numbers)}" for _ in range(count)) for count in counts]
        text = f"mma.sync.aligned.{instruction.ptx} {{$0, $1, $2, $3}}, " + ", ".join(f"{{{g}}}" for g in groups) + ";"
        constraints = ",".join(["=f"] * 4 + ["r"] * (counts[0] + counts[1]) + ["f"] * 4)
        arguments = [word] * (counts[0] + counts[1]) + [single] * 4
        kind = ir.FunctionType(ir.LiteralStructType([single] * 4), arguments)

        @intrinsic
        def function(typing, a, b, sums):
            signature = types.UniTuple(types.float32, 4)(a, b, sums)

            def generate(context, builder, signature, given):
                values = [builder.extract_value(x, n) for x, count in zip(given, counts) for n in range(count)]
                # With side effects, so that it is not moved to where not all lanes come by.
                result = builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), values)
                members = [builder.extract_value(result, n) for n in range(4)]
                return context.make_tuple(builder, signature.return_type, members)

            return signature, generate

        return function

    @intrinsic
    def put_half(typing, words, index, bits):
        signature = types.void(words, index, bits)

        def generate(context, builder, signature, given):
            kind, at, value = signature.args
            data = context.make_array(kind)(context, builder, given[0]).data
            halves = builder.bitcast(data, ir.IntType(16).as_pointer())
            place = builder.gep(halves, [context.cast(builder, given[1], at, types.intp)])
            builder.store(context.cast(builder, given[2], value, types.uint16), place)
            return context.get_dummy_value()

        return signature, generate

    @intrinsic
    def to_tfloat32(typing, x):
        signature = types.uint32(x)

        def generate(context, builder, signature, given):
            kind = ir.FunctionType(word, [single])
            return builder.call(ir.InlineAsm(kind, "cvt.rna.tf32.f32 $0, $1;", "=r,f"), given)

        return signature, generate

    functions = {name: multiply(instruction) for name, instruction in INSTRUCTIONS.items()}
    return {**functions, "put_half": put_half, "to_tfloat32": to_tfloat32}
