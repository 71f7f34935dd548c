"""What cuDNN is asked for, on an object in its place: descriptors, engines, padding, epilogues, errors, programs."""

from __future__ import annotations

import gc
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import keras
import numpy as np
import pytest

import kgraph
from kgraph import errors
from kgraph.codegen.cuda import families
from kgraph.codegen.cuda.target import simulator_target
from kgraph.compiler import compile_graph
from kgraph.ir import PRIMITIVES, Dim, Graph, TensorType, Value
from kgraph.ir.dims import evaluate
from kgraph.ir.interpreter import evaluate as evaluate_graph
from kgraph.report import explain
from kgraph.runtime.cuda.cudnn import Convolutions, padding_behind
from kgraph.runtime.cuda.device import device_for
from kgraph.runtime.steps import Convolution
from tests.codegen.contractions import add, filled, verify
from tests.cuda.fake_cudnn import Engine, FakeCudnn
from tests.cuda.test_conv import convolution, filter_gradient

TARGET = replace(simulator_target(), convolutions=True, tf32=True)
N, H = Dim.symbol("N"), Dim.symbol("H")


@pytest.fixture
def library():
    device = device_for("cuda-simulator")
    fake = FakeCudnn(device)
    device.libraries[Convolution] = Convolutions(device, fake)
    yield fake
    device.libraries.clear()


def graph_of(node) -> Graph:
    """A graph of one node."""
    inputs = [Value(v.type, name=f"x{n}") for n, v in enumerate(node.inputs)]
    graph = Graph(inputs, name=node.name)
    out = graph.add(node.primitive, tuple(inputs), **node.attrs)
    graph.outputs = list(out) if isinstance(out, (list, tuple)) else [out]
    return graph


def compiled(node, target=TARGET):
    return compile_graph(graph_of(node), target=target)


def check(node, sizes=None, target=TARGET, calls=2):
    """Runs a program of the node (launched, captured, replayed), and compares with float64; gives the program."""
    sizes = sizes or {}
    program = compiled(node, target).program
    arrays = [filled([evaluate(n, sizes) for n in v.shape], v.dtype, seed) for seed, v in enumerate(node.inputs)]
    for _ in range(calls):
        results = program(arrays)
    verify(node, arrays, list(results), sizes)
    return program


