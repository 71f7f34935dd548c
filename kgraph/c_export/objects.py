"""Gives the kernels of a program, which are all called `kernel`, names of their own, so that a linker can take them."""

from __future__ import annotations

import struct

from kgraph.errors import CompileError

_SYMBOL = struct.Struct("<IBBHQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SHT_SYMTAB, _STV_HIDDEN, _STB_GLOBAL = 2, 2, 1


def rename_symbol(payload: bytes, old: str, new: str) -> bytes:
    """The relocatable ELF64 object with its one global symbol `old` called `new`, and hidden from other libraries.

    The table of names is written anew at the end of the file; all else stays where it is.
    Raises CompileError for another kind of object, or one without that symbol.
    """
    if payload[:6] != b"\x7fELF\x02\x01":
        raise CompileError("only little-endian ELF64 objects can be exported; export on Linux")
    out = bytearray(payload)
    (sections,) = struct.unpack_from("<Q", payload, 0x28)
    size, count = struct.unpack_from("<HH", payload, 0x3A)
    tables = [sections + i * size for i in range(count)]
    for at in tables:
        fields = _SECTION.unpack_from(payload, at)
        if fields[1] != _SHT_SYMTAB:
            continue
        names_at = sections + fields[6] * size
        names_fields = _SECTION.unpack_from(payload, names_at)
        names = payload[names_fields[4] : names_fields[4] + names_fields[5]]
        for place in range(fields[4], fields[4] + fields[5], _SYMBOL.size):
            name, info, _, section, value, length = _SYMBOL.unpack_from(payload, place)
            if info >> 4 != _STB_GLOBAL or names[name : names.index(b"\0", name)] != old.encode():
                continue
            _SYMBOL.pack_into(out, place, len(names), info, _STV_HIDDEN, section, value, length)
            extended = names + new.encode() + b"\0"
            moved = (*names_fields[:4], len(out), len(extended), *names_fields[6:])
            _SECTION.pack_into(out, names_at, *moved)
            return bytes(out) + extended
    raise CompileError(f"a kernel's object has no symbol {old!r}")
