"""A variational autoencoder with a step of its own, on scikit-learn's handwritten digits.

The layer that samples keeps its random state in a seed generator and adds the divergence from the prior to the loss.

Run: python examples/autoencoder.py   (needs scikit-learn)
"""

from __future__ import annotations

# isort: off
import kgraph  # before keras: it becomes Keras' backend
import keras
import numpy as np
from keras import layers, ops
from sklearn.datasets import load_digits


class Sampling(layers.Layer):
    """A sample from the normal distribution that an encoder gives as mean and logarithm of the variance."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seed_generator = keras.random.SeedGenerator(1337)

    def call(self, inputs):
        mean, log_variance = inputs
        divergence = -0.5 * ops.sum(1 + log_variance - ops.square(mean) - ops.exp(log_variance), axis=-1)
        self.add_loss(ops.mean(divergence))
        noise = keras.random.normal(ops.shape(mean), seed=self.seed_generator)
        return mean + ops.exp(0.5 * log_variance) * noise


class Autoencoder(keras.Model):
    """Trained by a step that is written out: loss, gradients, update, metrics."""

    def __init__(self, latent: int = 8):
        super().__init__()
        inputs = keras.Input((64,))
        hidden = layers.Dense(128, "relu")(inputs)
        code = Sampling()([layers.Dense(latent)(hidden), layers.Dense(latent)(hidden)])
        self.encoder = keras.Model(inputs, code)
        self.decoder = keras.Sequential([keras.Input((latent,)), layers.Dense(128, "relu"), layers.Dense(64)])
        self.total = keras.metrics.Mean(name="loss")
        self.reconstruction = keras.metrics.Mean(name="reconstruction")

    @property
    def metrics(self):
        return [self.total, self.reconstruction]

    def call(self, x):
        return ops.sigmoid(self.decoder(self.encoder(x)))

    def train_step(self, data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)

        def loss_of(weights):
            state = [v.value for v in self.non_trainable_variables]
            y, state, losses = self.stateless_call(weights, state, x, return_losses=True)
            pixels = ops.sum(keras.losses.binary_crossentropy(x[..., None], y[..., None]), axis=-1)
            reconstruction = ops.mean(pixels)
            return reconstruction + sum(losses), (reconstruction, state)

        weights = [v.value for v in self.trainable_variables]
        (loss, (reconstruction, state)), gradients = kgraph.value_and_grad(loss_of, has_aux=True)(weights)
        for variable, value in zip(self.non_trainable_variables, state):
            variable.assign(value)
        self.optimizer.apply(gradients, self.trainable_variables)
        self.total.update_state(loss)
        self.reconstruction.update_state(reconstruction)
        return {metric.name: metric.result() for metric in self.metrics}


def main(epochs: int = 30, verbose: int | str = "auto") -> float:
    """Train, print, and give the mean squared error of reconstructed pixels in 0..1."""
    keras.utils.set_random_seed(0)
    x = (load_digits().data / 16.0).astype("float32")
    model = Autoencoder()
    model.build((None, 64))
    model.compile(optimizer=keras.optimizers.Adam(2e-3))
    model.fit(x, batch_size=128, epochs=epochs, verbose=verbose)
    error = float(np.mean(np.square(model.predict(x, verbose=0) - x)))
    print(f"mean squared error of pixels {error:.4f}, of their mean {x.var(0).mean():.4f}")
    return error


if __name__ == "__main__":
    main()
