"""Real agents, one of which has all experts on its flash and may ask another for them, over real links."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.agent import expert_links
from edge_runtime.agent.expert_report import REPORT_SECONDS, ExpertReporter
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import SamplingParams
from edge_runtime.experts import flash_and_peers
from edge_runtime.experts.flash_and_peers import FlashAndPeers, HelpedStatistics
from edge_runtime.experts.flash_store import expert_layers
from edge_runtime.experts.miss_split import Division, HereCost, Miss, PeerCost
from edge_runtime.experts.peer_server import PeerServer
from edge_runtime.experts.peer_standing import CHECKS
from edge_runtime.protocol.expert_messages import ExpertRows
from tests.support.agents import Cluster, cluster_of, one_device_loop
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

LAYERS, EXPERTS = 3, 16
PROMPT = [5, 17, 42, 99, 3, 7, 150, 11, 60]
GREEDY = SamplingParams(temperature=0.0)
LAPTOP_HAS = [[1] * EXPERTS] * LAYERS  # and nobody else has anything in memory
NAMES = ("phone", "laptop")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = TinyModel(layers=LAYERS, experts=EXPERTS, format="int4")
    return build_tiny_bundle(tmp_path_factory.mktemp("helped") / "bundle", model)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FlashAndPeers]:
    """Every such source that agents make."""
    found: list[FlashAndPeers] = []
    begin = FlashAndPeers.__init__

    def noted(self: FlashAndPeers, *arguments: object, **options: object) -> None:
        begin(self, *arguments, **options)  # type: ignore[arg-type]
        found.append(self)

    monkeypatch.setattr(FlashAndPeers, "__init__", noted)
    return found


@pytest.fixture
def asks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it costs."""

    def anyhow(
        misses: Sequence[Miss], here: HereCost, peers: Sequence[PeerCost], least_reads: int
    ) -> Division:
        away = tuple(miss.expert for miss in misses if miss.holders)
        return Division(tuple(miss.expert for miss in misses if not miss.holders), (away,), 0.0)

    monkeypatch.setattr(flash_and_peers, "divide", anyhow)
    monkeypatch.setattr(flash_and_peers, "RENT", float("inf"))
    monkeypatch.setattr(FlashAndPeers, "_is_any_faster", lambda *_: True)


