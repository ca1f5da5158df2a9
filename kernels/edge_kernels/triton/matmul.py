"""Linear layers: one launch per matrix, two where K is split.

The number of splits follows from the matrix alone: enough programs to fill a large GPU at one row, and never so that a
row's sum depends on how many rows there are.
Knows: how the programs of `programs/matmul.py` are launched. Does not know: what a matrix is for.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from edge_kernels.triton.launch import operand_types, row_major
from edge_kernels.triton.programs.matmul import add_splits, multiply
from edge_kernels.triton.shapes import BITS, BLOCK, TILE_ROWS, Matrix

TILE_COLUMNS = 64
SUM_COLUMNS = 512
_WANTED_PROGRAMS = 256  # about two for each multiprocessor of a large GPU
_LEAST_SPLIT_BLOCKS = 8


def splits_of(rows: int, columns: int) -> int:
    """Of a matrix [rows, columns]: into how many pieces K is cut."""
    tiles, blocks = -(-rows // TILE_COLUMNS), -(-columns // BLOCK)
    splits = 1
    while tiles * splits < _WANTED_PROGRAMS and blocks >= 2 * splits * _LEAST_SPLIT_BLOCKS:
        splits *= 2
    return splits


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x @ matrix.T + bias: [R, N] of `dtype`. Sums are float32."""
    x = row_major(x)
    count, n = len(x), matrix.rows
    if x.shape[1] != matrix.columns:
        raise ValueError(f"rows of {x.shape[1]} entries do not fit a matrix of {matrix.columns} columns")
    out = torch.empty((count, n), dtype=dtype, device=x.device)
    if count == 0:
        return out
    splits = splits_of(n, matrix.columns)
    parts = out if splits == 1 else torch.empty((splits, count, n), dtype=torch.float32, device=x.device)
    # fp32 weights stay fp32: a bundle has them where rounding hurts.
    operand, dot = operand_types(torch.float32 if matrix.data.dtype == torch.float32 else x.dtype)
    grid = (triton.cdiv(count, TILE_ROWS), triton.cdiv(n, TILE_COLUMNS), splits)
    multiply[grid](
        x,
        matrix.data,
        matrix.scales,
        bias if splits == 1 else None,
        parts,
        count,
        n,
        matrix.columns,
        BITS=BITS.get(matrix.format, 32),
        SPLIT_BLOCKS=-(-triton.cdiv(matrix.columns, BLOCK) // splits),
        HAS_BIAS=bias is not None and splits == 1,
        TILE_M=TILE_ROWS,
        TILE_N=TILE_COLUMNS,
        DOT=dot,
        OPERAND=operand,
    )
    if splits > 1:
        grid_of_sums = (count, triton.cdiv(n, SUM_COLUMNS))
        add_splits[grid_of_sums](
            parts, bias, out, count, n, SPLITS=splits, HAS_BIAS=bias is not None, TILE_N=SUM_COLUMNS
        )
    return out
