"""Models with training steps of their own, several optimizers, losses added in layers, shared and frozen parts."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import kgraph
from kgraph.errors import UnsupportedError
from tests.models.training_runs import assert_equal_weights, data


def agree(build, *fit_args, epochs=2, rtol=2e-4, atol=2e-5, **fit_options):
    """The model trained by compiled steps, checked against the same one trained eagerly."""
    models = []
    for eager in (False, True):
        keras.utils.set_random_seed(3)
        model = build(run_eagerly=eager)
        options = {"batch_size": 8, "shuffle": False, "verbose": 0, **fit_options}
        model.history = model.fit(*fit_args, epochs=epochs, **options)
        models.append(model)
    compiled, eager = models
    assert_equal_weights(compiled, eager, rtol=rtol, atol=atol)
    for name, values in compiled.history.history.items():
        np.testing.assert_allclose(values, eager.history.history[name], rtol=1e-3, atol=1e-5)
    stats = compiled._compiled_train_step.stats()
    assert stats["compiles"] == 1
    assert stats["specialised"] is None
    return compiled


# -- overrides --------------------------------------------------------------------------------------------------------
class OwnStep(keras.Model):
    """A step from the ground up: the loss of given weights, its gradients, the update, the metrics."""

    def train_step(self, data):
        x, y = data

        def loss_of(weights, x, y):
            rest = [v.value for v in self.non_trainable_variables]
            y_pred, rest = self.stateless_call(weights, rest, x, training=True)
            return self.compute_loss(x, y, y_pred), (y_pred, rest)

        weights = [v.value for v in self.trainable_variables]
        (loss, (y_pred, rest)), gradients = kgraph.value_and_grad(loss_of, has_aux=True)(weights, x, y)
        for variable, value in zip(self.non_trainable_variables, rest):
            variable.assign(value)
        self.optimizer.apply(gradients, self.trainable_variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {m.name: m.result() for m in self.metrics}


def own_step(cls=OwnStep, **options):
    inputs = keras.Input((6,))
    x = layers.BatchNormalization()(layers.Dense(8, "relu")(inputs))
    model = cls(inputs, layers.Dense(3)(layers.Dropout(0.2)(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"], **options)
    return model


def test_a_step_from_the_ground_up_is_keras_own_step():
    x, y = data(40)
    own = agree(own_step, x, y, batch_size=10)
    keras.utils.set_random_seed(3)
    plain = own_step(keras.Model)
    plain.fit(x, y, batch_size=10, epochs=2, shuffle=False, verbose=0)
    assert_equal_weights(own, plain, rtol=1e-4, atol=1e-5)


def test_a_step_for_the_state_of_jax_gets_a_clear_error():
    class ForJax(keras.Model):
        def train_step(self, state, data):
            return {}, state

    model = own_step(ForJax)
    with pytest.raises(UnsupportedError, match=r"train_step takes \(state, data\).*on kgraph it takes `data`"):
        model.fit(*data(8), verbose=0)

    class WithTape(keras.Model):
        def train_step(self, data):
            import tensorflow as tf

            with tf.GradientTape():
                return {}

    with pytest.raises(ModuleNotFoundError, match="tensorflow"):
        own_step(WithTape).fit(*data(8), verbose=0)


def test_overrides_of_losses_metrics_and_the_test_step():
    class Own(keras.Model):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.mae = keras.metrics.MeanAbsoluteError(name="own_mae")

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return ops.mean(ops.abs(ops.cast(y, y_pred.dtype) - y_pred[:, 0])) + (0.5 if training else 0.0)

        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            self.mae.update_state(y, y_pred[:, 0])
            return {**super().compute_metrics(x, y, y_pred, sample_weight), "constant": 3.0}

        def test_step(self, data):
            x, _ = data
            y_pred = self(x, training=False)
            return {"mean": ops.mean(y_pred), "rows": ops.shape(x)[0]}

    x, y = data(20)
    model = agree(lambda **options: own_step(Own, **options), x, y, batch_size=20)
    history = model.history.history
    assert history["constant"] == [3.0, 3.0]
    np.testing.assert_allclose(history["loss"][0], history["own_mae"][0] + 0.5, rtol=1e-5)
    logs = model.evaluate(x, y, batch_size=20, return_dict=True, verbose=0)
    np.testing.assert_allclose(logs["mean"], np.mean(model(x)), rtol=1e-4)
    assert logs["rows"] == 20


def test_a_step_that_computes_with_numpy_is_named():
    class Numpy(keras.Model):
        def train_step(self, data):
            x, _ = data
            return {"size": float(np.linalg.norm(np.asarray(x)))}

    with pytest.raises(kgraph.errors.CaptureError):
        own_step(Numpy).fit(*data(8), verbose=0)
    assert own_step(Numpy, run_eagerly=True).fit(*data(8), verbose=0).history["size"][0] > 0


# -- several optimizers -----------------------------------------------------------------------------------------------
class Gan(keras.Model):
    """Two networks, two optimizers, both updated in one step."""

    def __init__(self, latent: int = 4):
        super().__init__()
        self.latent = latent
        self.generator = keras.Sequential(
            [
                keras.Input((latent,)),
                layers.Dense(2 * 2 * 8),
                layers.Reshape((2, 2, 8)),
                layers.Conv2DTranspose(8, 4, strides=2, padding="same"),
                layers.BatchNormalization(),
                layers.LeakyReLU(),
                layers.Conv2DTranspose(1, 4, strides=2, padding="same", activation="tanh"),
            ]
        )
        self.discriminator = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Conv2D(8, 3, strides=2, padding="same"),
                layers.LeakyReLU(negative_slope=0.2),
                layers.Flatten(),
                layers.Dropout(0.2),
                layers.Dense(1),
            ]
        )
        self.seeds = keras.random.SeedGenerator(7)
        self.built = True

    def compile(self, d_optimizer, g_optimizer, **options):
        super().compile(**options)
        self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer
        self.loss_fn = keras.losses.BinaryCrossentropy(from_logits=True)
        self.d_loss, self.g_loss = keras.metrics.Mean(name="d_loss"), keras.metrics.Mean(name="g_loss")

    @property
    def metrics(self):
        return [self.d_loss, self.g_loss]

    def update(self, network, optimizer, loss_of):
        weights = network.trainable_variables

        def loss(values):
            rest = [v.value for v in network.non_trainable_variables]
            return loss_of(lambda x: network.stateless_call(values, rest, x, training=True)[0])

        value, gradients = kgraph.value_and_grad(loss)([w.value for w in weights])
        optimizer.apply(gradients, weights)
        return value

    def train_step(self, data):
        real = data[0] if isinstance(data, tuple) else data
        rows = ops.shape(real)[0]
        fake = self.generator(keras.random.normal((rows, self.latent), seed=self.seeds), training=True)
        images = ops.concatenate([fake, real], axis=0)
        labels = ops.concatenate([ops.ones((rows, 1)), ops.zeros((rows, 1))], axis=0)
        labels += 0.05 * keras.random.uniform(ops.shape(labels), seed=self.seeds)
        d_loss = self.update(self.discriminator, self.d_optimizer, lambda call: self.loss_fn(labels, call(images)))
        noise = keras.random.normal((rows, self.latent), seed=self.seeds)
        g_loss = self.update(
            self.generator,
            self.g_optimizer,
            lambda call: self.loss_fn(ops.zeros((rows, 1)), self.discriminator(call(noise), training=True)),
        )
        self.d_loss.update_state(d_loss)
        self.g_loss.update_state(g_loss)
        return {"d_loss": self.d_loss.result(), "g_loss": self.g_loss.result()}


def test_a_gan_with_two_optimizers():
    images = np.tanh(np.random.default_rng(0).normal(size=(24, 8, 8, 1))).astype("float32")

    def build(**options):
        model = Gan()
        model.compile(keras.optimizers.Adam(1e-3), keras.optimizers.RMSprop(1e-3), **options)
        return model

    model = agree(build, images, rtol=2e-3, atol=1e-4)
    assert int(model.d_optimizer.iterations) == int(model.g_optimizer.iterations) == 6
    assert model._compiled_train_step.stats()["host_steps"] == 0


# -- losses from layers -----------------------------------------------------------------------------------------------
class Sampling(layers.Layer):
    """z = mean + sigma * noise, with the divergence from the prior as a loss."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(1337)

    def call(self, inputs):
        mean, log_var = inputs
        self.add_loss(-0.5 * ops.mean(ops.sum(1 + log_var - ops.square(mean) - ops.exp(log_var), axis=-1)))
        return mean + ops.exp(0.5 * log_var) * keras.random.normal(ops.shape(mean), seed=self.seed_generator)


