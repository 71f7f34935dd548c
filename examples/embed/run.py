"""Runs a saved model from Python with nothing but NumPy and kgraph's runtime: neither Keras nor a compiler is loaded.

python run.py convnet.kgraph convnet.input convnet.output
"""

import sys

import numpy as np

import kgraph


def main(artifact: str, source: str, target: str) -> None:
    model = kgraph.load(artifact)
    ((name, type_),) = zip(model.inputs.names, model.inputs.types)
    row = type_.shape[1:]
    x = np.fromfile(source, type_.np_dtype).reshape(-1, *row)
    y = model(x)
    y.tofile(target)
    print(f"{name} {x.shape} -> {y.shape}; keras loaded: {'keras' in sys.modules}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
