"""Weights of a bundle as float32 arrays: whole tensors, chosen rows, or one expert.

Knows: the layouts of the tensor formats. Does not know: operations, or who multiplies by what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from edge_kernels.nested import NestedMatrix, dequantize_nested
from numpy.typing import NDArray

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import FINE_PLANE, LOW_PLANE, TENSOR_FORMATS, Part, Tensor
from edge_runtime.errors import EngineError

Float32 = NDArray[np.float32]


def dequantize(data: NDArray[np.uint8], scales: Float32, bits: int, width: int) -> Float32:
    """[N, blocks, 32 * bits / 8] and [N, blocks] to [N, width]: (code - 2^(bits - 1)) * scale, low nibble first."""
    if bits == 4:
        data = np.stack((data & 0xF, data >> 4), axis=-1).reshape(*data.shape[:2], -1)
    codes = data.astype(np.float32) - np.float32(1 << (bits - 1))
    return (codes * scales[..., None]).reshape(len(data), -1)[:, :width]


def read_tensor(bundle: Bundle, name: str) -> Float32:
    """The whole tensor, dequantised; a fp32 one is a mapped view."""
    tensor = tensor_of(bundle, name)
    return _decode(bundle, tensor.parts, "data", "scales", TENSOR_FORMATS[tensor.format].bits, tensor.shape)


def read_expert(bundle: Bundle, name: str, expert: int, projection: str) -> Float32:
    """`gate` or `up` [intermediate, hidden], or `down` [hidden, intermediate], of one expert."""
    tensor = tensor_of(bundle, name)
    _, intermediate, hidden = tensor.shape
    moved = expert * tensor.expert_stride_bytes
    parts = {key: replace(part, offset_bytes=part.offset_bytes + moved) for key, part in tensor.parts.items()}
    shape = (hidden, intermediate) if projection == "down" else (intermediate, hidden)
    if f"{projection}{LOW_PLANE}" in parts:
        return _decode_nested(bundle, parts, projection, shape[1])
    bits = TENSOR_FORMATS[tensor.format].bits
    return _decode(bundle, parts, projection, f"{projection}_scales", bits, shape)


class RowTable:
    """A matrix kept as it is stored; rows are dequantised when asked for."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        tensor = tensor_of(bundle, name)
        self._bits = TENSOR_FORMATS[tensor.format].bits
        self.rows, self.width = tensor.shape
        self._data = bundle.part(tensor.parts["data"])
        scales = tensor.parts.get("scales")
        self._scales = None if scales is None else bundle.part(scales).astype(np.float32, copy=False)

    def __getitem__(self, ids: NDArray[np.integer]) -> Float32:
        data = np.asarray(self._data[ids])
        if self._scales is None:
            return data.astype(np.float32, copy=False)
        return dequantize(data.view(np.uint8), self._scales[ids], self._bits, self.width)


def tensor_of(bundle: Bundle, name: str) -> Tensor:
    tensor = bundle.manifest.tensors.get(name)
    if tensor is None:
        raise EngineError(f"the bundle has no tensor {name!r}", hint="export the bundle again")
    return tensor


def _decode(
    bundle: Bundle, parts: Mapping[str, Part], data: str, scales: str, bits: int, shape: tuple[int, ...]
) -> Float32:
    array = bundle.part(parts[data])
    if scales not in parts:
        return array.astype(np.float32, copy=False).reshape(shape)
    return dequantize(array.view(np.uint8), bundle.part(parts[scales]).view(np.float32), bits, shape[-1])


def _decode_nested(bundle: Bundle, parts: Mapping[str, Part], name: str, columns: int) -> Float32:
    high, scales, low = (
        bundle.part(parts[part]).view(np.uint8) for part in (name, f"{name}_scales", f"{name}{LOW_PLANE}")
    )
    fine = parts.get(f"{name}{FINE_PLANE}")
    matrix = NestedMatrix(high, low, scales, None if fine is None else bundle.part(fine).view(np.uint8))
    return dequantize_nested(matrix, matrix.bits, columns)