def test_a_variational_autoencoder():
    def build(**options):
        inputs = keras.Input((6,))
        h = layers.Dense(8, "relu", activity_regularizer=keras.regularizers.L1(1e-3))(inputs)
        z = Sampling()([layers.Dense(2)(h), layers.Dense(2)(h)])
        model = keras.Model(inputs, layers.Dense(6)(layers.Dense(8, "relu")(z)))
        model.compile("adam", "mse", **options)
        return model

    x, _ = data(40)
    model = agree(build, x, x, epochs=3)
    logs = model.evaluate(x, x, verbose=0)
    outputs = model(x)
    assert logs > np.mean(np.square(outputs - x)) * 0.5
    assert len(model.losses) == 2


def test_activity_regularizers_scale_with_the_batch():
    inputs = keras.Input((3,))
    dense = layers.Dense(2, use_bias=False, kernel_initializer="ones", activity_regularizer=keras.regularizers.L2(0.1))
    model = keras.Model(inputs, dense(inputs))
    model.compile(keras.optimizers.SGD(0.0), lambda y, p: 0.0 * ops.sum(p, axis=-1))
    x = np.ones((5, 3), "float32")
    # Outputs of 3: the sum of 0.1 * 9 over 10 of them, divided by 5 rows.
    np.testing.assert_allclose(model.train_on_batch(x, np.zeros((5, 2))), 1.8, rtol=1e-5)


