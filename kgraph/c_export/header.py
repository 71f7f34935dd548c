"""The C header of an exported model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kgraph.artifact.save import SavedModel, StateVariable
    from kgraph.runtime.plan import Program

_TYPES = Path(__file__).parent / "runtime" / "types.h"


def header_text(
    name: str, model: SavedModel, program: Program, state: Sequence[StateVariable], weights_inside: bool
) -> str:
    """The header: types, what the model takes and gives, and its functions with their contracts."""
    guard = f"KGRAPH_MODEL_{name.upper()}_H"
    split = len(program.inputs) - sum(s.input >= 0 for s in state)
    results = len(program.outputs) - sum(s.output >= 0 for s in state)
    listing = [_line("input", i, program.input_names[i], program.buffers[program.inputs[i]]) for i in range(split)]
    outputs = model.forms[0].outputs.names
    listing += [_line("output", i, outputs[i], program.buffers[program.outputs[i]]) for i in range(results)]
    parts = [_COMMON, _RUN if not state else _STATE]
    if not weights_inside:
        parts.insert(1, _WEIGHTS)
    if state and model.kind == "step":
        parts.append(_TRAIN)
    elif state:
        parts.append(_RUN_WITH_STATE)
    return "\n".join(
        [
            f"/* {model.name}, made by kgraph.",
            "",
            *(f"   {line}" for line in listing),
            "*/",
            f"#ifndef {guard}",
            f"#define {guard}",
            "",
            _TYPES.read_text(),
            "#ifdef __cplusplus",
            'extern "C" {',
            "#endif",
            "",
            '#define KG_PUBLIC __attribute__((visibility("default")))',
            "",
            "\n".join(parts).replace("NAME", name).strip(),
            "",
            "#undef KG_PUBLIC",
            "#ifdef __cplusplus",
            "}",
            "#endif",
            "#endif",
            "",
        ]
    )


def _line(kind: str, number: int, name: str, buffer) -> str:
    shape = ", ".join(map(str, buffer.shape))
    return f"{kind} {number}: {name or '-'}, {buffer.dtype}[{shape}]".replace("*/", "* /")


_COMMON = """
/* All memory is the caller's: a plan for each kind of call, a workspace for each call in flight, a pool of threads for
   the process if calls are to be shared between threads. Nothing is allocated. Functions may be called from any number
   of threads; results do not depend on the number of threads, bit for bit. */

/* A text for each status. */
KG_PUBLIC const char *NAME_status_text(kg_status status);
/* The instruction set level whose code runs on this processor; "" where there is none. */
KG_PUBLIC const char *NAME_level(void);

KG_PUBLIC int NAME_num_inputs(void);
KG_PUBLIC int NAME_num_outputs(void);
/* Name, type and shape of an input or output; null for a wrong number. */
KG_PUBLIC const kg_tensor_info *NAME_input(int number);
KG_PUBLIC const kg_tensor_info *NAME_output(int number);

/* Prepare the model for inputs of these shapes (one array of sizes per input), and for at most max_threads threads a
   call. memory: NAME_plan_bytes() bytes that stay with the plan. */
KG_PUBLIC size_t NAME_plan_bytes(void);
KG_PUBLIC kg_status NAME_plan(void *memory, size_t bytes, const int64_t *const *input_shapes, int max_threads,
                              kg_plan **plan);
/* Bytes of the workspace that a call needs; each call in flight has its own. Its content does not matter. */
KG_PUBLIC size_t NAME_workspace_bytes(const kg_plan *plan);
/* Size in bytes and shape (as many numbers as NAME_output(number)->rank) of an output. */
KG_PUBLIC size_t NAME_output_bytes(const kg_plan *plan, int number);
KG_PUBLIC kg_status NAME_output_shape(const kg_plan *plan, int number, int64_t *shape);

/* Start the threads of a pool (threads - 1 of them: a caller takes part) in NAME_pool_bytes() bytes of memory, and stop
   them when no call is under way. Calls that find the pool busy, and those of a forked child, run on one thread. */
KG_PUBLIC size_t NAME_pool_bytes(void);
KG_PUBLIC kg_status NAME_pool_start(void *memory, size_t bytes, int threads, kg_pool **pool);
KG_PUBLIC void NAME_pool_stop(kg_pool *pool);
"""

_WEIGHTS = """
/* The weights, before anything else: a file to be mapped, or its content at an address that is a multiple of 64. */
KG_PUBLIC kg_status NAME_open_weights(const char *path);
KG_PUBLIC kg_status NAME_use_weights(const void *data, size_t bytes);
"""

_RUN = """
/* Compute the outputs from the inputs, dense arrays all of them. pool: null to run on the calling thread alone. */
KG_PUBLIC kg_status NAME_run(const kg_plan *plan, kg_pool *pool, void *workspace, size_t workspace_bytes,
                             const void *const *inputs, void *const *outputs);
"""

_STATE = """
/* What calls read and change lies in NAME_state_bytes() bytes of the caller, which NAME_state_init fills with the
   values at the time of the export. One call at a time may use it. */
KG_PUBLIC int NAME_num_states(void);
KG_PUBLIC const kg_tensor_info *NAME_state_info(int number);
KG_PUBLIC size_t NAME_state_bytes(void);
KG_PUBLIC kg_status NAME_state_init(void *state, size_t bytes);
KG_PUBLIC void *NAME_state_data(void *state, int number);
/* The state as a safetensors file. Reading goes by the tensors' names; a file may hold more than is asked for. */
KG_PUBLIC kg_status NAME_save_weights(const void *state, const char *path);
KG_PUBLIC kg_status NAME_load_weights(void *state, const char *path);
/* Metrics as they are where an epoch begins. */
KG_PUBLIC kg_status NAME_reset_metrics(void *state);
"""

_RUN_WITH_STATE = """
/* Compute the outputs from the inputs and the state, and change the state. pool: null for the calling thread alone. */
KG_PUBLIC kg_status NAME_run(const kg_plan *plan, kg_pool *pool, void *workspace, size_t workspace_bytes, void *state,
                             const void *const *inputs, void *const *outputs);
"""

_TRAIN = """
/* One step of training on a batch: changes the state (weights, the optimizer's slots, metrics), gives the logs.
   pool: null for the calling thread alone. */
KG_PUBLIC kg_status NAME_train_step(const kg_plan *plan, kg_pool *pool, void *workspace, size_t workspace_bytes,
                                    void *state, const void *const *inputs, void *const *outputs);
"""
