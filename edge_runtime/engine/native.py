"""Segments on our own kernels: the uncut operations between cut ones, compiled to one native call.

Matrices are packed while loading and live in memory of their own; the mapped slices are then needed no more.
Knows: what the operations mean, and their weights. Does not know: sessions, batches, cut operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from edge_kernels.chain import ProgramPart
from edge_kernels.linear import PackedMatrix, pack, pack_fp32
from edge_kernels.program import Step, compile_program
from numpy.typing import NDArray

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import Block, Segment
from edge_runtime.bundle.operations import Operation
from edge_runtime.engine.weights import read_tensor, tensor_of

Float32 = NDArray[np.float32]

_PARAMETERS = ("epsilon", "factor", "cap")  # an operation has one of these at most


class NativeSegment:
    """One segment, ready to run on any number of rows."""

    def __init__(self, bundle: Bundle, block: Block, segment: Segment, threads: int) -> None:
        self.inputs = segment.inputs
        self.outputs = segment.outputs
        self._threads = threads
        operations = block.operations[segment.first_operation : segment.last_operation + 1]
        steps = [_step(bundle, operation, threads) for operation in operations]
        widths = _input_widths(steps, segment, bundle.manifest.model.hidden_size)
        self._program = compile_program(steps, widths, segment.outputs)

    def run(self, values: Sequence[Float32]) -> list[Float32]:
        return self._program.run(values, threads=self._threads)

    def part(self) -> ProgramPart:
        """The same, of a chain."""
        return ProgramPart(self._program, self.inputs, self.outputs)


def _step(bundle: Bundle, operation: Operation, threads: int) -> Step:
    weights, attributes = operation.weights, operation.attributes
    bias = read_tensor(bundle, weights["bias"]).copy() if "bias" in weights else None
    parameter = next((float(attributes[name]) for name in _PARAMETERS if name in attributes), 0.0)
    matrix = weight = None
    if operation.kind == "linear":
        matrix = _matrix(bundle, weights["weight"], threads)
    elif "weight" in weights:
        weight = read_tensor(bundle, weights["weight"]).copy()
    return Step(
        operation.kind, operation.inputs, operation.outputs[0], matrix, weight, bias, parameter=parameter
    )


def _matrix(bundle: Bundle, name: str, threads: int) -> PackedMatrix:
    tensor = tensor_of(bundle, name)
    if tensor.format == "fp32":
        return pack_fp32(read_tensor(bundle, name), threads=threads)
    data, scales = bundle.part(tensor.parts["data"]), bundle.part(tensor.parts["scales"])
    return pack(data.view(np.uint8), scales.view(np.float32), tensor.shape[1], threads=threads)


def _input_widths(steps: Sequence[Step], segment: Segment, hidden_size: int) -> dict[str, int]:
    """Where an operation says how wide a value is, that; everything else is a residual."""
    widths = dict.fromkeys(segment.inputs, hidden_size)
    for name in segment.inputs:
        for step in steps:
            if name in step.inputs:
                if step.matrix is not None:
                    widths[name] = step.matrix.columns
                elif step.weight is not None:
                    widths[name] = step.weight.size
                else:
                    continue
                break
            if step.output == name:
                break
    return widths