FORMS = {
    "3x3": ((2, 5, 6, 3), (3, 3, 3, 4), {"padding": 1}),
    "strided": ((2, 7, 6, 3), (3, 2, 3, 4), {"strides": (2, 3), "padding": 1}),
    "dilated": ((1, 9, 7, 2), (3, 2, 2, 3), {"rhs_dilation": (2, 3), "padding": 1}),
    "same, even": ((1, 8, 8, 3), (3, 3, 3, 2), {"strides": 2, "padding": ((0, 1),) * 2}),
    "same, odd": ((1, 7, 7, 3), (3, 3, 3, 2), {"strides": 2, "padding": ((1, 1),) * 2}),
    "pixels that no window meets": ((1, 8, 9, 3), (2, 2, 3, 2), {"strides": 3}),
    "groups": ((2, 5, 4, 6), (3, 3, 2, 9), {"padding": 1, "feature_groups": 3}),
    "causal 1D": ((2, 9, 3), (3, 3, 4), {"padding": ((4, 0),), "rhs_dilation": 2}),
    "3D": ((1, 3, 4, 5, 2), (2, 2, 3, 2, 3), {"strides": (1, 2, 2), "padding": ((1, 0), (0, 1), (1, 1))}),
    "1x1, strided": ((1, 5, 6, 3), (1, 1, 3, 2), {"strides": 2}),
    "one of everything": ((1, 3, 3, 1), (3, 3, 1, 1), {}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_forms(library, form, dtype):
    x, w, options = FORMS[form]
    program = check(convolution(x, w, dtype, **options))
    assert program.stats()["library_calls"] == 1
    (operation, _) = library.convolved[0]
    assert operation.kind == 10


@pytest.mark.parametrize("form", FORMS)
def test_cotangents_of_weights(library, form):
    x, (*window, channels, filters), options = FORMS[form]
    groups = options.pop("feature_groups", 1) if form == "groups" else 1
    node = filter_gradient(x, filters, tuple(window), "bfloat16", groups, **options)
    if form == "groups":
        options["feature_groups"] = groups
    program = check(node)
    assert program.stats()["library_calls"] == 1
    assert library.convolved[0][0].kind == 11
    assert channels == node.output.shape[-2]


DILATED = {
    "3x3": ((2, 3, 4, 3), (3, 3, 3, 2), {"lhs_dilation": 2, "padding": ((1, 2), (1, 1))}),
    "odd remainders": ((1, 3, 2, 3), (3, 3, 3, 2), {"lhs_dilation": 3, "padding": ((2, 4), (0, 2))}),
    "dilated window": ((1, 3, 4, 2), (2, 3, 2, 3), {"lhs_dilation": 2, "rhs_dilation": (2, 1), "padding": 1}),
    "groups": ((1, 3, 3, 4), (3, 3, 2, 6), {"lhs_dilation": 2, "padding": 1, "feature_groups": 2}),
    "1D": ((2, 4, 3), (3, 3, 2), {"lhs_dilation": 2, "padding": ((2, 2),)}),
    "one axis alone": ((1, 3, 4, 2), (3, 3, 2, 2), {"lhs_dilation": (2, 1), "padding": ((1, 2), (1, 1))}),
}


@pytest.mark.parametrize("form", DILATED)
def test_dilated_images_are_cotangents(library, form):
    x, w, options = DILATED[form]
    check(convolution(x, w, "float16", **options))
    (operation, _) = library.convolved[0]
    assert operation.kind == 12


@pytest.mark.parametrize(
    ("x", "w", "dtype", "options"),
    [
        ((1, 5, 5, 2), (3, 3, 2, 2), "float64", {}),
        ((1, 5, 5, 2), (3, 3, 2, 2), "int32", {}),
        ((1, 5, 5, 2), (3, 3, 1, 2), "float16", {"feature_groups": 2}),
        ((1, 3, 3, 2), (2, 2, 2, 2), "float16", {"lhs_dilation": 2, "strides": 3, "padding": 1}),
        ((1, 2, 2, 2, 2, 2), (2, 2, 2, 2, 2, 2), "float16", {}),
    ],
)
def test_what_the_library_does_not_do_has_kernels_alone(x, w, dtype, options):
    assert all(call.library is None for call in families.lower(convolution(x, w, dtype, **options), TARGET))


def test_float32_is_not_rounded_unless_that_is_allowed():
    node = convolution((1, 5, 5, 2), (3, 3, 2, 2), padding=1)
    assert families.lower(node, TARGET)[0].library is not None
    assert families.lower(node, replace(TARGET, tf32=False))[0].library is None
    gradient = filter_gradient((1, 5, 5, 2), 3, (3, 3))
    assert families.lower(gradient, TARGET)[0].library is not None
    assert families.lower(gradient, replace(TARGET, tf32=False))[0].library is None


@pytest.mark.parametrize("sizes", [{"N": 2, "H": 5}, {"N": 1, "H": 8}, {"N": 3, "H": 3}])
def test_symbolic_images(library, sizes):
    """Padding "same" of a size that is not known: it is symmetric for some, and not for others."""
    from kgraph.ops.convolution import same_padding

    pads = (same_padding(H, 3, 2), (1, 1))
    check(convolution((N, H, 4, 3), (3, 3, 3, 2), "float16", strides=(2, 1), padding=pads), sizes)
    assert library.convolved


def test_an_empty_batch_and_cropped_images_are_kgraph_s(library):
    node = convolution((N, 6, 5, 2), (2, 2, 2, 3), "float16", padding=((-1, 0), (0, 1)))
    program = compiled(node)
    program.program([filled((1, 6, 5, 2), "float16"), filled((2, 2, 2, 3), "float16", 1)])
    program.program([filled((0, 6, 5, 2), "float16"), filled((2, 2, 2, 3), "float16", 1)])
    assert not library.convolved
    told = [d.reason for d in explain("cropped", program).decisions if "cuDNN" in d.outcome]
    assert told == ["the image is cropped"]
    check(node, {"N": 1})
    check(filter_gradient((N, 4, 4, 2), 3, (2, 2), "float16"), {"N": 0})
    assert not library.convolved


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # window, size, count, stride, low, dilation
        ((3, 8, 4, 2, 0, 1), 1),
        ((3, 7, 4, 2, 1, 1), 1),
        ((2, 8, 3, 3, 0, 1), 0),
        ((3, 9, 4, 2, 0, 1), 0),
        ((3, 10, 4, 2, 0, 1), 0),
        ((3, 9, 3, 2, 0, 1), -1),
        ((2, 9, 9, 1, 3, 4), 1),
    ],
)
def test_padding_behind(sizes, expected):
    assert padding_behind(*sizes) == expected


