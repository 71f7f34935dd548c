"""The C compiler that an export uses: the system's, or the one in the package `ziglang`."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kgraph.errors import CompileError

_SYSTEM_COMPILERS = ("cc", "gcc", "clang")
_CROSS_PREFIXES = {"aarch64": "aarch64-linux-gnu-", "x86_64": "x86_64-linux-gnu-"}


@dataclass(frozen=True)
class Toolchain:
    """Commands that compile and link C and make static libraries, for one kind of machine."""

    compiler: tuple[str, ...]
    archiver: tuple[str, ...]

    def compile(self, source: Path, target: Path, options: Sequence[str] = ()) -> None:
        """Compile a C file to an object. Raises CompileError with the compiler's own words."""
        common = ["-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        _run([*self.compiler, *common, *options, "-c", source.name, "-o", str(target.resolve())], source.parent)

    def link_shared(self, objects: Sequence[Path], target: Path) -> None:
        """Link objects to a shared library."""
        command = [*self.compiler, "-shared", f"-Wl,-soname,{target.name}", "-Wl,-z,noexecstack", "-o", target.name]
        _run([*command, *(str(o.resolve()) for o in objects), "-lm", "-lpthread"], target.parent)

    def archive(self, objects: Sequence[Path], target: Path) -> None:
        """Put objects into a static library."""
        target.unlink(missing_ok=True)
        _run([*self.archiver, "rcs", target.name, *(str(o.resolve()) for o in objects)], target.parent)


def find_toolchain(machine: str, compiler: str | Sequence[str] | None = None) -> Toolchain:
    """A toolchain that makes code for Linux on `machine` (`x86_64`, `aarch64`).

    compiler: the command of a compiler to use, such as `"clang --target=aarch64-linux-gnu"`; by default `CC` of the
    environment, the system's compiler (for another machine, one that is called after it), and then `ziglang`.
    Raises CompileError where there is none.
    """
    here = platform.machine() == machine
    if compiler is None and here:
        compiler = os.environ.get("CC")
    if compiler is not None:
        command = tuple(shlex.split(compiler) if isinstance(compiler, str) else compiler)
        return Toolchain(command, _archiver(_CROSS_PREFIXES[machine] if not here else ""))
    prefix = "" if here else _CROSS_PREFIXES[machine]
    for name in _SYSTEM_COMPILERS:
        if shutil.which(prefix + name):
            return Toolchain((prefix + name,), _archiver(prefix))
    if importlib.util.find_spec("ziglang") is not None:
        zig = (sys.executable, "-m", "ziglang")
        return Toolchain((*zig, "cc", "-target", f"{machine}-linux-gnu"), (*zig, "ar"))
    raise CompileError(
        f"no C compiler for {machine} was found (looked for {', '.join(prefix + n for n in _SYSTEM_COMPILERS)}); "
        "install one, or `pip install ziglang`, or name one with `compiler=`"
    )


def _archiver(prefix: str) -> tuple[str, ...]:
    for name in (prefix + "ar", "ar", "llvm-ar"):
        if shutil.which(name):
            return (name,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "ar")
    raise CompileError("no `ar` was found to make the static library; install binutils, or `pip install ziglang`")


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        words = " ".join(command[:4])
        raise CompileError(f"`{words} ...` failed ({done.returncode}):\n{done.stderr.strip()[-4000:]}")
