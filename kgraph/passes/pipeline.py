"""The ordered lists of passes."""

from __future__ import annotations

from kgraph.passes.canonicalise import canonicalise
from kgraph.passes.collapse_dot import collapse_dot
from kgraph.passes.common_subexpressions import common_subexpressions
from kgraph.passes.dead_code import dead_code
from kgraph.passes.duplicate_producers import duplicate_producers
from kgraph.passes.expand_random import expand_random
from kgraph.passes.fold_batch_norm import fold_batch_norm
from kgraph.passes.fold_constants import fold_constants
from kgraph.passes.fold_padding import fold_padding
from kgraph.passes.fuse import fuse
from kgraph.passes.group_recurrent import group_recurrent
from kgraph.passes.inline_cond import inline_cond
from kgraph.passes.layout import layout
from kgraph.passes.manager import Pass
from kgraph.passes.merge_scans import merge_scans
from kgraph.passes.optimise_bodies import optimise_bodies
from kgraph.passes.reshape_motion import reshape_motion
from kgraph.passes.share_moments import share_moments
from kgraph.passes.split_scan import split_scan
from kgraph.passes.transpose_motion import transpose_motion
from kgraph.passes.window_updates import window_updates

INFERENCE: list[Pass] = [
    dead_code,
    inline_cond,
    expand_random,
    canonicalise,
    fold_constants,
    common_subexpressions,
    merge_scans,
    dead_code,
    window_updates,
    dead_code,
    split_scan,
    transpose_motion,
    canonicalise,
    fold_padding,
    collapse_dot,
    reshape_motion,
    canonicalise,
    fold_constants,
    common_subexpressions,
    fold_batch_norm,
    dead_code,
    group_recurrent,
    share_moments,
    duplicate_producers,
    fuse,
    layout,
    optimise_bodies,
    common_subexpressions,
    dead_code,
]

# For graphs with a backward part, in which what a step changes (weights, statistics, optimizer state) is among the
# inputs: nothing is prepared ahead of calls. `passes.autodiff` comes before, when the step is traced.
_PREPARE_WEIGHTS = (fold_batch_norm, layout)
TRAINING: list[Pass] = [pass_ for pass_ in INFERENCE if pass_ not in _PREPARE_WEIGHTS]

PIPELINES = {"inference": INFERENCE, "training": TRAINING}
