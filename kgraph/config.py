"""Options of a compilation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What `kgraph.compile` may be told.

    target: "cpu", "cuda", "cuda:N" or "cuda-simulator"; None for what `kgraph.set_device` was given.
    freeze: bake the weights in as they are now; later changes of the model's weights are not seen.
    tune: measure on this machine where there is a choice between algorithms.
    precision: "float32", or "bf16": operands of products and convolutions are rounded to bfloat16.
    progress: show progress of a compile that takes longer than a second; None shows it on a terminal only.
    """

    target: str | None = None
    freeze: bool = False
    progress: bool | None = None
    precision: str = "float32"
    tune: bool = False
