"""Random graphs: how one is drawn, run, compared with the oracle, and reduced to the part that fails."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kgraph.compiler import compile_graph
from kgraph.errors import DimDecisionError, ShapeError
from kgraph.frontend.tracer import GraphTracer
from kgraph.ir import Graph, Node, TensorType, Value
from kgraph.ir.interpreter import evaluate
from kgraph.ir.verifier import verify
from tests.fuzz import chains, computing, elementwise, movement  # noqa: F401  (they fill OPERATIONS)
from tests.fuzz.building import FLOATS, LARGEST_BATCH, Builder, Fact, N, SkipOperation, draw
from tests.fuzz.operations import OPERATIONS

EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
DTYPES = ("float32",) * 6 + ("float64", "float16", "bfloat16")


@dataclass
class Case:
    """A random graph, which of its values are exact, and how its inputs and parameters are drawn."""

    seed: int
    graph: Graph
    exact: set[Value] = field(default_factory=set)
    exact_inputs: set[Value] = field(default_factory=set)
    operations: list[str] = field(default_factory=list)

    def arrays(self, values: Sequence[Value], batch: int) -> list[np.ndarray]:
        """Concrete operands for inputs or parameters; the same ones for the same seed."""
        out = []
        for number, value in enumerate(values):
            rng = np.random.default_rng((self.seed, number, batch, len(value.name)))
            shape = tuple(s if isinstance(s, int) else s.evaluate({"N": batch}) for s in value.shape)
            out.append(draw(rng, TensorType(shape, value.dtype), value in self.exact_inputs)[0])
        return out


def random_case(seed: int, length: int | None = None, scale: str = "small") -> Case:
    """The graph of a seed: `length` drawn operations on a few inputs and parameters, and a few outputs."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[int(rng.integers(len(DTYPES)))]
    b = Builder(rng, dtype, scale)
    tracer = GraphTracer(f"fuzz_{seed}")
    case = Case(seed, tracer.graph)
    names = sorted(OPERATIONS)
    chances = np.array([OPERATIONS[n][0] for n in names])
    length = length or int(rng.integers(3, 20))
    with tracer.active():
        for number, (type_, is_param) in enumerate(_operand_types(b, dtype)):
            traced = tracer.add_input(type_, f"{'w' if is_param else 'x'}{number}")
            exact = b.chance(0.5) or not type_.is_float
            _, fact = draw(np.random.default_rng(0), type_.with_shape(()), exact)
            if exact:
                case.exact_inputs.add(traced.value)
            b.keep(traced, fact)
            if is_param:
                tracer.graph.inputs.remove(traced.value)
                tracer.graph.params.append(traced.value)
        attempts = 0
        while len(case.operations) < length and attempts < 40 * length:
            attempts += 1
            name = str(rng.choice(names, p=chances / chances.sum()))
            try:
                OPERATIONS[name][1](b)
            except (SkipOperation, DimDecisionError, ShapeError):
                continue
            case.operations.append(name)
        results = _choose_outputs(b, tracer.graph)
        tracer.graph.outputs = [tracer.lift(r) for r in results]
        case.exact = {tracer.lift(v) for v in b.values if b.exact(v)}
    drop_dead(tracer.graph)
    verify(tracer.graph, after="the generator")
    return case


def _operand_types(b: Builder, dtype: str) -> list[tuple[TensorType, bool]]:
    height, width, channels, filters = b.small_size() + 1, b.small_size() + 2, b.size(), b.size()
    shapes = [
        (N, channels),
        (N, height, channels),
        (N, height, width, channels),
        (N, 1, channels),
        (N,),
        (N, height, N),
        (height, channels),
        (channels,),
        (),
        (N, 2, 3, 2, channels),
    ]
    inputs = [shapes[int(i)] for i in b.rng.permutation(len(shapes))[: b.integer(1, 3)]]
    inputs = [s for s in inputs if b.count(s) <= b.most_elements]
    if not any(N in s for s in inputs):
        inputs.insert(0, (N, channels))
    kinds = (dtype,) * 4 + ("int32", "bool", "float32", "int64")
    out = [(TensorType(shape, dtype if i == 0 else b.choice(kinds)), False) for i, shape in enumerate(inputs)]
    weights = [(channels,), (channels, filters), (filters,), (3, 3, channels, filters), (channels, channels), ()]
    weights = [s for s in weights if b.count(s) <= b.most_elements]
    for i in b.rng.permutation(len(weights))[: b.integer(0, 3)]:
        out.append((TensorType(weights[int(i)], dtype), True))
    return out


