"""Writes a compiled model as a C library: header, shared and static library, and the C source that they are made of."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kgraph.artifact.save import SavedForm, SavedModel, StateVariable
from kgraph.c_export.header import header_text
from kgraph.c_export.objects import rename_symbol
from kgraph.c_export.tables import ALIGNMENT, ProgramTables, Weights, dtype_number
from kgraph.c_export.toolchain import find_toolchain
from kgraph.codegen.target import Target, host_target, make_target
from kgraph.compiler import CompiledGraph, compile_graph
from kgraph.errors import CompileError, UnsupportedError
from kgraph.ir import Graph
from kgraph.runtime.plan import Program

_RUNTIME = Path(__file__).parent / "runtime"
_X86_LEVELS = ("x86-64-v4", "x86-64-v3", "x86-64-v2")
# What cpuid must report: leaf 1 ecx, leaf 7 ebx, leaf 0x80000001 ecx.
_CPUID = {
    "x86-64-v2": (0x00982201, 0, 0x1),
    "x86-64-v3": (0x38D83201, 0x128, 0x21),
    "x86-64-v4": (0x38D83201, 0xD0030128, 0x21),
    "aarch64": (0, 0, 0),
}


@dataclass(frozen=True)
class ExportedLibrary:
    """The files of an export. weights: None where they lie inside of the libraries."""

    name: str
    header: Path
    source: Path
    shared: Path
    static: Path
    weights: Path | None
    levels: tuple[str, ...]


def export(
    model: SavedModel,
    directory: str | os.PathLike,
    *,
    name: str | None = None,
    machine: str = "x86_64",
    levels: Sequence[str] | None = None,
    weights: str = "inside",
    compiler: str | Sequence[str] | None = None,
    keep_objects: bool = False,
) -> ExportedLibrary:
    """Write the C library of a model into a directory.

    name: what functions and files are called; by default the model's name.
    machine: "x86_64" or "aarch64", under Linux. levels: of the instruction set, best first ("x86-64-v4", "x86-64-v3",
        "x86-64-v2"; by default the first two); the library takes the first that the processor has, when it runs.
    weights: "inside" of the library; in a "file" of their own; or "state", memory of the caller that can be filled from
        a safetensors file, such as one that an exported training step has written.
    compiler: see `toolchain.find_toolchain`.
    keep_objects: leave the kernels' objects and the weights in the directory, so that the source can be compiled again
        with other options.
    Raises UnsupportedError for a model with steps that run on NumPy, CompileError where no C compiler is found or it
    fails, ValueError for other values of the arguments.
    """
    if weights not in ("inside", "file", "state"):
        raise ValueError(f"weights={weights!r}: expected 'inside', 'file' or 'state'")
    if weights == "state":
        model = _with_weights_as_state(model)
    name = name or re.sub(r"\W", "_", model.name)
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(f"name={name!r} cannot be part of the names of C functions")
    targets = _targets(machine, levels)
    toolchain = find_toolchain(machine, compiler)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    library = _Library(model, name, weights, folder, targets)
    objects = library.write()
    main = folder / f"{name}.o"
    try:
        toolchain.compile(library.source, main)
        toolchain.link_shared([main, *objects], library.files.shared)
        toolchain.archive([main, *objects], library.files.static)
    finally:
        main.unlink(missing_ok=True)
        if not keep_objects:
            for path in objects:
                path.unlink(missing_ok=True)
            if weights != "file":
                library.weights_path.unlink(missing_ok=True)
    return library.files


def _targets(machine: str, levels: Sequence[str] | None) -> dict[str, Target]:
    known = {"x86_64": _X86_LEVELS, "aarch64": ("aarch64",)}
    if machine not in known:
        raise ValueError(f"machine={machine!r}: expected one of {sorted(known)}")
    if levels is None:
        levels = known[machine][:2]
    levels = (levels,) if isinstance(levels, str) else tuple(levels)
    unknown = set(levels) - set(known[machine])
    if unknown or not levels:
        raise ValueError(f"levels={levels}: expected some of {known[machine]} for {machine}")
    return {level: make_target(level, foreign=True) for level in sorted(levels, key=known[machine].index)}


def _with_weights_as_state(model: SavedModel) -> SavedModel:
    """The model with its weights among what a call reads from the caller's memory, not prepared ahead of calls."""
    forms = []
    for form in model.forms:
        if form.state:
            raise UnsupportedError(f"{model.name} has state of its own; weights='state' is for models without")
        graph = Graph([*form.graph.inputs, *form.graph.params], [], form.graph.nodes, form.graph.outputs, model.name)
        first = len(form.graph.inputs)
        state = [
            StateVariable(name, "weight", value, first + i, -1, None)
            for i, (name, value) in enumerate(zip(form.names, form.values, strict=True))
        ]
        forms.append(replace(form, graph=graph, values=[], names=[], compiled=None, state=state, passes="training"))
    return replace(model, forms=forms)