# -- shared, frozen, averaged -----------------------------------------------------------------------------------------
def test_a_siamese_network():
    def build(**options):
        encoder = keras.Sequential([keras.Input((6,)), layers.Dense(8, "tanh"), layers.Dense(4)])
        left, right = keras.Input((6,)), keras.Input((6,))
        distance = layers.Lambda(lambda t: ops.sqrt(ops.sum(ops.square(t[0] - t[1]), axis=1, keepdims=True) + 1e-6))
        model = keras.Model([left, right], distance([encoder(left), encoder(right)]))

        def contrastive(y, d):
            y = ops.cast(y, d.dtype)
            return ops.mean((1 - y) * ops.square(d) + y * ops.square(ops.maximum(1.0 - d, 0.0)), axis=-1)

        model.compile("rmsprop", contrastive, **options)
        return model

    x, y = data(32)
    agree(build, [x, x[::-1].copy()], (y != y[::-1]).astype("int32")[:, None])


class Byol(keras.Model):
    """An online and a target encoder, the latter an average of the former that gradients do not see."""

    def __init__(self):
        super().__init__()
        make = lambda: keras.Sequential([keras.Input((6,)), layers.Dense(8, "relu"), layers.Dense(4)])
        self.online, self.target = make(), make()
        self.target.set_weights(self.online.get_weights())
        self.target.trainable = False
        self.predictor = layers.Dense(4)
        self.seeds = keras.random.SeedGenerator(3)

    def call(self, x):
        return self.predictor(self.online(x))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        noisy = x + 0.1 * keras.random.normal(ops.shape(x), seed=self.seeds)
        aim = ops.stop_gradient(self.target(noisy))
        return ops.mean(2 - 2 * ops.sum(ops.normalize(y_pred) * ops.normalize(aim), axis=-1))

    def train_step(self, data):
        logs = super().train_step(data)
        for slow, fast in zip(self.target.variables, self.online.variables):
            slow.assign(0.9 * slow + 0.1 * fast)
        return logs


def test_two_encoders_of_which_one_is_an_average():
    x, _ = data(32)

    def build(**options):
        model = Byol()
        model(x[:2])
        model.compile("sgd", **options)
        return model

    model = agree(build, x)
    assert not np.array_equal(model.target.get_weights()[0], model.online.get_weights()[0])


