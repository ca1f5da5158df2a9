"""A whole stage with its experts on flash: the same bits as with all of them in memory, and little memory."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.agent.pipeline_events import DropRows, Event, OpenRows, RunRows, SessionBroke, Work
from edge_runtime.agent.row_queue import RowQueue
from edge_runtime.agent.stage_steps import LoadedStage
from edge_runtime.agent.stage_worker import StageWorker
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SamplingParams, SessionId
from edge_runtime.engine.base import Batch
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.probe import probe
from edge_runtime.errors import CapacityError
from edge_runtime.experts.cache import CacheOptions
from edge_runtime.experts.flash_store import token_cycle_bytes
from edge_runtime.experts.lanes import read_into
from edge_runtime.experts.policies import POLICIES
from edge_runtime.experts.reader import Cancelled
from tests.support.stages import Pipeline, span
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

LAYERS, EXPERTS = 4, 8


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = TinyModel(layers=LAYERS, experts=EXPERTS, format="int8")
    return build_tiny_bundle(tmp_path_factory.mktemp("stage") / "bundle", model)


def load(
    bundle: Bundle, layers: LayerRange, experts: CacheOptions | None, reuse: CpuStage | None = None
) -> CpuStage:
    return CpuStage.load(bundle, layers, threads=1, kv_budget_bytes=1 << 20, experts=experts, reuse=reuse)


def cycle_bytes(bundle: Bundle, layers: LayerRange) -> int:
    return token_cycle_bytes(bundle.manifest, layers.first, layers.last)


def logits(pipeline: Pipeline, ids: list[int], chunks: list[int]) -> np.ndarray:
    """A prompt in chunks, then token after token."""
    pipeline.open(1, len(ids))
    rows, start = [], 0
    for size in [*chunks, *[1] * len(ids)]:
        if start < len(ids):
            rows.append(pipeline.run(span(1, start, ids[start : start + size])))
            start += size
    pipeline.drop(1)
    return np.concatenate(rows)


@given(
    cut=st.integers(0, LAYERS - 1),
    cycles=st.floats(1.0, 4.0),
    policy=st.sampled_from(sorted(POLICIES)),
    lanes=st.integers(1, 3),
    chunks=st.lists(st.integers(1, 9), max_size=3),
    ids=st.lists(st.integers(0, 199), min_size=1, max_size=24),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_same_bits_as_in_memory(
    bundle: Bundle, cut: int, cycles: float, policy: str, lanes: int, chunks: list[int], ids: list[int]
) -> None:
    cuts = [cut] if cut else []
    wanted = logits(Pipeline.load(bundle, lambda b, layers: load(b, layers, None)), ids, [len(ids)])

    def on_flash(b: Bundle, layers: LayerRange) -> CpuStage:
        budget_bytes = int(cycles * cycle_bytes(b, layers))
        return load(b, layers, CacheOptions(budget_bytes, policy=policy, lanes=lanes))

    pipeline = Pipeline.load(bundle, on_flash, *cuts)
    got = logits(pipeline, ids, chunks)
    for stage in pipeline.stages:
        stage.close()
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


def test_a_session_that_goes_is_not_read_for_any_more(bundle: Bundle) -> None:
    """Its batch fails; another session's is left alone, and the stage serves on with the same bits."""
    both = LayerRange(0, LAYERS - 1)
    begun, go_on = threading.Event(), threading.Event()

    def slow(descriptor: int, target: memoryview, offset_bytes: int) -> int:
        begun.set()
        assert go_on.wait(10)
        return read_into(descriptor, target, offset_bytes)

    stage = load(bundle, both, CacheOptions(1 << 30, lanes=1, read=slow))
    assert stage.experts is not None
    for session in (1, 2):
        stage.open(SessionId(session), 8)

    def leave() -> None:
        assert begun.wait(10)
        stage.give_up(SessionId(2))  # not its batch
        stage.give_up(SessionId(1))
        go_on.set()

    helper = threading.Thread(target=leave)
    helper.start()
    with pytest.raises(Cancelled):
        stage.run(Batch((span(1, 0, list(range(8))),), None))
    helper.join()
    assert stage.experts.reader.counters.reads == 0  # the one that had begun was not counted as arrived
    assert stage.rows(SessionId(1)) == 0
    stage.drop(SessionId(1))
    stage.drop(SessionId(2))
    stage.give_up(SessionId(1))  # nothing runs: nothing happens
    wanted = logits(Pipeline([load(bundle, both, None)]), list(range(8)), [8])
    assert np.array_equal(logits(Pipeline([stage]), list(range(8)), [8]), wanted)
    stage.close()


