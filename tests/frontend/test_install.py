"""The three ways to start Keras on kgraph, each in a process of its own, with other frameworks made unimportable."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROBE = """
import json, os, sys
blocked = {"jax", "tensorflow", "torch"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            tried.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
tried = []
sys.meta_path.insert(0, Refuse())
"""

REPORT = """
import keras
print(json.dumps({
    "backend": keras.config.backend(),
    "served_by": sys.modules["keras.src.backend.numpy"].__name__,
    "same_module": sys.modules["keras.src.backend.numpy.core"] is sys.modules["kgraph.frontend.keras_backend.core"],
    "environment": os.environ.get("KERAS_BACKEND"),
    "result": keras.ops.relu([-1.0, 2.0]).tolist(),
    "forbidden": sorted(m for m in ("jax", "tensorflow", "torch") if m in sys.modules),
}))
"""


def run(arguments, environment=None, **kwargs):
    env = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env.update(environment or {})
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120, check=False, **kwargs
    )


def report(result) -> dict:
    import json

    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.strip().splitlines()[-1])


def check(found: dict) -> None:
    assert found["served_by"] == "kgraph.frontend.keras_backend.interface"
    assert found["same_module"]
    assert found["environment"] == "kgraph"
    assert found["result"] == [0.0, 2.0]
    assert found["forbidden"] == []


def test_import_kgraph_before_keras():
    check(report(run(["-c", PROBE + "import kgraph\n" + REPORT])))


def test_importing_a_backend_module_first():
    check(report(run(["-c", PROBE + "import kgraph.frontend.keras_backend.nn\n" + REPORT])))


def test_python_m_kgraph(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(PROBE + REPORT + "assert sys.argv[1:] == ['--epochs', '3'] and __name__ == '__main__'\n")
    check(report(run(["-m", "kgraph", str(script), "--epochs", "3"])))


def test_python_m_kgraph_runs_modules(tmp_path):
    (tmp_path / "job.py").write_text(PROBE + REPORT)
    check(report(run(["-m", "kgraph", "-m", "job"], cwd=tmp_path)))


def test_environment_variable_and_pth_hook(tmp_path):
    """What the .pth file does at start-up, in a site directory of its own."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "kgraph_hook.pth").write_text((ROOT / "kgraph_hook.pth").read_text())
    program = f"import site; site.addsitedir({str(site)!r})\n" + PROBE + REPORT
    check(report(run(["-c", program], {"KERAS_BACKEND": "kgraph"})))


def test_the_hook_does_nothing_without_the_variable(tmp_path):
    line = (ROOT / "kgraph_hook.pth").read_text()
    program = f"exec({line!r}); import sys; print(any(m.startswith('kgraph') for m in sys.modules))"
    assert run(["-c", program], {"KERAS_BACKEND": "jax"}).stdout.strip() == "False"
    assert run(["-c", program]).stdout.strip() == "False"


def test_an_explicit_backend_is_respected():
    program = "import kgraph, sys; from kgraph.frontend import install; print(install.is_installed())"
    assert run(["-c", program], {"KERAS_BACKEND": "jax"}).stdout.strip() == "False"


def test_keras_already_on_another_backend():
    """Simulated, so that no other framework is needed: Keras' configuration says jax."""
    program = """
import sys, types, warnings
config = types.ModuleType("keras.src.backend.config"); config._BACKEND = "jax"
sys.modules["keras.src.backend.config"] = config
from kgraph.frontend import install
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(install.install(), install.foreign_backend(), "jax" in str(caught[0].message))
print(install.install(force=False))
"""
    assert run(["-c", program]).stdout.split() == ["False", "jax", "True", "False"]


def test_importing_kgraph_is_cheap():
    """The package and the hook load neither Keras nor NumPy nor a compiler."""
    program = "import kgraph, sys; print([m for m in ('keras', 'numpy', 'llvmlite', 'numba') if m in sys.modules])"
    assert run(["-c", program]).stdout.strip() == "[]"


@pytest.mark.long
@pytest.mark.parametrize("editable", [False, True])
def test_the_wheel_installs_the_hook(tmp_path, editable):
    """`pip install .` and `pip install -e .` both put the .pth file into site-packages."""
    source = tmp_path / "source"
    copied = ["kgraph", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "kgraph_hook.pth"]
    source.mkdir()
    for name in copied:
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "-q"]
    subprocess.run([*install, *(["-e"] if editable else []), str(source)], check=True, timeout=600)
    packages = next(venv.glob("lib/python*/site-packages"))
    assert (packages / "kgraph_hook.pth").read_text() == (ROOT / "kgraph_hook.pth").read_text()
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"KERAS_BACKEND": "kgraph"}
    done = subprocess.run([python, "-c", PROBE + REPORT], env=env, capture_output=True, text=True, check=False)
    check(report(done))
