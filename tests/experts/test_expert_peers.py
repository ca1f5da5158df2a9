"""Experts of a layer on several devices: the bits of one device, wherever each expert is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from edge_kernels.experts import ExpertWeights, route, run_experts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.errors import EngineError, ProtocolError
from edge_runtime.experts import peer_runner
from edge_runtime.experts.flash_store import ExpertLayer, expert_layers
from edge_runtime.experts.peer_runner import PeerExperts, PeerOptions, peers_of
from edge_runtime.experts.peer_server import PeerServer
from edge_runtime.experts.peer_shares import held_by, owners_of, pack_experts, unpack_experts
from edge_runtime.experts.peer_store import PeerStore
from edge_runtime.protocol.expert_messages import ExpertShare
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

EXPERTS, TOP_K, LAYERS = 11, 3, 2
HUB, PEERS = "hub", ("left", "right")
Rows = NDArray[np.float32]
Ints = NDArray[np.int32]


@pytest.fixture(scope="module", params=["int4", "int8", "fp32"])
def bundle(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Bundle:
    model = TinyModel(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, format=request.param)
    return build_tiny_bundle(tmp_path_factory.mktemp("peers") / "bundle", model)


def layers_of(bundle: Bundle) -> tuple[ExpertLayer, ...]:
    return expert_layers(bundle, bundle.manifest.layers)


def filled(bundle: Bundle, held: dict[int, tuple[int, ...]]) -> PeerStore:
    store = PeerStore(layers_of(bundle), held)
    for layer, expert in store.experts():
        start = layer.offset(expert)
        assert store.put(
            layer.layer, expert, bundle.slice_bytes(layer.slice)[start : start + layer.stride_bytes]
        )
    return store


class Direct:
    """A port without a link: the peers' own servers, called when they are waited for."""

    def __init__(self, servers: dict[str, PeerServer]) -> None:
        self.servers = servers
        self.asked: dict[int, tuple[int, list[bytes]]] = {}
        self.requests = 0

    def ask(self, device_id: str, layer: int, rows: Rows, uses: Ints, gates: Rows | None = None) -> int:
        self.requests += 1
        sent = [rows, uses] if gates is None else [rows, uses, gates]
        self.asked[self.requests] = (layer, [part.tobytes() for part in sent])
        return self.requests

    def wait(self, device_id: str, ticket: int, outputs: int, hidden: int) -> Rows:
        layer, payloads = self.asked.pop(ticket)
        found = self.servers[device_id].answer(layer, [memoryview(payload) for payload in payloads])
        assert found.shape == (outputs, hidden)
        return found

    def forget(self, device_id: str) -> None:
        self.asked.clear()


def shares_of(places: Sequence[Sequence[int]]) -> tuple[ExpertShare, ...]:
    """places[layer][expert]: a set of devices as bits, hub first."""
    return tuple(
        ExpertShare(device, layer, pack_experts([e for e, bits in enumerate(of) if bits >> n & 1], len(of)))
        for layer, of in enumerate(places)
        for n, device in enumerate((HUB, *PEERS))
    )


def shared(bundle: Bundle, shares: Sequence[ExpertShare]) -> tuple[PeerExperts, Direct]:
    counts = dict.fromkeys(range(LAYERS), EXPERTS)
    stores = {device: filled(bundle, held_by(shares, device, counts)) for device in (HUB, *PEERS)}
    activations = dict.fromkeys(range(LAYERS), "silu")
    port = Direct({device: PeerServer(stores[device], activations, threads=1) for device in PEERS})
    return PeerExperts(PeerOptions(stores[HUB], owners_of(shares, HUB, counts), port)), port


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


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    places=st.lists(
        st.one_of(
            st.lists(st.integers(1, 7), min_size=EXPERTS, max_size=EXPERTS),
            st.sampled_from(
                [[2] * EXPERTS, [4] * EXPERTS]
            ),  # one peer has all of a layer, and makes the sums
        ),
        min_size=LAYERS,
        max_size=LAYERS,
    ),
    rows=st.integers(1, 9),
    seed=st.integers(0, 1000),
    piece_bytes=st.sampled_from([1, 600, 2 << 20]),
)
def test_any_placement_gives_the_bits_of_one_device(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    places: list[list[int]],
    rows: int,
    seed: int,
    piece_bytes: int,
) -> None:
    monkeypatch.setattr(peer_runner, "PIECE_BYTES", piece_bytes)
    rng = np.random.default_rng(seed)
    experts, _ = shared(bundle, shares_of(places))
    for layer in layers_of(bundle):
        x = rng.standard_normal((rows, layer.hidden), np.float32)
        logits = rng.standard_normal((rows, EXPERTS), np.float32)
        ids, gates = route(logits, top_k=TOP_K, normalize=True, softmax_after=False)
        found = experts.run(layer.layer, x, ids, gates, activation="silu", threads=1)
        wanted = run_experts(x, ids, gates, whole(bundle, layer), activation="silu")
        assert found.tobytes() == wanted.tobytes()
    counted = experts.statistics
    assert counted.local_uses + counted.peer_uses == LAYERS * rows * TOP_K


