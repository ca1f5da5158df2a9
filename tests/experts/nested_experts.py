"""Bit-nested experts for tests: tiny models whose experts have two or three planes; ways to look at and damage them."""

from __future__ import annotations

import os
from dataclasses import replace

from edge_kernels.experts import ExpertWeights

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import plane_of
from edge_runtime.experts.cache import ExpertCache
from edge_runtime.experts.flash_store import ExpertLayer
from tests.experts.test_expert_cache import EXPERTS, LAYERS, TOP_K, Ids, Rows, mapped
from tests.support.tiny_bundle import TinyModel

MODEL = TinyModel(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, format="nested4")
MODEL_8 = replace(MODEL, format="nested8")
ALL_SLOTS = LAYERS * EXPERTS
PIECE_BYTES = 8192  # of a read: experts of tests have several


def first_plane(bundle: Bundle, layer: ExpertLayer) -> ExpertWeights:
    return first_planes(bundle, layer, 1)


def first_planes(bundle: Bundle, layer: ExpertLayer, planes: int) -> ExpertWeights:
    whole = mapped(bundle, layer)
    offsets = {part: at for part, at in whole.offsets.items() if plane_of(part) < planes}
    return replace(whole, format=f"nested{2**planes}", offsets=offsets)


def run(cache: ExpertCache, layer: ExpertLayer, asked: tuple[Rows, Ids, Rows]) -> Rows:
    return cache.run(layer.layer, *asked, activation="silu", threads=1)


def upgrade_all(cache: ExpertCache) -> None:
    """A few experts after each step, one plane each."""
    assert cache.upgrades is not None
    for _ in range(3 * ALL_SLOTS):
        cache.upgrades.wait()
        cache.upgrades.begin()
    assert cache.upgrades.under_way == 0


def data_of(bundle: Bundle, layer: ExpertLayer, expert: int) -> bytes:
    return bundle.read(layer.slice, layer.offset(expert), layer.stride_bytes)[0]


def flip(layer: ExpertLayer, expert: int, plane: int) -> None:
    with layer.path.open("r+b") as file:
        file.seek(layer.offset(expert, plane) + 100)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