def test_engines_that_round_or_vary_are_left_out(library):
    library.engines = [Engine((n,)) for n in range(1, 9)] + [Engine(()), Engine((0, 4)), Engine((9,))]
    node = convolution((1, 5, 5, 2), (3, 3, 2, 2), "float16")
    program = compiled(node)
    arrays = [filled(v.shape, v.dtype) for v in node.inputs]
    program.program(arrays)
    assert not library.convolved
    assert any("no engine" in d.reason for d in explain("conv", program).decisions)
    wanted = Engine((0, 9))
    library.engines += [Engine(workspace=1 << 40), Engine(holds=False), wanted, Engine()]
    check(node)
    assert [engine for _, engine in library.convolved] == [wanted] * 2


def test_what_a_graph_is_refused_for_is_told(library):
    library.refused = 3002
    node = convolution((1, 5, 5, 2), (3, 3, 2, 2), "float16")
    program = compiled(node)
    program.program([filled(v.shape, v.dtype) for v in node.inputs])
    assert any("NOT_SUPPORTED (3002) as the test wants it" in d.reason for d in explain("conv", program).decisions)


def test_failures(library):
    node = convolution((1, 5, 5, 2), (3, 3, 2, 2), "float16")
    arrays = [filled(v.shape, v.dtype) for v in node.inputs]
    library.failures = {"cudnnBackendExecute": 5000}
    with pytest.raises(errors.DeviceError, match="EXECUTION_FAILED"):
        compiled(node).program(arrays)
    library.failures = {"cudnnBackendFinalize": 4000}
    with pytest.raises(errors.DeviceError, match="INTERNAL_ERROR"):
        compiled(node).program(arrays)
    library.failures = {"cudnnCreate": 1001}
    with pytest.raises(errors.DeviceError, match="NOT_INITIALIZED"):
        Convolutions(device_for("cuda-simulator"), library)


def test_descriptors_are_given_back(library):
    program = check(convolution((1, 5, 5, 2), (3, 3, 2, 2), "float16"))
    assert library.alive
    del program
    gc.collect()
    assert not library.alive


def test_workspace_grows_and_what_plans_have_stays(library):
    library.engines = [Engine(workspace=100)]
    node = convolution((1, 5, 5, 2), (3, 3, 2, 2), "float16")
    first = compiled(node)
    arrays = [filled(v.shape, v.dtype, n) for n, v in enumerate(node.inputs)]
    (expected,) = first.program(arrays)
    library.engines = [Engine(workspace=1 << 16)]
    check(convolution((1, 6, 6, 2), (3, 3, 2, 2), "float16"))
    for _ in range(3):
        np.testing.assert_array_equal(first.program(arrays)[0], expected)
    opened = device_for("cuda-simulator").library(Convolution)
    assert opened.workspace(1) is opened.workspace(1 << 16)


def test_nothing_lies_where_the_library_s_filters_do(library):
    """They are there beside the image, which dies with the step, and what is computed."""
    x, *weights = (Value(TensorType(s, "float16")) for s in ((1, 6, 6, 4), *[(3, 3, 4, 4)] * 3))
    graph = Graph([x, *weights], name="chain")
    attrs = convolution((1, 6, 6, 4), (3, 3, 4, 4), padding=1).attrs
    for w in weights:
        x = add(graph, "conv", x, w, **attrs)
    graph.outputs = [x]
    program = compile_graph(graph, target=TARGET).program
    program([filled(v.shape, v.dtype) for v in graph.inputs])
    (binding,) = program._bindings.values()
    storage = binding.storage
    for step in program.steps:
        places = {b: storage.places[b] for b in step.touched}
        taken = sorted((p.offset, p.offset + storage.nbytes[b]) for b, p in places.items() if p.space == "arena")
        assert len(taken) >= 2
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))


def test_the_library_is_told_how_addresses_are_aligned(library):
    """Arrays of other libraries may lie anywhere; what is kgraph's own is aligned to 64 bytes at least."""
    x, w = Value(TensorType((1, 5, 5, 4), "float16")), Value(TensorType((3, 3, 4, 4), "float16"))
    graph = Graph([x, w], name="chain")
    attrs = convolution((1, 5, 5, 4), (3, 3, 4, 4), padding=1).attrs
    graph.outputs = [add(graph, "conv", add(graph, "conv", x, w, **attrs), w, **attrs)]
    told = []
    for donations in ([], [(0, 0)]):
        library.convolved.clear()
        program = compile_graph(graph, target=TARGET, donations=donations).program
        program([filled(v.shape, v.dtype) for v in graph.inputs])
        for operation, _ in library.convolved:
            tensors = [operation.attributes[n][0] for n in (703, 704, 705)]
            told.append([min(tensor.attributes[900][0], 64) for tensor in tensors])
    # Filters, image, result; where nothing is known they are aligned like an element.
    assert told == [[64, 2, 64], [64, 64, 64], [64, 2, 64], [64, 64, 2]]


