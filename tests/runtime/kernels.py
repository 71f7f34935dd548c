"""Small kernels written by hand in LLVM IR, for tests of the runtime that need no kernel family."""

from __future__ import annotations

import functools

from kgraph.codegen.cpu.compiler import compile_ir
from kgraph.codegen.cpu.executor import executor_object
from kgraph.ir import Dim
from kgraph.runtime.plan import Buffer, NativeStep, Program

HEADER = "define void @kernel(ptr %buffers, ptr %sizes, i64 %begin, i64 %end, ptr %scratch) {"

# y[i] = x[i] + 1
ADD_ONE = (
    HEADER
    + """
entry:
  %x = load ptr, ptr %buffers
  %y.p = getelementptr ptr, ptr %buffers, i64 1
  %y = load ptr, ptr %y.p
  br label %loop
loop:
  %i = phi i64 [%begin, %entry], [%next, %loop]
  %x.i = getelementptr float, ptr %x, i64 %i
  %a = load float, ptr %x.i
  %b = fadd float %a, 1.0
  %y.i = getelementptr float, ptr %y, i64 %i
  store float %b, ptr %y.i
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, %end
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""
)

# z[i] = x[i] * y[i] + sizes[0]
MULTIPLY_ADD = (
    HEADER
    + """
entry:
  %x = load ptr, ptr %buffers
  %y.p = getelementptr ptr, ptr %buffers, i64 1
  %y = load ptr, ptr %y.p
  %z.p = getelementptr ptr, ptr %buffers, i64 2
  %z = load ptr, ptr %z.p
  %size = load i64, ptr %sizes
  %shift = sitofp i64 %size to float
  br label %loop
loop:
  %i = phi i64 [%begin, %entry], [%next, %loop]
  %x.i = getelementptr float, ptr %x, i64 %i
  %a = load float, ptr %x.i
  %y.i = getelementptr float, ptr %y, i64 %i
  %b = load float, ptr %y.i
  %c = fmul float %a, %b
  %d = fadd float %c, %shift
  %z.i = getelementptr float, ptr %z, i64 %i
  store float %d, ptr %z.i
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, %end
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""
)

# y[i] = sum over x[0 .. sizes[0]), read whole by every i: a step that needs all of the step before.
TOTAL = (
    HEADER
    + """
entry:
  %x = load ptr, ptr %buffers
  %y.p = getelementptr ptr, ptr %buffers, i64 1
  %y = load ptr, ptr %y.p
  %count = load i64, ptr %sizes
  br label %outer
outer:
  %i = phi i64 [%begin, %entry], [%i.next, %store]
  br label %inner
inner:
  %j = phi i64 [0, %outer], [%j.next, %inner]
  %sum = phi float [0.0, %outer], [%sum.next, %inner]
  %x.j = getelementptr float, ptr %x, i64 %j
  %a = load float, ptr %x.j
  %sum.next = fadd float %sum, %a
  %j.next = add i64 %j, 1
  %more = icmp ult i64 %j.next, %count
  br i1 %more, label %inner, label %store
store:
  %y.i = getelementptr float, ptr %y, i64 %i
  store float %sum.next, ptr %y.i
  %i.next = add i64 %i, 1
  %more.i = icmp ult i64 %i.next, %end
  br i1 %more.i, label %outer, label %done
done:
  ret void
}
"""
)

# Copies bytes [begin, end) by way of scratch memory, with calls of memcpy.
COPY_BYTES = (
    "declare ptr @memcpy(ptr, ptr, i64)\n"
    + HEADER
    + """
entry:
  %x = load ptr, ptr %buffers
  %y.p = getelementptr ptr, ptr %buffers, i64 1
  %y = load ptr, ptr %y.p
  %n = sub i64 %end, %begin
  %from = getelementptr i8, ptr %x, i64 %begin
  %to = getelementptr i8, ptr %y, i64 %begin
  %r0 = call ptr @memcpy(ptr %scratch, ptr %from, i64 %n)
  %r1 = call ptr @memcpy(ptr %to, ptr %scratch, i64 %n)
  ret void
}
"""
)

# y[i] = table[i % 5]: read-only data next to the code.
TABLE = (
    "@table = internal constant [5 x float] [float 1.5, float -2.0, float 3.25, float 4.0, float 7.0]\n"
    + HEADER
    + """
entry:
  %y = load ptr, ptr %buffers
  br label %loop
loop:
  %i = phi i64 [%begin, %entry], [%next, %loop]
  %k = urem i64 %i, 5
  %t = getelementptr float, ptr @table, i64 %k
  %a = load float, ptr %t
  %y.i = getelementptr float, ptr %y, i64 %i
  store float %a, ptr %y.i
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, %end
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""
)

SOURCES = {"add_one": ADD_ONE, "multiply_add": MULTIPLY_ADD, "total": TOTAL, "copy": COPY_BYTES, "table": TABLE}
N = Dim.symbol("N")
# Enough for the plan to give every step several threads.
HEAVY = 100_000_000


@functools.cache
def kernel(name: str) -> bytes:
    return compile_ir(SOURCES[name], name=name)


def program(buffers, steps, inputs, outputs, params=(), name="test", **kwargs) -> Program:
    keys = {step.kernel for step in steps if isinstance(step, NativeStep)}
    return Program(
        name,
        buffers,
        steps,
        inputs,
        outputs,
        params,
        kernels={key: kernel(key) for key in keys},
        executor=executor_object(),
        **kwargs,
    )


def chain(length: int, flops=0, shape=(N,), inplace: bool = True) -> Program:
    """y = x + length, in `length` steps."""
    buffers = [Buffer("input", shape, "float32", name="x")]
    buffers += [Buffer("temporary", shape, "float32") for _ in range(length)]
    extent = 1
    for size in shape:
        extent = size * extent
    steps = [
        NativeStep(
            "add_one", (i, i + 1), 1, extent, flops=flops, inplace=((1, 0),) if inplace else (), label=f"add_{i}"
        )
        for i in range(length)
    ]
    return program(buffers, steps, (0,), (length,), name="chain")


def totals(length: int, flops=HEAVY) -> Program:
    """Alternates y = x + 1 and y[:] = sum(x), so that every second step reads all that the one before wrote."""
    buffers = [Buffer("input", (N,), "float32", name="x")]
    steps = []
    for i in range(length):
        buffers.append(Buffer("temporary", (N,), "float32"))
        if i % 2:
            steps.append(NativeStep("total", (i, i + 1), 1, N, sizes=(N,), flops=flops, label="total"))
        else:
            steps.append(NativeStep("add_one", (i, i + 1), 1, N, flops=flops, label="add_one"))
    return program(buffers, steps, (0,), (length,), name="totals")
