"""Agents that keep experts on flash: the same ids, within their budget, and damage is mended from the coordinator."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from edge_runtime.agent.config import AgentConfig
from edge_runtime.agent.expert_report import REPORT_SECONDS, ExpertReporter
from edge_runtime.agent.memory import EXPERTS_ALL, EXPERTS_AUTO, SCRATCH_BYTES, MemoryBudget
from edge_runtime.agent.status import Serving
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.store import BundleStore
from edge_runtime.config import parse_expert_cache
from edge_runtime.core import SamplingParams
from edge_runtime.engine.numeric_class import is_early_class
from edge_runtime.errors import CapacityError, ConfigError, UsageError
from edge_runtime.experts.cache import CacheOptions, ExpertCache
from edge_runtime.experts.flash_store import expert_bytes, expert_layers, token_cycle_bytes
from edge_runtime.experts.start_bits import parse_start_bits
from edge_runtime.protocol.messages import StageFailed
from edge_runtime.sdk.device_spec import DeviceSpec
from tests.support.agents import cluster_of, one_device_loop
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

LAYERS = 3
LAST = LAYERS - 1
PROMPT = [5, 17, 42, 99, 3, 7, 150, 11, 60]
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = TinyModel(layers=LAYERS, experts=16, format="int8")
    return build_tiny_bundle(tmp_path_factory.mktemp("agents") / "bundle", model)


def cycle_bytes(bundle: Bundle) -> int:
    return token_cycle_bytes(bundle.manifest, 0, LAST)


async def test_the_ids_are_those_of_a_device_with_everything_in_memory(
    bundle: Bundle, tmp_path: Path
) -> None:
    names = ["phone", "laptop"]
    async with cluster_of(bundle, tmp_path) as cluster:
        await cluster.start(*names, expert_cache=cycle_bytes(bundle))
        lease = await cluster.serve(names, [1])
        session = await cluster.coordinator.open(names, lease, PROMPT, 40, sampling=GREEDY)
        found = await cluster.coordinator.tokens("laptop", session)
        assert [token.id for token in found[session]] == one_device_loop(bundle, PROMPT, 40, GREEDY)
        for name in names:
            serving = cluster.statuses[name][-1]
            assert isinstance(serving, Serving)
            assert 0 < serving.expert_cache_bytes < serving.expert_bytes
            assert "experts on flash: " in str(serving)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("flash")]


async def test_damaged_experts_are_fetched_again(bundle: Bundle, tmp_path: Path) -> None:
    async with cluster_of(bundle, tmp_path) as cluster:
        await cluster.start("phone", expert_cache=cycle_bytes(bundle))
        lease = await cluster.serve(["phone"], [])
        store = BundleStore(tmp_path / "phone").open(bundle.digest)
        whole = {
            key: store.slice_path(key).read_bytes() for key in bundle.manifest.slices if "experts" in key
        }
        for key, data in whole.items():
            store.slice_path(key).write_bytes(bytes(byte ^ 0x10 for byte in data))  # all of them, in place
        session = await cluster.coordinator.open(["phone"], lease, PROMPT, 40, sampling=GREEDY)
        found = await cluster.coordinator.tokens("phone", session)
        assert [token.id for token in found[session]] == one_device_loop(bundle, PROMPT, 40, GREEDY)
        mended = [
            key for key, data in whole.items() if store.slice_path(key).read_bytes()[:4096] == data[:4096]
        ]
        assert mended


@pytest.mark.parametrize(("format", "start_bits"), [("nested4", 2), ("nested8", 4)])
async def test_experts_used_early_are_said_and_promise_no_bits(
    tmp_path: Path, format: str, start_bits: int
) -> None:
    nested = build_tiny_bundle(tmp_path / "nested", TinyModel(layers=LAYERS, experts=16, format=format))
    cache_bytes = 4 * cycle_bytes(nested)
    async with cluster_of(nested, tmp_path) as cluster:
        await cluster.start("phone", expert_cache=cache_bytes, expert_start_bits=start_bits)
        await cluster.start("laptop", expert_cache=cache_bytes)
        for name, is_early in (("phone", True), ("laptop", False)):
            lease = await cluster.coordinator.load([name], [])
            ready = await cluster.coordinator.links[name].ready(lease)
            assert is_early_class(ready.numeric_class) == is_early
            session = await cluster.coordinator.open([name], lease, PROMPT, 40, sampling=GREEDY)
            found = await cluster.coordinator.tokens(name, session)
            ids = [token.id for token in found[session]]
            wanted = one_device_loop(nested, PROMPT, 40, GREEDY)
            assert len(ids) == len(wanted)
            assert is_early or ids == wanted
            serving = cluster.statuses[name][-1]
            assert isinstance(serving, Serving)
            assert ("used before they are whole (nobody measured" in str(serving)) == is_early


async def test_a_cache_below_one_token_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    async with cluster_of(bundle, tmp_path) as cluster:
        await cluster.start("phone", expert_cache=cycle_bytes(bundle) - 1)
        await cluster.coordinator.load(["phone"], [])
        failed, _ = await cluster.coordinator.links["phone"].expect(StageFailed)
        assert failed.code == "capacity"
        assert "of experts that one token uses in layers 0-2" in failed.reason


# ---------------------------------------------------------------- memory


def budget_for(free_bytes: int) -> MemoryBudget:
    return MemoryBudget(free_bytes + SCRATCH_BYTES + (1 << 20), 1 << 20)


def test_memory_is_divided_within_the_budget(bundle: Bundle) -> None:
    manifest = bundle.manifest
    experts = expert_bytes(manifest, 0, LAST)
    dense = manifest.stage_weight_bytes(0, LAST) - experts
    token = manifest.model.kv_bytes_per_token_per_layer * LAYERS
    kv = 512 * token  # a full context of this model

    plenty = budget_for(dense + experts + kv).divide(manifest, 0, LAST)
    assert plenty.expert_cache_bytes is None
    for spare in range(0, experts, experts // 7):
        budget = budget_for(dense + 2 * cycle_bytes(bundle) + kv + spare - cycle_bytes(bundle))
        found = budget.divide(manifest, 0, LAST, EXPERTS_AUTO)
        if found.expert_cache_bytes is None:
            assert dense + experts + found.kv_bytes <= budget.free_bytes
            continue
        assert cycle_bytes(bundle) <= found.expert_cache_bytes <= experts
        assert dense + found.expert_cache_bytes + found.kv_bytes <= budget.free_bytes
        assert found.kv_bytes >= 32 * token

    told = budget_for(dense + experts + kv).divide(manifest, 0, LAST, 3 * cycle_bytes(bundle))
    assert told.expert_cache_bytes == 3 * cycle_bytes(bundle)
    assert dense + told.expert_cache_bytes + told.kv_bytes <= dense + experts + kv
    more = budget_for(dense + experts + kv).divide(manifest, 0, LAST, 1 << 40)
    assert more.expert_cache_bytes == experts


def test_what_does_not_fit_is_refused_with_the_numbers(bundle: Bundle) -> None:
    manifest = bundle.manifest
    dense = manifest.stage_weight_bytes(0, LAST) - expert_bytes(manifest, 0, LAST)
    small = budget_for(dense + cycle_bytes(bundle))
    for setting in (EXPERTS_AUTO, 2 * cycle_bytes(bundle)):
        with pytest.raises(CapacityError, match=r"need .* MiB for experts \(one token uses .* MiB\)"):
            small.divide(manifest, 0, LAST, setting)
    with pytest.raises(CapacityError, match="of weights"):
        small.divide(manifest, 0, LAST, EXPERTS_ALL)


# ---------------------------------------------------------------- settings and reports


def test_settings(tmp_path: Path) -> None:
    assert [parse_expert_cache(value) for value in ("auto", "all", "1MiB", 5)] == ["auto", "all", 1 << 20, 5]
    for wrong in ("most", "0", "-1"):
        with pytest.raises(ValueError, match=r"all|room"):
            parse_expert_cache(wrong)
    with pytest.raises(UsageError, match="neither auto nor all"):
        DeviceSpec(name="phone", expert_cache="most")
    with pytest.raises(ConfigError, match="an expert cache is a size above 0"):
        AgentConfig("phone", tmp_path, 1 << 30, 1, expert_cache="most")
    assert [parse_start_bits(value) for value in ("all", "2", 4, 0)] == [0, 2, 4, 0]
    with pytest.raises(UsageError, match="'3' is none of all, 2 and 4"):
        DeviceSpec(name="phone", expert_start_bits="3")
    with pytest.raises(ConfigError, match="from 2 or 4 bits on"):
        AgentConfig("phone", tmp_path, 1 << 30, 1, expert_start_bits=3)
    with pytest.raises(ConfigError, match="choose one of auto, off"):
        AgentConfig("phone", tmp_path, 1 << 30, 1, expert_prediction="read")


def test_reports_come_now_and_then_and_only_of_news(bundle: Bundle) -> None:
    layers = expert_layers(bundle, bundle.manifest.layers)
    cache = ExpertCache(layers, CacheOptions(cycle_bytes(bundle)))
    reporter = ExpertReporter()
    assert reporter.report(0.0, None) is None
    assert reporter.report(0.0, cache) is None
    cache.statistics.count(1, hits=3, misses=1, read_bytes=1 << 20, waited_seconds=0.5)
    assert reporter.report(1.0, cache) is None
    said = reporter.report(REPORT_SECONDS, cache)
    assert said is not None
    assert (said.hits, said.misses, said.worst_layer) == (3, 1, 0)
    assert str(said).startswith("experts: 75.0 % of 4 were in memory, 1.0 MiB read, 0.5 s waited")
    assert "0% of experts are named a layer ahead; keeping them: off, not tried yet" in str(said)
    cache.statistics.count(1, hits=1, misses=0, read_bytes=0, waited_seconds=0.0)
    assert reporter.report(REPORT_SECONDS + 1, cache) is None
    cache.statistics.count_upgrade(2, 1 << 20)
    again = reporter.report(2 * REPORT_SECONDS, cache, "perplexity 2 and 1")
    assert again is not None
    assert (again.hits, again.misses) == (1, 0)
    cache.close()