def test_iterations_of_loops_are_aligned_like_their_elements(library):
    """Slices of sequences, and places in what is stacked."""
    attrs = convolution((1, 3, 3, 1), (3, 3, 1, 1), padding=1).attrs
    image, weights = TensorType((1, 3, 3, 1), "float16"), TensorType((3, 3, 1, 1), "float16")
    body = Graph([Value(image), Value(weights)], name="body")
    body.outputs = [add(body, "conv", *body.inputs, **attrs)]
    graph = Graph([Value(TensorType((5, *image.shape), "float16")), Value(weights)], name="loop")
    scan = {"num_carry": 0, "num_xs": 1, "length": 5, "reverse": False}
    graph.outputs = list(graph.add(PRIMITIVES["scan"], graph.inputs, body=body, **scan))
    program = compile_graph(graph, target=TARGET, passes=[]).program
    arrays = [filled(v.shape, v.dtype, n) for n, v in enumerate(graph.inputs)]
    for _ in range(3):
        (got,) = program(arrays)
        np.testing.assert_allclose(got, evaluate_graph(graph, arrays)[0], rtol=2e-3, atol=2e-3)
    assert program.stats()["library_calls"] == 1
    assert len(library.convolved) == 10  # launched, captured
    assert all(op.attributes[705][0].attributes[900] == [2] for op, _ in library.convolved)


def test_the_device_is_the_thread_s_when_the_library_is_called(library, monkeypatch):
    """A thread that has not used the device has no context, and libraries find the device by that."""
    node = convolution((1, 5, 5, 2), (3, 3, 2, 2), "float16")
    arrays = [filled(v.shape, v.dtype, n) for n, v in enumerate(node.inputs)]
    program = compiled(node).program
    device, current = device_for("cuda-simulator"), threading.local()
    monkeypatch.setattr(device, "make_current", lambda: setattr(current, "device", device))
    call = FakeCudnn.__getattr__

    def watched(self, name):
        assert getattr(current, "device", None) is device
        return call(self, name)

    monkeypatch.setattr(FakeCudnn, "__getattr__", watched)
    (expected,) = program(arrays)
    with ThreadPoolExecutor(1) as pool:
        (result,) = pool.submit(program, arrays).result()
    np.testing.assert_array_equal(result, expected)


def scaled(graph, result, bias, more):
    shifted = add(graph, "add", result, bias)
    return [add(graph, "relu", add(graph, "add", shifted, more)), shifted]


def test_results_that_no_output_can_hold_have_room_of_their_own(library):
    """As where batch normalisation follows in mixed precision: it takes float32."""
    wide = lambda graph, result: [add(graph, "convert", result, dtype="float32")]
    node = convolution((2, 5, 6, 3), (3, 3, 3, 4), "bfloat16", [], wide, padding=1)
    (call,) = families.lower(node, TARGET)
    assert call.library.operands[-1] not in node.outputs
    program = compiled(node).program
    arrays = [filled(v.shape, v.dtype, n) for n, v in enumerate(node.inputs)]
    (result,) = program(arrays)
    expected = (
        node.attrs["body"]
        .nodes[0]
        .primitive.reference(*(a.astype(np.float64) for a in arrays), **node.attrs["body"].nodes[0].attrs)
    )
    np.testing.assert_allclose(result, expected, rtol=8e-3, atol=1e-2)
    assert program.stats()["library_calls"] == 1


@pytest.mark.parametrize("refused", [False, True])
def test_epilogues_follow_in_a_kernel(library, refused):
    library.engines = [] if refused else [Engine()]
    extras = [TensorType((4,), "float16"), TensorType((2, 5, 6, 4), "float16")]
    node = convolution((2, 5, 6, 3), (3, 3, 3, 4), "float16", extras, scaled, padding=1)
    (call,) = families.lower(node, TARGET)
    assert not call.notes["inplace"], "the epilogue reads its operands after the library has written"
    program = check(node, calls=3)
    assert program.stats()["library_calls"] == (0 if refused else 1)


def test_sums_in_pieces_are_the_library_s_as_a_whole(library):
    """Where kernels take two launches, the library takes the place of both."""
    node = filter_gradient((2, 8, 8, 2), 3, (1, 2), "float16")
    calls = families.lower(node, TARGET)
    assert [call.continues for call in calls] == [False, True]
    check(node)
    library.engines = []
    check(node)


