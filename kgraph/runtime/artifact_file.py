"""The container of a saved model: a header and sections, each with its SHA-256, in one file that can be mapped.

    0    8  magic
    8    4  format version
    12   4  number of sections
    16   8  size of the file
    24   8  zero
    32  32  SHA-256 of the 32 bytes before and of the section table
    64      the section table: name (48 bytes, padded with zeros), offset (8), length (8) and SHA-256 of each section

All integers are little-endian. Sections follow in the table's order; each starts at the first multiple of ALIGNMENT
behind what precedes it, after zeros, and the last one ends the file. So there is one way to lay out given sections, and
none can overlap another or the header. What is to be executed or parsed is copied out of the file, and it is the copy
that is checked.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from kgraph.errors import ArtifactError

MAGIC = b"\x89KGRAPH\n"
FORMAT = 1
ALIGNMENT = 4096
HEADER = struct.Struct("<8sIIQQ")
DIGEST_BYTES = 32
ENTRY = struct.Struct("<48sQQ32s")
_TABLE = HEADER.size + DIGEST_BYTES
_MAX_SECTIONS = 1 << 14
# JSON sections are a few hundred KiB; more than this is no model of ours.
_MAX_JSON_BYTES = 1 << 26


@dataclass(frozen=True)
class Section:
    """A named range of the file and its SHA-256."""

    name: str
    offset: int
    length: int
    digest: bytes


class ArtifactFile:
    """A mapped file with a header that holds; no section has been looked at yet.

    Raises ArtifactError for a file that is damaged, truncated, no artifact, or of a newer format, and OSError where it
    cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size < _TABLE:
                self.fail("it is truncated, or no saved model")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.size = len(self._map)
        self._view = memoryview(self._map)
        self.sections = self._read_table()

    def fail(self, reason: str) -> NoReturn:
        """Raise ArtifactError for this file."""
        raise ArtifactError(f"{self.path}: {reason}")

    def _read_table(self) -> dict[str, Section]:
        magic, version, count, size, zero = HEADER.unpack_from(self._map)
        if magic != MAGIC:
            self.fail("it is no model saved by kgraph")
        if version != FORMAT:
            newer = "; a newer kgraph wrote it: upgrade kgraph" if version > FORMAT else ""
            self.fail(f"its format is {version}, this version of kgraph reads {FORMAT}{newer}")
        end = _TABLE + count * ENTRY.size
        if size != self.size:
            self.fail(f"it has {self.size} bytes and should have {size}: it is truncated or damaged")
        if count > _MAX_SECTIONS or end > size or zero:
            self.fail("its header is damaged")
        head = bytes(self._view[:end])
        digest = hashlib.sha256(head[: HEADER.size] + head[_TABLE:]).digest()
        if digest != head[HEADER.size : _TABLE]:
            self.fail("its header is damaged: the checksum differs")
        sections: dict[str, Section] = {}
        for fields in ENTRY.iter_unpack(head[_TABLE:]):
            title, offset, length, digest = fields
            try:
                name = title.rstrip(b"\0").decode("ascii")
            except UnicodeDecodeError:
                self.fail("a section has no name")
            if not name or not name.isprintable() or name in sections:
                self.fail(f"the section name {name!r} is empty, unprintable or used twice")
            if offset != aligned(end) or length > size - offset:
                self.fail(f"the section {name!r} does not lie behind the one before it and inside of the file")
            if any(self._view[end:offset]):
                self.fail(f"there are bytes before the section {name!r} that belong to none")
            end = offset + length
            sections[name] = Section(name, offset, length, digest)
        if end != size:
            self.fail("its sections do not end where the file ends")
        return sections

    def section(self, name: str) -> Section:
        """The section called `name`. Raises ArtifactError if there is none."""
        try:
            return self.sections[name]
        except KeyError:
            self.fail(f"it has no section {name!r}")

    def view(self, name: str) -> memoryview:
        """The bytes of a section in the mapping, read from the disk when they are used, and not checked."""
        section = self.section(name)
        return self._view[section.offset : section.offset + section.length]

    def expect(self, name: str) -> None:
        """Tell the system that a section will be read soon."""
        section = self.section(name)
        if hasattr(mmap, "MADV_WILLNEED") and section.length:
            start = section.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, section.offset + section.length - start)

    def check(self, name: str) -> None:
        """Compare a section's checksum. Raises ArtifactError if it differs."""
        if hashlib.sha256(self.view(name)).digest() != self.section(name).digest:
            self.fail(f"the section {name!r} is damaged: the checksum differs")

    def read(self, name: str) -> bytes:
        """A copy of a section's bytes, whose checksum holds."""
        content = bytes(self.view(name))
        if hashlib.sha256(content).digest() != self.section(name).digest:
            self.fail(f"the section {name!r} is damaged: the checksum differs")
        return content

    def read_json(self, name: str) -> Any:
        """The JSON value of a section whose checksum holds."""
        if self.section(name).length > _MAX_JSON_BYTES:
            self.fail(f"the section {name!r} is too large")
        try:
            return parse_json(self.read(name))
        except ValueError as error:
            self.fail(f"the section {name!r} is no JSON: {error}")


def aligned(offset: int) -> int:
    """The first multiple of ALIGNMENT that is not below `offset`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def parse_json(data: bytes) -> Any:
    """A JSON value in UTF-8 without NaN, infinities and repeated keys. Raises ValueError, whatever the bytes are."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key is repeated")
    return out


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def write_file(path: str | os.PathLike, sections: Iterable[tuple[str, Iterable[bytes | memoryview]]]) -> int:
    """Write an artifact; gives its size.

    sections: each one's name and its content in pieces. The file is written aside and renamed into place, so that a
    process that has the former file mapped keeps it, and nobody sees half a file. Raises ValueError for a bad name.
    """
    content = [(name, list(pieces)) for name, pieces in sections]
    path = Path(path)
    end = _TABLE + len(content) * ENTRY.size
    table = b""
    for name, pieces in content:
        title = name.encode("ascii")
        if not 0 < len(title) <= 48 or not name.isprintable():
            raise ValueError(f"{name!r} cannot be the name of a section")
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        start, length = aligned(end), sum(memoryview(piece).nbytes for piece in pieces)
        table += ENTRY.pack(title, start, length, digest.digest())
        end = start + length
    head = HEADER.pack(MAGIC, FORMAT, len(content), end, 0)
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with open(aside, "wb") as file:
            file.write(head + hashlib.sha256(head + table).digest() + table)
            for _, pieces in content:
                file.write(bytes(-file.tell() % ALIGNMENT))
                for piece in pieces:
                    file.write(piece)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return end
