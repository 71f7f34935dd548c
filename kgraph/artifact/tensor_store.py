"""Collects the tensors of a file: equal ones are written once, and those that are used together lie together."""

from __future__ import annotations

import hashlib

import numpy as np

from kgraph.runtime import artifact_plan
from kgraph.runtime.artifact_tensors import to_pieces

# Sections of about this size are checked by several threads at once.
_SECTION_BYTES = 16 << 20


class TensorStore:
    """Tensors by content, and who uses each: a user is any string, such as a form and a level."""

    def __init__(self) -> None:
        self._names: dict[tuple, str] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._users: dict[str, set[str]] = {}

    def add(self, array: np.ndarray, user: str, name: str = "") -> str:
        """Put an array into the file and give its name there. name: what to call it if nobody has called it yet."""
        array = artifact_plan.stored(array)
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        key = (array.dtype.name, array.shape, hashlib.sha256(flat.data).digest())
        if key not in self._names:
            base = f"{len(self._names)}.{name}" if name else str(len(self._names))
            self._names[key] = base
            self._arrays[base] = array
        stored = self._names[key]
        self._users.setdefault(stored, set()).add(user)
        return stored

    def sections(self) -> tuple[list[tuple[str, list]], dict[str, list[str]]]:
        """The sections (name, pieces), and the names of those that each user needs."""
        groups: dict[frozenset[str], list[str]] = {}
        for name, users in self._users.items():
            groups.setdefault(frozenset(users), []).append(name)
        sections: list[tuple[str, list]] = []
        needed: dict[str, list[str]] = {}
        for group, names in groups.items():
            for chunk in self._chunks(names):
                title = f"weights/{len(sections)}"
                sections.append((title, to_pieces({name: self._arrays[name] for name in chunk})))
                for user in group:
                    needed.setdefault(user, []).append(title)
        return sections, needed

    def _chunks(self, names: list[str]) -> list[list[str]]:
        chunks: list[list[str]] = [[]]
        filled = 0
        for name in names:
            if filled > _SECTION_BYTES:
                chunks.append([])
                filled = 0
            chunks[-1].append(name)
            filled += self._arrays[name].nbytes
        return chunks
