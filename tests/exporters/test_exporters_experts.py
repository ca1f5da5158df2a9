"""Experts as the exporter lays them out: planes on pages, each with a digest, each making a more exact expert."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pytest
from edge_kernels.experts import PARTS, ExpertWeights
from numpy.typing import NDArray

from edge_runtime.bundle.hashing import digest_of_expert
from edge_runtime.bundle.manifest import SLICE_ALIGNMENT_BYTES, Tensor, plane_of
from edge_runtime.bundle.writer import SliceWriter
from exporters.architectures.plan import ExpertNames, ExpertsPlan
from exporters.experts import quantized_expert, write_experts
from exporters.quantize import Inputs, restored
from exporters.sources import Expert, ExpertsSource

EXPERTS, HIDDEN, INTERMEDIATE = 3, 150, 70
F32 = NDArray[np.float32]


@dataclass
class Rows:
    sample: F32

    @property
    def importance(self) -> F32:
        return np.square(self.sample).mean(axis=0) + np.float32(1e-6)


class Drawn(ExpertsSource):
    """Normal weights instead of a checkpoint's."""

    def __init__(self) -> None:
        names = ExpertNames("", "", "", "", "")
        self.plan = ExpertsPlan("experts", names, EXPERTS, HIDDEN, INTERMEDIATE)

    def expert(self, number: int) -> Expert:
        rng = np.random.default_rng(number)
        shapes = ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
        return Expert(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))


def inputs(expert: int, part: str) -> Inputs:
    rng = np.random.default_rng(100 + expert)
    columns = INTERMEDIATE if part == "down" else HIDDEN
    return Rows((rng.normal(size=(90, 7)) @ rng.normal(size=(7, columns))).astype(np.float32))


def written(format: str) -> tuple[Tensor, bytes]:
    file = io.BytesIO()
    out = SliceWriter("experts", file)
    out.add(b"something before them")
    return write_experts(out, Drawn(), format, inputs), file.getvalue()


def planes_of(tensor: Tensor, data: bytes, expert: int) -> list[bytes]:
    start = min(part.offset_bytes for part in tensor.parts.values()) + expert * tensor.expert_stride_bytes
    found = []
    for size in tensor.plane_bytes:
        found.append(data[start : start + size])
        start += size
    return found


@pytest.mark.parametrize("format", ["int8", "nested4", "nested8"])
def test_experts_are_read_back_as_they_were_rounded(format: str) -> None:
    tensor, data = written(format)
    first = min(part.offset_bytes for part in tensor.parts.values())
    weights = ExpertWeights(
        np.frombuffer(data, np.uint8)[first:],
        format,
        EXPERTS,
        HIDDEN,
        INTERMEDIATE,
        tensor.expert_stride_bytes,
        {name: part.offset_bytes - first for name, part in tensor.parts.items()},
    )
    for expert in range(EXPERTS):
        rounded = quantized_expert(Drawn().expert(expert), expert, format, inputs)
        for part in PARTS:
            columns = INTERMEDIATE if part == "down" else HIDDEN
            wanted = restored(rounded[part], format, columns)
            np.testing.assert_allclose(weights.matrix(expert, part), wanted, rtol=1e-6)


@pytest.mark.parametrize(("format", "planes"), [("int4", 1), ("nested4", 2), ("nested8", 3)])
def test_planes_lie_on_pages_and_have_digests_of_their_own(format: str, planes: int) -> None:
    tensor, data = written(format)
    assert len(tensor.plane_bytes) == planes
    assert sum(tensor.plane_bytes) == tensor.expert_stride_bytes
    assert all(size % SLICE_ALIGNMENT_BYTES == 0 for size in tensor.plane_bytes)
    assert {plane_of(name) for name in tensor.parts} == set(range(planes))
    digests = [
        digest_of_expert(plane).hex()
        for expert in range(EXPERTS)
        for plane in planes_of(tensor, data, expert)
    ]
    assert list(tensor.expert_digests) == digests


def test_the_first_two_of_three_planes_are_those_of_nested4() -> None:
    (two, short), (three, long) = written("nested4"), written("nested8")
    for expert in range(EXPERTS):
        assert planes_of(three, long, expert)[:2] == planes_of(two, short, expert)
