"""Exceptions of kgraph. Each message says what happened, where, what was expected and what to do."""

from __future__ import annotations


class KGraphError(Exception):
    """Base class of every error that kgraph raises on purpose."""


class ShapeError(KGraphError, ValueError):
    """Operands of a primitive have shapes that do not fit together."""


class DTypeError(KGraphError, TypeError):
    """Operands of a primitive have dtypes that it does not take."""


class InputError(KGraphError, ValueError):
    """A call of a compiled model got an input of the wrong structure, rank, size or dtype."""


class UnsupportedError(KGraphError, NotImplementedError):
    """A function of the Keras backend interface that kgraph does not provide (listed in `gaps.toml`)."""


class GradientError(UnsupportedError):
    """A gradient needs the derivative of a primitive that has none; the message names it, its layer and the reason."""


class CaptureError(KGraphError, RuntimeError):
    """A model could not be captured as a graph."""


class DimDecisionError(KGraphError, RuntimeError):
    """Python code asked a question about a symbolic size whose answer depends on the size.

    The capture reacts by specialising on concrete sizes; it reaches a user only through direct use of `trace`.
    """


class VerificationError(KGraphError, AssertionError):
    """A graph broke an invariant of the IR; the message names the pass and shows the nodes around the fault."""


class CompileError(KGraphError, RuntimeError):
    """Kernel generation failed."""


class DeviceError(KGraphError, RuntimeError):
    """A GPU cannot be used: there is none, its driver is missing or too old, or it was lost; the message says what."""


class DeviceMemoryError(DeviceError, MemoryError):
    """The memory of a GPU does not suffice; the message says how much was wanted and how much is free."""


class ArtifactError(KGraphError, ValueError):
    """A cached or saved object is damaged, truncated, or does not fit this machine."""
