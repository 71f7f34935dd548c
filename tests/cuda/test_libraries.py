"""Where NVIDIA's libraries are looked for, and in which order they are opened."""

from __future__ import annotations

import pytest

from kgraph.runtime.cuda import libraries
from kgraph.runtime.cuda.cudnn import Convolutions
from kgraph.runtime.cuda.device import device_for
from kgraph.runtime.cuda.libraries import is_installed, open_library
from kgraph.runtime.steps import Convolution, Product
from tests.cuda.fake_cudnn import FakeCudnn


@pytest.fixture
def there(monkeypatch):
    """What can be opened, by the end of its name; gives the names that were asked for too."""
    found: dict = {}
    asked: list[str] = []

    def load(name):
        asked.append(name)
        for end, library in found.items():
            if name.endswith(end):
                return library
        raise OSError(f"no {name}")

    monkeypatch.setattr(libraries, "CDLL", load)
    monkeypatch.setattr(libraries.sys, "platform", "linux")
    return found, asked


def cudnn(version):
    """One that was made for a version of CUDA."""
    library = FakeCudnn(device_for("cuda-simulator"))
    library.cudnnGetCudartVersion = type("Function", (), {"__call__": lambda self: version})()
    return library


@pytest.mark.parametrize(("kind", "name"), [(Product, "libcublasLt.so.12"), (Convolution, "libcudnn.so.9")])
def test_without_a_library_the_reason_is_told(there, kind, name):
    reason = open_library(kind, device_for("cuda-simulator"), 12040)
    assert f"no {name}" in reason
    assert ".so.13" not in reason


def test_the_packages_come_before_the_system(there, monkeypatch, tmp_path):
    place = tmp_path / "cudnn" / "lib" / "libcudnn.so.9"
    place.parent.mkdir(parents=True)
    place.touch()
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(libraries.ctypes.util, "find_library", lambda name: None)
    assert is_installed(Convolution)
    open_library(Convolution, device_for("cuda-simulator"), 12040)
    assert there[1] == [str(place), "libcudnn.so.9"]
    place.unlink()
    assert not is_installed(Convolution)


def test_cudnn_is_used_with_the_cublaslt_of_its_version_of_cuda(there):
    """It ends the process where it finds none."""
    found, asked = there
    found["libcudnn.so.9"] = cudnn(12090)
    reason = open_library(Convolution, device_for("cuda-simulator"), 13000)
    assert "no libcublasLt.so.12" in reason
    found["libcublasLt.so.12"] = object()
    assert isinstance(open_library(Convolution, device_for("cuda-simulator"), 13000), Convolutions)
    assert asked[-1].endswith("libcublasLt.so.12")


def test_a_driver_that_is_too_old_for_a_library_is_told(there):
    there[0]["libcudnn.so.9"] = cudnn(13000)
    assert "for CUDA 13" in open_library(Convolution, device_for("cuda-simulator"), 12040)


def test_libraries_are_left_alone_on_demand(there, monkeypatch):
    monkeypatch.setenv("KGRAPH_CUDA_LIBRARIES", "0")
    for kind in (Product, Convolution):
        assert not is_installed(kind)
        assert "KGRAPH_CUDA_LIBRARIES" in open_library(kind, device_for("cuda-simulator"), 13000)
    assert not there[1]
