"""What every primitive's record promises, derived from the registry: one test per rule, run on all samples.

- the shape rule agrees with what the reference gives, for static and for symbolic sizes;
- the reference works in float64 and on empty arrays;
- the gradient rule agrees with central differences in float64, and its results have the operands' types;
- the gradient rule traces: it holds for symbolic sizes.
"""

import importlib
import inspect
import zlib

import numpy as np
import pytest

from kgraph import ops
from kgraph.errors import DimDecisionError, KGraphError
from kgraph.ir import PRIMITIVES, Dim, Graph, NotDifferentiable, TensorType, Traced, Tracer, Value, type_of
from kgraph.ir.dims import substitute
from kgraph.ir.interpreter import evaluate, wide_array, wide_attrs
from kgraph.ir.primitive import current_tracer
from kgraph.ir.types import COMPLEX, FLOATS
from kgraph.ir.verifier import verify

# By their names: the package's attributes of these names are its functions.
recurrent_cells, resize_module, scatter_module = (
    importlib.import_module(f"kgraph.ops.{name}") for name in ("recurrent_cells", "resize", "scatter")
)
INEXACT = FLOATS | COMPLEX
STEP = 1e-5
RECORDS = [pytest.param(p, id=p.name) for p in PRIMITIVES.values()]
DIFFERENTIABLE = [
    pytest.param(p, id=p.name) for p in PRIMITIVES.values() if not isinstance(p.gradient, NotDifferentiable)
]
BOUND_TO_DTYPE = ("bitcast_convert", "bitcast_regroup", "nextafter", "pack")
DECLARED = ("stop_gradient", "custom_gradient")  # their derivative is not the one of what they compute
MAX_PROBES = 40  # finite differences per operand and sample


def as_tuple(x) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def arguments(sample) -> list[np.ndarray]:
    return [np.asarray(a) for a in sample.args]


def generator(record) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(record.name.encode()))


# -- the record itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", RECORDS)
def test_record_is_complete(record):
    samples = list(record.samples())
    assert samples, "a record without samples is not tested"
    assert callable(record.gradient) or record.gradient.reason
    assert record.tolerance >= 0
    assert record.results >= 0


@pytest.mark.parametrize("name", ops.__all__)
def test_public_functions_are_documented(name):
    function = getattr(ops, name)
    assert inspect.getdoc(function), f"ops.{name} has no docstring"


@pytest.mark.parametrize("record", RECORDS)
def test_every_primitive_has_a_function(record):
    assert callable(getattr(ops, record.name, None)), f"ops.{record.name} is missing"


# -- shape rule and reference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", RECORDS)
def test_shape_rule_agrees_with_reference(record):
    for sample in record.samples():
        args = arguments(sample)
        inferred = as_tuple(record.infer(*map(type_of, args), **sample.attrs))
        results = as_tuple(record.reference(*args, **sample.attrs))
        assert [type_of(r) for r in results] == list(inferred), sample
        if record.results:
            assert record.results == len(results)


