"""What KerasHub's tests check with `run_layer_test`, `run_backbone_test` and `run_task_test` also goes through kgraph.

Layers, backbones and tasks are compiled and have to give what the eager ones give, backbones for a second length too,
on which nothing was traced. Images of one colour are replaced by noise, because batch normalisation leaves nothing but
rounding of them. Tasks take a step of `fit` besides, whose gradients have to be those of a step of
`fit(run_eagerly=True)`: plain gradient descent with a large rate, so that the change of a weight is its gradient.

What a task generates, in any test, has to be what its `generate_step` gives op by op with the same seeds.
"""

from __future__ import annotations

import functools
import inspect

import numpy as np

from tests.conformance.compiled_layers import FLOAT32_ERRORS, TOLERANCES, assert_agree, check

LENGTH = 3  # of the second call of a backbone for sequences
# Where results differ, eager calls on weights and inputs that are rounded otherwise tell how well they are determined.
MOVES = 3
# Of the numbers of a dtype, relative to them.
SPACING = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
# A power of two, so that it is the gradients that round, and not the sums of weights and changes.
RATE = 1024.0
# Relative to the largest gradient of a weight, or to a part of the model's largest where the weight's own are smaller:
# those that vanish but for rounding, such as the biases of keys in attention, have no digits to compare. Nor have any
# below the last number, if what they are sums of is about 1.
GRADIENT_TOLERANCE, SMALLEST_PART, SMALLEST_GRADIENT = 1e-3, 1e-3, 1e-7


def install() -> None:
    """Wrap the methods of KerasHub's test case that build layers and models, and the compiled `generate_step`."""
    from keras_hub.src.tests.test_case import TestCase

    from kgraph.frontend.keras_backend.generation import Generation

    for name, further in (
        ("run_layer_test", check_layer),
        ("run_backbone_test", check_backbone),
        ("run_task_test", check_task),
    ):
        setattr(TestCase, name, _followed_by(getattr(TestCase, name), further))
    Generation.__call__ = checked_generation(Generation.__call__)


