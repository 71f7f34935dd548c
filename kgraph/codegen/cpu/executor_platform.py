"""LLVM IR of what the executor needs of the operating system and the processor: sleeping, clock, pause, float state."""

from __future__ import annotations

_LINUX = """
declare i64 @syscall(i64, ...) nounwind
define internal void @futex_wait(ptr %address, i32 %old) #1 {
  %r = call i64 (i64, ...) @syscall(i64 $SYS_futex, ptr %address, i64 128, i32 %old, ptr null, ptr null, i64 0)
  ret void
}
define internal void @futex_wake(ptr %address) #1 {
  %r = call i64 (i64, ...) @syscall(i64 $SYS_futex, ptr %address, i64 129, i64 2147483647, ptr null, ptr null, i64 0)
  ret void
}
"""

# Elsewhere a sleeper gives its time slice away and looks again.
_OTHER_SYSTEM = """
declare i32 @usleep(i32) nounwind
define internal void @futex_wait(ptr %address, i32 %old) #1 {
  %r = call i32 @usleep(i32 50)
  ret void
}
define internal void @futex_wake(ptr %address) #1 {
  ret void
}
"""

_CLOCK = """
declare i32 @clock_gettime(i32, ptr) nounwind
define internal i64 @now() #1 {
  %time = alloca { i64, i64 }
  %r = call i32 @clock_gettime(i32 $CLOCK_MONOTONIC, ptr %time)
  %seconds = load i64, ptr %time
  %ns.p = getelementptr i8, ptr %time, i64 8
  %ns = load i64, ptr %ns.p
  %scaled = mul i64 %seconds, 1000000000
  %sum = add i64 %scaled, %ns
  ret i64 %sum
}
"""

# Kernels run with the default state of the SSE unit (round to nearest, gradual underflow) whatever the caller's thread
# has set, so that results do not depend on who calls and which thread computes a part.
_X86 = """
declare void @llvm.x86.sse2.pause()
declare void @llvm.x86.sse.stmxcsr(ptr)
declare void @llvm.x86.sse.ldmxcsr(ptr)
define internal void @pause() #0 {
  call void @llvm.x86.sse2.pause()
  ret void
}
define internal i32 @enter_default_float_state() #0 {
  %state = alloca i32
  call void @llvm.x86.sse.stmxcsr(ptr %state)
  %old = load i32, ptr %state
  %control = and i32 %old, 65472
  %is_default = icmp eq i32 %control, 8064
  br i1 %is_default, label %done, label %set
set:
  store i32 8064, ptr %state
  call void @llvm.x86.sse.ldmxcsr(ptr %state)
  br label %done
done:
  ret i32 %old
}
define internal void @leave_float_state(i32 %old) #0 {
  %control = and i32 %old, 65472
  %is_default = icmp eq i32 %control, 8064
  br i1 %is_default, label %done, label %set
set:
  %state = alloca i32
  store i32 %old, ptr %state
  call void @llvm.x86.sse.ldmxcsr(ptr %state)
  br label %done
done:
  ret void
}
"""

_AARCH64 = """
declare void @llvm.aarch64.hint(i32)
define internal void @pause() #0 {
  call void @llvm.aarch64.hint(i32 1)
  ret void
}
"""

_OTHER_MACHINE = """
define internal void @pause() #0 {
  fence acq_rel
  ret void
}
"""

_NO_FLOAT_STATE = """
define internal i32 @enter_default_float_state() #0 {
  ret i32 0
}
define internal void @leave_float_state(i32 %old) #0 {
  ret void
}
"""


def platform_functions(triple: str) -> tuple[str, dict[str, int]]:
    """The IR for machines of an LLVM triple (`x86_64-unknown-linux-gnu`), and the numbers to be filled in.

    It defines futex_wait, futex_wake, now, pause, enter_default_float_state and leave_float_state.
    """
    machine = triple.partition("-")[0]
    x86 = machine in ("x86_64", "amd64")
    parts = [_LINUX if "linux" in triple else _OTHER_SYSTEM, _CLOCK]
    if x86:
        parts.append(_X86)
    else:
        parts += [_AARCH64 if machine in ("aarch64", "arm64") else _OTHER_MACHINE, _NO_FLOAT_STATE]
    apple = "darwin" in triple or "apple" in triple
    return "".join(parts), {"SYS_futex": 202 if x86 else 98, "CLOCK_MONOTONIC": 6 if apple else 1}
