"""The limit of a product on flash: every term of it is measured beside the product."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from edge_kernels import flash

from benchmarks.flash_arm import PRODUCT, Order, run
from benchmarks.flash_beside import STRETCH_TOKENS
from benchmarks.flash_limit import Stretch, limit_fraction, limits, medians, table
from edge_runtime.experts.trace import read_trace
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

TRACE_FILE = Path(__file__).parents[2] / "benchmarks" / "traces" / "qwen3_30b_a3b.csv.gz"

ring = pytest.mark.skipif(not flash.works(), reason="the system does not read on its own")

# Of one layer, one expert and two tokens: dense 10 ms, computing 10 ms.
STRETCH = Stretch(
    missed=[[1], [1]], seconds=0.3, memory_tokens=[(0.02, 0.01), (0.02, 0.01)], flash_bytes_per_second=1e9
)
EXPERT_BYTES = 100_000_000


def test_a_limit_takes_each_stretch_with_what_was_measured_beside_it() -> None:
    faster = replace(STRETCH, flash_bytes_per_second=2e9, memory_tokens=[(0.01, 0.005)], seconds=0.2)
    own, other = limits([STRETCH, faster], 1, EXPERT_BYTES)
    assert own.seconds == pytest.approx(2 * (0.01 + 0.1 + 0.01))
    assert other.seconds == pytest.approx(2 * (0.005 + 0.05 + 0.005))
    assert limit_fraction([STRETCH, faster], 1, EXPERT_BYTES) == pytest.approx((0.24 + 0.12) / 0.5)


def test_a_stretch_without_reads_beside_it_has_the_usual_speed_of_flash() -> None:
    unknown = replace(STRETCH, flash_bytes_per_second=0.0)
    own, other = limits([STRETCH, unknown], 1, EXPERT_BYTES)
    assert own == other


def test_flash_counts_as_far_as_computing_does_not_hide_it() -> None:
    few = replace(STRETCH, missed=[[1, 0], [0, 1]], memory_tokens=[(0.08, 0.06)])
    (limit,) = limits([few], 2, 20_000_000)
    # Four layers of 10 ms and two experts of 15 ms each; two misses of 20 ms, one hit of 15 beside each.
    assert (limit.dense, limit.hits, limit.last) == pytest.approx((0.04, 6 * 0.015, 2 * 0.015))
    assert limit.flash == pytest.approx(2 * 0.005)


def test_the_table_is_of_a_token_in_milliseconds() -> None:
    (row,) = table([STRETCH], 1, EXPERT_BYTES)
    assert row["token"] == pytest.approx(150.0)
    assert row["limit"] == pytest.approx(120.0)
    assert row["missed"] == 1.0
    assert medians([row, {key: 3 * value for key, value in row.items()}])["limit"] == pytest.approx(240.0)


@ring
def test_what_is_measured_beside_a_product_changes_nothing_of_it(tmp_path: Path) -> None:
    trace_file = tmp_path / "two_layers.csv"
    with gzip.open(TRACE_FILE, "rt") as whole:
        trace_file.write_text(
            "".join(line for line in whole if line[0] in "#t" or int(line.split(",")[3]) < 2)
        )
    trace = read_trace(trace_file)
    model = TinyModel(layers=trace.layers, experts=trace.experts, top_k=trace.top_k, format="int4")
    bundle = build_tiny_bundle(tmp_path / "bundle", model)
    tokens = 2 * STRETCH_TOKENS
    slots_bytes = trace.keys // 4 * bundle.manifest.tensors["layers.0.experts"].expert_stride_bytes
    order = Order(
        PRODUCT, str(bundle.path), str(trace_file), decode_tokens=tokens, cache_bytes=slots_bytes, threads=1
    )
    alone, measured = run(order), run(replace(order, beside=True))
    assert measured.digest == alone.digest != hashlib.sha256().hexdigest()
    assert (measured.hits, measured.misses) == (alone.hits, alone.misses)
    assert measured.missed == alone.missed
    first, second = measured.stretches
    assert first.missed + second.missed == alone.missed
    for stretch in (first, second):
        assert len(stretch.memory_tokens) == STRETCH_TOKENS
        assert 0.0 < stretch.memory_experts_seconds < stretch.memory_seconds
        assert 0.0 < stretch.experts_seconds < stretch.seconds
        assert stretch.flash_bytes_per_second > 0.0
        assert stretch.flash_alone_bytes_per_second > 0.0
        assert 0.0 < stretch.reading_seconds + stretch.after_seconds < stretch.experts_seconds
    assert measured.decode_seconds == pytest.approx(first.seconds + second.seconds, rel=0.15)