def test_the_worker_gives_up_what_runs_for_a_session_it_is_told_to_drop(bundle: Bundle) -> None:
    both = LayerRange(0, LAYERS - 1)
    begun, go_on = threading.Event(), threading.Event()

    def slow(descriptor: int, target: memoryview, offset_bytes: int) -> int:
        begun.set()
        assert go_on.wait(10)
        return read_into(descriptor, target, offset_bytes)

    stage = load(bundle, both, CacheOptions(1 << 30, lanes=1, read=slow))
    events: queue.Queue[Event] = queue.Queue()

    def deliver(some: Sequence[Event]) -> None:
        for event in some:
            events.put(event)

    worker = StageWorker(deliver)
    worker.start()
    loaded = LoadedStage(1, stage, is_tail=True, vocab_size=200, queue=RowQueue(16))
    session = SessionId(5)
    work = Work(1, session, 0, 1, 0, tuple(range(8)), None, 0, False, True)
    worker.put(lambda: worker.install(loaded))
    worker.put(OpenRows(1, session, 8, 8, SamplingParams(temperature=0.0)))
    worker.put(RunRows(work))
    assert begun.wait(10)
    worker.put(DropRows(2, session))  # of another plan
    worker.put(DropRows(1, session))
    go_on.set()
    broke = events.get(timeout=10)
    assert isinstance(broke, SessionBroke)
    assert (broke.session, broke.code) == (session, "cancelled")
    assert worker.stop()
    assert stage.experts is not None
    assert stage.experts.reader.counters.reads == 0


def test_blocks_used_again_get_the_new_stages_cache(bundle: Bundle) -> None:
    both = LayerRange(0, LAYERS - 1)
    ids = list(range(20))
    first = load(bundle, both, None)
    wanted = logits(Pipeline([first]), ids, [5])
    second = load(bundle, both, CacheOptions(cycle_bytes(bundle, both)), reuse=first)
    assert np.array_equal(logits(Pipeline([second]), ids, [5]), wanted)
    assert second.experts is not None
    assert second.experts.statistics.total.misses > 0
    assert second.weight_bytes < first.weight_bytes
    third = load(bundle, LayerRange(1, LAYERS - 1), CacheOptions(1 << 30), reuse=second)
    assert third.experts is not None
    assert third.experts.arena_bytes == third.experts.total_bytes  # never more than there is
    fourth = load(bundle, both, None, reuse=third)
    assert fourth.experts is None
    assert np.array_equal(logits(Pipeline([fourth]), ids, [5]), wanted)


def test_the_probe_runs_on_flash(bundle: Bundle) -> None:
    both = LayerRange(0, LAYERS - 1)
    stage = load(bundle, both, CacheOptions(cycle_bytes(bundle, both)))
    assert probe(stage, budget_seconds=0.2).row_invariant
    stage.close()


def test_too_little_memory_is_refused(bundle: Bundle) -> None:
    both = LayerRange(0, LAYERS - 1)
    with pytest.raises(CapacityError, match="of experts that one token"):
        load(bundle, both, CacheOptions(cycle_bytes(bundle, both) - 1))


SCRIPT = """
import os, sys
from pathlib import Path
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import Batch, Span
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.experts.cache import CacheOptions
rss = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
bundle, budget = Bundle.open(sys.argv[1]), int(sys.argv[2])
before = rss()
experts = CacheOptions(budget) if budget else None
stage = CpuStage.load(bundle, LayerRange(0, 1), threads=1, kv_budget_bytes=1 << 20, experts=experts)
for session in range(8):
    stage.open(SessionId(session), 100)
    stage.run(Batch((Span(SessionId(session), 0, tuple(range(session, 100 + session)), 1),), None))
    stage.drop(SessionId(session))
print(rss() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_resident_memory_stays_within_the_cache(tmp_path: Path) -> None:
    model = TinyModel(layers=2, experts=64, hidden=256, intermediate=512, format="int8")
    large = build_tiny_bundle(tmp_path / "bundle", model)
    total_bytes = sum(s.size_bytes for key, s in large.manifest.slices.items() if key.endswith("experts"))
    assert total_bytes > 50 << 20

    def grown(budget_bytes: int) -> int:
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, large.path, str(budget_bytes)],
            capture_output=True,
            check=True,
            text=True,
        )
        return int(run.stdout)

    assert grown(0) > 0.7 * total_bytes  # random rows never ask for some
    assert grown(8 << 20) < (8 << 20) + (12 << 20)  # the rest is what any stage of this size takes