class _Library:
    def __init__(self, model: SavedModel, name: str, weights: str, folder: Path, targets: dict[str, Target]):
        self.model, self.name, self.folder, self.targets = model, name, folder, targets
        self.inside = weights != "file"
        self.weights = Weights()
        self.source = folder / f"{name}.c"
        self.weights_path = folder / f"{name}.weights"
        self.objects: list[Path] = []
        self.files = ExportedLibrary(
            name=name,
            header=folder / f"{name}.h",
            source=self.source,
            shared=folder / f"lib{name}.so",
            static=folder / f"lib{name}.a",
            weights=None if self.inside else self.weights_path,
            levels=tuple(targets),
        )
        states = {tuple((s.name, np.shape(s.value), s.input, s.output) for s in form.state) for form in model.forms}
        if len(states) > 1:
            raise UnsupportedError(f"{model.name}: its forms for different sizes have different state")
        self.state: Sequence[StateVariable] = model.forms[0].state

    def write(self) -> list[Path]:
        """Write header, source, weights and the kernels' objects; gives the objects."""
        levels, tables = [], []
        for number, (level, target) in enumerate(self.targets.items()):
            symbols: dict[str, str] = {}
            programs = []
            for form_number, form in enumerate(self.model.forms):
                program = self._program(form, target)
                self._kernels(program, f"kgk_{self.name}_{number}", symbols)
                programs.append(f"kg_program_{number}_{form_number}")
                text = ProgramTables(programs[-1], program, self.weights, symbols.__getitem__).text()
                tables.append(text)
            declared = "\n".join(f"extern void {symbol}();" for symbol in symbols.values())
            tables.insert(len(tables) - len(programs), declared.replace("()", _KERNEL_ARGUMENTS))
            masks = ", ".join(f"0x{mask:x}u" for mask in _CPUID[level])
            levels.append(f'{{"{level}", {masks}, {{{", ".join("&" + p for p in programs)}}}}}')
        first = program  # every program has the same inputs and outputs
        body = self._interface(first) + self._levels(levels)
        self.files.header.write_text(header_text(self.name, self.model, first, self.state, self.inside))
        self.source.write_text(
            "".join(
                [
                    f"/* {self.name}: made by kgraph. Compile together with the kernels' objects. */\n",
                    "#define _GNU_SOURCE\n",
                    f'#include "{self.name}.h"\n',
                    _runtime("program.h"),
                    _STORE_DIM,
                    _runtime("plan.h"),
                    _runtime("plan.c"),
                    _runtime("pool.c"),
                    _runtime("execute.c"),
                    *(text + "\n" for text in tables),
                    body,
                    _runtime("api.c"),
                ]
            )
        )
        self.weights.write(self.weights_path)
        return self.objects

    def _program(self, form: SavedForm, target: Target) -> Program:
        compiled: CompiledGraph | None = form.compiled if target == host_target() else None
        if compiled is None:
            compiled = compile_graph(form.graph, passes=form.passes, donations=form.donations, target=target)
            compiled.set_params(form.values)
        return compiled.program

    def _kernels(self, program: Program, prefix: str, symbols: dict[str, str]) -> None:
        for key, payload in program.kernels.items():
            if key in symbols:
                continue
            symbols[key] = f"{prefix}_{len(symbols)}"
            path = self.folder / f"{symbols[key]}.o"
            path.write_bytes(rename_symbol(payload, "kernel", symbols[key]))
            self.objects.append(path)

    # -- the model's own part of the source -------------------------------------------------------------------------
    def _interface(self, program: Program) -> str:
        split = len(program.inputs) - sum(s.input >= 0 for s in self.state)
        results = len(program.outputs) - sum(s.output >= 0 for s in self.state)
        inputs = [(program.input_names[i], program.buffers[b]) for i, b in enumerate(program.inputs[:split])]
        names = self.model.forms[0].outputs.names
        outputs = [(names[i] or f"output_{i}", program.buffers[b]) for i, b in enumerate(program.outputs[:results])]
        lines = [
            f"#define KG_API(name) {self.name}_##name",
            f"#define KG_NUM_INPUTS {split}",
            f"#define KG_NUM_OUTPUTS {results}",
            f"#define KG_NUM_STATES {len(self.state)}",
            f"#define KG_NUM_FORMS {len(self.model.forms)}",
            f"#define KG_IS_STEP {int(self.model.kind == 'step')}",
            _infos("input", inputs),
            _infos("output", outputs),
            self._states(),
        ]
        return "\n".join(lines) + "\n"

    def _states(self) -> str:
        if not self.state:
            return ""
        at, offset = 0, 0
        rows, shapes, entries = [], [], []
        for number, state in enumerate(self.state):
            value = np.ascontiguousarray(state.value)
            kind = _SAFETENSORS.get(value.dtype.name)
            if kind is None:
                raise UnsupportedError(f"state {state.name} is {value.dtype}, which safetensors has no name for")
            shapes.append(_shape(f"kg_state_shape_{number}", value.shape))
            name = re.sub(r"[^\w/.:-]", "_", state.name)  # needs no escaping in JSON
            info = _info(name, value.dtype.name, len(value.shape), f"kg_state_shape_{number}")
            initial = self.weights.add(value)
            reset = -1 if state.reset is None else self.weights.add(np.asarray(state.reset, value.dtype))
            rows.append(f"{{{info}, {at}, {initial}, {value.nbytes}, {reset}, {state.input}, {state.output}}}")
            shape = ",".join(map(str, value.shape))
            entries.append(
                f'"{name}":{{"dtype":"{kind}","shape":[{shape}],"data_offsets":[{offset},{offset + value.nbytes}]}}'
            )
            offset += value.nbytes
            at += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
        header = "{" + ",".join(entries) + "}"
        header += " " * (-len(header) % 8)
        pieces = [header[i : i + 100] for i in range(0, len(header), 100)]
        literal = "\n    ".join(_quoted(piece) for piece in pieces)
        return "\n".join(
            [
                "typedef struct {",
                "    kg_tensor_info info;",
                "    size_t at, initial, bytes;",
                "    int64_t reset;",
                "    int input, output;",
                "} kg_state;",
                *shapes,
                "static const kg_state kg_states[] = {\n    " + ",\n    ".join(rows) + "};",
                f"static const char kg_state_header[] =\n    {literal};",
                f"#define KG_STATE_BYTES {at}u",
            ]
        )

    def _levels(self, levels: Sequence[str]) -> str:
        lines = [
            "typedef struct {",
            "    const char *name;",
            "    unsigned leaf1_ecx, leaf7_ebx, extended_ecx;",
            "    const kg_program *forms[KG_NUM_FORMS];",
            "} kg_level;",
            f"#define KG_NUM_LEVELS {len(levels)}",
            "static const kg_level kg_levels[] = {\n    " + ",\n    ".join(levels) + "};",
            f"#define KG_WEIGHTS_INSIDE {int(self.inside)}",
            f"#define KG_WEIGHTS_BYTES {self.weights.nbytes}u",
        ]
        if self.inside:
            symbol = f"kgk_{self.name}_weights"
            lines += [
                f'__asm__(".section .rodata\\n.balign {ALIGNMENT}\\n.globl {symbol}\\n.hidden {symbol}\\n"',
                f'        "{symbol}:\\n.incbin \\"{self.weights_path.name}\\"\\n.byte 0\\n.previous\\n");',
                f"extern const unsigned char {symbol}[];",
                f"#define kg_weights_inside {symbol}",
            ]
        else:
            numbers = ", ".join(str(b) for b in self.weights.identification())
            lines.append(f"static const unsigned char kg_weights_id[{ALIGNMENT}] = {{{numbers}}};")
        return "\n".join(lines) + "\n"


