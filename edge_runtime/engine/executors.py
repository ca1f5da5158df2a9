"""Who computes a stage: our own kernels or ONNX Runtime on the processor (`CpuStage`), or torch (`TorchStage`).

Knows: the executors' names, their libraries and what decides their bits. Does not know: blocks or batches. ONNX Runtime
and torch are imported only where they are used: their libraries alone take tens and hundreds of MiB.
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
TORCH = "torch"
CHOICES = (AUTO, NATIVE, ONNX)  # of the processor
DEVICE_CHOICES = (*CHOICES, TORCH)


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


def device_executor(name: str) -> str:
    """Of a device as a whole: `auto` is torch where there is a CUDA device and a torch that can use it."""
    from edge_runtime.engine.torch_stage.available import has_cuda, require_torch

    if name == TORCH:
        require_torch()
        return TORCH
    return TORCH if name == AUTO and has_cuda() else chosen_executor(name)


def device_memory_bytes(name: str) -> int | None:
    """What stages may take of a GPU's memory; None where they live in this process's."""
    from edge_runtime.engine.torch_stage.available import has_cuda

    if name not in (AUTO, TORCH) or not has_cuda():
        return None
    from edge_runtime.engine.torch_stage import arithmetic

    return arithmetic.device_memory_bytes()


def load_segment(executor: str, bundle: Bundle, block: Block, segment: Segment, threads: int) -> SegmentStep:
    if executor == NATIVE:
        from edge_runtime.engine.native import NativeSegment

        return NativeSegment(bundle, block, segment, threads)
    from edge_runtime.engine.onnx import OnnxSegment

    return OnnxSegment(bundle, block, segment, threads)


def import_executor(name: str) -> None:
    """Load the libraries of an executor now, so that what they take can be measured."""
    if name == TORCH:
        import edge_runtime.engine.torch_stage.stage
    elif chosen_executor(name) == ONNX:
        import edge_runtime.engine.cpu
        import edge_runtime.engine.onnx
    else:
        import edge_runtime.engine.cpu
        import edge_runtime.engine.native  # noqa: F401


def numeric_class_of(executor: str, weights: str, formats: StageFormats = DEFAULT_FORMATS) -> str:
    """Of stages that this process would load with `executor`."""
    if executor == NATIVE:
        return native_class(weights, formats)
    if executor == TORCH:
        from edge_runtime.engine.torch_stage.arithmetic import choose

        return choose(weights).numeric_class(weights, formats.wire)
    import onnxruntime

    return onnx_class(onnxruntime.__version__, weights, formats)
