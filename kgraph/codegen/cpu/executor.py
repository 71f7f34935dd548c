"""The native executor: LLVM IR of the code that runs a table of steps on one or several threads.

It is generated once per machine and cached like a kernel. `run` is the one call from Python per model call; `worker` is
the loop of the pool's threads; the tables that they read are described in `kgraph.runtime.layout`.

A call with several threads is one fork and one join. In between all threads walk over the same steps. A step with
`threads == 1` is run by thread 0. Another is cut into chunks, and every thread owns the same number of them; it runs
its own, and before it would wait for others, what they have not begun. So a thread that wakes late or loses its core
delays the call by one chunk at most, and usually by nothing, while caches stay warm as under a fixed partition. Where
the plan says so, and at the end, the steps before form a group that must be done before a thread goes on.

Claims and completions are counted by words that only grow, against goals that grow with the number of times that these
steps were run: nothing is reset between calls. Waiting is spinning for a bounded time, then sleeping in the kernel
(futex). A second caller that finds the pool busy runs all steps alone.
"""

from __future__ import annotations

import string

from kgraph.codegen.compiler import compile_spec
from kgraph.codegen.cpu.executor_platform import platform_functions
from kgraph.codegen.cpu.executor_steps import GLANCES, STEPS, WAITING
from kgraph.codegen.kernel import KernelSpec
from kgraph.codegen.target import Target
from kgraph.runtime import layout

