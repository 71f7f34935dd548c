"""What happens to a finished sum of a contraction: the fused elementwise code, and the stores."""

from __future__ import annotations

from collections.abc import Sequence

from kgraph.codegen.cuda import scalar_ops
from kgraph.codegen.cuda.source import KernelSource
from kgraph.codegen.expressions import compute_dtype


class Finish:
    """The epilogue of a kernel; its operands are the kernel's next ones, extras first.

    accumulate: dtype of the sums. result: of the contraction's result. extras: (kind, dtype) of further operands, kinds
    as in `operand_kind`. outputs: dtypes. expression: or None where the result itself is the only output.
    """

    def __init__(
        self, k: KernelSource, accumulate: str, result: str, extras: Sequence, outputs: Sequence[str], expression
    ):
        self.k, self.accumulate, self.result, self.expression = k, accumulate, result, expression
        self.extras = [(kind, k.operand(dtype)) for kind, dtype in extras]
        self.outputs = [k.operand(dtype) for dtype in outputs]
        self._kept: dict[int, str] = {}

    @staticmethod
    def params(parts, accumulate: str) -> tuple:
        """The params of a node's epilogue. parts: as `take_apart` gives them."""
        extras = tuple((kind, value.dtype) for kind, value in parts.extras)
        outputs = tuple(value.dtype for value in parts.outputs)
        return accumulate, parts.result.dtype, extras, outputs, parts.expression

    def begin(self, column: str) -> None:
        """Reads what all rows of a column share, for stores of that column alone: behind the first of them the compiler
        would read it again."""
        places = {"channel": column, "scalar": self.k.i(0)}
        for n, (kind, operand) in enumerate(self.extras):
            if kind in places:
                self._kept[n] = self.k.load(operand, places[kind])

    def store(self, value: str, row: str, column: str, columns: str) -> None:
        """Stores what becomes of the sum of one row (a pixel) and column, of `columns`."""
        k = self.k
        at = k.let(k.add(k.mul(row, columns), column), "at")
        value = k.let(scalar_ops.convert(k, value, self.accumulate, compute_dtype(self.result)))
        results = [value]
        if self.expression is not None:
            places = {"full": at, "row": row, "channel": column, "scalar": k.i(0)}
            extras = [
                self._kept[n] if n in self._kept else k.load(operand, places[kind])
                for n, (kind, operand) in enumerate(self.extras)
            ]
            results = k.emit(self.expression, [value, *extras])
        for output, result in zip(self.outputs, results, strict=True):
            k.store(output, at, result)
