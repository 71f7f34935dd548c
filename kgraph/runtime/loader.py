"""Loads kernel objects: relocatable x86-64 ELF bytes become code at callable addresses, with no linker and no LLVM.

All objects of a program share one mapping, filled while writable and executable only after (never both). Code in it may
refer to its own sections, and to C functions (`memcpy`, `memset`, `syscall` ...) through stubs. Objects of other
formats are handed to LLVM's JIT.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import struct
import sys
import weakref
from collections.abc import Mapping

from kgraph.errors import ArtifactError

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")

_SHT_SYMTAB, _SHT_RELA, _SHT_NOBITS = 2, 4, 8
_SHF_WRITE, _SHF_ALLOC, _SHF_TLS = 1, 2, 0x400
_SHN_UNDEF, _SHN_ABS, _SHN_COMMON = 0, 0xFFF1, 0xFFF2

# Relocation types of the x86-64 psABI, by what is stored.
_ABS64 = 1
_PC32, _PLT32 = 2, 4
_GOT = (9, 41, 42)  # GOTPCREL, GOTPCRELX, REX_GOTPCRELX
_ABS32, _ABS32S = 10, 11
_PC64 = 24

_STUB = struct.Struct("<6sxxQ")  # jmp *2(%rip); target address. The address doubles as the symbol's GOT slot.
_JUMP = b"\xff\x25\x02\x00\x00\x00"
_MAX_ALIGN = 4096
_MAX_SECTION_BYTES = 1 << 28
# What parsing of arbitrary bytes may raise.
_DAMAGE = (struct.error, LookupError, ValueError, TypeError, OverflowError)


class Library:
    """Code of several objects in one executable mapping, released with the last reference.

    objects: name -> bytes of a relocatable object.
    Raises ArtifactError for an object that is damaged or needs what is not there.
    """

    def __init__(self, objects: Mapping[str, bytes]):
        self._symbols: dict[str, dict[str, int]] = {}
        self._release: weakref.finalize | None = None
        self.code_bytes = 0
        if not objects:
            return
        if sys.platform.startswith("linux") and platform.machine() in ("x86_64", "AMD64"):
            self._load_elf(objects)
        else:
            self._load_with_llvm(objects)

    def address(self, name: str, symbol: str = "kernel") -> int:
        """Where the global function `symbol` of object `name` lies. Raises ArtifactError if there is none."""
        try:
            return self._symbols[name][symbol]
        except KeyError:
            raise ArtifactError(f"object {name!r} defines no function {symbol!r}") from None

    def keep_forever(self) -> None:
        """Never release the mapping: threads may run in it until the process is gone."""
        if self._release is not None:
            self._release.detach()
        else:
            _IMMORTAL.append(self)

    def _load_elf(self, objects: Mapping[str, bytes]) -> None:
        parsed: list[_Object] = []
        externals: dict[str, int] = {}
        size = 0
        for name, data in objects.items():
            try:
                item = _Object(name, data, size)
            except ArtifactError:
                raise
            except _DAMAGE as error:
                raise ArtifactError(f"kernel object {name!r} is damaged: {error}") from error
            size = item.end
            for symbol in item.undefined:
                externals.setdefault(symbol, len(externals))
            parsed.append(item)
        stubs = -(-size // 16) * 16
        local_slots = sum(item.num_got for item in parsed)
        size = stubs + _STUB.size * (len(externals) + local_slots)
        size = max(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE, mmap.PAGESIZE)
        image = bytearray(size)
        base = _map(size)
        self._release = weakref.finalize(self, _unmap, base, size)
        self._release.atexit = False
        slots = {}
        for symbol, index in externals.items():
            _STUB.pack_into(image, stubs + _STUB.size * index, _JUMP, external_address(symbol))
            slots[symbol] = stubs + _STUB.size * index
        next_slot = stubs + _STUB.size * len(externals)
        for item in parsed:
            try:
                next_slot = item.place(image, base, slots, next_slot)
                self._symbols[item.name] = item.exported(base)
            except ArtifactError:
                raise
            except _DAMAGE as error:
                raise ArtifactError(f"kernel object {item.name!r} is damaged: {error}") from error
        ctypes.memmove(base, (ctypes.c_char * size).from_buffer(image), size)
        _protect(base, size)
        self.code_bytes = size

    def _load_with_llvm(self, objects: Mapping[str, bytes]) -> None:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        for name, data in objects.items():
            engine = llvm.create_mcjit_compiler(
                llvm.parse_assembly(""), llvm.Target.from_default_triple().create_target_machine()
            )
            # Each object in an engine of its own: all of them define a function of the same name.
            engine.add_object_file(llvm.ObjectFileRef.from_data(data))
            engine.finalize_object()
            self._symbols[name] = _EngineSymbols(engine)
            self.code_bytes += len(data)


class _EngineSymbols(dict):
    """Addresses of the functions of one of LLVM's JIT engines, which lives as long as this."""

    def __init__(self, engine):
        super().__init__()
        self._engine = engine

    def __missing__(self, symbol: str) -> int:
        address = self._engine.get_function_address(symbol)
        if not address:
            raise KeyError(symbol)
        return address


