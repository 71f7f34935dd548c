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

import platform
import string
import sys

from kgraph.runtime import layout

# Looks at a completion counter, with a pause in between, before a thread offers help: some 200 ns.
_GLANCES = 12

_BODY = """
; -- waiting ---------------------------------------------------------------------------------------------------------
$platform_functions

; Spin up to %pauses times while the word at %address is %old. Gives 1 if it still is.
define internal i1 @spin_while_equal(ptr %address, i32 %old, i64 %pauses) #0 {
entry:
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %again]
  %now = load atomic i32, ptr %address acquire, align 4
  %same = icmp eq i32 %now, %old
  br i1 %same, label %wait, label %changed
wait:
  %more = icmp ult i64 %i, %pauses
  br i1 %more, label %again, label %expired
again:
  call void @pause()
  %next = add i64 %i, 1
  br label %loop
expired:
  ret i1 true
changed:
  ret i1 false
}

; Return once the word at %address differs from %old. The sleeper count is raised before the kernel compares the word,
; and whoever changes the word reads the count after: one of the two sees the other, so that no wake-up is lost.
define internal void @wait_while_equal(ptr %address, i32 %old, i64 %pauses, ptr %sleeping) #1 {
entry:
  %still = call i1 @spin_while_equal(ptr %address, i32 %old, i64 %pauses)
  br i1 %still, label %sleep, label %done
sleep:
  %s0 = atomicrmw add ptr %sleeping, i32 1 seq_cst
  br label %check
check:
  %now = load atomic i32, ptr %address seq_cst, align 4
  %same = icmp eq i32 %now, %old
  br i1 %same, label %block, label %awake
block:
  call void @futex_wait(ptr %address, i32 %old)
  br label %check
awake:
  %s1 = atomicrmw sub ptr %sleeping, i32 1 seq_cst
  br label %done
done:
  ret void
}

define internal void @wake_sleepers(ptr %address, ptr %sleeping) #0 {
entry:
  %count = load atomic i32, ptr %sleeping seq_cst, align 4
  %none = icmp eq i32 %count, 0
  br i1 %none, label %done, label %wake, !prof !1
wake:
  call void @futex_wake(ptr %address)
  br label %done
done:
  ret void
}

; -- steps -----------------------------------------------------------------------------------------------------------
define internal void @stamp(ptr %context, i64 %index) #1 {
entry:
  %profile.p = getelementptr i8, ptr %context, i64 $CONTEXT_PROFILE
  %profile = load ptr, ptr %profile.p
  %off = icmp eq ptr %profile, null
  br i1 %off, label %done, label %write, !prof !2
write:
  %now = call i64 @now()
  %at = getelementptr i64, ptr %profile, i64 %index
  store i64 %now, ptr %at
  br label %done
done:
  ret void
}

define internal void @launch(ptr %context, ptr %step, i64 %from, i64 %to, ptr %scratch) #0 {
entry:
  %operands.p = getelementptr i8, ptr %context, i64 $CONTEXT_OPERANDS
  %operands = load ptr, ptr %operands.p
  %function = load ptr, ptr %step
  %slot.p = getelementptr i8, ptr %step, i64 $STEP_OPERANDS
  %slot = load i64, ptr %slot.p
  %buffers = getelementptr i8, ptr %operands, i64 %slot
  %sizes.p = getelementptr i8, ptr %step, i64 $STEP_SIZES
  %sizes = load ptr, ptr %sizes.p
  call void %function(ptr %buffers, ptr %sizes, i64 %from, i64 %to, ptr %scratch)
  ret void
}

; All steps [%first, %last) on the calling thread.
define internal void @walk_alone(ptr %context, i64 %first, i64 %last) #1 {
entry:
  %steps.p = getelementptr i8, ptr %context, i64 $CONTEXT_STEPS
  %steps = load ptr, ptr %steps.p
  %scratch.p = getelementptr i8, ptr %context, i64 $CONTEXT_SCRATCH
  %scratch = load ptr, ptr %scratch.p
  br label %test
test:
  %i = phi i64 [%first, %entry], [%next, %loop]
  %more = icmp ult i64 %i, %last
  br i1 %more, label %loop, label %done
loop:
  %index = mul i64 %i, 2
  call void @stamp(ptr %context, i64 %index)
  %offset = mul i64 %i, $STEP_BYTES
  %step = getelementptr i8, ptr %steps, i64 %offset
  %extent.p = getelementptr i8, ptr %step, i64 $STEP_EXTENT
  %extent = load i64, ptr %extent.p
  call void @launch(ptr %context, ptr %step, i64 0, i64 %extent, ptr %scratch)
  %next = add i64 %i, 1
  br label %test
done:
  ret void
}

; Claim a chunk by raising the counter at %claims, if it is below %limit. Gives the old count, or %limit.
define internal i64 @claim(ptr %claims, i64 %limit) #0 {
entry:
  %start = load atomic i64, ptr %claims monotonic, align 8
  br label %test
test:
  %count = phi i64 [%start, %entry], [%seen, %try]
  %exhausted = icmp eq i64 %count, %limit
  br i1 %exhausted, label %done, label %try
try:
  %next = add i64 %count, 1
  %pair = cmpxchg ptr %claims, i64 %count, i64 %next monotonic monotonic
  %seen = extractvalue { i64, i1 } %pair, 0
  %won = extractvalue { i64, i1 } %pair, 1
  br i1 %won, label %done, label %test
done:
  ret i64 %count
}

; Claim and run the chunks of %step that thread %owner owns and nobody has begun. Gives how many.
define internal i32 @drain(ptr %context, ptr %step, i64 %owner, ptr %scratch) #1 {
entry:
  %threads.p = getelementptr i8, ptr %step, i64 $STEP_THREADS
  %threads = load i64, ptr %threads.p
  %owns = icmp ult i64 %owner, %threads
  br i1 %owns, label %prepare, label %nothing
nothing:
  ret i32 0
prepare:
  %all_claims.p = getelementptr i8, ptr %context, i64 $CONTEXT_CLAIMS
  %all_claims = load ptr, ptr %all_claims.p
  %step_claims.p = getelementptr i8, ptr %step, i64 $STEP_CLAIMS
  %step_claims.offset = load i64, ptr %step_claims.p
  %step_claims = getelementptr i8, ptr %all_claims, i64 %step_claims.offset
  %line = mul i64 %owner, $LINE
  %claims = getelementptr i8, ptr %step_claims, i64 %line
  %per_thread.p = getelementptr i8, ptr %step, i64 $STEP_CHUNKS
  %per_thread = load i64, ptr %per_thread.p
  %epoch.pp = getelementptr i8, ptr %context, i64 $CONTEXT_EPOCH
  %epoch.p = load ptr, ptr %epoch.pp
  %epoch = load i64, ptr %epoch.p
  %base = mul i64 %epoch, %per_thread
  %limit = add i64 %base, %per_thread
  br label %again
again:
  %run = phi i32 [0, %prepare], [%run.next, %chunk]
  %count = call i64 @claim(ptr %claims, i64 %limit)
  %none = icmp eq i64 %count, %limit
  br i1 %none, label %done, label %chunk
chunk:
  %chunks = mul i64 %per_thread, %threads
  %extent.p = getelementptr i8, ptr %step, i64 $STEP_EXTENT
  %extent = load i64, ptr %extent.p
  %grain.p = getelementptr i8, ptr %step, i64 $STEP_GRAIN
  %grain = load i64, ptr %grain.p
  %grains = udiv i64 %extent, %grain
  %own = sub i64 %count, %base
  %first = mul i64 %owner, %per_thread
  %number = add i64 %first, %own
  %e0 = mul i64 %grains, %number
  %b = udiv i64 %e0, %chunks
  %from = mul i64 %b, %grain
  %e1 = add i64 %e0, %grains
  %e = udiv i64 %e1, %chunks
  %to.0 = mul i64 %e, %grain
  %number.next = add i64 %number, 1
  %is_last = icmp eq i64 %number.next, %chunks
  %to = select i1 %is_last, i64 %extent, i64 %to.0
  call void @launch(ptr %context, ptr %step, i64 %from, i64 %to, ptr %scratch)
  %run.next = add i32 %run, 1
  br label %again
done:
  ret i32 %run
}

; Run what other threads own and have not begun of the steps from record %from up to %to. Gives the number of chunks.
define internal i32 @help(ptr %context, ptr %from, ptr %to, i64 %thread, ptr %scratch) #1 {
entry:
  br label %test
test:
  %step = phi ptr [%from, %entry], [%step.next, %next]
  %run = phi i32 [0, %entry], [%run.step, %next]
  %more = icmp ult ptr %step, %to
  br i1 %more, label %look, label %done
look:
  %threads.p = getelementptr i8, ptr %step, i64 $STEP_THREADS
  %threads = load i64, ptr %threads.p
  %single = icmp eq i64 %threads, 1
  %apart = icmp uge i64 %thread, %threads
  %not_mine = or i1 %single, %apart
  br i1 %not_mine, label %next, label %hop
hop:
  ; The neighbour first, so that helpers spread.
  %hops = phi i64 [1, %look], [%hops.next, %hop]
  %run.hop = phi i32 [%run, %look], [%run.more, %hop]
  %sum = add i64 %thread, %hops
  %owner = urem i64 %sum, %threads
  %count = call i32 @drain(ptr %context, ptr %step, i64 %owner, ptr %scratch)
  %run.more = add i32 %run.hop, %count
  %hops.next = add i64 %hops, 1
  %again = icmp ult i64 %hops.next, %threads
  br i1 %again, label %hop, label %next
next:
  %run.step = phi i32 [%run, %look], [%run.more, %hop]
  %step.next = getelementptr i8, ptr %step, i64 $STEP_BYTES
  br label %test
done:
  ret i32 %run
}

; Add %run finished chunks to the counter at %done. Gives whether it then stands at %goal, and wakes who waits for that.
define internal i1 @report(ptr %pool, ptr %done, i32 %run, i32 %goal) #0 {
entry:
  %before = atomicrmw add ptr %done, i32 %run seq_cst
  %after = add i32 %before, %run
  %reached = icmp eq i32 %after, %goal
  br i1 %reached, label %signal, label %leave
signal:
  %sleeping = getelementptr i8, ptr %pool, i64 $POOL_BARRIER_SLEEPING
  call void @wake_sleepers(ptr %done, ptr %sleeping)
  br label %leave
leave:
  ret i1 %reached
}

; The group of steps from record %from to %step ends. Report the %run chunks that this thread has done in it, and return
; when all are: help others, then wait. A worker does not wait at the end of the job (%step_is_end).
define internal void @meet(ptr %context, ptr %pool, ptr %from, ptr %step, i32 %run, i64 %thread, ptr %scratch,
                           i1 %step_is_end) #1 {
entry:
  %all_done.p = getelementptr i8, ptr %context, i64 $CONTEXT_DONE
  %all_done = load ptr, ptr %all_done.p
  %done.offset.p = getelementptr i8, ptr %step, i64 $STEP_GROUP
  %done.offset = load i64, ptr %done.offset.p
  %done.p = getelementptr i8, ptr %all_done, i64 %done.offset
  %epoch.pp = getelementptr i8, ptr %context, i64 $CONTEXT_EPOCH
  %epoch.p = load ptr, ptr %epoch.pp
  %epoch = load i64, ptr %epoch.p
  %total.p = getelementptr i8, ptr %step, i64 $STEP_GROUP_CHUNKS
  %total = load i64, ptr %total.p
  %calls = add i64 %epoch, 1
  %goal.64 = mul i64 %calls, %total
  %goal = trunc i64 %goal.64 to i32
  %is_worker = icmp ne i64 %thread, 0
  %leaves = and i1 %is_worker, %step_is_end
  %idle = icmp eq i32 %run, 0
  br i1 %idle, label %look, label %tell
tell:
  %last = call i1 @report(ptr %pool, ptr %done.p, i32 %run, i32 %goal)
  br i1 %last, label %leave, label %others
look:
  %now.0 = load atomic i32, ptr %done.p acquire, align 4
  %complete.0 = icmp eq i32 %now.0, %goal
  br i1 %complete.0, label %leave, label %others
others:
  ; With all threads inside, the rest is probably under way: a short wait comes before looking for unclaimed chunks,
  ; as looking takes cache lines away from their owners.
  %state.p = getelementptr i8, ptr %pool, i64 $POOL_STATE
  %state = load atomic i32, ptr %state.p monotonic, align 4
  %inside = and i32 %state, $JOB_COUNT_MASK
  %threads.p = getelementptr i8, ptr %context, i64 $CONTEXT_THREADS
  %threads = load i64, ptr %threads.p
  %threads.32 = trunc i64 %threads to i32
  %with_caller = add i32 %inside, 1
  %all_here = icmp uge i32 %with_caller, %threads.32
  %patient = xor i1 %leaves, true
  %hold = and i1 %all_here, %patient
  br i1 %hold, label %glance, label %help
glance:
  %g = phi i64 [0, %others], [%g.next, %glance.again]
  %now.g = load atomic i32, ptr %done.p acquire, align 4
  %complete.g = icmp eq i32 %now.g, %goal
  br i1 %complete.g, label %leave, label %glance.count
glance.count:
  %short = icmp ult i64 %g, $GLANCES
  br i1 %short, label %glance.again, label %help
glance.again:
  call void @pause()
  %g.next = add i64 %g, 1
  br label %glance
help:
  %helped = call i32 @help(ptr %context, ptr %from, ptr %step, i64 %thread, ptr %scratch)
  %no_help = icmp eq i32 %helped, 0
  br i1 %no_help, label %stay, label %tell.more
tell.more:
  %last.more = call i1 @report(ptr %pool, ptr %done.p, i32 %helped, i32 %goal)
  br i1 %last.more, label %leave, label %stay
stay:
  br i1 %leaves, label %leave, label %test
test:
  %now = load atomic i32, ptr %done.p acquire, align 4
  %complete = icmp eq i32 %now, %goal
  br i1 %complete, label %leave, label %wait
wait:
  %spin.p = getelementptr i8, ptr %pool, i64 $POOL_SPIN_BARRIER
  %spin = load i64, ptr %spin.p
  %sleeping = getelementptr i8, ptr %pool, i64 $POOL_BARRIER_SLEEPING
  call void @wait_while_equal(ptr %done.p, i32 %now, i64 %spin, ptr %sleeping)
  br label %test
leave:
  ret void
}

; Thread %thread of a job walks over steps [%first, %last). For thread 0 all of them are done at the end.
define internal void @walk(ptr %context, ptr %pool, i64 %thread, i64 %first, i64 %last) #1 {
entry:
  %steps.p = getelementptr i8, ptr %context, i64 $CONTEXT_STEPS
  %steps = load ptr, ptr %steps.p
  %scratch.p = getelementptr i8, ptr %context, i64 $CONTEXT_SCRATCH
  %scratch.0 = load ptr, ptr %scratch.p
  %stride.p = getelementptr i8, ptr %context, i64 $CONTEXT_SCRATCH_STRIDE
  %stride = load i64, ptr %stride.p
  %scratch.offset = mul i64 %stride, %thread
  %scratch = getelementptr i8, ptr %scratch.0, i64 %scratch.offset
  %all_claims.p = getelementptr i8, ptr %context, i64 $CONTEXT_CLAIMS
  %all_claims = load ptr, ptr %all_claims.p
  %line = mul i64 %thread, $LINE
  %claims = getelementptr i8, ptr %all_claims, i64 %line
  %is_thread_0 = icmp eq i64 %thread, 0
  %first.offset = mul i64 %first, $STEP_BYTES
  %first.step = getelementptr i8, ptr %steps, i64 %first.offset
  br label %test
test:
  %i = phi i64 [%first, %entry], [%next, %advance]
  %step = phi ptr [%first.step, %entry], [%step.next, %advance]
  ; The first step of the group, and the chunks that this thread has run in it.
  %from = phi ptr [%first.step, %entry], [%from.now, %advance]
  %run = phi i32 [0, %entry], [%run.next, %advance]
  %more = icmp ult i64 %i, %last
  br i1 %more, label %loop, label %end
loop:
  %flag.p = getelementptr i8, ptr %step, i64 $STEP_BARRIER
  %flag = load i64, ptr %flag.p
  %flagged = icmp ne i64 %flag, 0
  br i1 %flagged, label %meet, label %work
meet:
  call void @meet(ptr %context, ptr %pool, ptr %from, ptr %step, i32 %run, i64 %thread, ptr %scratch, i1 false)
  br label %work
work:
  %from.now = phi ptr [%from, %loop], [%step, %meet]
  %run.now = phi i32 [%run, %loop], [0, %meet]
  %step.next = getelementptr i8, ptr %step, i64 $STEP_BYTES
  %ahead.p = getelementptr i8, ptr %step.next, i64 $STEP_CLAIMS
  %ahead.offset = load i64, ptr %ahead.p
  %ahead = getelementptr i8, ptr %claims, i64 %ahead.offset
  call void @llvm.prefetch.p0(ptr %ahead, i32 1, i32 3, i32 1)
  br i1 %is_thread_0, label %stamp, label %choose
stamp:
  %index = mul i64 %i, 2
  call void @stamp(ptr %context, i64 %index)
  br label %choose
choose:
  %threads.p = getelementptr i8, ptr %step, i64 $STEP_THREADS
  %threads = load i64, ptr %threads.p
  %single = icmp eq i64 %threads, 1
  br i1 %single, label %whole, label %part
whole:
  br i1 %is_thread_0, label %run_whole, label %advance
run_whole:
  %extent.p = getelementptr i8, ptr %step, i64 $STEP_EXTENT
  %extent = load i64, ptr %extent.p
  call void @launch(ptr %context, ptr %step, i64 0, i64 %extent, ptr %scratch)
  %run.plus_1 = add i32 %run.now, 1
  br label %advance
part:
  %count = call i32 @drain(ptr %context, ptr %step, i64 %thread, ptr %scratch)
  %run.plus = add i32 %run.now, %count
  br label %advance
advance:
  %run.next = phi i32 [%run.now, %whole], [%run.plus_1, %run_whole], [%run.plus, %part]
  %next = add i64 %i, 1
  br label %test
end:
  call void @meet(ptr %context, ptr %pool, ptr %from, ptr %step, i32 %run, i64 %thread, ptr %scratch, i1 true)
  ret void
}

declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

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


def render(params: tuple = (), target=None) -> str:
    """LLVM IR of the executor for this operating system and processor family (a renderer, as the kernels have)."""
    machine = platform.machine().lower()
    linux = sys.platform.startswith("linux")
    parts = [_LINUX if linux else _OTHER_SYSTEM, _CLOCK]
    if machine in ("x86_64", "amd64"):
        parts.append(_X86)
    else:
        parts += [_AARCH64 if machine in ("aarch64", "arm64") else _OTHER_MACHINE, _NO_FLOAT_STATE]
    names = {k: v for k, v in vars(layout).items() if k.isupper()}
    names["GLANCES"], names["LAYOUT_VERSION"] = _GLANCES, layout.version()
    names["SYS_futex"] = 202 if machine in ("x86_64", "amd64") else 98
    names["CLOCK_MONOTONIC"] = 6 if sys.platform == "darwin" else 1
    functions = string.Template("".join(parts)).substitute(names)
    return string.Template(_BODY).substitute(names, platform_functions=functions)


def executor_object() -> bytes:
    """The executor's object code, from the disk cache where it is there."""
    from kgraph.codegen.compiler import compile_spec
    from kgraph.codegen.kernel import KernelSpec

    return compile_spec(KernelSpec("executor", "executor:render", ()))
