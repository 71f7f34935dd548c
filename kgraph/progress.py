"""Progress of a compile that takes longer than a second, on standard error."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class CompileProgress:
    """Context manager that is called as `progress(done, total)`; shows a bar once a second has passed.

    show: True or False; None means only where standard error is a terminal.
    """

    def __init__(self, name: str, show: bool | None = None, delay: float = 1.0):
        self.name = name
        self.show = sys.stderr.isatty() if show is None else show
        self.delay = delay
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._start = time.perf_counter()

    def __enter__(self):
        self._start = time.perf_counter()
        return self

    def __call__(self, done: int, total: int) -> None:
        if not self.show:
            return
        if self._bar is None or self._task is None:
            if time.perf_counter() - self._start < self.delay:
                return
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(f"compiling {self.name}", total=total)
        self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *exc) -> None:
        if self._bar is not None:
            self._bar.stop()
