"""Models with sparse inputs: eager, compiled, trained, saved; each gives what dense arrays give."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import kgraph

sparse = pytest.importorskip("scipy.sparse")
SparseTensor = kgraph.SparseTensor

MATRIX = sparse.random(20, 30, density=0.1, format="csr", dtype="float32", random_state=0)
DENSE = MATRIX.toarray()
TENSOR = SparseTensor.from_scipy(MATRIX)
Y = np.linspace(-1, 1, 60, dtype="float32").reshape(20, 3)
FORMS = {"scipy": MATRIX, "coo": MATRIX.tocoo(), "tensor": TENSOR}


def model(seed=0):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((30,), sparse=True)
    return keras.Model(inputs, layers.Dense(3)(layers.Dense(4, activation="relu")(inputs)))


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_model_takes_sparse_inputs(form):
    m = model()
    compiled = kgraph.compile(m)
    expected = m(DENSE)
    np.testing.assert_allclose(compiled(FORMS[form]), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(compiled.predict(FORMS[form], batch_size=7), expected, rtol=1e-5, atol=1e-6)
    assert compiled.stats()["compiles"] == 1


def test_layers_get_the_sparse_tensor_in_an_eager_call():
    seen = []

    class Looks(keras.Layer):
        def call(self, x):
            seen.append(type(x))
            return ops.matmul(x, np.ones((30, 2), "float32"))

    inputs = keras.Input((30,), sparse=True)
    m = keras.Model(inputs, Looks()(inputs))
    np.testing.assert_allclose(m(TENSOR), DENSE @ np.ones((30, 2)), rtol=1e-5)
    assert seen[-1] is SparseTensor
    dense_inputs = keras.Input((30,))
    keras.Model(dense_inputs, Looks()(dense_inputs))(TENSOR)  # declared as dense
    assert issubclass(seen[-1], np.ndarray)


def history_of(x, y=Y, **options):
    m = model()
    m.compile("adam", "mse", **options)
    losses = m.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history["loss"]
    return losses, m.evaluate(x, y, batch_size=8, verbose=0), m.predict(x, batch_size=8, verbose=0)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_fit_evaluate_and_predict(form, eager):
    for found, expected in zip(history_of(FORMS[form], run_eagerly=eager), history_of(DENSE)):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_batches_of_a_generator(form, eager):
    batch = FORMS[form]

    def losses(x):
        m = model()
        m.compile("sgd", "mse", run_eagerly=eager)
        data = ((x, Y) for _ in range(3))
        return m.fit(data, steps_per_epoch=3, verbose=0, shuffle=False).history["loss"]

    np.testing.assert_allclose(losses(batch), losses(DENSE), rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_single_batches(form):
    def results(x):
        m = model()
        m.compile("sgd", "mse")
        return m.train_on_batch(x, Y), m.test_on_batch(x, Y), m.predict_on_batch(x)

    for found, expected in zip(results(FORMS[form]), results(DENSE)):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_validation_data_are_split_off():
    def losses(x):
        m = model()
        m.compile("sgd", "mse")
        return m.fit(x, Y, validation_split=0.25, shuffle=False, verbose=0).history["val_loss"]

    for x in FORMS.values():
        np.testing.assert_allclose(losses(x), losses(DENSE), rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_steps_get_arrays_that_multiply_element_by_element(form):
    """SciPy's own dense form is a matrix, of which `*` is the matrix product."""

    class Squares(keras.Model):
        def call(self, x):
            return ops.sum(x * x, axis=1)

    m = Squares()
    m.compile("sgd", "mse", run_eagerly=True)
    np.testing.assert_allclose(m.predict(FORMS[form], verbose=0), (DENSE**2).sum(1), rtol=1e-5)


def test_sparse_encodings_inside_of_a_compiled_model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), dtype="int32")
    encoded = layers.CategoryEncoding(10, "count", sparse=True)(inputs)
    assert encoded.sparse
    m, encoder = keras.Model(inputs, layers.Dense(2)(encoded)), keras.Model(inputs, encoded)
    x = np.random.default_rng(0).integers(0, 10, (5, 4))
    assert type(encoder(x)) is SparseTensor
    np.testing.assert_allclose(kgraph.compile(m)(x), m(x), rtol=1e-5)
    np.testing.assert_array_equal(kgraph.compile(encoder)(x), ops.convert_to_numpy(encoder(x)))
    np.testing.assert_array_equal(encoder.predict(x, verbose=0), ops.convert_to_numpy(encoder(x)))
    m.compile("sgd", "mse")
    assert np.isfinite(m.fit(x, np.ones((5, 2)), verbose=0).history["loss"]).all()


def test_functions_are_compiled_for_the_shape_of_a_sparse_argument_and_not_for_its_values():
    @kgraph.jit
    def total(x):
        return ops.sum(x, axis=0)

    for x, scale in ((TENSOR, 1), (ops.multiply(TENSOR, 2), 2), (3 * MATRIX, 3), (4 * DENSE, 4)):
        np.testing.assert_allclose(total(x), scale * DENSE.sum(0), rtol=1e-5)
    assert total.stats()["compiles"] == 1


def test_gradients_with_sparse_arguments():
    weights = np.ones((30, 2), "float32")
    loss = lambda w, x: ops.sum(ops.square(ops.matmul(x, w)))
    expected = kgraph.grad(loss)(weights, DENSE)
    for x in FORMS.values():
        np.testing.assert_allclose(kgraph.grad(loss)(weights, x), expected, rtol=1e-5)
        np.testing.assert_allclose(kgraph.jit(kgraph.grad(loss))(weights, x), expected, rtol=1e-5)


def test_an_example_may_be_sparse():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    m = Net()
    compiled = kgraph.compile(m, example=TENSOR)
    np.testing.assert_allclose(compiled(MATRIX[:7]), m(DENSE[:7]), rtol=1e-5, atol=1e-6)


def test_saved_models_and_steps_take_sparse_inputs(tmp_path):
    m = model()
    kgraph.compile(m).save(tmp_path / "m.kgraph")
    loaded = kgraph.load(tmp_path / "m.kgraph")
    for x in FORMS.values():
        np.testing.assert_allclose(loaded(x), m(DENSE), rtol=1e-5, atol=1e-6)
    m.compile("sgd", "mse")
    expected = m.test_on_batch(DENSE, Y)
    step = kgraph.compile_step(m, (TENSOR, Y))
    np.testing.assert_allclose(step((TENSOR, Y))["loss"], expected, rtol=1e-5)


def test_sparse_gradients_in_an_optimizer():
    """Rows of a table, as the gradient of an embedding has them."""
    rows = SparseTensor([[0], [2], [0]], np.ones((3, 2), "float32"), (4, 2))
    for name in ("sgd", "adam", "adagrad", "rmsprop"):
        results = []
        for gradient in (rows, rows.to_dense()):
            variable = keras.Variable(np.ones((4, 2), "float32"))
            optimizer = keras.optimizers.get({"class_name": name, "config": {"clipnorm": 1.0}})
            for _ in range(3):
                optimizer.apply([gradient], [variable])
            results.append(variable.numpy())
        np.testing.assert_allclose(*results, rtol=1e-5)
