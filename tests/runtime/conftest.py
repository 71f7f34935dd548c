import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Objects of these tests go to a cache of their own."""
    old = os.environ.get("KGRAPH_CACHE_DIR")
    os.environ["KGRAPH_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if old is None:
        del os.environ["KGRAPH_CACHE_DIR"]
    else:
        os.environ["KGRAPH_CACHE_DIR"] = old


@pytest.fixture
def num_threads():
    """Sets the thread count for one test."""
    from kgraph.runtime import threads

    yield threads.set_num_threads
    threads.set_num_threads(None)