class _Object:
    """One parsed ELF object, its sections laid out from offset `start` of the mapping."""

    def __init__(self, name: str, data: bytes, start: int):
        self.name, self.data = name, data
        header = _HEADER.unpack_from(data, 0)
        ident, kind, machine = header[:3]
        if ident[:6] != b"\x7fELF\x02\x01" or kind != 1 or machine != 62:
            raise ArtifactError(f"kernel object {name!r} is not a relocatable x86-64 ELF object")
        offset, count = header[6], header[12]
        if offset + count * _SECTION.size > len(data):
            raise ArtifactError(f"kernel object {name!r} is truncated")
        sections = [_SECTION.unpack_from(data, offset + i * _SECTION.size) for i in range(count)]
        self.sections = sections
        self.names = sections[header[13]][4]
        # Where each loaded section starts in the mapping; None for what is not loaded.
        self.places: list[int | None] = [None] * count
        self.symbols: list[tuple] = []
        self.strings = 0
        position = start
        self.relocations: list[tuple[int, tuple]] = []
        for index, (sname, kind, flags, _, at, size, link, info, align, _) in enumerate(sections):
            if kind != _SHT_NOBITS and at + size > len(data):
                raise ArtifactError(f"kernel object {name!r} is truncated")
            if kind == _SHT_SYMTAB:
                self.symbols = list(_SYMBOL.iter_unpack(data[at : at + size]))
                self.strings = sections[link][4]
            elif kind == _SHT_RELA:
                self.relocations.append((info, (at, size)))
            elif flags & _SHF_ALLOC and size:
                title = self._string(self.names + sname)
                if title.startswith((".eh_frame", ".note")):
                    continue  # kernels do not throw; debuggers of JIT code read other tables
                if flags & (_SHF_WRITE | _SHF_TLS) and not title.startswith(".data.rel.ro"):
                    raise ArtifactError(f"kernel object {name!r} has writable data in {title}")
                if align > _MAX_ALIGN or size > _MAX_SECTION_BYTES:
                    raise ArtifactError(f"kernel object {name!r}: {title} has {size} bytes aligned to {align}")
                # Functions start on a cache line.
                align = max(align, 64 if flags & 4 else 1)
                position = -(-position // align) * align
                self.places[index] = position
                position += size
        self.end = position
        self.relocations = [(s, place) for s, place in self.relocations if self.places[s] is not None]
        self.undefined = []
        used: set[int] = set()
        got: set[int] = set()
        self.entries: list[tuple[int, list[tuple]]] = []
        for section, (at, size) in self.relocations:
            entries = [(o, i >> 32, i & 0xFFFFFFFF, a) for o, i, a in _RELOCATION.iter_unpack(data[at : at + size])]
            self.entries.append((section, entries))
            for _, symbol, kind, _ in entries:
                used.add(symbol)
                if kind in _GOT:
                    got.add(symbol)
        for symbol in sorted(used):
            title, section = self.symbols[symbol][0], self.symbols[symbol][3]
            if section == _SHN_UNDEF and symbol:
                self.undefined.append(self._string(self.strings + title))
        self.num_got = len(got)

    def _string(self, offset: int) -> str:
        return self.data[offset : self.data.index(b"\0", offset)].decode()

    def _symbol_offset(self, symbol: int, slots: Mapping[str, int]) -> int:
        """Offset of a symbol in the mapping; an external is represented by its stub."""
        title, _, _, section, value, _ = self.symbols[symbol]
        if section == _SHN_UNDEF:
            return slots[self._string(self.strings + title)]
        if section in (_SHN_ABS, _SHN_COMMON) or section >= len(self.places) or self.places[section] is None:
            raise ArtifactError(f"kernel object {self.name!r} refers to a section that is not loaded")
        return self.places[section] + value

    def place(self, image: bytearray, base: int, slots: Mapping[str, int], next_slot: int) -> int:
        """Copy the sections into `image` and apply relocations for address `base`; gives the next free GOT slot."""
        data = self.data
        for fields, position in zip(self.sections, self.places):
            if position is not None and fields[1] != _SHT_NOBITS:
                image[position : position + fields[5]] = data[fields[4] : fields[4] + fields[5]]
        got: dict[int, int] = {}
        for section, entries in self.entries:
            origin, length = self.places[section] or 0, self.sections[section][5]
            for offset, symbol, kind, addend in entries:
                width = 8 if kind in (_ABS64, _PC64) else 4
                if offset + width > length:
                    raise ArtifactError(f"kernel object {self.name!r}: relocation outside of its section")
                where = origin + offset
                target = self._symbol_offset(symbol, slots)
                if kind in (_PC32, _PLT32):
                    struct.pack_into("<i", image, where, target + addend - where)
                elif kind == _ABS64:
                    struct.pack_into("<Q", image, where, (base + target + addend) % (1 << 64))
                elif kind == _PC64:
                    struct.pack_into("<q", image, where, target + addend - where)
                elif kind in _GOT:
                    if self.symbols[symbol][3] == _SHN_UNDEF:
                        slot = target + 8
                    else:
                        if symbol not in got:
                            _STUB.pack_into(image, next_slot, _JUMP, base + target)
                            got[symbol] = next_slot + 8
                            next_slot += _STUB.size
                        slot = got[symbol]
                    struct.pack_into("<i", image, where, slot + addend - where)
                elif kind in (_ABS32, _ABS32S):
                    # Only position-dependent code has these, and the mapping lies above 4 GiB.
                    raise ArtifactError(f"kernel object {self.name!r} is not position independent")
                else:
                    raise ArtifactError(f"kernel object {self.name!r}: relocation type {kind} is not supported")
        return next_slot

    def exported(self, base: int) -> dict[str, int]:
        """Addresses of the global functions."""
        out = {}
        for title, info, _, section, value, _ in self.symbols:
            if info >> 4 and info & 15 == 2 and section < len(self.places) and self.places[section] is not None:
                if value >= self.sections[section][5]:
                    raise ArtifactError(f"kernel object {self.name!r}: a function lies outside of its section")
                out[self._string(self.strings + title)] = base + self.places[section] + value
        return out


@functools.cache
def _c_libraries() -> tuple[ctypes.CDLL, ...]:
    libraries = [ctypes.CDLL(None)]
    for name in ("libm.so.6", "libgcc_s.so.1"):
        try:
            libraries.append(ctypes.CDLL(name))
        except OSError:
            continue
    return tuple(libraries)


@functools.cache
def external_address(symbol: str) -> int:
    """Address of a function of the C library, libm or the compiler's support library. Raises ArtifactError."""
    for library in _c_libraries():
        try:
            address = ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
        except AttributeError:
            continue
        if address:
            return address
    raise ArtifactError(f"a kernel needs the function {symbol!r}, which no C library of this process defines")


# The mapping is made with the C functions, not with Python's mmap objects: an object may be collected while the
# interpreter shuts down, when threads still run in the code.
@functools.cache
def _libc():
    libc = ctypes.CDLL(None, use_errno=True)
    word, integer = ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype, libc.mmap.argtypes = word, [word, word, integer, integer, integer, ctypes.c_longlong]
    libc.munmap.argtypes = [word, word]
    libc.mprotect.argtypes = [word, word, integer]
    return libc


def _map(size: int) -> int:
    """Fresh zeroed pages, readable and writable."""
    address = _libc().mmap(0, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if address == ctypes.c_size_t(-1).value:
        raise MemoryError(f"cannot map {size} bytes: errno {ctypes.get_errno()}")
    return address


def _protect(address: int, size: int) -> None:
    if _libc().mprotect(address, size, mmap.PROT_READ | mmap.PROT_EXEC):
        raise ArtifactError(f"the system does not let this process make code executable: errno {ctypes.get_errno()}")


def _unmap(address: int, size: int) -> None:
    _libc().munmap(address, size)


def allocate_forever(size: int) -> int:
    """Address of zeroed page-aligned memory that is never released, for what native threads use until the end."""
    if sys.platform.startswith("linux"):
        return _map(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
    buffer = ctypes.create_string_buffer(size + 4096)
    _IMMORTAL.append(buffer)
    return -(-ctypes.addressof(buffer) // 4096) * 4096


_IMMORTAL: list = []
