"""Who runs the uncut operations of a block: our own kernels, or ONNX Runtime.

Knows: the executors' names, their libraries and what decides their bits. Does not know: blocks or batches. ONNX Runtime
is imported only where it is used: its library alone takes tens of MiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import edge_kernels
import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import Block, Segment
from edge_runtime.engine.base import DEFAULT_FORMATS, StageFormats
from edge_runtime.engine.numeric_class import native_class, onnx_class
from edge_runtime.errors import EngineError

Float32 = NDArray[np.float32]

NATIVE = "native"
ONNX = "onnx"
AUTO = "auto"
CHOICES = (AUTO, NATIVE, ONNX)


class SegmentStep(Protocol):
    """Consecutive uncut operations, ready to run on any number of rows. Values are matched by position."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, values: Sequence[Float32]) -> list[Float32]: ...


def chosen_executor(name: str) -> str:
    """`auto` is native where our kernels have vector instructions on this processor, and onnx elsewhere."""
    if name not in CHOICES:
        raise EngineError(f"unknown executor {name!r}", hint=f"choose one of {', '.join(CHOICES)}")
    if name == AUTO:
        return ONNX if edge_kernels.isa() == "scalar" else NATIVE
    return name


def load_segment(executor: str, bundle: Bundle, block: Block, segment: Segment, threads: int) -> SegmentStep:
    if executor == NATIVE:
        from edge_runtime.engine.native import NativeSegment

        return NativeSegment(bundle, block, segment, threads)
    from edge_runtime.engine.onnx import OnnxSegment

    return OnnxSegment(bundle, block, segment, threads)


def import_executor(name: str) -> None:
    """Load the libraries of an executor now, so that what they take can be measured."""
    if chosen_executor(name) == ONNX:
        import edge_runtime.engine.cpu
        import edge_runtime.engine.onnx
    else:
        import edge_runtime.engine.cpu
        import edge_runtime.engine.native  # noqa: F401


def numeric_class_of(executor: str, weights: str, formats: StageFormats = DEFAULT_FORMATS) -> str:
    """Of stages that this process would load with `executor`."""
    if executor == NATIVE:
        return native_class(weights, formats)
    import onnxruntime

    return onnx_class(onnxruntime.__version__, weights, formats)
