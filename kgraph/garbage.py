"""Python's garbage collector during a compile, which makes objects by the hundred thousand and few cycles."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

# New objects between two collections, instead of some hundreds.
_OBJECTS = 50_000


@contextlib.contextmanager
def earlier_objects_set_aside() -> Iterator[None]:
    """For the duration of a `with`, collections are rare and look only at objects made inside of it.

    A full collection visits every object of the process, several times in a compile; those of Keras and of the
    application, most of them by far, are not garbage of the compile. Does nothing where the application has frozen
    objects itself.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    threshold, *others = gc.get_threshold()
    if threshold:
        gc.set_threshold(max(threshold, _OBJECTS), *others)
    try:
        yield
    finally:
        gc.set_threshold(threshold, *others)
        gc.unfreeze()


__all__ = ["earlier_objects_set_aside"]
