"""Operands of many sizes share one kernel where its code need not know the size: compile time follows the kernels."""

from __future__ import annotations

import gc

import pytest

from kgraph import ops  # noqa: F401  (registers the primitives)
from kgraph.codegen import expressions, families
from kgraph.codegen.cpu.compiler import compile_ir
from kgraph.codegen.cpu.microkernel import register_tile
from kgraph.codegen.target import host_target
from kgraph.garbage import earlier_objects_set_aside
from kgraph.ir import PRIMITIVES, Dim, TensorType, Value, make_node


def specs(primitive: str, *shapes: tuple, **attrs) -> list[tuple]:
    """What identifies the kernels of a node over float32 operands of these shapes."""
    node = make_node(PRIMITIVES[primitive], [Value(TensorType(shape, "float32")) for shape in shapes], attrs)
    return [(call.spec.template, call.spec.params) for call in families.lower(node, host_target())]


@pytest.mark.parametrize(
    ("primitive", "one", "other", "attrs"),
    [
        ("reduce_sum", (100000, 256), (400000, 128), {"axes": (0,), "keepdims": False}),
        ("transpose", (320, 960), (96, 320), {"permutation": (1, 0)}),
        ("rev", (5, 576), (3, 960), {"axes": (0,)}),
    ],
)
def test_sizes_are_no_part_of_the_code(primitive, one, other, attrs):
    assert specs(primitive, one, **attrs) == specs(primitive, other, **attrs)


def test_pieces_of_rows_are_concatenated_by_one_kernel():
    one, other = (specs("concatenate", (9, k), (9, 32), axis=1) for k in (128, 160))
    assert one == other
    assert one != specs("concatenate", (9, 128), (9, 24), axis=1)


def test_products_of_symbolic_rows_share_a_kernel_if_their_tiles_are_of_one_size():
    """Blocks of 4 and of 7 tiles."""
    attrs = {"lhs_contract": (1,), "rhs_contract": (0,), "lhs_batch": (), "rhs_batch": ()}
    rows = Dim.symbol("N")
    tile, _ = register_tile(host_target())
    one, other = (specs("dot_general", (n * tile * rows, 192), (192, 64), **attrs)[-1] for n in (4, 7))
    assert one[0].endswith("gemm_kernel:render")
    assert one == other


def test_operands_of_products_are_packed_by_one_kernel():
    attrs = {"lhs_contract": (1,), "rhs_contract": (0,), "lhs_batch": (), "rhs_batch": ()}
    packs = [specs("dot_general", (64, k), (k, n), **attrs)[0] for k, n in ((100, 64), (300, 256))]
    assert packs[0][0].endswith("render_pack")
    assert packs[0] == packs[1]


@pytest.mark.parametrize(("name", "shared"), [("add", True), ("mul", True), ("sub", False), ("maximum", False)])
def test_the_order_of_operands_is_no_part_of_a_kernel_where_it_does_not_matter(name, shared):
    a, b = Value(TensorType((5,), "float32")), Value(TensorType((5,), "float32"))
    first, second = (make_node(PRIMITIVES[name], inputs, {}) for inputs in ([a, b], [b, a]))
    one, other = (expressions.encode_nodes([node], [a, b], node.outputs) for node in (first, second))
    assert (one == other) == shared


VECTOR_KERNEL = """
define void @kernel(ptr %buffers, ptr %sizes, i64 %begin, i64 %end, ptr %scratch) {
  %at = load ptr, ptr %buffers
  %value = load <4 x float>, ptr %at, align 4
  %sum = fadd <4 x float> %value, %value
  store <4 x float> %sum, ptr %at, align 4
  ret void
}
"""


def test_kernels_of_one_and_of_several_functions_compile():
    helper = "define internal void @helper() noinline {\n  ret void\n}\n"
    assert compile_ir(VECTOR_KERNEL)
    assert compile_ir(helper + VECTOR_KERNEL.replace("  ret void", "  call void @helper()\n  ret void"))


def test_the_collector_sees_earlier_objects_again():
    before = gc.get_freeze_count()
    with earlier_objects_set_aside():
        assert gc.get_freeze_count() > before
        with earlier_objects_set_aside():
            pass
        assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == before
