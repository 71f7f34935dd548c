"""Random graphs and models of `tests.fuzz`, on a GPU or an emulated one."""

from __future__ import annotations

import functools

import pytest

import kgraph
from kgraph.targets import resolve
from tests.cuda.driver import DEVICE, IS_SLOW, ON_GPU
from tests.fuzz import graphs
from tests.fuzz.models import run_model_seed

pytestmark = [
    pytest.mark.skipif(not ON_GPU, reason="Numba's simulator would take too long"),
    pytest.mark.filterwarnings("ignore:You are using a softmax"),
]
LONG = pytest.mark.long if IS_SLOW else ()


@pytest.fixture(autouse=True)
def _on_the_device(monkeypatch):
    monkeypatch.setattr(graphs, "compile_graph", functools.partial(graphs.compile_graph, target=resolve(DEVICE)))
    kgraph.set_device(DEVICE)
    yield
    kgraph.set_device("cpu")


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=LONG) for n in range(8, 160, 8))])
def test_random_graphs(first):
    for seed in range(first, first + 8):
        graphs.run_seed(seed, (1, 3))


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=LONG) for n in range(4, 40, 4))])
def test_random_models(first):
    for seed in range(first, first + 4):
        run_model_seed(seed)
