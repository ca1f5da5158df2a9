"""Where a torch stage computes, with what, and in which type: everything that decides its bits.

Knows: torch, devices, and the name of a class. Does not know: bundles or blocks.
"""

from __future__ import annotations

import importlib
import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

import torch
from edge_kernels.triton.shapes import AttentionShape, AttentionWeights, ExpertBank, Matrix, PagedRows
from torch import Tensor

from edge_runtime.engine.numeric_class import processor_features
from edge_runtime.errors import EngineError

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FREE_SHARE = 0.9  # of a GPU's free memory that may be taken: scratch and fragments need some


class Kernels(Protocol):
    """The module `edge_kernels.triton.kernels` or `edge_kernels.triton.reference`."""

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None, dtype: torch.dtype) -> Tensor: ...
    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor: ...
    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor: ...
    def activation(self, x: Tensor, kind: str) -> Tensor: ...
    def softcap(self, x: Tensor, cap: float) -> Tensor: ...
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pool: Tensor,
        layer: int,
        rows: PagedRows,
        shape: AttentionShape,
        weights: AttentionWeights,
    ) -> Tensor: ...
    def route(
        self, logits: Tensor, top_k: int, *, normalize: bool, softmax_after: bool
    ) -> tuple[Tensor, Tensor]: ...
    def experts(self, x: Tensor, ids: Tensor, gates: Tensor, bank: ExpertBank) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """`kernels` is "triton" or "reference"; `type_name`, of rows between operations and of KV, "bf16" or "fp32"."""

    device: torch.device
    kernels: str
    type_name: str

    def __post_init__(self) -> None:
        if self.type_name not in TYPES:
            raise EngineError(f"rows of a torch stage are bf16 or fp32, not {self.type_name!r}")
        if self.kernels not in ("triton", "reference"):
            raise EngineError(f"a torch stage runs on triton or reference kernels, not {self.kernels!r}")
        if self.kernels == "reference" and (self.is_cuda or self.type_name != "fp32"):
            raise EngineError("the reference kernels compute in fp32 on the CPU")

    @property
    def is_cuda(self) -> bool:
        return bool(self.device.type == "cuda")

    @property
    def dtype(self) -> torch.dtype:
        return TYPES[self.type_name]

    @property
    def module(self) -> Kernels:
        module: Any = importlib.import_module(f"edge_kernels.triton.{self._module_name}")
        kernels: Kernels = module
        return kernels

    @property
    def _module_name(self) -> str:
        return "kernels" if self.kernels == "triton" else "reference"

    def numeric_class(self, weights: str, wire: str = "fp32") -> str:
        """`torch-version/device/kernels/w:weights/act:type/kv:type/wire:format/k:kernel version`."""
        kernels = self.kernels
        if kernels == "triton":
            kernels += f"-{version('triton')}"
        types = (f"w:{weights}", f"act:{self.type_name}", f"kv:{self.type_name}", f"wire:{wire}")
        ours = f"k:{version('edge-runtime')}"  # the kernels ship with the package
        return "/".join((f"torch-{torch.__version__}", self._device_name, kernels, *types, ours)).replace(
            " ", "-"
        )

    @property
    def _device_name(self) -> str:
        if self.is_cuda:
            major, minor = torch.cuda.get_device_capability(self.device)
            name = torch.cuda.get_device_name(self.device).replace("/", "-")
            return f"{name}+sm{major}{minor}+cuda-{torch.version.cuda}"
        capability = torch.backends.cpu.get_cpu_capability().lower()
        return "+".join((platform.machine().lower(), capability, *processor_features()))


def choose(weights: str, *, device: str = "", kernels: str = "", type_name: str = "") -> Arithmetic:
    """What is not said: a CUDA device where there is one, Triton there, and bf16 for bundles of quantized weights."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EngineError(
            "torch sees no CUDA device here", hint="install a CUDA build of torch, or use another --executor"
        )
    kernels = kernels or ("triton" if device.startswith("cuda") else "reference")
    exact = kernels == "reference" or weights == "fp32"
    return Arithmetic(torch.device(device), kernels, type_name or ("fp32" if exact else "bf16"))


def device_memory_bytes() -> int | None:
    """What a stage may take on the CUDA device; None where stages live in this process's memory."""
    if not torch.cuda.is_available():
        return None
    free_bytes, _ = torch.cuda.mem_get_info()
    return int(free_bytes * FREE_SHARE)