def _choose_outputs(b: Builder, graph: Graph) -> list:
    """Mostly what nobody has read yet, so that little of what was drawn is dead."""
    read = {v for node in graph.nodes for v in node.inputs}
    computed = [v for v in b.values if not isinstance(v, np.ndarray) and v.value.node is not None]
    unread = [v for v in computed if v.value not in read] or b.values[-1:]
    order = b.rng.permutation(len(unread))[: b.integer(1, 5)]
    results = [unread[int(i)] for i in order]
    if b.chance(0.15):
        results.append(b.choice(b.values))  # an input, a parameter, an intermediate, or the same one twice
    return results


def drop_dead(graph: Graph) -> None:
    """Remove nodes that no output depends on."""
    live, kept = set(graph.outputs), []
    for node in reversed(graph.nodes):
        if any(o in live for o in node.outputs):
            live.update(node.inputs)
            kept.append(node)
    graph.nodes = kept[::-1]


# -- comparison -------------------------------------------------------------------------------------------------------
class Mismatch(AssertionError):
    """A compiled graph and the oracle disagree."""


@dataclass
class Oracle:
    """Every value of a graph in float64 and in its own precision, for one batch."""

    wide: dict[Value, np.ndarray]
    narrow: dict[Value, np.ndarray]


def oracle(graph: Graph, inputs, params, batch: int) -> Oracle:
    values = [*graph.inputs, *graph.params, *(o for node in graph.nodes for o in node.outputs)]
    everything = Graph(graph.inputs, graph.params, graph.nodes, values, graph.name)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        wide = evaluate(everything, inputs, params, sizes={"N": batch}, precision="float64")
        narrow = evaluate(everything, inputs, params, sizes={"N": batch})
    return Oracle(dict(zip(values, wide)), dict(zip(values, narrow)))


def cone(value: Value) -> set[Value]:
    """A value and all that it is computed from."""
    seen, stack = set(), [value]
    while stack:
        v = stack.pop()
        if v not in seen:
            seen.add(v)
            if v.node is not None:
                stack.extend(v.node.inputs)
    return seen


def allowed_error(value: Value, known: Oracle) -> float:
    """What rounding may do to a value: some units of the coarsest dtype on the way, at the largest magnitude there,
    and some times the error that the evaluation in the values' own precision makes."""
    parts = [v for v in cone(value) if v.dtype in FLOATS]
    if not parts:
        return 0.0
    epsilon = max(EPSILON[v.dtype] for v in parts)
    largest = max((float(np.abs(known.wide[v]).max(initial=0)) for v in parts), default=0.0)
    error = np.abs(known.narrow[value].astype("float64") - known.wide[value]).max(initial=0)
    return 32 * epsilon * largest + 16 * float(error)


def compare(case: Case, graph: Graph, results, known: Oracle, where: str) -> None:
    """Raises Mismatch where a result is not what the oracle says."""
    for number, (value, got) in enumerate(zip(graph.outputs, results, strict=True)):
        wanted = known.wide[value]
        what = f"output {number} ({value.type}), {where}"
        if got.shape != wanted.shape or got.dtype != value.type.np_dtype:
            raise Mismatch(f"{what}: got {got.dtype}{got.shape}, expected {value.dtype}{wanted.shape}")
        exact = value in case.exact or value.dtype not in FLOATS
        if exact:
            wrong = got.astype(wanted.dtype) != wanted
            limit = 0.0
        else:
            limit = allowed_error(value, known)
            wrong = ~(np.abs(got.astype("float64") - wanted) <= limit)
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise Mismatch(
                f"{what}: {int(wrong.sum())} of {wrong.size} elements are wrong, the first at {at}: got {got[at]!r}, "
                f"expected {wanted[at]!r} within {limit:.3g}"
            )


class Guarded:
    """An array like a given one between bytes that must not change."""

    MARGIN, MARK = 256, 0xA5

    def __init__(self, like: np.ndarray):
        self.raw = np.full(like.nbytes + 2 * self.MARGIN + 64, self.MARK, np.uint8)
        self.begin = self.MARGIN + -self.raw.ctypes.data % 64
        self.end = self.begin + like.nbytes
        self.array = self.raw[self.begin : self.end].view(like.dtype).reshape(like.shape)

    def intact(self) -> bool:
        return bool((self.raw[: self.begin] == self.MARK).all() and (self.raw[self.end :] == self.MARK).all())


def check(case: Case, graph: Graph, operands: dict[int, tuple[list, list]]) -> int:
    """Compile and compare at each batch of `operands` (batch -> inputs, params); gives the number of comparisons.

    Batches on which the oracle has no answer (the maximum of nothing) are left out.
    """
    compiled = compile_graph(graph)
    done = 0
    for batch, (inputs, params) in operands.items():
        try:
            known = oracle(graph, inputs, params, batch)
        except ValueError:
            if batch:
                raise
            continue
        compiled.set_params(params)
        first = compiled.program(inputs)
        compare(case, graph, first, known, f"batch {batch}")
        guarded = [Guarded(r) for r in first]
        compiled.program(inputs, out=[g.array for g in guarded])
        for number, (a, b) in enumerate(zip(first, guarded)):
            if a.tobytes() != b.array.tobytes():
                raise Mismatch(f"output {number}: two calls at batch {batch} give different bits")
            if not b.intact():
                raise Mismatch(f"output {number}: a call at batch {batch} writes beside it")
        done += 1
    return done


