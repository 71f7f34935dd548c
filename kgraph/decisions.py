"""What passes and lowering decided, for `explain()` to tell."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """One choice that a user may ask about, such as why two nodes were not fused."""

    subject: str
    outcome: str
    reason: str
    layers: frozenset = frozenset()