def test_what_is_here_asks_nobody_and_memory_is_what_is_held(bundle: Bundle) -> None:
    experts, port = shared(bundle, shares_of([[1] * EXPERTS, [1] * 5 + [2] * 6]))
    layer = layers_of(bundle)[0]
    ids = np.array([[0, 3, 9]], np.int32)
    gates = np.full((1, TOP_K), 0.3, np.float32)
    x = np.ones((1, layer.hidden), np.float32)
    experts.run(0, x, ids, gates, activation="silu", threads=1)
    assert port.requests == 0
    assert experts.arena_bytes == (EXPERTS + 5) * layer.stride_bytes
    assert experts.total_bytes == 2 * EXPERTS * layer.stride_bytes
    experts.run(1, x, ids, gates, activation="silu", threads=1)
    assert (port.requests, experts.statistics.peer_uses, experts.statistics.requests) == (1, 1, 1)


def test_a_store_takes_no_wrong_bytes(bundle: Bundle) -> None:
    layer = layers_of(bundle)[0]
    store = PeerStore(layers_of(bundle), {0: (1, 4)})
    good = bytes(bundle.slice_bytes(layer.slice)[layer.offset(4) : layer.offset(4) + layer.stride_bytes])
    assert not store.put(0, 4, bytes([good[0] ^ 1]) + good[1:])
    assert not store.put(0, 1, good)
    assert not store.put(0, 4, good[:-1])
    assert store.put(0, 4, good)
    assert [(of.layer, expert) for of, expert in store.experts()] == [(0, 1), (0, 4)]
    with pytest.raises(EngineError, match="holds no expert of layer 1"):
        store.run_each(
            1, np.zeros((1, layer.hidden), np.float32), np.zeros(1, np.int32), activation="silu", threads=1
        )


# ---------------------------------------------------------------- what others may send


def test_a_server_refuses_what_does_not_fit_its_own_plan(bundle: Bundle) -> None:
    layer = layers_of(bundle)[0]
    server = PeerServer(filled(bundle, {0: (2, 5)}), {0: "silu", 1: "silu"}, threads=1)
    row = np.ones((1, layer.hidden), np.float32).tobytes()

    def uses(*pairs: tuple[int, int]) -> bytes:
        return np.array(pairs, np.int32).tobytes()

    one = np.ones(1, np.float32).tobytes()
    assert server.answer(0, [memoryview(row), memoryview(uses((0, 5), (0, 2)))]).shape == (2, layer.hidden)
    sums = server.answer(0, [memoryview(row), memoryview(uses((0, 5), (0, 2))), memoryview(one * 2)])
    assert sums.shape == (1, layer.hidden)
    for number, payloads in (
        (0, [row]),
        (0, [row, uses((0, 5)), b""]),
        (0, [row[:-4], uses((0, 5))]),
        (0, [b"", uses((0, 5))]),
        (0, [row, b""]),
        (0, [row, uses((0, 5))[:-1]]),
        (0, [row, uses((1, 5))]),
        (0, [row, uses((-1, 5))]),
        (0, [row, uses((0, 3))]),
        (0, [row, uses((0, -1))]),
        (0, [row, uses((0, EXPERTS))]),
        (1, [row, uses((0, 5))]),
        (7, [row, uses((0, 5))]),
        (0, [row, uses((0, 5)) * 100_000]),
        (0, [row, uses((0, 5)), one * 2]),
        (0, [row, uses((0, 5)), one[:-1]]),
        (0, [row * 2, uses((0, 5), (1, 2), (1, 5)), one * 3]),
        (0, [row * 2, uses((0, 5), (1, 2), (0, 5), (1, 2)), one * 4]),
        (0, [row * 2, uses((0, 5)), one]),
    ):
        with pytest.raises(ProtocolError):
            server.answer(number, [memoryview(payload) for payload in payloads])


@given(chosen=st.sets(st.integers(0, 40)), count=st.integers(41, 60))
def test_sets_of_experts_come_back(chosen: set[int], count: int) -> None:
    packed = pack_experts(chosen, count)
    assert unpack_experts(packed, count) == tuple(sorted(chosen))
    with pytest.raises(ProtocolError, match="does not fit"):
        unpack_experts(packed + b"\0", count)


def test_shares_must_cover_every_expert_of_known_layers() -> None:
    counts = {0: 3}
    shares = [ExpertShare(HUB, 0, pack_experts([0], 3)), ExpertShare("left", 0, pack_experts([1], 3))]
    with pytest.raises(ProtocolError, match="expert 2 of layer 0 is on no device"):
        owners_of(shares, HUB, counts)
    with pytest.raises(ProtocolError, match="layer 5, which has no experts"):
        held_by([ExpertShare(HUB, 5, b"")], HUB, counts)
    with pytest.raises(ProtocolError, match="does not fit"):
        held_by([ExpertShare(HUB, 0, b"\xff")], HUB, counts)
    shares += [
        ExpertShare("right", 0, pack_experts([0, 1, 2], 3)),
        ExpertShare("idle", 0, pack_experts([1], 3)),
    ]
    owners = owners_of(shares, HUB, counts)
    assert owners[0].of.tolist() == [0, 1, 2]  # its own first, then the first that holds it
    assert peers_of(owners) == ["left", "right"]


def test_a_bundle_without_files_can_be_planned_for(tmp_path: Path) -> None:
    bundle = build_tiny_bundle(tmp_path / "bundle", TinyModel(layers=1, experts=4, format="int8"))
    (layer,) = layers_of(bundle)
    layer.path.unlink()
    (same,) = expert_layers(bundle, bundle.manifest.layers, files=False)
    assert same == layer
