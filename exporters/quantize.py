"""Which format each tensor gets, and writing it in that format.

| role                 | fp32 | int8 | int4 | nested4 | nested8 |
|----------------------|------|------|------|---------|---------|
| linear               | fp32 | int8 | int4 | int4    | int8    |
| experts              | fp32 | int8 | int4 | nested4 | nested8 |
| shared k and v       | fp32 | int8 | int8 | int8    | int8    |
| embedding, head      | fp32 | int8 | int8 | int8    | int8    |
| router, vector, table| fp32 | fp32 | fp32 | fp32    | fp32    |

A router decides which experts run: one flipped choice costs more than its few bytes save. Vectors and tables are
small. The head (often tied to the embedding) picks the token: at 4 bits it alone cost 1.5 % of the top tokens on the
demo model. Key and value projections that several query heads share are a percent or so of a model, and every head
reads them: at 8 bits they took the demo model from 93.8 % of the top tokens kept to 95.5 %.

Knows: that table and the layouts. Does not know: families, or why a layer is kept at fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from edge_kernels.error_feedback import ErrorFeedback, quantize_with_feedback
from edge_kernels.nested import NestedMatrix, dequantize_nested, nest, refine
from edge_kernels.quantization import QuantizedMatrix, dequantize, quantize
from numpy.typing import NDArray

from edge_runtime.bundle.manifest import Part, Tensor
from edge_runtime.bundle.writer import SliceWriter
from exporters.architectures.plan import EMBEDDING, HEAD, LINEAR, SHARED_KEY_VALUE
from exporters.checkpoint import Floats
from exporters.sources import TensorSource

WEIGHTS = ("fp32", "int8", "int4", "nested4", "nested8")
_NESTED = {"nested4": "int4", "nested8": "int8"}  # -> what else there is has
_FORMATS: Mapping[str, Mapping[str, str]] = {
    "fp32": {},
    "int8": dict.fromkeys((LINEAR, SHARED_KEY_VALUE, EMBEDDING, HEAD), "int8"),
    "int4": {LINEAR: "int4"} | dict.fromkeys((SHARED_KEY_VALUE, EMBEDDING, HEAD), "int8"),
}


def format_of(role: str, weights: str) -> str:
    """The format of a tensor with this role in a bundle of these weights."""
    return _FORMATS[_NESTED.get(weights, weights)].get(role, "fp32")


def experts_format_of(weights: str) -> str:
    """The format of experts: bit-nested ones make sense only where single ones are read."""
    return weights if weights in _NESTED else format_of(LINEAR, weights)


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor in its slice, and how far its output is from the exact one (0 where nobody measured)."""

    tensor: Tensor
    relative_error: float = 0.0


class Inputs(Protocol):
    """What reached a weight of K columns: some rows [R, K], and mean squares [K] of all, above 0."""

    sample: Floats

    @property
    def importance(self) -> Floats: ...


Quantized = QuantizedMatrix | NestedMatrix
Rounding = Callable[[Floats], QuantizedMatrix]


def rounding(format: str, inputs: Inputs | None, *, search: bool = True) -> Rounding:
    """How rows [N, K] become int8 or int4, for all weights that these inputs reach.

    At 4 bits errors are made up for by the columns behind them: 92.8 -> 94.6 % of the demo model's top tokens kept. At
    8 bits there is little to make up for.
    """
    if inputs is None or not search or format != "int4":
        importance = None if inputs is None else inputs.importance
        return partial(quantize, format=format, importance=importance, search=search)
    return partial(quantize_with_feedback, feedback=ErrorFeedback.of(inputs.sample, inputs.importance))


def expert_rounding(format: str, inputs: Inputs | None) -> Callable[[Floats], Quantized]:
    """The same for an expert's matrices: bit-nested ones have int4's codes, and at 8 bits what those leave over."""
    if format not in _NESTED:
        return rounding(format, inputs)
    feedback = None if inputs is None else ErrorFeedback.of(inputs.sample, inputs.importance)

    def rounded(rows: Floats) -> NestedMatrix:
        whole = quantize(rows, "int4") if feedback is None else quantize_with_feedback(rows, feedback)
        nested = nest(whole.data, whole.scales)
        return nested if format == "nested4" else refine(nested, rows, feedback)

    return rounded


class Meter(Protocol):
    """Judges a quantized weight by pieces of its rows."""

    def add(self, exact: Floats, quantized: Floats) -> None: ...

    @property
    def relative_error(self) -> float: ...


def write_tensor(
    out: SliceWriter,
    source: TensorSource,
    format: str,
    *,
    inputs: Inputs | None = None,
    meter: Meter | None = None,
    max_error: float = math.inf,
    search: bool = True,
) -> Written:
    """Append the tensor to the slice, a few rows of float32 in memory at a time; as fp32 if the error is too large."""
    if format == "fp32":
        return Written(Tensor("fp32", source.shape, {"data": _stream(out, source)}))
    rounded = rounding(format, inputs, search=search)
    quantized = []
    for _, rows in source.chunks():
        quantized.append(rounded(rows))
        if meter is not None:
            meter.add(rows, dequantize(quantized[-1], format, rows.shape[1]))
    error = meter.relative_error if meter is not None else 0.0
    if error > max_error:
        return Written(Tensor("fp32", source.shape, {"data": _stream(out, source)}), error)
    data = _append(out, (chunk.data for chunk in quantized))
    scales = _append(out, (chunk.scales for chunk in quantized))
    return Written(Tensor(format, source.shape, {"data": data, "scales": scales}), error)


def _stream(out: SliceWriter, source: TensorSource) -> Part:
    return _append(out, (rows for _, rows in source.chunks()))


def _append(out: SliceWriter, chunks: Iterator[NDArray[np.generic]]) -> Part:
    """One part made of chunks of rows: the first on a page, the others right behind."""
    first: Part | None = None
    rows = 0
    for chunk in chunks:
        part = out.add(chunk) if first is None else out.add(chunk, alignment_bytes=1)
        first = first or part
        rows += len(chunk)
    assert first is not None, "a tensor has at least one row"
    return Part(first.slice, first.offset_bytes, first.dtype, (rows, *first.shape[1:]))


def restored(quantized: Quantized, format: str, columns: int) -> Floats:
    """The float32 values [N, columns] that the quantized rows stand for; of bit-nested ones at all their bits."""
    if isinstance(quantized, NestedMatrix):
        return dequantize_nested(quantized, quantized.bits, columns)
    return dequantize(quantized, format, columns)