_KERNEL_ARGUMENTS = "(void *const *, const int64_t *, int64_t, int64_t, void *)"
_SAFETENSORS = {
    "bool": "BOOL", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "uint8": "U8", "uint16": "U16",
    "uint32": "U32", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
}  # fmt: skip
_STORE_DIM = """
static void kg_store_dim(void *to, int dtype, int64_t value)
{
    int8_t i8 = (int8_t)value;
    int16_t i16 = (int16_t)value;
    int32_t i32 = (int32_t)value;
    float f32 = (float)value;
    double f64 = (double)value;
    switch (dtype) {
    case KG_INT8: case KG_UINT8: memcpy(to, &i8, 1); break;
    case KG_INT16: case KG_UINT16: memcpy(to, &i16, 2); break;
    case KG_INT32: case KG_UINT32: memcpy(to, &i32, 4); break;
    case KG_FLOAT32: memcpy(to, &f32, 4); break;
    case KG_FLOAT64: memcpy(to, &f64, 8); break;
    default: memcpy(to, &value, 8);
    }
}
"""


def _runtime(name: str) -> str:
    return "\n" + (_RUNTIME / name).read_text()


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _shape(name: str, shape: Sequence) -> str:
    sizes = [str(s) if isinstance(s, int) else "-1" for s in shape] or ["0"]
    return f"static const int64_t {name}[] = {{{', '.join(sizes)}}};"


def _info(name: str, dtype: str, rank: int, shape: str) -> str:
    return f"{{{_quoted(name)}, (kg_dtype){dtype_number(dtype)}, {rank}, {shape}}}"


def _infos(kind: str, buffers: Sequence[tuple]) -> str:
    shapes = [_shape(f"kg_{kind}_shape_{i}", buffer.shape) for i, (_, buffer) in enumerate(buffers)]
    rows = [
        _info(name, buffer.dtype, len(buffer.shape), f"kg_{kind}_shape_{i}") for i, (name, buffer) in enumerate(buffers)
    ]
    body = ",\n    ".join(rows) or "{0}"
    return "\n".join([*shapes, f"static const kg_tensor_info kg_{kind}_infos[] = {{\n    {body}}};"])


__all__ = ["CompileError", "ExportedLibrary", "export"]
