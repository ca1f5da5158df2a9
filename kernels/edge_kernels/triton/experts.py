"""Routing and grouped experts, straight from the bytes of a slice.

Which tile works for which expert is decided on the device, so that nothing waits for it: the grid is as large as it
could have to be, and tiles without pairs end at once.
Knows: how the programs of `programs/experts.py` are launched. Does not know: bundles, caches of experts.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from edge_kernels.triton.launch import operand_types, power_of_two, row_major
from edge_kernels.triton.programs import experts as programs
from edge_kernels.triton.shapes import BITS, TILE_ROWS, ExpertBank

TILE_COLUMNS = 64
MIX_COLUMNS = 512


def route(logits: Tensor, top_k: int, *, normalize: bool, softmax_after: bool) -> tuple[Tensor, Tensor]:
    """Chosen experts (largest logit first, ties to the lower id) int32 and their gates float32, both [R, top_k].

    A row with a logit that is not finite gets NaN gates.
    """
    logits = row_major(logits)
    count, experts = logits.shape
    if not 1 <= top_k <= experts:
        raise ValueError(f"a row is sent to 1 to {experts} experts, not {top_k}")
    ids = torch.empty((count, top_k), dtype=torch.int32, device=logits.device)
    gates = torch.empty((count, top_k), dtype=torch.float32, device=logits.device)
    if count:
        programs.route[(count,)](
            logits,
            ids,
            gates,
            EXPERTS=experts,
            PADDED=power_of_two(experts),
            TOP_K=top_k,
            OF_CHOSEN=normalize or softmax_after,
        )
    return ids, gates


def experts(x: Tensor, ids: Tensor, gates: Tensor, bank: ExpertBank) -> Tensor:
    """Sum over a row's experts, in the order given, of gate * down(silu(gate_proj x) * up_proj x): [R, hidden]."""
    x = row_major(x)
    count, top_k = ids.shape
    if count == 0:
        return torch.empty_like(x)
    order, tiles = group(ids, bank.num_experts)
    operand, dot = operand_types(x.dtype)
    floats = bank.buffer[: bank.buffer.numel() // 4 * 4].view(torch.float32)
    at, missing = bank.offsets, 0
    common = {"BITS": BITS.get(bank.format, 32), "TILE_M": TILE_ROWS, "TILE_N": TILE_COLUMNS}
    inner = torch.empty((count * top_k, bank.intermediate), dtype=x.dtype, device=x.device)
    programs.open_up[(len(tiles), triton.cdiv(bank.intermediate, TILE_COLUMNS))](
        x,
        bank.buffer,
        floats,
        tiles,
        order,
        inner,
        bank.hidden,
        bank.intermediate,
        bank.stride_bytes,
        at["gate"],
        at["up"],
        at.get("gate_scales", missing),
        at.get("up_scales", missing),
        TOP_K=top_k,
        DOT=dot,
        OPERAND=operand,
        **common,
    )
    parts = torch.empty((count * top_k, bank.hidden), dtype=torch.float32, device=x.device)
    programs.close_down[(len(tiles), triton.cdiv(bank.hidden, TILE_COLUMNS))](
        inner,
        bank.buffer,
        floats,
        tiles,
        order,
        parts,
        bank.hidden,
        bank.intermediate,
        bank.stride_bytes,
        at["down"],
        at.get("down_scales", missing),
        DOT=dot,
        OPERAND=operand,
        **common,
    )
    out = torch.empty_like(x)
    programs.mix[(count, triton.cdiv(bank.hidden, MIX_COLUMNS))](
        parts, gates, out, bank.hidden, TOP_K=top_k, TILE_N=MIX_COLUMNS
    )
    return out


def group(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Pairs in order of their experts, int32 [R * k], and tiles int32 [T, 3]: expert, first place in that order, pairs.

    A tile holds at most 16 pairs; some tiles hold none. No value is read back from the device.
    """
    chosen = ids.flatten().long()
    order = torch.argsort(chosen, stable=True)
    experts = torch.arange(num_experts + 1, device=ids.device)
    starts = torch.searchsorted(chosen[order], experts)  # [experts + 1]
    counts = starts[1:] - starts[:-1]
    ends = torch.cumsum((counts + TILE_ROWS - 1) // TILE_ROWS, 0)  # tiles of this expert and those before it
    pairs = len(chosen)
    most_tiles = min(pairs, -(-pairs // TILE_ROWS) + num_experts)
    tile = torch.arange(most_tiles, device=ids.device)
    expert = torch.searchsorted(ends, tile, right=True).clamp_(max=num_experts - 1)
    before = torch.where(expert > 0, ends[expert - 1], 0)
    done = (tile - before) * TILE_ROWS
    count = (counts[expert] - done).clamp_(0, TILE_ROWS)
    return order.int(), torch.stack((expert, starts[expert] + done, count), dim=1).int()