@pytest.mark.parametrize("record", RECORDS)
def test_reference_leaves_its_operands_alone(record):
    for sample in record.samples():
        args = arguments(sample)
        before = [a.copy() for a in args]
        record.reference(*args, **sample.attrs)
        for a, b in zip(args, before, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("record", RECORDS)
def test_reference_in_float64_agrees(record):
    if "random" in record.traits or record.name in BOUND_TO_DTYPE:
        pytest.skip("defined by the dtype of its operands or attributes")
    for sample in record.samples():
        args = arguments(sample)
        if sample.name == "special" or not all(a.dtype.name in ("float32", "complex64") for a in args):
            continue
        wide_args, attrs = [wide_array(a) for a in args], wide_attrs(sample.attrs)
        wide = as_tuple(record.reference(*wide_args, **attrs))
        inferred = as_tuple(record.infer(*map(type_of, wide_args), **attrs))
        assert [type_of(w) for w in wide] == list(inferred), sample
        narrow = as_tuple(record.reference(*args, **sample.attrs))
        for n, w in zip(narrow, wide, strict=True):
            if type_of(n).dtype not in ("float32", "complex64") or "host" in record.traits or not np.size(n):
                continue
            scale = np.max(np.abs(w[np.isfinite(w)]), initial=0.0) if np.ndim(w) else abs(w)
            np.testing.assert_allclose(n, w, rtol=1e-4, atol=max(record.tolerance * 30, 1e-6) * (scale or 1))


# -- symbolic sizes ---------------------------------------------------------------------------------------------------

N = Dim.symbol("N")
PROBES = (1, 2, 3, 5, 8)


def symbolic_types(types, size):
    """Types whose leading sizes equal to `size` became N."""
    return [t.with_shape((N, *t.shape[1:])) if t.rank and t.shape[0] == size else t for t in types]


@pytest.mark.parametrize("record", RECORDS)
def test_shape_rule_with_a_symbolic_leading_size(record):
    """Where a rule accepts a symbolic size, its answer is the static one for that size."""
    for sample in record.samples():
        types = [type_of(a) for a in arguments(sample)]
        sizes = {t.shape[0] for t in types if t.rank} - {0, 1}
        static = as_tuple(record.infer(*types, **sample.attrs))
        for size in sizes:
            symbolic = symbolic_types(types, size)
            try:
                result = as_tuple(record.infer(*symbolic, **sample.attrs))
            except (DimDecisionError, KGraphError):
                continue  # the attributes fix the size
            concrete = [t.with_shape(substitute(s, {"N": size}) for s in t.shape) for t in result]
            assert concrete == list(static), (sample, symbolic)


ACCEPTS_SYMBOLIC = [p for p in PRIMITIVES.values() if p.traits & {"elementwise", "reduction"}]


@pytest.mark.parametrize("record", ACCEPTS_SYMBOLIC, ids=lambda p: p.name)
def test_elementwise_and_reductions_take_symbolic_sizes(record):
    accepted = 0
    for sample in record.samples():
        types = [type_of(a) for a in arguments(sample)]
        for size in {t.shape[0] for t in types if t.rank} - {0, 1}:
            try:
                record.infer(*symbolic_types(types, size), **sample.attrs)
                accepted += 1
            except DimDecisionError:
                pass
    assert accepted


# -- gradients --------------------------------------------------------------------------------------------------------


def gradient_samples(record):
    """Samples with float operands and results, widened: (operands, attributes, results)."""
    for sample in record.samples():
        if sample.name.startswith("special"):
            continue
        args = arguments(sample)
        if any(a.dtype.name in FLOATS and a.dtype.name != "float32" for a in args):
            continue
        wide, attrs = [wide_array(a) for a in args], wide_attrs(sample.attrs)
        results = as_tuple(record.reference(*wide, **attrs))
        types = as_tuple(record.infer(*map(type_of, wide), **attrs))
        results = tuple(np.asarray(r, t.np_dtype) for r, t in zip(results, types, strict=True))
        if any(a.dtype.name in INEXACT for a in wide) and any(r.dtype.name in INEXACT for r in results):
            yield wide, attrs, results


def random_cotangents(rng, results) -> tuple:
    out = []
    for r in results:
        c = rng.standard_normal(r.shape)
        out.append((c + 1j * rng.standard_normal(r.shape) if r.dtype.kind == "c" else c).astype(r.dtype))
    return tuple(out)


def pairing(cotangents, results) -> float:
    return sum(float(np.sum(np.real(c * np.asarray(r)))) for c, r in zip(cotangents, results) if r.dtype.kind in "fc")


def differences(record, args, attrs, which, cotangents, positions, direction):
    """Central differences of the pairing along single elements of one operand."""
    out = []
    for position in positions:
        ends = []
        for sign in (1, -1):
            moved = [a.copy() for a in args]
            moved[which].reshape(-1)[position] += sign * STEP * direction
            ends.append(pairing(cotangents, [np.asarray(r) for r in as_tuple(record.reference(*moved, **attrs))]))
        out.append((ends[0] - ends[1]) / (2 * STEP))
    return np.array(out)


@pytest.mark.parametrize("record", DIFFERENTIABLE)
def test_gradient_against_central_differences(record):
    if record.name in DECLARED:
        pytest.skip("its derivative is what it is declared to be")
    rng, checked = generator(record), 0
    for args, attrs, results in gradient_samples(record):
        cotangents = random_cotangents(rng, results)
        gradients = record.gradient(cotangents, tuple(args), results, **attrs)
        assert len(gradients) == len(args)
        for which, (x, g) in enumerate(zip(args, gradients, strict=True)):
            if x.dtype.name not in INEXACT:
                assert g is None, "operands without derivative have the cotangent None"
                continue
            if g is not None:
                assert type_of(g) == type_of(x)
            g = np.zeros_like(x) if g is None else np.asarray(g)
            positions = rng.permutation(x.size)[:MAX_PROBES]
            real = differences(record, args, attrs, which, cotangents, positions, 1)
            scale = max(1.0, np.max(np.abs(real), initial=0.0))
            got = g.reshape(-1)[positions]
            np.testing.assert_allclose(got.real, real, rtol=1e-5, atol=2e-7 * scale, err_msg=f"{which} {attrs}")
            if x.dtype.kind == "c":  # dL = Re(sum(g dx)), so that a step along i shows -Im(g)
                imaginary = differences(record, args, attrs, which, cotangents, positions, 1j)
                np.testing.assert_allclose(-got.imag, imaginary, rtol=1e-5, atol=2e-7 * scale)
            checked += x.size > 0
    assert checked, "no sample checks the gradient"


# The values of attributes that choose what a primitive computes; bool attributes have two.
CHOICES = {
    ("pad_mirror", "mode"): {"reflect", "symmetric", "edge", "wrap"},
    ("qr", "mode"): {"reduced", "complete"},
    ("reduce_window", "kind"): {"max", "min", "sum"},
    ("resize", "method"): set(resize_module.METHODS),
    ("rnn", "cell"): set(recurrent_cells.GATES),
    ("rnn", "activation"): set(recurrent_cells.ACTIVATIONS),
    ("rnn", "recurrent_activation"): {"sigmoid", "hard_sigmoid"},  # those of `activation` again, by the same code
    ("scatter_along_axis", "reduction"): set(scatter_module.REDUCTIONS),
    ("scatter_nd", "reduction"): set(scatter_module.REDUCTIONS),
    ("take", "mode"): {"clip", "fill", "wrap"},
}
# The primitives between floats without a gradient rule; their records say why.
NO_RULE = {
    "ctc_beam_search",
    "eig",
    "fusion",
    "nextafter",
    "pack",
    "random_beta",
    "random_binomial",
    "random_gamma",
    "rnn_gradient",
    "select_and_scatter_add",
    "while_loop",
}


def test_which_primitives_have_no_gradient():
    """Beyond these, only primitives whose operands or results are no floats have none."""
    found = set()
    for record in PRIMITIVES.values():
        if not isinstance(record.gradient, NotDifferentiable):
            continue
        for sample in record.samples():
            types = [type_of(a) for a in arguments(sample)]
            results = as_tuple(record.infer(*types, **sample.attrs))
            if all(any(t.dtype in INEXACT for t in side) for side in (types, results)):
                found.add(record.name)
    assert found == NO_RULE


@pytest.mark.parametrize("record", DIFFERENTIABLE)
def test_gradients_are_checked_in_every_variant(record):
    """The samples of the test above have every value of attributes that are bools or names."""
    seen: dict[str, set] = {}
    for _, attrs, _ in gradient_samples(record):
        for name, value in attrs.items():
            if isinstance(value, (bool, str)) and not name.endswith("dtype"):
                seen.setdefault(name, set()).add(value)
    for name, values in seen.items():
        assert values == CHOICES.get((record.name, name), {False, True}), name


class Recorded(Traced):
    """A value of the small tracer below."""

    __slots__ = ("tracer", "value")

    def __init__(self, tracer, value):
        self.tracer, self.value = tracer, value

    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)


