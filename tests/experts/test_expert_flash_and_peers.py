"""Misses that go to flash or to a peer: the same bits whatever was where, and nothing depends on a peer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from edge_kernels.experts import ExpertWeights, route, run_experts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.errors import EngineError, TransportError
from edge_runtime.experts import flash_and_peers
from edge_runtime.experts.cache import CacheOptions, ExpertCache
from edge_runtime.experts.flash_and_peers import RENT, FlashAndPeers, HelpedOptions
from edge_runtime.experts.flash_store import ExpertLayer, expert_layers
from edge_runtime.experts.lanes import read_into
from edge_runtime.experts.miss_split import Division, HereCost, Miss, PeerCost
from edge_runtime.experts.peer_server import PeerServer
from edge_runtime.experts.peer_shares import holders_of, pack_experts
from edge_runtime.experts.peer_store import PeerStore
from edge_runtime.protocol.expert_messages import ExpertShare
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

EXPERTS, TOP_K, LAYERS = 12, 3, 2
PEERS = ("left", "right")
Rows = NDArray[np.float32]
Ints = NDArray[np.int32]
ACTIVATIONS = dict.fromkeys(range(LAYERS), "silu")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = TinyModel(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, format="int4")
    return build_tiny_bundle(tmp_path_factory.mktemp("helped") / "bundle", model)


def layers_of(bundle: Bundle) -> tuple[ExpertLayer, ...]:
    return expert_layers(bundle, bundle.manifest.layers)


class Time:
    """A clock that only what is done moves on."""

    def __init__(self) -> None:
        self.now = 0.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds

    def reaches(self, when: float) -> None:
        with self._lock:
            self.now = max(self.now, when)


class Peers:
    """A port without a link. An answer comes `seconds[device]` after it was asked for; `mood`: what else happens."""

    def __init__(self, servers: dict[str, PeerServer], time: Time) -> None:
        self.servers, self.time = servers, time
        self.seconds = dict.fromkeys(servers, 1e-3)
        self.mood: Callable[[str], str] = lambda device_id: ""
        self.asked: dict[int, tuple[str, int, float, list[bytes]]] = {}
        self.requests = dict.fromkeys(servers, 0)
        self.forgotten = 0

    def ask(self, device_id: str, layer: int, rows: Rows, uses: Ints) -> int:
        self.requests[device_id] += 1
        if self.mood(device_id) == "unreachable":
            raise TransportError("there is no link to it")
        ticket = sum(self.requests.values())
        self.asked[ticket] = device_id, layer, self.time(), [rows.tobytes(), uses.tobytes()]
        return ticket

    def wait_until_late(
        self, device_id: str, ticket: int, outputs: int, hidden: int, seconds: float
    ) -> Rows | None:
        to, layer, asked_at, payloads = self.asked.pop(ticket)
        assert to == device_id
        mood = self.mood(device_id)
        comes_at = asked_at + self.seconds[device_id]
        if mood == "late" or comes_at > self.time() + seconds:
            self.time.passes(seconds)
            return None
        self.time.reaches(comes_at)
        if mood == "gone":
            raise TransportError("the link broke")
        if mood == "refuses":
            raise EngineError("it could not run its experts")
        found = self.servers[device_id].answer(layer, [memoryview(payload) for payload in payloads])
        assert found.shape == (outputs, hidden)
        if mood == "lies":
            found.view(np.int32)[-1, -1] ^= 1
        return found

    def forget(self, device_id: str) -> None:
        self.forgotten += 1


def filled(bundle: Bundle, held: dict[int, tuple[int, ...]]) -> PeerStore:
    store = PeerStore(layers_of(bundle), held)
    for layer, expert in store.experts():
        start = layer.offset(expert)
        assert store.put(
            layer.layer, expert, bundle.slice_bytes(layer.slice)[start : start + layer.stride_bytes]
        )
    return store


class World:
    """This device, whose reads take `flash_seconds` each, one after the other, and two peers."""

    def __init__(
        self,
        bundle: Bundle,
        slots: int = LAYERS * TOP_K,
        held: Sequence[Sequence[int]] = (range(EXPERTS), range(EXPERTS)),
        policy: str = "lfru",
        native: bool = False,
    ) -> None:
        self.bundle, self.time, self.flash_seconds = bundle, Time(), 1e-3
        self.layers = layers_of(bundle)
        self.port = Peers(
            {
                device: PeerServer(
                    filled(bundle, dict.fromkeys(range(LAYERS), tuple(experts))), ACTIVATIONS, threads=1
                )
                for device, experts in zip(PEERS, held, strict=True)
            },
            self.time,
        )
        shares = [
            ExpertShare(device, layer, pack_experts(experts, EXPERTS))
            for layer in range(LAYERS)
            for device, experts in zip(PEERS, held, strict=True)
        ]
        holders = holders_of(shares, "hub", dict.fromkeys(range(LAYERS), EXPERTS))
        slot_bytes = slots * self.layers[0].stride_bytes
        options = (
            CacheOptions(slot_bytes, policy=policy)
            if native
            else CacheOptions(slot_bytes, policy=policy, lanes=1, read=self._read)
        )
        self.cache = ExpertCache(self.layers, options)
        self.source = FlashAndPeers(self.cache, HelpedOptions(options, holders, self.port), self.time)
        self._chance = np.random.default_rng(7)

    def _read(self, descriptor: int, target: memoryview, offset_bytes: int) -> int:
        self.time.passes(self.flash_seconds)
        return read_into(descriptor, target, offset_bytes)

    def open(self) -> None:
        """Peers may be asked, and have been found to compute the same."""
        self.source.open()
        for _ in range(12):
            self.run()

    def run(self, rows: int = 1) -> None:
        """All layers once, compared with all in memory."""
        for layer in self.layers:
            x = self._chance.standard_normal((rows, layer.hidden), np.float32)
            logits = self._chance.standard_normal((rows, EXPERTS), np.float32)
            ids, gates = route(logits, top_k=TOP_K, normalize=True, softmax_after=False)
            found = self.source.run(layer.layer, x, ids, gates, activation="silu", threads=1)
            wanted = run_experts(x, ids, gates, whole(self.bundle, layer), activation="silu")
            assert found.tobytes() == wanted.tobytes()

    def asked_share(self, steps: int) -> float:
        """Of the misses of so many steps, how many a peer computed."""
        counted, read = self.source.statistics, self.cache.statistics
        asked, misses = counted.asked_uses, read.total.misses
        for _ in range(steps):
            self.run()
        asked, misses = counted.asked_uses - asked, read.total.misses - misses
        return asked / max(1, asked + misses)


def whole(bundle: Bundle, layer: ExpertLayer) -> ExpertWeights:
    return ExpertWeights(
        np.frombuffer(bundle.slice_bytes(layer.slice), np.uint8)[layer.first_byte :],
        layer.format,
        layer.experts,
        layer.hidden,
        layer.intermediate,
        layer.stride_bytes,
        layer.offsets,
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), policy=st.sampled_from(["lfru", "lru"]), native=st.booleans(), rows=st.integers(1, 5))
def test_any_division_and_any_mishap_give_the_bits_of_one_device(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, data: st.DataObject, policy: str, native: bool, rows: int
) -> None:
    def anyhow(
        misses: Sequence[Miss], here: HereCost, peers: Sequence[PeerCost], least_reads: int
    ) -> Division:
        away: list[list[int]] = [[] for _ in peers]
        for miss in misses:
            choice = data.draw(st.sampled_from([-1, *miss.holders]))
            if choice >= 0:
                away[choice].append(miss.expert)
        return Division((), tuple(tuple(experts) for experts in away), 0.0)

    monkeypatch.setattr(flash_and_peers, "divide", anyhow)
    monkeypatch.setattr(flash_and_peers, "RENT", float("inf"))
    monkeypatch.setattr(FlashAndPeers, "_is_any_faster", lambda *_: True)
    world = World(
        bundle, data.draw(st.integers(LAYERS * TOP_K, 20)), (range(8), range(4, 12)), policy, native
    )
    moods = ["", "", "", "late", "gone", "refuses", "unreachable"]
    try:
        world.open()
        world.port.mood = lambda device_id: data.draw(st.sampled_from(moods))
        for _ in range(4):
            world.run(rows)
            for standing in world.source.peers.values():
                standing.passed(1e6)  # it has rested
        assert world.source.statistics.shared_layers > 0
    finally:
        world.source.close()


def test_slow_flash_makes_misses_go_to_peers_and_they_come_back(bundle: Bundle) -> None:
    world = World(bundle)
    world.port.seconds = {"left": 2e-3, "right": 4e-3}
    try:
        world.flash_seconds = 1e-4
        world.open()
        world.run(8)  # the cache is full
        assert world.asked_share(40) < 0.05
        world.flash_seconds = 1e-2
        world.asked_share(20)
        assert world.asked_share(40) > 0.9
        world.flash_seconds = 1e-4
        world.asked_share(300)
        assert world.asked_share(40) < 0.05
    finally:
        world.source.close()


def test_what_peers_are_asked_for_again_and_again_is_read_after_all(bundle: Bundle) -> None:
    """As long as flash costs, asking may cost a few times, and then the expert is here."""
    world = World(bundle)
    world.flash_seconds = 1e-2
    try:
        world.open()
        experts = [(layer.layer, expert) for layer in world.layers for expert in range(EXPERTS)]
        reads = world.cache.statistics.total.misses
        spent = world.source._rent_seconds
        for _ in range(300):
            world.run()
            line = world.source._reading.line
            peers = max(peer.measured.line.seconds(1) for peer in world.source.peers.values())
            assert all(spent.get(each, 0.0) <= RENT * line.seconds(1) + peers + 1e-2 for each in experts)
        assert world.cache.statistics.total.misses - reads > 20
    finally:
        world.source.close()


def test_where_both_are_as_fast_both_are_used(bundle: Bundle) -> None:
    world = World(bundle)
    world.port.seconds = dict.fromkeys(PEERS, 2.5e-3)  # three reads take longer, one is quicker
    try:
        world.open()
        world.run(8)
        assert 0.1 < world.asked_share(60) < 0.9
    finally:
        world.source.close()


def test_nobody_is_asked_before_it_has_given_the_same_bits_and_never_who_did_not(bundle: Bundle) -> None:
    world = World(bundle)
    world.flash_seconds = 1e-1
    world.port.mood = lambda device_id: "lies" if device_id == "left" else ""
    try:
        world.run()
        assert world.port.requests == {"left": 0, "right": 0}
        world.open()
        assert world.source.peers["left"].is_barred
        assert world.source.peers["right"].is_checked
        assert world.port.requests["left"] == 1
        world.port.requests = dict.fromkeys(PEERS, 0)
        for _ in range(60):
            world.run()
        assert world.port.requests["left"] == 0
        assert world.port.requests["right"] > 20
        counted = world.source.statistics
        assert str(counted.asked_uses) in world.source.says
        assert "1 of them compute other bits" in world.source.says
    finally:
        world.source.close()


@pytest.mark.parametrize("mood", ["late", "gone", "refuses", "unreachable"])
def test_a_peer_that_fails_is_asked_rarely_until_it_answers(bundle: Bundle, mood: str) -> None:
    world = World(bundle, held=(range(EXPERTS), ()))
    world.flash_seconds = 5e-2
    try:
        world.open()
        world.run(8)
        assert world.asked_share(30) > 0.8
        world.port.mood = lambda device_id: mood
        before, began = world.port.requests["left"], world.time()
        for _ in range(60):
            world.run()
        assert world.port.requests["left"] - before <= 6
        assert world.source.statistics.late_uses > 0 or mood == "unreachable"
        assert world.time() - began < 60 * LAYERS * TOP_K * world.flash_seconds * 1.1
        world.port.mood = lambda device_id: ""
        for _ in range(150):
            world.run()
        assert world.asked_share(30) > 0.8
    finally:
        world.source.close()


def test_what_flash_can_not_give_ends_the_batch_and_nobody_waits(bundle: Bundle, tmp_path: Path) -> None:
    """Requests under way are forgotten when reading fails."""
    world = World(bundle, held=(range(6), ()))
    world.flash_seconds = 1e-2
    try:
        world.open()
        world.run(8)

        def broken(*_: object, **__: object) -> Rows:
            raise EngineError("flash is broken")

        world.cache.run = broken  # type: ignore[method-assign]
        for _ in range(30):
            with pytest.raises(EngineError, match="flash is broken"):
                world.asked_share(100)
        assert world.port.forgotten > 0
    finally:
        world.source.close()
