"""Puts `kgraph_hook.pth` into site-packages, for plain and for editable installs; all else is in pyproject.toml.

Python runs the one line of the .pth file at start-up. It looks at one environment variable, so that
`KERAS_BACKEND=kgraph python train.py` works with an unchanged script.
"""

import base64
import hashlib
import os
import shutil
import zipfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

HOOK = "kgraph_hook.pth"


class BuildWithHook(build_py):
    """Copies the .pth file beside the package, the top of the wheel, which is installed as site-packages."""

    def run(self):
        super().run()
        if not self.editable_mode:
            os.makedirs(self.build_lib, exist_ok=True)
            shutil.copyfile(HOOK, os.path.join(self.build_lib, HOOK))

    def get_outputs(self, *args, **kwargs):
        outputs = super().get_outputs(*args, **kwargs)
        return outputs if self.editable_mode else [*outputs, os.path.join(self.build_lib, HOOK)]


class EditableWithHook(editable_wheel):
    """Adds the .pth file to the finished wheel of an editable install, and to the wheel's RECORD."""

    def run(self):
        super().run()
        for wheel in Path(self.dist_dir).glob("kgraph-*.whl"):
            _add_to_wheel(wheel, HOOK, Path(HOOK).read_bytes())


def _add_to_wheel(wheel: Path, name: str, content: bytes) -> None:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    rebuilt = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(rebuilt, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.infolist():
            data = source.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                data += f"{name},sha256={digest},{len(content)}\n".encode()
            target.writestr(item, data)
        target.writestr(name, content)
    rebuilt.replace(wheel)


setup(cmdclass={"build_py": BuildWithHook, "editable_wheel": EditableWithHook})
