"""What a machine must have for stored code to run on it, and what this machine has.

Known without a compiler: from the system's own list of the processor's features (Linux), else by the processor's name.
"""

from __future__ import annotations

import functools
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# LLVM's names of features where Linux spells them in another way than with `_` for `.`.
_LINUX_NAMES = {
    "64bit": "lm",
    "avx512bf16": "avx512_bf16",
    "avx512bitalg": "avx512_bitalg",
    "avx512fp16": "avx512_fp16",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512vp2intersect": "avx512_vp2intersect",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avxifma": "avx_ifma",
    "avxvnni": "avx_vnni",
    "bmi": "bmi1",
    "crc32": "sse4_2",
    "lzcnt": "abm",
    "pclmul": "pclmulqdq",
    "prfchw": "3dnowprefetch",
    "sahf": "lahf_lm",
    "sha": "sha_ni",
    "sse3": "pni",
}
# Prefixes of features that both spell alike, whether this machine has them or not.
_SPELLED_ALIKE = ("avx", "sse", "ssse", "bmi", "fma", "f16c", "movbe", "popcnt", "cx", "cmov")
# Instructions for systems, not for kernels: the compiler does not emit them by itself.
_NOT_EMITTED = frozenset(
    "clflushopt clwb clzero fsgsbase fxsr invpcid mwaitx pku rdpid rdpru rdrnd rdseed shstk wbnoinvd "
    "xsave xsavec xsaveopt xsaves".split()
)


@dataclass(frozen=True)
class Requirement:
    """What code needs.

    system, machine: as Python's `sys.platform` and `platform.machine()` name them. flags: features of the processor
    that the code may use. model: the processor it was made for, where its features cannot all be looked up; else "".
    """

    system: str
    machine: str
    flags: frozenset[str]
    model: str = ""

    def missing(self) -> list[str]:
        """What this machine lacks; nothing where the code runs here."""
        here = host()
        if (self.system, self.machine) != (here.system, here.machine):
            return [f"{self.machine} on {self.system}"]
        lacking = sorted(self.flags - here.flags)
        return lacking + ([f"the processor {self.model}"] if self.model and self.model != here.model else [])

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` reads back."""
        return {"system": self.system, "machine": self.machine, "flags": sorted(self.flags), "model": self.model}

    @staticmethod
    def from_json(data: Any) -> Requirement:
        """The requirement that `to_json` wrote. Raises ValueError for anything else."""
        if type(data) is not dict or set(data) != {"system", "machine", "flags", "model"}:
            raise ValueError("what the code requires is not stated")
        system, machine, flags, model = (data[name] for name in ("system", "machine", "flags", "model"))
        if type(flags) is not list or not all(type(text) is str for text in (system, machine, model, *flags)):
            raise ValueError("what the code requires is not stated")
        return Requirement(system, machine, frozenset(flags), model)


def requirement(features: Iterable[str]) -> Requirement:
    """What code made on this system with these processor features (in LLVM's spelling) needs."""
    here, flags = host(), set()
    model = "" if here.flags else here.model
    for feature in features:
        flag = _LINUX_NAMES.get(feature, feature.replace(".", "_"))
        if flag in here.flags or feature in _LINUX_NAMES or feature.startswith(_SPELLED_ALIKE):
            flags.add(flag)
        elif feature not in _NOT_EMITTED:
            model = here.model
    return Requirement(here.system, here.machine, frozenset(flags if here.flags else ()), model)


@functools.cache
def host(path: str = "/proc/cpuinfo") -> Requirement:
    """This machine: its system and kind, its processor's features and name. path: Linux' description of it."""
    fields: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                name, colon, value = line.partition(":")
                if not colon:
                    break  # the end of the first core; the others are alike
                fields[name.strip()] = value.strip()
    except OSError:
        pass
    names = [fields.get(name, "") for name in ("vendor_id", "cpu family", "model")]
    model = " ".join(names) if all(names) else platform.processor() or platform.machine()
    flags = frozenset((fields.get("flags") or fields.get("Features") or "").split())
    return Requirement(sys.platform, platform.machine(), flags, model)
