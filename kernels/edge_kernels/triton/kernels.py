"""The functions of `reference`, on Triton programs.

Element-wise functions are torch's own: on a GPU each entry is computed by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edge_kernels.triton.attention import attention
from edge_kernels.triton.experts import experts, route
from edge_kernels.triton.matmul import linear
from edge_kernels.triton.norms import layer_norm, rms_norm
from edge_kernels.triton.reference import ACTIVATIONS

__all__ = ["activation", "attention", "experts", "layer_norm", "linear", "rms_norm", "route", "softcap"]


def activation(x: Tensor, kind: str) -> Tensor:
    return ACTIVATIONS[kind](x)


def softcap(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)
