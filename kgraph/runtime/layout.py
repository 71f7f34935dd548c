"""Memory layout shared by the native executor and the Python that prepares its tables.

All offsets are in bytes; all fields are 64-bit words unless said otherwise. The executor's code is generated from these
constants, so a change here changes the key of its cached object.
"""

from __future__ import annotations

import zlib

WORD = 8

# A context: one call in flight. Its memory belongs to Python (runtime/context.py).
CONTEXT_STEPS = 0  # address of the step records, shared by all contexts of a binding
CONTEXT_FIRST = 8  # the first step to run
CONTEXT_LAST = 16  # the step after the last to run
CONTEXT_OPERANDS = 24  # address of this context's operand slots
CONTEXT_SCRATCH = 32  # address of thread 0's scratch memory
CONTEXT_SCRATCH_STRIDE = 40  # distance to the next thread's
CONTEXT_POOL = 48  # address of the thread pool; 0 without one
CONTEXT_THREADS = 56  # how many threads take part; 1 = the caller alone
CONTEXT_EXTERNALS = 64  # address of the words that stand for the call's inputs and outputs
CONTEXT_EXTERNAL_OFFSET = (
    72  # >= 0: such a word is an object's address, whose data pointer lies there; -1: it is the pointer
)
CONTEXT_PATCHES = 80  # address of the patch records, shared
CONTEXT_NUM_PATCHES = 88
CONTEXT_PROFILE = 96  # address of two time stamps (ns) per step; 0 = off
CONTEXT_EPOCH = 104  # address of a word: how many times the steps to run were run by several threads
CONTEXT_CLAIMS = 112  # address of the claim counters (i64, a line each): one per step and thread that owns chunks of it
CONTEXT_DONE = 120  # address of the completion counters (i32, futex, a line each), one per group of steps
CONTEXT_BYTES = 128

# A step: one kernel launch. Two cache lines. A record without a launch follows the last step of a segment: it ends the
# segment's last group.
STEP_FUNCTION = 0
STEP_OPERANDS = 8  # byte offset of its first operand slot
STEP_SIZES = 16  # address of its sizes
STEP_EXTENT = 24
STEP_THREADS = 32  # how many threads own chunks of the extent; 1 = thread 0 runs it whole
STEP_CHUNKS = 40  # chunks per thread
STEP_GRAIN = 48  # chunks end at multiples of this
STEP_CLAIMS = 56  # byte offset of its first claim counter
STEP_BARRIER = 64  # 1 = the group of the steps before ends here: all its chunks must be done before this step begins
STEP_GROUP = 72  # if so: byte offset of that group's completion counter
STEP_GROUP_CHUNKS = 80  # if so: chunks in that group (a whole step counts as one)
STEP_BYTES = 128

# A patch: operand slot <- data pointer of an external + offset.
PATCH_SLOT = 0  # byte offset of the slot
PATCH_EXTERNAL = 8  # byte offset of the external's word
PATCH_OFFSET = 16
PATCH_BYTES = 24

# Counters that different threads write lie this far apart.
LINE = 64

# The pool: fields that different threads write lie on lines of their own.
POOL_BUSY = 0  # i32: 1 while a caller has the pool
POOL_JOB_CONTEXT = 64
POOL_JOB_FIRST = 72
POOL_JOB_LAST = 80
POOL_JOB_THREADS = 88
POOL_STATE = 128  # i32, futex: JOB_OPEN while workers may enter, plus the number of those inside
POOL_JOIN_SLEEPING = 192  # i32: the caller sleeps on STATE
POOL_BARRIER_SLEEPING = 256  # i32: threads asleep on a completion counter
POOL_SPIN_BARRIER = 320  # pauses before a thread sleeps within a job
POOL_SPIN_PARK = 328  # pauses before an idle worker parks
POOL_MAILBOXES = 512  # one per worker, thread 1 first
MAILBOX_TICKET = 0  # i32, futex: changes when there is a job
MAILBOX_SLEEPING = 4  # i32
MAILBOX_BYTES = 128  # two lines: the neighbour line prefetcher makes pairs share

JOB_OPEN = 1 << 30
JOB_COUNT_MASK = JOB_OPEN - 1


def version() -> int:
    """A number that differs between layouts: an executor made for another one must not be used."""
    fields = sorted((name, value) for name, value in globals().items() if name.isupper())
    return zlib.crc32(repr(fields).encode())
