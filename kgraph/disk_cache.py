"""Disk cache of kernel objects and programs, shared by all processes of a user.

One file per entry, named by a digest of everything that it depends on. Files are written aside and renamed into
place, so a reader sees a whole file or none; a checksum guards against damage. Entries are code that will run, so
directories and files are the user's alone (0700, 0600), and an entry that another user could have written is a miss.
Where: `KGRAPH_CACHE_DIR`, else the user's cache directory. `KGRAPH_CACHE=0` switches it off, `KGRAPH_CACHE_SIZE` is its
limit in MiB.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
import time
from pathlib import Path

_MAGIC = b"kgraph-object-1\n"
_CHECKSUM_BYTES = 16
_DEFAULT_LIMIT_MIB = 512
# An entry's time of last use is written at most this often.
_TOUCH_SECONDS = 3600.0
# The size limit is looked at on the first write of a process and then once per this many writes.
_WRITES_PER_SWEEP = 200


class DiskCache:
    """Entries by key under one directory. All faults of the file system count as a miss, never as an error."""

    def __init__(self, directory: Path, limit_bytes: int):
        self.directory, self.limit_bytes = directory, limit_bytes
        self._writes = 0

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / key[2:]

    def get(self, key: str) -> bytes | None:
        """The entry's bytes, or None. A damaged entry is removed."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                if not _is_trusted(status):
                    return None
                data = file.read()
        except OSError:
            return None
        age = time.time() - status.st_mtime
        head = len(_MAGIC) + _CHECKSUM_BYTES
        payload = data[head:]
        if data[: len(_MAGIC)] != _MAGIC or data[len(_MAGIC) : head] != _checksum(key, payload):
            _remove(path)
            return None
        if age > _TOUCH_SECONDS:
            with contextlib.suppress(OSError):
                os.utime(path)
        return payload

    def put(self, key: str, payload: bytes) -> bool:
        """Store an entry; False where the file system does not let us."""
        path = self._path(key)
        temporary = None
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + _checksum(key, payload) + payload)
            os.replace(temporary, path)
        except OSError:
            if temporary is not None:
                _remove(Path(temporary))
            return False
        if self._writes % _WRITES_PER_SWEEP == 0:
            self.sweep()
        self._writes += 1
        return True

    def sweep(self) -> int:
        """Remove the entries used least recently until the cache is within its limit; gives the bytes removed."""
        entries = []
        total = 0
        now = time.time()
        for path in self.directory.glob("??/*"):
            try:
                status = path.stat()
            except OSError:
                continue
            if path.name.startswith(".new-"):
                if now - status.st_mtime > _TOUCH_SECONDS:  # left by a process that was killed
                    _remove(path)
                continue
            entries.append((status.st_mtime, status.st_size, path))
            total += status.st_size
        removed = 0
        if total > self.limit_bytes:
            # Below the limit by a margin, so that not every later write sweeps again.
            goal = self.limit_bytes * 4 // 5
            for _, size, path in sorted(entries, key=lambda entry: entry[0]):
                if total - removed <= goal:
                    break
                _remove(path)
                removed += size
        return removed


def _checksum(key: str, payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=_CHECKSUM_BYTES, key=key.encode()).digest()


def _is_trusted(status: os.stat_result) -> bool:
    """Whether only this user (or root) can have written a file: what it holds is executed."""
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def disk_cache() -> DiskCache | None:
    """The cache that the environment asks for now; None where it is switched off."""
    if os.environ.get("KGRAPH_CACHE", "1").lower() in ("0", "off", "no", "false"):
        return None
    directory = os.environ.get("KGRAPH_CACHE_DIR") or _user_directory()
    try:
        limit = int(os.environ.get("KGRAPH_CACHE_SIZE", _DEFAULT_LIMIT_MIB))
    except ValueError:
        limit = _DEFAULT_LIMIT_MIB
    return _open(Path(directory) / "objects", limit << 20)


def _user_directory() -> str:
    import platformdirs

    return platformdirs.user_cache_dir("kgraph", appauthor=False)


@functools.cache
def _open(directory: Path, limit_bytes: int) -> DiskCache:
    return DiskCache(directory, limit_bytes)