_CALLS = """
; Write the addresses of the call's inputs and outputs into the operand slots that hold them.
define internal void @patch(ptr %context) #1 {
entry:
  %count.p = getelementptr i8, ptr %context, i64 $CONTEXT_NUM_PATCHES
  %count = load i64, ptr %count.p
  %bytes = mul i64 %count, $PATCH_BYTES
  %patches.p = getelementptr i8, ptr %context, i64 $CONTEXT_PATCHES
  %patches = load ptr, ptr %patches.p
  %end = getelementptr i8, ptr %patches, i64 %bytes
  %operands.p = getelementptr i8, ptr %context, i64 $CONTEXT_OPERANDS
  %operands = load ptr, ptr %operands.p
  %externals.p = getelementptr i8, ptr %context, i64 $CONTEXT_EXTERNALS
  %externals = load ptr, ptr %externals.p
  %indirect.p = getelementptr i8, ptr %context, i64 $CONTEXT_EXTERNAL_OFFSET
  %indirect = load i64, ptr %indirect.p
  %direct = icmp slt i64 %indirect, 0
  br label %test
test:
  %patch = phi ptr [%patches, %entry], [%patch.next, %write]
  %more = icmp ult ptr %patch, %end
  br i1 %more, label %fetch, label %done
fetch:
  %external.p = getelementptr i8, ptr %patch, i64 $PATCH_EXTERNAL
  %external = load i64, ptr %external.p
  %word.p = getelementptr i8, ptr %externals, i64 %external
  %word = load ptr, ptr %word.p
  br i1 %direct, label %write, label %follow
follow:
  %data.p = getelementptr i8, ptr %word, i64 %indirect
  %followed = load ptr, ptr %data.p
  br label %write
write:
  %data = phi ptr [%word, %fetch], [%followed, %follow]
  %offset.p = getelementptr i8, ptr %patch, i64 $PATCH_OFFSET
  %offset = load i64, ptr %offset.p
  %value = getelementptr i8, ptr %data, i64 %offset
  %slot = load i64, ptr %patch
  %slot.p = getelementptr i8, ptr %operands, i64 %slot
  store ptr %value, ptr %slot.p
  %patch.next = getelementptr i8, ptr %patch, i64 $PATCH_BYTES
  br label %test
done:
  ret void
}

; Open a job for the workers, take part as thread 0, close it and wait for those inside.
define internal void @fork_join(ptr %context, ptr %pool, i64 %threads, i64 %first, i64 %last) #1 {
entry:
  %jc = getelementptr i8, ptr %pool, i64 $POOL_JOB_CONTEXT
  store ptr %context, ptr %jc
  %jf = getelementptr i8, ptr %pool, i64 $POOL_JOB_FIRST
  store i64 %first, ptr %jf
  %jl = getelementptr i8, ptr %pool, i64 $POOL_JOB_LAST
  store i64 %last, ptr %jl
  %jt = getelementptr i8, ptr %pool, i64 $POOL_JOB_THREADS
  store i64 %threads, ptr %jt
  %state = getelementptr i8, ptr %pool, i64 $POOL_STATE
  store atomic i32 $JOB_OPEN, ptr %state release, align 4
  %workers = sub i64 %threads, 1
  br label %wake
wake:
  %w = phi i64 [0, %entry], [%w.next, %wake]
  %box.0 = mul i64 %w, $MAILBOX_BYTES
  %box.1 = add i64 %box.0, $POOL_MAILBOXES
  %ticket = getelementptr i8, ptr %pool, i64 %box.1
  %sleeping = getelementptr i8, ptr %ticket, i64 $MAILBOX_SLEEPING
  %old = atomicrmw add ptr %ticket, i32 1 seq_cst
  call void @wake_sleepers(ptr %ticket, ptr %sleeping)
  %w.next = add i64 %w, 1
  %more = icmp ult i64 %w.next, %workers
  br i1 %more, label %wake, label %own
own:
  call void @walk(ptr %context, ptr %pool, i64 0, i64 %first, i64 %last)
  ; All is done, so whoever has not come in by now need not, and those inside leave at once.
  %before = atomicrmw and ptr %state, i32 $JOB_COUNT_MASK seq_cst
  %spin.p = getelementptr i8, ptr %pool, i64 $POOL_SPIN_BARRIER
  %spin = load i64, ptr %spin.p
  %join.sleeping = getelementptr i8, ptr %pool, i64 $POOL_JOIN_SLEEPING
  br label %join
join:
  %inside = load atomic i32, ptr %state acquire, align 4
  %empty = icmp eq i32 %inside, 0
  br i1 %empty, label %done, label %wait
wait:
  call void @wait_while_equal(ptr %state, i32 %inside, i64 %spin, ptr %join.sleeping)
  br label %join
done:
  %epoch.pp = getelementptr i8, ptr %context, i64 $CONTEXT_EPOCH
  %epoch.p = load ptr, ptr %epoch.pp
  %epoch = load i64, ptr %epoch.p
  %epoch.next = add i64 %epoch, 1
  store i64 %epoch.next, ptr %epoch.p
  ret void
}

; Entry: run the steps that %context asks for.
define void @run(ptr %context) #1 {
entry:
  %first.p = getelementptr i8, ptr %context, i64 $CONTEXT_FIRST
  %first = load i64, ptr %first.p
  %last.p = getelementptr i8, ptr %context, i64 $CONTEXT_LAST
  %last = load i64, ptr %last.p
  %float_state = call i32 @enter_default_float_state()
  call void @patch(ptr %context)
  %threads.p = getelementptr i8, ptr %context, i64 $CONTEXT_THREADS
  %threads = load i64, ptr %threads.p
  %parallel = icmp ugt i64 %threads, 1
  br i1 %parallel, label %acquire, label %alone
acquire:
  %pool.p = getelementptr i8, ptr %context, i64 $CONTEXT_POOL
  %pool = load ptr, ptr %pool.p
  %busy = getelementptr i8, ptr %pool, i64 $POOL_BUSY
  %old = atomicrmw xchg ptr %busy, i32 1 acquire
  %free = icmp eq i32 %old, 0
  br i1 %free, label %together, label %alone
together:
  call void @fork_join(ptr %context, ptr %pool, i64 %threads, i64 %first, i64 %last)
  store atomic i32 0, ptr %busy release, align 4
  br label %done
alone:
  call void @walk_alone(ptr %context, i64 %first, i64 %last)
  br label %done
done:
  %index.0 = mul i64 %last, 2
  %index = sub i64 %index.0, 1
  call void @stamp(ptr %context, i64 %index)
  call void @leave_float_state(i32 %float_state)
  ret void
}

; Enter the job if one is open: gives whether it was.
define internal i1 @enter(ptr %state) #0 {
entry:
  %start = load atomic i32, ptr %state monotonic, align 4
  br label %test
test:
  %count = phi i32 [%start, %entry], [%seen, %try]
  %open.bit = and i32 %count, $JOB_OPEN
  %open = icmp ne i32 %open.bit, 0
  br i1 %open, label %try, label %done
try:
  %next = add i32 %count, 1
  %pair = cmpxchg ptr %state, i32 %count, i32 %next acquire monotonic
  %seen = extractvalue { i32, i1 } %pair, 0
  %won = extractvalue { i32, i1 } %pair, 1
  br i1 %won, label %done, label %test
done:
  %entered = phi i1 [false, %test], [true, %try]
  ret i1 %entered
}

; Entry: the life of the pool's thread %thread (1, 2 ...). Never returns.
define void @worker(ptr %pool, i64 %thread) #1 {
entry:
  %float_state = call i32 @enter_default_float_state()
  %w = sub i64 %thread, 1
  %box.0 = mul i64 %w, $MAILBOX_BYTES
  %box.1 = add i64 %box.0, $POOL_MAILBOXES
  %ticket = getelementptr i8, ptr %pool, i64 %box.1
  %sleeping = getelementptr i8, ptr %ticket, i64 $MAILBOX_SLEEPING
  %spin.p = getelementptr i8, ptr %pool, i64 $POOL_SPIN_PARK
  %jc = getelementptr i8, ptr %pool, i64 $POOL_JOB_CONTEXT
  %jf = getelementptr i8, ptr %pool, i64 $POOL_JOB_FIRST
  %jl = getelementptr i8, ptr %pool, i64 $POOL_JOB_LAST
  %jt = getelementptr i8, ptr %pool, i64 $POOL_JOB_THREADS
  %state = getelementptr i8, ptr %pool, i64 $POOL_STATE
  %join.sleeping = getelementptr i8, ptr %pool, i64 $POOL_JOIN_SLEEPING
  br label %idle
idle:
  ; A worker that starts late finds its first ticket already changed.
  %seen = phi i32 [0, %entry], [%now, %woken], [%now, %leave], [%now, %signal]
  %spin = load i64, ptr %spin.p
  call void @wait_while_equal(ptr %ticket, i32 %seen, i64 %spin, ptr %sleeping)
  br label %woken
woken:
  %now = load atomic i32, ptr %ticket acquire, align 4
  %entered = call i1 @enter(ptr %state)
  br i1 %entered, label %inside, label %idle
inside:
  ; It may be a later job than the one of the ticket, with fewer threads.
  %threads = load i64, ptr %jt
  %wanted = icmp ult i64 %thread, %threads
  br i1 %wanted, label %work, label %leave
work:
  %context = load ptr, ptr %jc
  %first = load i64, ptr %jf
  %last = load i64, ptr %jl
  call void @walk(ptr %context, ptr %pool, i64 %thread, i64 %first, i64 %last)
  br label %leave
leave:
  %before = atomicrmw sub ptr %state, i32 1 seq_cst
  %is_last = icmp eq i32 %before, 1
  br i1 %is_last, label %signal, label %idle
signal:
  call void @wake_sleepers(ptr %state, ptr %join.sleeping)
  br label %idle
}

; Entry: %count pauses, to measure how long one takes.
define void @pauses(i64 %count) #1 {
entry:
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
  call void @pause()
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, %count
  br i1 %more, label %loop, label %done
done:
  ret void
}

; Entry: the layout of the tables that this code reads.
define i64 @layout_version() #1 {
entry:
  ret i64 $LAYOUT_VERSION
}

attributes #0 = { nounwind alwaysinline }
attributes #1 = { nounwind }
!1 = !{!"branch_weights", i32 1000, i32 1}
!2 = !{!"branch_weights", i32 1000, i32 1}
"""


def render(params: tuple, target: Target) -> str:
    """LLVM IR of the executor for the target's operating system and processor family (a renderer, as kernels have)."""
    functions, numbers = platform_functions(target.triple)
    names = {name: value for name, value in vars(layout).items() if name.isupper()}
    names |= numbers | {"GLANCES": GLANCES, "LAYOUT_VERSION": layout.version()}
    return string.Template(functions + WAITING + STEPS + _CALLS).substitute(names)


EXECUTOR = KernelSpec("executor", "executor:render", ())


def executor_object(target: Target | None = None) -> bytes:
    """The executor's object code for this machine or `target`, from the disk cache where it is there."""
    return compile_spec(EXECUTOR, target)
