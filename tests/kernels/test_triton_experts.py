"""Triton's routing and grouped experts against plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from edge_kernels.quantization import quantize
from edge_kernels.triton import kernels, reference
from edge_kernels.triton.experts import group
from edge_kernels.triton.shapes import ExpertBank
from hypothesis import given
from hypothesis import strategies as st

from tests.support.triton_device import DEVICE, few, products_in_order


def bank(rng: np.random.Generator, format: str, experts: int, hidden: int, intermediate: int) -> ExpertBank:
    """Experts one after another, with a gap after each, behind eight bytes of something else."""
    memory, offsets, stride = bytearray(8), {}, 0
    for expert in range(experts):
        start = len(memory)
        late: dict[str, bytes] = {}
        for part in ("gate", "up", "down"):
            rows, columns = (hidden, intermediate) if part == "down" else (intermediate, hidden)
            weights = (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
            if expert == 0:
                offsets[part] = len(memory)
            if format == "dense":
                memory += weights.tobytes()
                continue
            made = quantize(weights, format, search=False)
            memory += made.data.tobytes()
            late[f"{part}_scales"] = made.scales.tobytes()
        for name, scales in late.items():
            if expert == 0:
                offsets[name] = len(memory)
            memory += scales
        memory += bytes(12)
        stride = len(memory) - start
    buffer = torch.frombuffer(memory, dtype=torch.uint8).clone()
    return ExpertBank(buffer, format, experts, hidden, intermediate, stride, offsets)


def moved(one: ExpertBank) -> ExpertBank:
    return ExpertBank(
        one.buffer.to(DEVICE),
        one.format,
        one.num_experts,
        one.hidden,
        one.intermediate,
        one.stride_bytes,
        one.offsets,
    )


@pytest.mark.parametrize("format", ["dense", "int8", "int4"])
@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 4), st.integers(1, 70), st.integers(1, 70)),
    data=st.data(),
    seed=st.integers(0, 99),
)
@few(5)
def test_experts_agree_with_torch(
    format: str, sizes: tuple[int, int, int, int], data: st.DataObject, seed: int
) -> None:
    count, experts, hidden, intermediate = sizes
    top_k = data.draw(st.integers(1, experts))
    rng = np.random.default_rng(seed)
    made = bank(rng, format, experts, hidden, intermediate)
    x = torch.from_numpy(rng.standard_normal((count, hidden)).astype(np.float32))
    ids, gates = reference.route(
        torch.from_numpy(rng.standard_normal((count, experts)).astype(np.float32)),
        top_k,
        normalize=True,
        softmax_after=False,
    )
    wanted = reference.experts(x, ids, gates, made)
    got = kernels.experts(x.to(DEVICE), ids.to(DEVICE), gates.to(DEVICE), moved(made)).cpu()
    assert (got - wanted).abs().max() <= 2e-6 * wanted.abs().max() + 1e-9
    rounded = kernels.experts(
        x.to(DEVICE, torch.bfloat16), ids.to(DEVICE), gates.to(DEVICE), moved(made)
    ).cpu()
    assert (rounded.float() - wanted).abs().max() <= 0.03 * wanted.abs().max() + 1e-3


@pytest.mark.export
def test_experts_rows_do_not_depend_on_their_company(monkeypatch: pytest.MonkeyPatch) -> None:
    products_in_order(monkeypatch)
    rng = np.random.default_rng(0)
    made = moved(bank(rng, "int4", 4, 64, 96))
    x = torch.from_numpy(rng.standard_normal((40, 64)).astype(np.float32)).to(DEVICE)
    logits = torch.from_numpy(rng.standard_normal((40, 4)).astype(np.float32)).to(DEVICE)
    ids, gates = kernels.route(logits, 2, normalize=False, softmax_after=False)
    together = kernels.experts(x, ids, gates, made)
    for r in (0, 7, 39):
        one = slice(r, r + 1)
        assert torch.equal(kernels.experts(x[one], ids[one], gates[one], made)[0], together[r])


@given(
    count=st.integers(1, 9),
    experts=st.integers(1, 20),
    data=st.data(),
    normalize=st.booleans(),
    softmax_after=st.booleans(),
)
@few(12)
def test_routes_agree_with_torch(
    count: int, experts: int, data: st.DataObject, normalize: bool, softmax_after: bool
) -> None:
    top_k = data.draw(st.integers(1, experts))
    # Few different values, so that there are ties.
    values = st.sampled_from([-2.0, 0.0, 0.5, 3.0, 80.0, float("nan"), float("inf"), -float("inf")])
    logits = torch.tensor(
        data.draw(st.lists(st.lists(values, min_size=experts, max_size=experts), min_size=count))
    )
    ids, gates = kernels.route(logits.to(DEVICE), top_k, normalize=normalize, softmax_after=softmax_after)
    wanted_ids, wanted_gates = reference.route(
        logits, top_k, normalize=normalize, softmax_after=softmax_after
    )
    assert ((ids >= 0) & (ids < experts)).all()
    finite = logits.isfinite().all(1)
    assert torch.equal(ids.cpu()[finite], wanted_ids[finite])
    assert torch.allclose(gates.cpu(), wanted_gates, rtol=1e-5, atol=1e-7, equal_nan=True)


@given(st.lists(st.lists(st.integers(0, 6), min_size=2, max_size=2, unique=True), min_size=1, max_size=60))
@few(40)
def test_every_pair_is_in_one_tile_of_its_expert(chosen: list[list[int]]) -> None:
    ids = torch.tensor(chosen, dtype=torch.int32)
    order, tiles = group(ids, 7)
    seen: list[int] = []
    for expert, first, count in tiles.tolist():
        assert 0 <= count <= 16
        pairs = order[first : first + count].tolist()
        assert all(ids.flatten()[pair] == expert for pair in pairs)
        seen += pairs
    assert sorted(seen) == list(range(ids.numel()))


def test_experts_that_end_beyond_their_buffer_are_refused() -> None:
    made = bank(np.random.default_rng(0), "int8", 2, 32, 32)
    with pytest.raises(ValueError, match="of the last expert ends at byte"):
        ExpertBank(made.buffer[:-20], "int8", 2, 32, 32, made.stride_bytes, made.offsets)
    with pytest.raises(ValueError, match="4-byte boundaries"):
        ExpertBank(made.buffer, "int8", 2, 32, 32, made.stride_bytes + 1, made.offsets)
