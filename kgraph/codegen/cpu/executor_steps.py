"""LLVM IR of the executor's walk over the steps: waiting, claiming chunks, helping, meeting."""

from __future__ import annotations

# Looks at a completion counter, with a pause in between, before a thread offers help: some 200 ns.
GLANCES = 12

WAITING = """
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
"""

STEPS = """
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
"""
