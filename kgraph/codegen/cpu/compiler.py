"""LLVM: what it knows of this machine, and object code from IR."""

from __future__ import annotations

import functools
import re

import llvmlite.binding as llvm

from kgraph.codegen.target import Target, host_target
from kgraph.errors import CompileError

_VECTORS = re.compile(r"<\d+ x (?:float|double|half|bfloat|i\d+)>")


@functools.cache
def initialize_llvm() -> None:
    """Make LLVM ready to generate code for this machine."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    # Without it, LLVM ends the process on a kernel with inline assembly.
    llvm.initialize_native_asmparser()


def host_features() -> tuple[str, str]:
    """(name, features) of this machine's processor."""
    initialize_llvm()
    try:
        features = llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM cannot tell on this system; the name alone decides then
        features = ""
    return llvm.get_host_cpu_name(), features


def layout_of(cpu: str, features: str, triple: str | None = None) -> tuple[str, str]:
    """(triple, data layout) for a processor; triple: None for this system's."""
    if triple is None:
        initialize_llvm()
        triple = llvm.get_process_triple()
    else:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    return triple, str(machine.target_data)


def compile_text(text: str, name: str, target: Target) -> bytes:
    """Object code of a kernel's IR."""
    return compile_ir(text, name=name, target=target)


def prepare(target: Target) -> None:
    """Make ready what every process that compiles needs."""
    initialize_llvm()
    _pipeline(target, True)


def compile_ir(text: str, *, name: str = "kernel", target: Target | None = None, vectorize: bool = True) -> bytes:
    """Relocatable object code of LLVM IR text, optimised for `target`.

    vectorize: whether LLVM's own loop vectoriser looks at scalar loops. Raises CompileError for IR that does not parse.
    """
    target = target or host_target()
    initialize_llvm()
    machine, whole_module, one_function = _pipeline(target, vectorize)
    context = llvm.create_context()
    try:
        module = llvm.parse_assembly(text, context)
        module.triple = target.triple
        module.data_layout = target.data_layout
        module.verify()
    except RuntimeError as error:
        raise CompileError(f"kernel {name}: LLVM refuses its IR: {error}") from error
    functions = [f for f in module.functions if not f.is_declaration]
    if len(functions) > 1:
        _passes_for_tiles().run(module, one_function)
    elif _VECTORS.search(text):
        one_function.getFunctionPassManager().run(functions[0], one_function)
    else:
        whole_module.getModulePassManager().run(module, whole_module)
    return machine.emit_object(module)


@functools.cache
def _pipeline(target: Target, vectorize: bool):
    """(target machine, passes over a module, passes over a function).

    In a kernel that is one function and works on vectors there is nothing to inline and no loop for the vectoriser: the
    passes that simplify a function take half the time of those for a module and leave code that is as fast.
    """
    machine = llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=2, reloc="pic", codemodel="small"
    )
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = vectorize
    options.slp_vectorization = False
    options.loop_interleaving = vectorize
    simple = llvm.create_pipeline_tuning_options(speed_level=1)
    return machine, llvm.create_pass_builder(machine, options), llvm.create_pass_builder(machine, simple)


def _passes_for_tiles():
    """The passes for what has functions of its own: kernels with tiles, the executor.

    Their loops are written as they are to run, with sums in registers and addresses that count up. What is left for
    LLVM is to simplify each expression once; the code generator moves what is constant out of loops.
    """
    passes = llvm.create_new_module_pass_manager()
    passes.add_always_inliner_pass()
    passes.add_sroa_pass()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    passes.add_new_gvn_pass()
    passes.add_dead_code_elimination_pass()
    return passes