class Distiller(keras.Model):
    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher

    def call(self, x):
        return self.student(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        own = super().compute_loss(x, y, y_pred, sample_weight, training)
        soft = ops.softmax(ops.stop_gradient(self.teacher(x, training=False)) / 3.0)
        return 0.3 * own + 0.7 * keras.losses.KLDivergence()(soft, ops.softmax(y_pred / 3.0)) * 9.0


def test_teacher_and_student():
    x, y = data(32)

    def build(**options):
        teacher = keras.Sequential([keras.Input((6,)), layers.Dense(16, "relu"), layers.Dense(3)])
        student = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
        teacher.trainable = False
        model = Distiller(student, teacher)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, metrics=["accuracy"], **options)
        return model

    model = agree(build, x, y)
    assert len(model.trainable_variables) == 2


# -- state ------------------------------------------------------------------------------------------------------------
def test_stateful_recurrent_layers():
    x = np.random.default_rng(0).normal(size=(4, 5, 3)).astype("float32")
    y = x.sum((1, 2))[:, None]

    def build(**options):
        inputs = keras.Input(batch_shape=(4, 5, 3))
        lstm = layers.LSTM(6, stateful=True, return_sequences=True)
        model = keras.Model(inputs, layers.Dense(1)(layers.GRU(4, stateful=True)(lstm(inputs))))
        model.compile("sgd", "mse", **options)
        return model

    models = []
    for eager in (False, True):
        keras.utils.set_random_seed(0)
        model = build(run_eagerly=eager)
        for _ in range(3):
            model.train_on_batch(x, y)
        first = model.predict_on_batch(x)
        second = model.predict_on_batch(x)
        assert not np.allclose(first, second)
        for layer in model.layers:
            if getattr(layer, "stateful", False):
                layer.reset_state()
        fresh = model.predict_on_batch(x)
        models.append((model, first, second, fresh))
    for a, b in zip(models[0][1:], models[1][1:]):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert_equal_weights(models[0][0], models[1][0], rtol=1e-3, atol=1e-5)


class Counter(layers.Layer):
    """Counts calls and rows; scales by what it has seen."""

    def build(self, shape):
        self.calls = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="calls")
        self.seen = self.add_weight(shape=(), initializer="zeros", trainable=False, name="seen")

    def call(self, x, training=False):
        if training:
            self.calls.assign_add(1)
            self.seen.assign(self.seen + ops.cast(ops.shape(x)[0], "float32"))
        return x * (1.0 + 0.01 * ops.cast(self.calls, x.dtype))


def test_counters_that_are_not_trained():
    x, y = data(20)

    def build(**options):
        inputs = keras.Input((6,))
        model = keras.Model(inputs, layers.Dense(1)(Counter()(inputs)))
        model.compile("sgd", "mse", **options)
        return model

    model = agree(build, x, y.astype("float32"))
    counter = model.layers[1]
    assert int(counter.calls) == 6
    assert float(counter.seen) == 40.0
    model.evaluate(x, y, verbose=0)
    model.predict(x, verbose=0)
    assert int(counter.calls) == 6


def test_metrics_of_the_users_own():
    class Confusion(keras.metrics.Metric):
        def __init__(self, classes=3, **kwargs):
            super().__init__(name="confusion", **kwargs)
            self.matrix = self.add_weight(shape=(classes, classes), initializer="zeros", name="matrix")

        def update_state(self, y_true, y_pred, sample_weight=None):
            rows = ops.one_hot(ops.cast(y_true, "int32"), 3)
            columns = ops.one_hot(ops.argmax(y_pred, axis=-1), 3)
            self.matrix.assign_add(ops.matmul(ops.transpose(rows), columns))

        def result(self):
            return ops.trace(self.matrix) / ops.sum(self.matrix)

    def build(**options):
        model = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        metrics = ["accuracy", Confusion(), keras.metrics.SparseTopKCategoricalAccuracy(2)]
        model.compile("sgd", loss, metrics=metrics, **options)
        return model

    x, y = data(20)
    model = agree(build, x, y)
    history = model.history.history
    np.testing.assert_allclose(history["confusion"], history["accuracy"], rtol=1e-5)
    assert model._compiled_train_step.stats()["host_steps"] == 0
