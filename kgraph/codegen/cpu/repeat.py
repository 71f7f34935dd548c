"""The native loop around a program: runs it again and again on memory that moves on, without Python in between.

It is compiled like a kernel, and takes the one table that `kgraph.runtime.control.NativeRuns` describes.
"""

from __future__ import annotations

from kgraph.codegen.kernel import KernelSpec
from kgraph.codegen.target import Target
from kgraph.runtime.control import COPY_WORDS, PAIR_WORDS, TABLE

SPEC = KernelSpec("repeat", "repeat:render", (TABLE, COPY_WORDS, PAIR_WORDS))


def _each(name: str, count: str, following: str, body: str) -> str:
    """A loop over `%{name}` from 0 to `count`, then on to the block `following`; body ends by falling out."""
    return f"""
{name}.start:
  br label %{name}.test
{name}.test:
  %{name} = phi i64 [0, %{name}.start], [%{name}.next, %{name}.body]
  %{name}.more = icmp ult i64 %{name}, {count}
  br i1 %{name}.more, label %{name}.body, label %{following}
{name}.body:{body}
  %{name}.next = add i64 %{name}, 1
  br label %{name}.test
"""


def _row(name: str, base: str, words: int) -> str:
    """`%{name}.w0`, `%{name}.w1` ...: the addresses of the words of row `%{name}`."""
    lines = [f"  %{name}.first = mul i64 %{name}, {words}"]
    for word in range(words):
        lines += [
            f"  %{name}.i{word} = add i64 %{name}.first, {word}",
            f"  %{name}.w{word} = getelementptr i64, ptr {base}, i64 %{name}.i{word}",
        ]
    return "\n" + "\n".join(lines)


def _cell(name: str, slot: str) -> str:
    return f"\n  %{name} = getelementptr i64, ptr %cells, i64 {slot}"


def render(params: tuple, target: Target) -> str:
    """LLVM IR of the loop (a renderer, as kernels have)."""
    table, copy_words, pair_words = params
    pointers = {"run", "context", "cells", "sources", "new", "toggle_rows", "move_rows", "copy_rows"}
    loads = []
    for index, field in enumerate(table):
        loads.append(f"  %{field}.p = getelementptr i64, ptr %table, i64 {index}")
        if field != "going":
            loads.append(f"  %{field} = load {'ptr' if field in pointers else 'i64'}, ptr %{field}.p")
    copies = _row("copy", "%copy_rows", copy_words)
    copies += "\n  %copy.slot = load i64, ptr %copy.w1" + _cell("copy.cell", "%copy.slot")
    copies += """
  %copy.to = load ptr, ptr %copy.w0
  %copy.from = load ptr, ptr %copy.cell
  %copy.bytes = load i64, ptr %copy.w2
  call void @llvm.memmove.p0.p0.i64(ptr %copy.to, ptr %copy.from, i64 %copy.bytes, i1 false)
  %copy.step = load i64, ptr %copy.w3
  %copy.on = getelementptr i8, ptr %copy.to, i64 %copy.step
  store ptr %copy.on, ptr %copy.w0"""
    fetch = _row("fetch", "%sources", 1) + "\n  %fetch.slot = load i64, ptr %fetch.w0"
    fetch += _cell("fetch.cell", "%fetch.slot")
    fetch += """
  %fetch.value = load i64, ptr %fetch.cell
  %fetch.to = getelementptr i64, ptr %new, i64 %fetch
  store i64 %fetch.value, ptr %fetch.to"""
    settle = """
  %settle.from = getelementptr i64, ptr %new, i64 %settle
  %settle.value = load i64, ptr %settle.from
  %settle.slot = add i64 %settle, %first"""
    settle += _cell("settle.cell", "%settle.slot") + "\n  store i64 %settle.value, ptr %settle.cell"

    def shift(name: str, rows: str, operation: str) -> str:
        text = _row(name, rows, pair_words) + f"\n  %{name}.slot = load i64, ptr %{name}.w0"
        text += _cell(f"{name}.cell", f"%{name}.slot")
        return f"""{text}
  %{name}.by = load i64, ptr %{name}.w1
  %{name}.old = load i64, ptr %{name}.cell
  %{name}.value = {operation} i64 %{name}.old, %{name}.by
  store i64 %{name}.value, ptr %{name}.cell"""

    loads_text = "\n".join(loads)
    return f"""
declare void @llvm.memmove.p0.p0.i64(ptr, ptr, i64, i1)

define void @kernel(ptr %table) {{
entry:
{loads_text}
  %conditional = icmp sge i64 %flag, 0
  br label %iteration
iteration:
  %number = phi i64 [0, %entry], [%number.next, %advanced]
  call void %run(ptr %context)
  br label %copy.start
{_each("copy", "%copies", "test", copies)}
test:
  br i1 %conditional, label %look, label %decided
look:{_cell("flag.cell", "%flag")}
  %flag.at = load ptr, ptr %flag.cell
  %flag.byte = load i8, ptr %flag.at
  %flag.on = icmp ne i8 %flag.byte, 0
  br label %decided
decided:
  %go_on = phi i1 [true, %test], [%flag.on, %look]
  br label %fetch.start
{_each("fetch", "%carries", "settle.start", fetch)}
{_each("settle", "%carries", "toggle.start", settle)}
{_each("toggle", "%toggles", "move.start", shift("toggle", "%toggle_rows", "xor"))}
{_each("move", "%moves", "advanced", shift("move", "%move_rows", "add"))}
advanced:
  %number.next = add i64 %number, 1
  %left = icmp ult i64 %number.next, %count
  %again = and i1 %left, %go_on
  br i1 %again, label %iteration, label %done
done:
  %going.value = zext i1 %go_on to i64
  store i64 %going.value, ptr %going.p
  ret void
}}
"""