# -- reduction --------------------------------------------------------------------------------------------------------
def failure_of(case: Case, graph: Graph, operands) -> Exception | None:
    try:
        check(case, graph, operands)
    except Exception as error:  # whatever it is, it is the finding
        return error
    return None


def _kind(error: Exception) -> tuple:
    return type(error), str(error)[:25] if not isinstance(error, Mismatch) else ""


def reduced(case: Case, operands: dict, error: Exception) -> tuple[Graph, dict, Exception]:
    """A smaller graph that fails in the same way: fewer outputs, then nodes replaced by inputs with their values."""
    graph = case.graph
    for batch in operands:
        one = {batch: operands[batch]}
        found = failure_of(case, graph, one)
        if found is not None and _kind(found) == _kind(error):
            operands, error = one, found
            break
    kind = _kind(error)
    for output in graph.outputs:
        smaller = _copy(graph, [output])
        found = failure_of(case, smaller, operands)
        if found is not None and _kind(found) == kind:
            graph, error = smaller, found
            break
    progress = True
    while progress:
        progress = False
        for node in list(graph.nodes):
            if node.name == "constant" or node not in graph.nodes or any(o in graph.outputs for o in node.outputs):
                continue
            cut = _cut(graph, node, operands)
            found = failure_of(case, cut[0], cut[1])
            if found is not None and _kind(found) == kind:
                (graph, operands), error, progress = cut, found, True
    return graph, operands, error


def _copy(graph: Graph, outputs) -> Graph:
    smaller = Graph(graph.inputs, graph.params, graph.nodes, outputs, graph.name)
    drop_dead(smaller)
    return smaller


def _cut(graph: Graph, node: Node, operands: dict) -> tuple[Graph, dict]:
    """The graph with the results of a node as inputs, and operands that hold their values."""
    extra = {o: Value(o.type, name=f"cut_{o.name or 'value'}") for o in node.outputs}
    nodes = []
    mapping: dict[Value, Value] = dict(extra)
    for other in graph.nodes:
        if other is node:
            continue
        inputs = [mapping.get(v, v) for v in other.inputs]
        copy = Node(other.primitive, inputs, other.attrs, [o.type for o in other.outputs], other.provenance)
        for o, new in zip(other.outputs, copy.outputs):
            mapping[o], new.name = new, o.name
        nodes.append(copy)
    outputs = [mapping.get(v, v) for v in graph.outputs]
    new = Graph([*graph.inputs, *extra.values()], graph.params, nodes, outputs, graph.name)
    drop_dead(new)
    used = {v for n in new.nodes for v in n.inputs} | set(new.outputs)
    kept_inputs = [i for i, v in enumerate(new.inputs) if v in used]
    kept_params = [i for i, v in enumerate(new.params) if v in used]
    found = {}
    for batch, (inputs, params) in operands.items():
        known = oracle(graph, inputs, params, batch)
        every = [*inputs, *(known.narrow[o] for o in node.outputs)]
        found[batch] = [every[i] for i in kept_inputs], [params[i] for i in kept_params]
    new.inputs = [new.inputs[i] for i in kept_inputs]
    new.params = [new.params[i] for i in kept_params]
    return new, found


def report(case: Case, graph: Graph, operands: dict, error: Exception) -> str:
    """The reduced graph as text, with its operands."""
    lines = [f"seed {case.seed}: {type(error).__name__}: {error}", str(graph)]
    for batch, (inputs, params) in operands.items():
        for value, array in zip([*graph.inputs, *graph.params], [*inputs, *params]):
            text = np.array2string(array.astype("float64"), threshold=60, precision=17)
            lines.append(f"batch {batch}: %{value.name}: {value.type} = {text}")
    return "\n".join(lines)


def run_seed(seed: int, batches: Sequence[int], length: int | None = None, scale: str = "small") -> Case:
    """Draw, compile and compare one graph. Raises AssertionError with the reduced graph."""
    case = random_case(seed, length, scale)
    operands = {n: (case.arrays(case.graph.inputs, n), case.arrays(case.graph.params, LARGEST_BATCH)) for n in batches}
    error = failure_of(case, case.graph, operands)
    if error is not None:
        raise AssertionError(report(case, *reduced(case, operands, error))) from error
    return case


__all__ = ["Case", "Fact", "Mismatch", "check", "random_case", "run_seed"]
