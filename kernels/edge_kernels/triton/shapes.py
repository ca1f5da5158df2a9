"""What the kernels take: weights as they lie in a bundle, and where the rows of a ragged batch lie.

Knows: layouts. Does not know: how anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK = 32  # weights of a row that share a scale
BITS = {"int8": 8, "int4": 4}
PAGE_TOKENS = 32
TILE_ROWS = 16  # the fewest rows a tensor core takes


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [N, K]. fp32 or bf16: `data` [N, K]. int8, int4: codes uint8 [N, blocks, 32 * bits / 8] and `scales`
    float32 [N, blocks]; weight = (code - 2^(bits - 1)) * scale, low nibble first."""

    format: str  # "dense", "int8" or "int4"
    data: Tensor
    scales: Tensor | None
    columns: int  # K

    def __post_init__(self) -> None:
        blocks = -(-self.columns // BLOCK)
        rows = self.data.shape[0]
        if self.format == "dense":
            fits = self.data.shape == (rows, self.columns)
        elif self.format in BITS and self.scales is not None:
            width = BLOCK * BITS[self.format] // 8
            fits = self.data.shape == (rows, blocks, width) and self.scales.shape == (rows, blocks)
        else:
            raise ValueError(
                f"unknown matrix format {self.format!r}: choose dense, int8 or int4, with scales"
            )
        if not fits or not self.data.is_contiguous():
            raise ValueError(
                f"{self.format} data of shape {tuple(self.data.shape)} is no matrix of {self.columns}"
            )

    @property
    def rows(self) -> int:
        return int(self.data.shape[0])

    @property
    def size_bytes(self) -> int:
        scales = 0 if self.scales is None else self.scales.nbytes
        return int(self.data.nbytes + scales)

    def take(self, ids: Tensor) -> Tensor:
        """Chosen rows in float32, [len(ids), K]."""
        data = self.data[ids]
        if self.scales is None:
            return data.float()
        return decode(data, self.scales[ids], self.format, self.columns)

    def dense(self) -> Tensor:
        """The whole matrix in float32."""
        if self.scales is None:
            return self.data.float()
        return decode(self.data, self.scales, self.format, self.columns)


def decode(data: Tensor, scales: Tensor, format: str, columns: int) -> Tensor:
    """Codes [N, blocks, bytes] and scales [N, blocks] to float32 [N, columns]."""
    if format == "int4":
        data = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
    codes = data.float() - float(1 << (BITS[format] - 1))
    return (codes * scales[..., None]).flatten(1)[:, :columns].contiguous()


@dataclass(frozen=True, slots=True)
class ExpertBank:
    """All experts of a layer as they lie in their slice; expert e's parts start `e * stride_bytes` after expert 0's.

    gate and up [intermediate, hidden], down [hidden, intermediate]; `offsets` are from the buffer's start.
    """

    buffer: Tensor  # uint8 [bytes]
    format: str  # "dense" (float32), "int8" or "int4"
    num_experts: int
    hidden: int
    intermediate: int
    stride_bytes: int
    offsets: Mapping[str, int]  # gate, up, down, and for int8 and int4 gate_scales, up_scales, down_scales

    def __post_init__(self) -> None:
        if self.format != "dense" and self.format not in BITS:
            raise ValueError(f"unknown expert format {self.format!r}: choose dense, int8 or int4")
        parts = {"gate", "up", "down"}
        if self.format != "dense":
            parts |= {f"{part}_scales" for part in parts}
        if set(self.offsets) != parts:
            raise ValueError(f"{self.format} experts need the parts {sorted(parts)}")
        floats = parts if self.format == "dense" else {part for part in parts if part.endswith("_scales")}
        if self.stride_bytes % 4 or any(self.offsets[part] % 4 for part in floats):
            raise ValueError("experts and their scales must lie on 4-byte boundaries")
        last_bytes = (self.num_experts - 1) * self.stride_bytes
        for part in parts:
            end = self.offsets[part] + last_bytes + self._part_bytes(part)
            if self.offsets[part] < 0 or end > self.buffer.numel():
                raise ValueError(f"{part} of the last expert ends at byte {end} of {self.buffer.numel()}")

    @property
    def size_bytes(self) -> int:
        return int(self.buffer.nbytes)

    def matrix(self, expert: int, part: str) -> Matrix:
        """Views of one expert's matrix."""
        rows, columns = self._shape(part)
        data = self._part(expert, part)
        if self.format == "dense":
            return Matrix("dense", data.view(torch.float32).view(rows, columns), None, columns)
        scales = self._part(expert, f"{part}_scales").view(torch.float32).view(rows, -1)
        return Matrix(self.format, data.view(rows, scales.shape[1], -1), scales, columns)

    def _part(self, expert: int, part: str) -> Tensor:
        start = self.offsets[part] + expert * self.stride_bytes
        return self.buffer[start : start + self._part_bytes(part)]

    def _shape(self, part: str) -> tuple[int, int]:
        if part.startswith("down"):
            return self.hidden, self.intermediate
        return self.intermediate, self.hidden

    def _part_bytes(self, part: str) -> int:
        rows, columns = self._shape(part)
        if self.format == "dense":
            return rows * columns * 4
        blocks = -(-columns // BLOCK)
        return rows * blocks * (4 if part.endswith("_scales") else BLOCK * BITS[self.format] // 8)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The numbers of an attention operation. `window` 0: unlimited; windows are for causal attention only."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int
    softcap: float
    causal: bool
    norm_epsilon: float

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """All optional: head norms (head_dim entries, or as many as a row) and rotary tables [positions, rotary / 2]."""

    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Where R rows of S sequences lie. Rows of a sequence are neighbours, in order of their positions.

    Row p of sequence s lies in page `block_tables[s, p // 32]` at slot p % 32.
    """

    positions: Tensor  # int32 [R]
    sequence: Tensor  # int32 [R]
    block_tables: Tensor  # int32 [S, most pages of one of them]
    lengths: Tensor  # int32 [S] rows of the sequence, the new ones included
    starts: tuple[int, ...]  # S + 1: sequence s has rows starts[s] .. starts[s + 1] - 1
    longest: int  # the largest of `lengths`
    _tiles: dict[int, Tensor] = field(default_factory=dict)

    def tiles(self, most_rows: int) -> Tensor:
        """int32 [T, 2]: first row and number of rows of pieces of at most `most_rows` rows of one sequence."""
        if most_rows not in self._tiles:
            pieces = [
                (first, min(most_rows, end - first))
                for start, end in zip(self.starts, self.starts[1:], strict=False)
                for first in range(start, end, most_rows)
            ]
            tiles = torch.tensor(pieces, dtype=torch.int32).reshape(-1, 2)
            self._tiles[most_rows] = tiles.to(self.positions.device)
        return self._tiles[most_rows]