async def started(cluster: Cluster, bundle: Bundle) -> int:
    """The phone has memory for a third of the experts; the lease."""
    stride_bytes = expert_layers(bundle, bundle.manifest.layers)[0].stride_bytes
    await cluster.start("phone", expert_cache=LAYERS * EXPERTS // 3 * stride_bytes)
    await cluster.start("laptop")
    lease = await cluster.coordinator.load_shared(NAMES, LAPTOP_HAS, on_flash=True)
    for name in reversed(NAMES):
        await cluster.coordinator.links[name].ready(lease)
    return lease


async def generated(cluster: Cluster, lease: int, count: int) -> list[int]:
    session = await cluster.coordinator.open(["phone"], lease, PROMPT, count)
    found = await cluster.coordinator.tokens("phone", session)
    return [token.id for token in found[session]]


async def test_the_ids_are_those_of_one_device_wherever_misses_go(
    bundle: Bundle, tmp_path: Path, made: list[FlashAndPeers], asks_for_all: None
) -> None:
    async with cluster_of(bundle, tmp_path) as cluster:
        lease = await started(cluster, bundle)
        for count in (30, 60):
            assert await generated(cluster, lease, count) == one_device_loop(bundle, PROMPT, count, GREEDY)
        (source,) = made
        counted = source.statistics
        assert counted.shared_layers > CHECKS
        assert counted.asked_uses > 20
        assert source.cache.statistics.total.misses > 0  # what was only compared, and the first ones
        reporter = ExpertReporter()
        assert reporter.report(0.0, source.cache) is None
        line = reporter.report(REPORT_SECONDS, source.cache, peers=source.says)
        assert f"{counted.asked_uses} uses computed by other devices" in str(line)


async def test_a_peer_that_dies_in_a_stream_is_done_without(
    bundle: Bundle, tmp_path: Path, made: list[FlashAndPeers], asks_for_all: None
) -> None:
    """The session goes on: nobody needs the peer."""
    wanted = one_device_loop(bundle, PROMPT, 200, GREEDY)
    async with cluster_of(bundle, tmp_path) as cluster:
        lease = await started(cluster, bundle)
        session = await cluster.coordinator.open(["phone"], lease, PROMPT, 200)
        ids = [token.id for token in await cluster.coordinator.links["phone"].expect_tokens(session, 20)]
        before = made[0].statistics.asked_uses
        await cluster.stop("laptop")
        while len(ids) < len(wanted):
            ids += [token.id for token in await cluster.coordinator.links["phone"].expect_tokens(session, 1)]
        assert ids == wanted
        assert before > 0


async def test_late_answers_are_dropped_and_the_link_stays(
    bundle: Bundle,
    tmp_path: Path,
    made: list[FlashAndPeers],
    asks_for_all: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with cluster_of(bundle, tmp_path) as cluster:
        lease = await started(cluster, bundle)
        assert len(await generated(cluster, lease, 30)) > 0
        (source,) = made
        assert source.statistics.late_uses == 0
        with monkeypatch.context() as patch:
            sent = answer_later(patch, 0.3)
            assert await generated(cluster, lease, 40) == one_device_loop(bundle, PROMPT, 40, GREEDY)
            assert source.statistics.late_uses > 0
            async with asyncio.timeout(5):
                while not sent:
                    await generated(cluster, lease, 12)
        assert await generated(cluster, lease, 50) == one_device_loop(bundle, PROMPT, 50, GREEDY)
        assert all(sent)
        links = source._helpers[0].port
        assert isinstance(links, expert_links.ExpertLinks)
        assert not links._answers
        assert not links._redials


def answer_later(patch: pytest.MonkeyPatch, seconds: float) -> list[bool]:
    """Every answer comes so much later, over the link that it was asked on; one entry each when it has been sent."""
    answer, sent = expert_links.ExpertLinks._answer, list[bool]()

    def later(
        self: expert_links.ExpertLinks, server: PeerServer, asked: ExpertRows, payloads: Sequence[memoryview]
    ) -> None:
        mesh = self._need_mesh()
        link = mesh._heard_on

        def send() -> None:
            before, mesh._heard_on = mesh._heard_on, link
            try:
                answer(self, server, asked, payloads)
            finally:
                mesh._heard_on = before
            sent.append(link is not None and not link.closed)

        asyncio.get_running_loop().call_later(seconds, send)

    patch.setattr(expert_links.ExpertLinks, "_answer", later)
    return sent


async def test_a_peer_that_computes_other_bits_is_not_asked(
    bundle: Bundle,
    tmp_path: Path,
    made: list[FlashAndPeers],
    asks_for_all: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = PeerServer.answer

    def wrong(self: PeerServer, layer: int, payloads: Sequence[memoryview]) -> np.ndarray:
        return right(self, layer, payloads) * np.float32(1 + 2**-20)

    monkeypatch.setattr(PeerServer, "answer", wrong)
    async with cluster_of(bundle, tmp_path) as cluster:
        lease = await started(cluster, bundle)
        assert await generated(cluster, lease, 60) == one_device_loop(bundle, PROMPT, 60, GREEDY)
        (source,) = made
        assert [peer.is_barred for peer in source.peers.values()] == [True]
        assert source.statistics == HelpedStatistics(shared_layers=1)


async def test_a_peer_out_of_reach_is_done_without(
    bundle: Bundle, tmp_path: Path, made: list[FlashAndPeers]
) -> None:
    async with cluster_of(bundle, tmp_path) as cluster:
        await started(cluster, bundle)
        await cluster.stop("laptop")
        lease = await cluster.coordinator.load_shared(NAMES[:1], [[0] * EXPERTS] * LAYERS, on_flash=True)
        await cluster.coordinator.links["phone"].ready(lease)
        assert await generated(cluster, lease, 30) == one_device_loop(bundle, PROMPT, 30, GREEDY)
        assert made[-1].statistics.shared_layers == 0
