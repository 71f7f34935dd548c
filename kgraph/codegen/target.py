"""The machine that kernels are generated for: instruction set, vector width, caches.

`KGRAPH_CPU` overrides what is generated: `native` (default), `x86-64-v2`, `x86-64-v3` (AVX2) or `x86-64-v4` (AVX-512).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import llvmlite

from kgraph.codegen.sources import module_source
from kgraph.disk_cache import disk_cache
from kgraph.errors import CompileError
from kgraph.ir import np_dtype

_V2 = frozenset("cx16 popcnt sahf sse3 sse4.1 sse4.2 ssse3".split())
_V3 = _V2 | frozenset("avx avx2 bmi bmi2 f16c fma lzcnt movbe".split())
_V4 = _V3 | frozenset("avx512f avx512bw avx512cd avx512dq avx512vl".split())
_LEVELS = {"x86-64-v2": _V2, "x86-64-v3": _V3, "x86-64-v4": _V4}

# What makes a `Target` of an answer.
_MODULES = ("kgraph.codegen.target", "kgraph.codegen.cpu.compiler")
# Lines of /proc/cpuinfo that differ between cores, or from boot to boot.
_PASSING = ("processor", "core id", "apicid", "initial apicid", "physical id", "cpu mhz", "bogomips")

# Used where the system does not tell: a small core of today.
_DEFAULT_CACHES = {1: 32 << 10, 2: 1 << 20, 3: 8 << 20}


@dataclass(frozen=True)
class Target:
    """What a renderer may ask about the machine; hashable, and part of every kernel's cache key.

    triple, cpu, features, data_layout: as LLVM spells them; `features` is the whole comma-separated list.
    vector_bytes: width of the widest vector register in use: 64, 32 or 16.
    num_vector_registers: architectural vector registers of that width.
    l1_bytes, l2_bytes, l3_bytes: data cache of one core, and the cache shared by all.
    """

    triple: str
    cpu: str
    features: str
    data_layout: str
    vector_bytes: int
    num_vector_registers: int
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int

    @property
    def families(self) -> str:
        """The module that says which kernel family serves which node."""
        return "kgraph.codegen.families"

    @property
    def loop_group(self) -> str:
        """The module that joins small updates in one kernel."""
        return "kgraph.codegen.cpu.loop_group"

    @property
    def toolchain(self) -> str:
        """What turns rendered text into objects, with its version; part of every kernel's cache key."""
        return f"llvmlite {llvmlite.__version__}"

    @property
    def sources(self) -> tuple[str, ...]:
        """Modules beside the templates that kernels' code depends on."""
        return ("kgraph.types", "kgraph.codegen.compiler", "kgraph.runtime.layout")

    @property
    def machine(self) -> str:
        """The processor family, as triples name it (`x86_64`)."""
        return self.triple.partition("-")[0]

    def lanes(self, dtype: str) -> int:
        """Elements of `dtype` in one vector register."""
        return self.vector_bytes // np_dtype(dtype).itemsize

    def has(self, feature: str) -> bool:
        """Whether the instruction set holds `feature`, in LLVM's spelling (`avx512bf16`, `fma`, `neon`)."""
        return feature in _enabled(self.features)


@functools.cache
def _enabled(features: str) -> frozenset[str]:
    return frozenset(f[1:] for f in features.split(",") if f.startswith("+"))


@functools.cache
def host_target() -> Target:
    """The target of this process.

    To load LLVM only to ask for this machine takes longer than anything else that a cached program needs, so the answer
    is kept in the disk cache, under what the system says of the processor.
    Raises CompileError for an unknown `KGRAPH_CPU`, or one that this machine cannot run.
    """
    name = os.environ.get("KGRAPH_CPU", "native")
    cache, processor = disk_cache(), _processor()
    if cache is None or not processor:
        return make_target(name)
    facts = (name, processor, platform.machine(), llvmlite.__version__, cache_sizes(), *map(module_source, _MODULES))
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:40]
    data = cache.get(key)
    if data is not None:
        with contextlib.suppress(ValueError, TypeError):  # an entry that this code has not written
            return Target(**json.loads(data))
    target = make_target(name)
    cache.put(key, json.dumps(asdict(target)).encode())
    return target


def make_target(name: str, *, foreign: bool = False) -> Target:
    """The target called `native`, `x86-64-v2`, `x86-64-v3` or `x86-64-v4`, on this machine's caches.

    foreign: also a level whose code this machine cannot run; there is `aarch64` too then (Linux on 64-bit ARM, with
        what every such processor has, and the caches of a small core).
    """
    from kgraph.codegen.cpu.compiler import host_features, layout_of

    if foreign and name == "aarch64":
        return _aarch64_target()
    cpu, host = host_features()
    if name == "native":
        enabled, features = _enabled(host), host
    elif name in _LEVELS:
        missing = _LEVELS[name] - _enabled(host)
        if missing and not foreign:
            raise CompileError(f"KGRAPH_CPU={name}: this machine has no {', '.join(sorted(missing))}")
        cpu, enabled = name, _LEVELS[name]
        features = ",".join(f"+{f}" for f in sorted(enabled))
    else:
        raise CompileError(f"KGRAPH_CPU={name!r} is unknown; use native, {', '.join(_LEVELS)}")
    if "avx512f" in enabled:
        vector_bytes, registers = 64, 32
        # Some Intel models are tuned to split explicit 512-bit vectors; kernels choose their width themselves.
        features += ",-prefer-256-bit"
    elif "avx2" in enabled:
        vector_bytes, registers = 32, 16
    else:
        vector_bytes, registers = 16, 32 if platform.machine().lower() in ("aarch64", "arm64") else 16
    caches = cache_sizes()
    triple, data_layout = layout_of(cpu, features)
    return Target(
        triple=triple,
        cpu=cpu,
        features=features,
        data_layout=data_layout,
        vector_bytes=vector_bytes,
        num_vector_registers=registers,
        l1_bytes=caches[1],
        l2_bytes=caches[2],
        l3_bytes=caches[3],
    )


@functools.cache
def _aarch64_target() -> Target:
    from kgraph.codegen.cpu.compiler import layout_of

    features = "+fp-armv8,+neon"
    triple, data_layout = layout_of("generic", features, "aarch64-unknown-linux-gnu")
    caches = _DEFAULT_CACHES
    return Target(triple, "generic", features, data_layout, 16, 32, caches[1], caches[2], caches[3])


def _processor(path: str = "/proc/cpuinfo") -> str:
    """What the system says of the first core, without what changes with time; nothing where it does not."""
    try:
        with open(path) as file:
            lines = list(itertools.takewhile(str.strip, file))
    except OSError:
        return ""
    return "".join(line for line in lines if not line.lower().startswith(_PASSING))


def cache_sizes(root: str = "/sys/devices/system/cpu/cpu0/cache") -> dict[int, int]:
    """Bytes of the data caches by level (1, 2, 3), from sysfs, with defaults for what it does not list."""
    sizes = dict(_DEFAULT_CACHES)
    try:
        entries = sorted(Path(root).glob("index*"))
    except OSError:
        return sizes
    for entry in entries:
        try:
            kind = (entry / "type").read_text().strip()
            level = int((entry / "level").read_text())
            text = (entry / "size").read_text().strip()
            scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
            size = int(text.rstrip("KMG")) * scale
        except (OSError, ValueError):
            continue
        if kind in ("Data", "Unified") and level in sizes and size > 0:
            sizes[level] = size
    return sizes
