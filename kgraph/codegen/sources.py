"""Digests of this package's sources, on which the keys of the disk cache stand.

To read all sources takes longer than to find a program in the cache, so their digests are kept there too, under a key
made of every file's size, identity and times. An index is kept only when all files have been left alone for a while:
a file that is written twice within the resolution of its times would look the same.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kgraph.disk_cache import disk_cache

_ROOT = Path(__file__).parent.parent
_RESTING_SECONDS = 2.0
_IMPORT = re.compile(
    r"^\s*(?:from\s+(kgraph[\w.]*)\s+import\s+(\([^)]*\)|[^\n]*)|import\s+(kgraph[\w.]*))", re.MULTILINE
)


@dataclass(eq=False)
class Index:
    """files: for each source, by its path below the package, its digest and the kgraph modules (or names in them) that
    it imports. digest: of all of them."""

    files: dict[str, tuple[bytes, tuple[str, ...]]]
    digest: bytes


def module_source(module: str) -> tuple[bytes, tuple[str, ...]]:
    """Digest of a module's source, and what it imports of kgraph; nothing for what is not a file of ours."""
    base = "/".join(module.split(".")[1:])
    files = index().files
    return files.get(f"{base}.py") or files.get(f"{base}/__init__.py".lstrip("/")) or (b"", ())


@functools.cache
def index() -> Index:
    """The index of the sources as they are when this process first asks."""
    found = sorted(_files(str(_ROOT), ""))
    stamps = [(path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev) for path, s in found]
    cache = disk_cache()
    key = hashlib.sha256(repr((str(_ROOT), stamps)).encode()).hexdigest()[:40]
    data = cache.get(key) if cache is not None else None
    if data is not None:
        try:
            return Index(*pickle.loads(data))
        except (pickle.PickleError, TypeError, AttributeError, ValueError, EOFError, IndexError):
            pass  # no entry that this code has written
    files = {path: _read(path) for path, _ in found}
    whole = Index(files, hashlib.sha256(repr(sorted((p, d) for p, (d, _) in files.items())).encode()).digest())
    newest = max((max(s.st_mtime, s.st_ctime) for _, s in found), default=0.0)
    if cache is not None and newest < time.time() - _RESTING_SECONDS:
        cache.put(key, pickle.dumps((whole.files, whole.digest)))
    return whole


def _files(directory: str, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    """The Python files below a directory, by their path from it, with what the system knows of them."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                yield prefix + entry.name, entry.stat()
            elif entry.name != "__pycache__" and entry.is_dir():
                yield from _files(entry.path, f"{prefix}{entry.name}/")


def _read(path: str) -> tuple[bytes, tuple[str, ...]]:
    text = (_ROOT / path).read_bytes()
    imports = []
    for origin, names, plain in _IMPORT.findall(text.decode()):
        imports.append(origin or plain)
        imports += [f"{origin}.{name.split()[0]}" for name in names.strip("()").split(",") if origin and name.split()]
    return hashlib.sha256(text).digest(), tuple(imports)
