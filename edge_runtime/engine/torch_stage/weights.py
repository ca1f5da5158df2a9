"""Weights of a bundle on a device, in the layout they have in their slices: nothing is repacked or rounded.

Knows: parts of tensors and how they become tensors of torch. Does not know: operations.
"""

from __future__ import annotations

import numpy as np
import torch
from edge_kernels.triton.shapes import ExpertBank, Matrix
from numpy.typing import NDArray
from torch import Tensor

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import TENSOR_FORMATS, Part
from edge_runtime.engine.weights import read_tensor, tensor_of
from edge_runtime.errors import EngineError


class DeviceWeights:
    """Of one block. Matrices are shared: a tied embedding and head are one."""

    def __init__(self, bundle: Bundle, device: torch.device, shared: dict[str, Matrix]) -> None:
        self._bundle = bundle
        self._device = device
        self._shared = shared

    def vector(self, name: str) -> Tensor:
        return self._upload(read_tensor(self._bundle, name).reshape(-1))

    def matrix(self, name: str) -> Matrix:
        if name not in self._shared:
            self._shared[name] = self._read_matrix(name)
        return self._shared[name]

    def _read_matrix(self, name: str) -> Matrix:
        tensor = tensor_of(self._bundle, name)
        if len(tensor.shape) != 2:
            raise EngineError(f"{name} has shape {tensor.shape}; a matrix was wanted")
        rows, columns = tensor.shape
        if TENSOR_FORMATS[tensor.format].block == 0:
            return Matrix("dense", self._part(tensor.parts["data"]).view(rows, columns), None, columns)
        data, scales = self._part(tensor.parts["data"]), self._part(tensor.parts["scales"])
        return Matrix(tensor.format, data.view(rows, -1, data.shape[-1]), scales.view(rows, -1), columns)

    def experts(self, name: str) -> ExpertBank:
        """All experts of a layer in one buffer, as they lie in their slice."""
        tensor = tensor_of(self._bundle, name)
        slices = {part.slice for part in tensor.parts.values()}
        if len(slices) != 1:
            raise EngineError(f"the experts {name} lie in {len(slices)} slices; they must lie in one")
        form = TENSOR_FORMATS[tensor.format]
        if form.planes > 1:
            raise EngineError(
                f"the torch executor has no kernels for {tensor.format}",
                hint=f"use --executor native, or export the model with --weights int{form.bits}",
            )
        count, intermediate, hidden = tensor.shape
        first_bytes = min(part.offset_bytes for part in tensor.parts.values())
        end_bytes = first_bytes + count * tensor.expert_stride_bytes
        view = np.frombuffer(self._bundle.slice_bytes(slices.pop()), np.uint8)[first_bytes:end_bytes]
        block = TENSOR_FORMATS[tensor.format].block
        return ExpertBank(
            buffer=self._upload(view),
            format=tensor.format.removeprefix("experts_") if block else "dense",
            num_experts=count,
            hidden=hidden,
            intermediate=intermediate,
            stride_bytes=tensor.expert_stride_bytes,
            offsets={key: part.offset_bytes - first_bytes for key, part in tensor.parts.items()},
        )

    def _part(self, part: Part) -> Tensor:
        return self._upload(self._bundle.part(part))

    def _upload(self, values: NDArray[np.generic]) -> Tensor:
        """A copy: mapped slices are read-only, and need not stay resident."""
        return torch.from_numpy(np.array(values)).to(self._device)
