"""What a stage's weights cost in resident memory, before it is loaded.

Our kernels pack a quantized matrix into nine tenths of its bytes in the bundle. ONNX Runtime takes more than those: it
keeps scales beside block sums, and every compiled segment has a graph of its own. Measured with ONNX Runtime 1.31 on
x86: an int4 matrix takes 1.5 times its bytes, int8 1.25 times, fp32 once.
Knows: manifests. Does not know: budgets, KV memory, what the process takes without weights.
"""

from __future__ import annotations

import math

import numpy as np
from edge_kernels.linear import packed_bytes

from edge_runtime.bundle.manifest import Manifest, Tensor
from edge_runtime.engine.executors import ONNX

SEGMENT_BYTES = 192 << 10  # of one session without weights
_SCALE_COPIES = 2  # of a repacked matrix's scales, beside those packed with it


def resident_weight_bytes(manifest: Manifest, first: int, last: int, executor: str) -> int:
    """Of a stage with layers first..last on one executor, once everything mapped has been touched."""
    total_bytes = 0
    mapped: set[str] = set()
    for block in manifest.blocks(first, last):
        total_bytes += SEGMENT_BYTES * len(block.segments) if executor == ONNX else 0
        for operation in block.operations:
            for name in operation.weights.values():
                tensor = manifest.tensors[name]
                if operation.kind == "linear":
                    total_bytes += _matrix_bytes(tensor, executor)
                elif name not in mapped:  # a tied embedding is mapped once, and repacked for the head
                    mapped.add(name)
                    total_bytes += _tensor_bytes(tensor)
    return total_bytes


def _matrix_bytes(tensor: Tensor, executor: str) -> int:
    if executor == ONNX:
        return _tensor_bytes(tensor) + _SCALE_COPIES * _part_bytes(tensor, "scales")
    if len(tensor.shape) == 1:  # a bias
        return _tensor_bytes(tensor)
    outputs, columns = tensor.shape
    return packed_bytes(tensor.format, outputs, columns)


def _tensor_bytes(tensor: Tensor) -> int:
    if tensor.expert_stride_bytes:
        return tensor.shape[0] * tensor.expert_stride_bytes
    return sum(_part_bytes(tensor, key) for key in tensor.parts)


def _part_bytes(tensor: Tensor, key: str) -> int:
    part = tensor.parts.get(key)
    return 0 if part is None else math.prod(part.shape) * np.dtype(part.dtype).itemsize
