"""What every launch needs: how operands enter a dot product, and whether programs run on a device or are interpreted.

Triton decides while programs (its own too) are defined whether they are interpreted on the CPU: TRITON_INTERPRET=1 must
be in the environment before anything imports it. That is for tests, thousands of times slower.
Knows: Triton's switches. Does not know: the programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def is_interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def operand_types(dtype: torch.dtype) -> tuple[tl.dtype, tl.dtype]:
    """(type operands are rounded to, type they are multiplied in). Sums are float32 in every case.

    The interpreter has no bfloat16 products; the same products in float32 are exact.
    """
    if dtype == torch.bfloat16:
        return tl.bfloat16, tl.float32 if is_interpreted() else tl.bfloat16
    return tl.float32, tl.float32


def power_of_two(number: int, least: int = 1) -> int:
    return max(least, 1 << (number - 1).bit_length())


def row_major(x: Tensor) -> Tensor:
    if x.ndim != 2:
        raise ValueError(f"rows have shape [R, width], not {tuple(x.shape)}")
    return x.contiguous()
