"""The mesh: direct where a peer can be dialled, relayed where not, and nobody outside the lease."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest

from edge_runtime.errors import ConnectionClosed, TransportError, TrustError
from edge_runtime.protocol import codec
from edge_runtime.protocol.messages import Gap, Message, PeerEntry, PeerLeaseBody, Relay
from edge_runtime.transport import zeromq
from edge_runtime.transport.base import Frame
from edge_runtime.transport.mesh import Mesh
from edge_runtime.trust.identity import KeyPair, SigningKey
from edge_runtime.trust.lease import sign_lease

SIGNER = SigningKey.generate()
BIND = "tcp://127.0.0.1:0"


class Cluster:
    """Meshes, and a coordinator of ten lines: it signs leases and forwards relayed lists through the codec."""

    def __init__(self) -> None:
        self.keys: dict[str, KeyPair] = {}
        self.meshes: dict[str, Mesh] = {}
        self.numbers = itertools.count(1)
        self.relayed = 0

    async def add(self, stack: AsyncExitStack, data_address: str) -> str:
        key = KeyPair.generate()
        name = key.device_id

        async def control_send(message: Message, payloads: Sequence[Frame]) -> None:
            assert isinstance(message, Relay)
            _relay, frames = codec.decode([bytes(frame) for frame in codec.encode(message, payloads)])
            self.relayed += 1
            self.meshes[message.peer].relayed(name, frames)

        mesh = Mesh(key, name, SIGNER.public, control_send, data_address, handshake_seconds=0.5)
        self.keys[name], self.meshes[name] = key, await stack.enter_async_context(mesh)
        return name

    def entry(self, name: str) -> PeerEntry:
        return PeerEntry(name, self.keys[name].public, self.meshes[name].data_address)

    def lease(self, to: str, number: int, *entries: PeerEntry) -> None:
        self.meshes[to].apply_lease(sign_lease(SIGNER, PeerLeaseBody(number, to, entries)))

    def lease_all(self, *names: str) -> None:
        number = next(self.numbers)
        for name in names:
            self.lease(name, number, *[self.entry(other) for other in names])


@asynccontextmanager
async def cluster_of(*data_addresses: str) -> AsyncIterator[tuple[Cluster, list[str]]]:
    cluster = Cluster()
    async with asyncio.timeout(20), AsyncExitStack() as stack:
        names = [await cluster.add(stack, address) for address in data_addresses]
        cluster.lease_all(*names)
        yield cluster, names


@pytest.mark.parametrize("address", [BIND, ""], ids=["direct", "relay"])
async def test_messages_arrive_in_order_with_source_and_payload(address: str) -> None:
    async with cluster_of(address, address) as (cluster, [a, b]):

        async def send_all() -> None:
            for row in range(700):  # more than a window of lists, and more than the inbox
                await cluster.meshes[a].send(b, Gap(1, 1, row), [row.to_bytes(2, "big")])

        async with asyncio.TaskGroup() as group:
            group.create_task(send_all())
            for row in range(700):
                source, message, payloads = await cluster.meshes[b].receive()
                assert (source, message) == (a, Gap(1, 1, row))
                assert [bytes(payload) for payload in payloads] == [row.to_bytes(2, "big")]
        assert cluster.meshes[a].ways() == {b: "direct" if address else "relay"}
        assert (cluster.relayed == 0) == bool(address)


async def test_a_ring_turns_both_ways_and_to_oneself() -> None:
    async with cluster_of(BIND, "", BIND) as (cluster, names):
        for source in names:
            for target in names:
                await cluster.meshes[source].send(target, Gap(1, 1, 1))
                received = await cluster.meshes[target].receive()
                assert received == (source, Gap(1, 1, 1), [])


@pytest.mark.parametrize("address", [BIND, ""], ids=["direct", "relay"])
async def test_messages_can_be_taken_as_they_arrive(address: str) -> None:
    taken: list[tuple[str, Message, list[bytes]]] = []
    arrived = asyncio.Event()

    def take(source: str, message: Message, payloads: list[memoryview]) -> None:
        taken.append((source, message, [bytes(payload) for payload in payloads]))
        arrived.set()

    async with cluster_of(address, address) as (cluster, [a, b]):
        cluster.meshes[b]._on_message = take
        assert not cluster.meshes[a].try_send(b, Gap(1, 1, 1))  # no link yet: `send` makes it
        await cluster.meshes[a].send(b, Gap(1, 1, 1), [b"x"])
        await arrived.wait()
        assert cluster.meshes[a].try_send(b, Gap(1, 1, 2))
        arrived.clear()
        await arrived.wait()
        arrived.clear()
        await cluster.meshes[b].send(b, Gap(1, 1, 3))
        await arrived.wait()
        assert taken == [(a, Gap(1, 1, 1), [b"x"]), (a, Gap(1, 1, 2), []), (b, Gap(1, 1, 3), [])]
        assert not cluster.meshes[a].try_send("stranger", Gap(1, 1, 1))


async def test_an_address_that_cannot_be_dialled_is_relayed_for_the_whole_lease() -> None:
    async with cluster_of(BIND, BIND) as (cluster, [a, b]):
        good = cluster.entry(b)
        number = next(cluster.numbers)
        cluster.lease(a, number, replace(good, address="tcp://127.0.0.1:1"))
        await cluster.meshes[a].send(b, Gap(1, 1, 1))
        assert cluster.meshes[a].ways() == {b: "relay"}
        assert (await cluster.meshes[b].receive())[1] == Gap(1, 1, 1)
        cluster.lease_all(a, b)
        await cluster.meshes[a].send(b, Gap(1, 1, 2))
        assert cluster.meshes[a].ways() == {b: "direct"}
        assert (await cluster.meshes[b].receive())[1] == Gap(1, 1, 2)


async def test_a_stranger_at_the_peers_address_gets_nothing() -> None:
    async with cluster_of(BIND, BIND, BIND) as (cluster, [a, b, c]):
        number = next(cluster.numbers)
        cluster.lease(a, number, replace(cluster.entry(b), address=cluster.meshes[c].data_address))
        await cluster.meshes[a].send(b, Gap(1, 1, 1))
        assert cluster.meshes[a].ways() == {b: "relay"}
        assert (await cluster.meshes[b].receive())[0] == a


async def test_a_peer_that_gets_its_lease_a_moment_later_is_still_dialled_directly() -> None:
    async with cluster_of(BIND, BIND) as (cluster, [a, b]):
        cluster.lease(b, next(cluster.numbers))  # nobody
        number = next(cluster.numbers)
        cluster.lease(a, number, cluster.entry(b))
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(cluster.meshes[a].send(b, Gap(1, 1, 1)))
            await asyncio.sleep(0.05)  # the first handshake was refused
            assert not sending.done()
            cluster.lease(b, number, cluster.entry(a))
        assert cluster.meshes[a].ways() == {b: "direct"}


@pytest.mark.parametrize("address", [BIND, ""], ids=["direct", "relay"])
async def test_a_peer_left_out_of_a_lease_is_cut_at_once(address: str) -> None:
    async with cluster_of(address, address) as (cluster, [a, b]):
        await cluster.meshes[a].send(b, Gap(1, 1, 1))
        await cluster.meshes[b].receive()
        await cluster.meshes[a].send(b, Gap(1, 1, 2))  # arrives, and is not read
        cluster.lease(b, next(cluster.numbers))
        with pytest.raises(TrustError) as caught:
            await cluster.meshes[b].send(a, Gap(1, 1, 3))
        assert caught.value.code == "not_in_lease"
        if address:
            with pytest.raises((TransportError, TrustError)):
                await _send_until_refused(cluster.meshes[a], b)
        else:
            await cluster.meshes[a].send(
                b, Gap(1, 1, 4)
            )  # the relay is silent about a peer that may not read it
        await cluster.meshes[b].send(b, Gap(1, 1, 5))
        assert (await cluster.meshes[b].receive())[:2] == (b, Gap(1, 1, 5))


async def _send_until_refused(mesh: Mesh, peer: str) -> None:
    while True:
        await mesh.send(peer, Gap(1, 1, 4))
        await asyncio.sleep(0)


async def test_only_newer_leases_by_the_coordinator_count() -> None:
    async with cluster_of(BIND) as (cluster, [a]):
        with pytest.raises(TrustError):
            cluster.lease(a, 1)
        with pytest.raises(TrustError):
            cluster.meshes[a].apply_lease(sign_lease(SigningKey.generate(), PeerLeaseBody(9, a, ())))


async def test_somebody_outside_the_lease_can_neither_dial_nor_be_relayed() -> None:
    async with cluster_of(BIND, BIND) as (cluster, [a, b]):
        stranger = KeyPair.generate()
        with pytest.raises(TrustError):
            await zeromq.connect(cluster.meshes[a].data_address, stranger, cluster.keys[a].public)
        cluster.meshes[a].relayed(stranger.device_id, [memoryview(b">O")])
        cluster.meshes[a].relayed(stranger.device_id, [memoryview(b">D"), memoryview(b"x")])
        await cluster.meshes[b].send(a, Gap(1, 1, 1))
        assert (await cluster.meshes[a].receive())[0] == b


async def test_a_peer_that_speaks_nonsense_is_cut_and_the_mesh_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with cluster_of(BIND, BIND) as (cluster, [a, b]):
        link = await zeromq.connect(cluster.meshes[a].data_address, cluster.keys[b], cluster.keys[a].public)
        await link.send([b"nonsense"])
        with pytest.raises(ConnectionClosed):
            await link.receive()
        assert "cut the link to device" in caplog.text
        for frames in (
            [],
            [b""],
            [b">"],
            [b">X"],
            [b">D"],
            [b"<D", b"x"],
            [b"<W", b"1"],
            [b">O"],
            [b">X", b"x"],
        ):
            cluster.meshes[a].relayed(b, [memoryview(frame) for frame in frames])
        await cluster.meshes[b].send(a, Gap(1, 1, 1))
        assert (await cluster.meshes[a].receive())[:2] == (b, Gap(1, 1, 1))


async def test_a_restarted_peer_is_reached_again_through_the_relay() -> None:
    async with AsyncExitStack() as stack, cluster_of("", "") as (cluster, [a, b]):
        await cluster.meshes[a].send(b, Gap(1, 1, 1))
        await cluster.meshes[b].receive()
        await cluster.meshes[b].close()
        fresh = Mesh(cluster.keys[b], b, SIGNER.public, cluster.meshes[b]._relay._send, "")
        cluster.meshes[b] = await stack.enter_async_context(fresh)
        cluster.lease(b, next(cluster.numbers), cluster.entry(a))
        await cluster.meshes[a].send(
            b, Gap(1, 1, 2)
        )  # may be lost: the peer has no such connection, and says so
        async with asyncio.timeout(5):
            while fresh._inbox.empty():
                await cluster.meshes[a].send(b, Gap(1, 1, 3))
                await asyncio.sleep(0)
        assert (await fresh.receive())[0] == a


async def test_closing_wakes_a_waiting_receive() -> None:
    async with cluster_of(BIND) as (cluster, [a]):
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(_receive_until_closed(cluster.meshes[a]))
            await asyncio.sleep(0)
            await cluster.meshes[a].close()
        assert waiting.result() == "closed"


async def _receive_until_closed(mesh: Mesh) -> str:
    try:
        await mesh.receive()
    except ConnectionClosed:
        return "closed"
    return "received"
