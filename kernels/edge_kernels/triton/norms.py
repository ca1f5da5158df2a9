"""RMS and layer norms of rows, or of the heads of rows.

Knows: how the programs of `programs/norms.py` are launched. Does not know: what is normalised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edge_kernels.triton.launch import power_of_two, row_major
from edge_kernels.triton.programs import norms as programs


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Over the last `weight.numel()` entries: a row may hold several heads, each normalised by itself."""
    x, width = row_major(x), weight.numel()
    out = torch.empty_like(x)
    if x.numel():
        grid = (x.numel() // width,)
        programs.rms_norm[grid](x, weight, out, epsilon, WIDTH=width, PADDED=power_of_two(width))
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    x, width = row_major(x), weight.numel()
    out = torch.empty_like(x)
    if x.numel():
        programs.layer_norm[(len(x),)](
            x,
            weight,
            bias,
            out,
            epsilon,
            WIDTH=width,
            PADDED=power_of_two(width),
            HAS_BIAS=bias is not None,
        )
    return out