def launches_of(monkeypatch) -> list[int]:
    """Gets the number of blocks of every launch from here on, those of captured ones when they are replayed."""
    device, found = device_for("cuda-simulator"), []
    launch = device.launch

    def counted(function, grid, *rest):
        if device._captured is None:
            found.append(grid)
        launch(function, grid, *rest)

    monkeypatch.setattr(device, "launch", counted)
    return found


def with_params(*params: tuple[int, ...], constant: np.ndarray | None = None) -> Graph:
    """Two convolutions of x[N, 5, 5, 4] in a row by weights that are parameters, or one of them a constant."""
    graph = Graph([Value(TensorType((N, 5, 5, 4), "float16"), name="x")], name="two")
    graph.params = [Value(TensorType(shape, "float16"), name=f"w{n}") for n, shape in enumerate(params)]
    weights = list(graph.params)
    if constant is not None:
        weights.append(add(graph, "constant", value=constant))
    attrs = convolution((1, 5, 5, 4), (3, 3, 4, 4), padding=1).attrs
    value = graph.inputs[0]
    for number in range(2):
        value = add(graph, "conv", value, weights[number % len(weights)], **attrs)
    graph.outputs = [value]
    return graph


@pytest.mark.parametrize("kind", ["two", "one for both", "one is a constant"])
def test_weights_are_copied_when_they_are_assigned(library, monkeypatch, kind):
    """And not in every call: the copies are no part of what is captured."""
    shape = (3, 3, 4, 4)
    constant = filled(shape, "float16", 5) if kind == "one is a constant" else None
    graph = with_params(*[shape] * (2 if kind == "two" else 1), constant=constant)
    program = compile_graph(graph, target=TARGET).program
    launched = launches_of(monkeypatch)
    program.set_params({n: filled(shape, "float16", n + 1) for n in range(len(graph.params))})
    copies = []

    def call(rows: int):
        launched.clear()
        x = filled((rows, 5, 5, 4), "float16", rows)
        (got,) = program([x])
        copies.append(len(launched))
        (wanted,) = evaluate_graph(graph, [x], list(program.values))
        np.testing.assert_allclose(got.astype(np.float64), wanted.astype(np.float64), rtol=4e-3, atol=4e-2)

    for _ in range(3):  # launched, captured, replayed
        call(2)
    call(1)  # other sizes of the image: the weights are the same
    program.set_param(0, filled(shape, "float16", 9))
    for rows in (2, 2, 1):
        call(rows)
    first = 1 if kind == "one for both" else 2
    assert copies == [first, 0, 0, 0, 1, 0, 0]
    assert program.stats()["library_calls"] == 2
    assert program.stats()["prepared_bytes"] == first * np.prod(shape) * 2
    # The parameters themselves are nobody's operands, and have no place on the device.
    assert program.resident_params.nbytes() == 0


def test_weights_that_the_library_leaves_are_not_copied(library, monkeypatch):
    library.engines = []
    graph = with_params((3, 3, 4, 4))
    program = compile_graph(graph, target=TARGET).program
    program.set_param(0, filled((3, 3, 4, 4), "float16", 1))
    launched = launches_of(monkeypatch)
    for _ in range(2):
        program([filled((2, 5, 5, 4), "float16")])
    assert len(launched) == 4
    assert program.stats()["prepared_bytes"] == 0


def network():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2D(4, 3, padding="same", groups=2),
            layers.Conv2DTranspose(3, 3, strides=2, padding="same"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2),
        ]
    )


@pytest.mark.parametrize("installed", [True, False])
def test_training_steps_take_all_three_kinds(library, installed):
    """The optimizer's updates are arranged after lowering, which has to keep the kernels around the library's calls."""
    if not installed:
        library.engines = []
    keras.utils.set_random_seed(1)
    x, y = filled((2, 8, 8, 3), "float32"), filled((2, 2), "float32", 1)
    weights = {}
    for name in ("cpu", "cuda-simulator"):
        kgraph.set_device(name, tf32=True)
        try:
            keras.utils.set_random_seed(1)
            model = network()
            model.compile("sgd", loss="mse")
            step = kgraph.compile_step(model, (x, y))
            for _ in range(2):
                step((x, y))
            weights[name] = model.get_weights()
        finally:
            kgraph.set_device("cpu")
    for mine, wanted in zip(weights["cuda-simulator"], weights["cpu"], strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-5)
    assert {operation.kind for operation, _ in library.convolved} == ({10, 11, 12} if installed else set())