def _followed_by(original, further):
    """original, and then further with those of its arguments that it takes, by name."""
    signature, taken = inspect.signature(original), inspect.signature(further).parameters

    @functools.wraps(original)
    def run(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        # The original puts layers of other dtypes in the place of those in the dict.
        given.arguments["init_kwargs"] = dict(given.arguments["init_kwargs"])
        original(self, *args, **kwargs)
        further(**{name: given.arguments[name] for name in taken})

    return run


def check_layer(cls, init_kwargs, input_data) -> None:
    """Raise AssertionError where the compiled layer differs from the eager one."""
    first = next(iter(inspect.signature(cls.call).parameters.keys() - {"self"}), None)
    whole = isinstance(input_data, dict) and not input_data.keys() <= inspect.signature(cls.call).parameters.keys()
    check(cls, init_kwargs, {}, {first: input_data} if whole else input_data)


def check_backbone(cls, init_kwargs, input_data) -> None:
    """Raise AssertionError where the compiled backbone differs from the eager one, for one of two lengths."""
    from keras import tree

    backbone = cls(**init_kwargs)
    inputs = [tree.map_structure(_varied, input_data)]
    if backbone.token_embedding is not None and all(len(x.shape) == 2 for x in tree.flatten(input_data)):
        inputs.append(tree.map_structure(lambda x: x[:, :LENGTH], input_data))
    _check_calls(backbone, inputs)


def check_task(cls, init_kwargs, train_data, compile_kwargs) -> None:
    """Raise AssertionError where the compiled task, or a step of `fit`, differs from the eager one."""
    import keras

    task = cls(**init_kwargs)
    x, y, sample_weight = map(_arrays, keras.utils.unpack_x_y_sample_weight(task.preprocessor(*train_data)))
    x = keras.tree.map_structure(_varied, x)
    _check_calls(task, [x])
    _check_step(task, compile_kwargs or {}, x, y, sample_weight)


def _arrays(data):
    """data, with the batch in arrays; labels may be in a list."""
    import keras

    if data is None or isinstance(data, list):
        return None if data is None else np.asarray(data)
    return keras.tree.map_structure(keras.ops.convert_to_numpy, data)


def _varied(x):
    """x, or noise added to it if it is a batch of images that have one colour."""
    x = np.asarray(x)
    if x.ndim < 4 or x.dtype.kind not in "fV" or np.any(x != x.flat[0]):
        return x
    return (x + np.random.default_rng(0).random(x.shape)).astype(x.dtype)


def checked_generation(original):
    """The call of a `Generation`, which raises AssertionError where the compiled step differs from the eager one."""
    from kgraph.frontend.keras_backend import generation

    @functools.wraps(original)
    def call(self, *args, **kwargs):
        task = self.task
        seeds = [*getattr(getattr(task, "sampler", None), "variables", []), *task.non_trainable_variables]
        before = [seed.numpy() for seed in seeds]
        found = original(self, *args, **kwargs)
        given, after = generation.tree.map_structure(generation.tensor, (args, kwargs)), [s.numpy() for s in seeds]

        def eager(data):
            _assign(seeds, before)
            return task.generate_step(*data[0], **data[1])

        expected, what = eager(given), f"{type(task).__name__}, what it generates"
        assert_agree([seed.numpy() for seed in seeds], after, f"{what}: seeds")
        try:
            assert_agree(expected, found, what, computed_in=_computed_in(task))
        except AssertionError:
            if _determined(task, eager, given, expected):
                raise
        return found

    return call


def _determined(task, eager, given, expected) -> bool:
    """Whether a task generates the same tokens where its weights are rounded otherwise, to what layers compute in."""
    from keras import ops, tree

    tokens = lambda data: [np.asarray(x) for x in tree.flatten(data) if ops.is_tensor(x) and x.dtype.kind in "iu"]
    spacing = max([SPACING["float32"], *(SPACING[dtype] for dtype in _computed_in(task))])
    values, same = [weight.numpy() for weight in task.weights], True
    for moved, _ in _moved(values, (), spacing):
        _assign(task.weights, moved)
        same = same and all(map(np.array_equal, tokens(eager(given)), tokens(expected)))
    _assign(task.weights, values)
    return same


def _computed_in(model) -> set[str]:
    """Names of dtypes with few digits that layers compute in."""
    return {layer.compute_dtype for layer in model._flatten_layers()} & TOLERANCES.keys()


def _check_calls(model, inputs: list) -> None:
    import kgraph

    compiled, what = kgraph.compile(model), f"{type(model).__name__}, compiled"
    for x in inputs:
        spread = functools.partial(_spread, model, x)
        assert_agree(model(x, training=False), compiled(x), what, spread=spread, computed_in=_computed_in(model))


def _spread(model, x) -> list[float]:
    """By how much each output changes at most where weights and inputs change by the spacing of their numbers."""
    from keras import tree

    call = lambda data: [np.asarray(y).astype("float64") for y in tree.flatten(model(data, training=False))]
    values, expected = [variable.numpy() for variable in model.variables], call(x)
    largest = [0.0] * len(expected)
    for moved, data in _moved(values, x):
        _assign(model.variables, moved)
        largest = [max(a, float(np.max(np.abs(y - e), initial=0.0))) for a, y, e in zip(largest, call(data), expected)]
    _assign(model.variables, values)
    return largest


def _moved(values: list, x, spacing=SPACING["float32"]):
    """Some times over, weights and inputs, with the floats moved to one of their neighbours, at random.

    spacing: of the numbers, relative to them; those of a dtype with fewer digits than that stay where they are.
    """
    from keras import tree

    rng = np.random.default_rng(0)

    def move(value):
        value = np.asarray(value)
        if value.dtype.kind not in "fV":
            return value
        return (value.astype("float64") * (1 + spacing * rng.choice([-1, 1], value.shape))).astype(value.dtype)

    for _ in range(MOVES):
        yield [move(value) for value in values], tree.map_structure(move, x)


def _assign(variables: list, values: list) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _check_step(task, compile_kwargs: dict, x, y, sample_weight) -> None:
    before = [variable.numpy() for variable in task.variables]
    step = functools.partial(_changes, task, compile_kwargs, y=y, sample_weight=sample_weight)
    eager, compiled = step(before, x, run_eagerly=True), step(before, x, run_eagerly=False)
    largest = max(np.max(np.abs(c), initial=0.0) for v, c in zip(task.variables, eager) if v.trainable)

    def tolerance(variable, value, change) -> float:
        if value.dtype.kind not in "fV":
            return 0.0
        scale = max(np.max(np.abs(change), initial=0.0), SMALLEST_PART * largest if variable.trainable else 1.0)
        # The sum of a weight and its change is rounded.
        spacing = float(np.finfo(value.dtype).eps) * np.max(np.abs(value) + np.abs(change), initial=0.0)
        return GRADIENT_TOLERANCE * scale + RATE * SMALLEST_GRADIENT + spacing

    tolerances = [tolerance(*three) for three in zip(task.variables, before, eager, strict=True)]
    apart = [np.max(np.abs(a - b), initial=0.0) for a, b in zip(eager, compiled, strict=True)]
    if any(a > t > 0 for a, t in zip(apart, tolerances, strict=True)):
        for moved, data in _moved(before, x):
            others = step(moved, data, run_eagerly=True)
            spreads = [np.max(np.abs(a - b), initial=0.0) for a, b in zip(eager, others, strict=True)]
            tolerances = [max(t, FLOAT32_ERRORS * s) if t else t for t, s in zip(tolerances, spreads, strict=True)]
    for variable, expected, found, atol in zip(task.variables, eager, compiled, tolerances, strict=True):
        what = f"{type(task).__name__}, change of {variable.path} in a step of fit"
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol, err_msg=what)


def _changes(task, compile_kwargs: dict, values: list, x, y, sample_weight, run_eagerly: bool) -> list:
    """By how much a step of `fit` on the whole data changes each variable of a task, from the given values."""
    import keras

    _assign(task.variables, values)
    optimizer = keras.optimizers.SGD(RATE)
    task.compile(**{**compile_kwargs, "optimizer": optimizer, "run_eagerly": run_eagerly})
    batch = len(keras.tree.flatten(x)[0])
    # The data is preprocessed. Some tasks ask the preprocessor for what they compile with.
    preprocessor, task.preprocessor = task.preprocessor, None
    task.fit(x, y, sample_weight=sample_weight, batch_size=batch, shuffle=False, verbose=0)
    task.preprocessor = preprocessor
    return [v.numpy().astype("float64") - b.astype("float64") for v, b in zip(task.variables, values, strict=True)]