class Recorder(Tracer):
    """Records primitives in a graph; arrays among the operands become constants."""

    def __init__(self):
        self.graph = Graph()

    def input(self, type):
        value = Value(type)
        self.graph.inputs.append(value)
        return Recorded(self, value)

    def value(self, x):
        if isinstance(x, Recorded):
            return x.value
        return self.graph.add(PRIMITIVES["constant"], [], value=np.asarray(x))

    def record(self, primitive, args, attrs):
        out = self.graph.add(primitive, [self.value(a) for a in args], **attrs)
        return tuple(Recorded(self, o) for o in out) if isinstance(out, tuple) else Recorded(self, out)


def trace_gradient(record, types, attrs):
    """The graph of the forward primitive and its gradient; operands and cotangents are inputs."""
    recorder = Recorder()
    token = current_tracer.set(recorder)
    try:
        operands = tuple(recorder.input(t) for t in types)
        results = as_tuple(recorder.record(record, operands, attrs))
        cotangents = tuple(recorder.input(TensorType(r.shape, r.dtype)) for r in results)
        gradients = record.gradient(cotangents, operands, results, **attrs)
    finally:
        current_tracer.reset(token)
    recorder.graph.outputs = [recorder.value(g) for g in gradients if g is not None]
    return recorder.graph


@pytest.mark.parametrize("record", DIFFERENTIABLE)
def test_gradient_traces_with_symbolic_sizes(record):
    """The rule's graph, recorded once for a symbolic size, gives what the rule gives eagerly."""
    rng = generator(record)
    for args, attrs, results in gradient_samples(record):
        types = [type_of(a) for a in args]
        size = max((t.shape[0] for t in types if t.rank), default=0)
        try:
            graph = trace_gradient(record, symbolic_types(types, size) if size > 1 else types, attrs)
        except (DimDecisionError, KGraphError):
            graph = trace_gradient(record, types, attrs)
        verify(graph)
        cotangents = random_cotangents(rng, results)
        eager = [g for g in record.gradient(cotangents, tuple(args), results, **attrs) if g is not None]
        traced = evaluate(graph, [*args, *cotangents], sizes={"N": size})
        for e, t in zip(eager, traced, strict=True):
            np.testing.assert_allclose(t, e, rtol=1e-9, atol=1e-9)
