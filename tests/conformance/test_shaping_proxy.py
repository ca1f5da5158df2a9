"""The bad link the other tests and benchmarks rely on is as bad as it says, and ours gets through it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator

import pytest

from benchmarks.shaping_proxy import Shape, ShapingProxy
from edge_runtime.errors import ConnectionClosed
from edge_runtime.transport import zeromq
from edge_runtime.transport.base import Connection
from edge_runtime.trust.admission import Admission
from edge_runtime.trust.identity import KeyPair

SERVER, DEVICE = KeyPair.generate(), KeyPair.generate()
Links = tuple[ShapingProxy, Connection, Connection]


@pytest.fixture
async def links() -> AsyncIterator[Links]:
    listener = await zeromq.listen("tcp://127.0.0.1:0", SERVER, Admission([DEVICE.public]))
    port = int(listener.address.rpartition(":")[2])
    with ShapingProxy("127.0.0.1", port) as proxy:
        async with asyncio.timeout(20):
            near = await zeromq.connect(proxy.address, DEVICE, SERVER.public)
            far = await listener.accept()
            yield proxy, near, far
            await near.close()
            await listener.close()


async def test_delay_and_rate_hold(links: Links) -> None:
    proxy, near, far = links
    proxy.change(delay_seconds=0.05)
    started = time.perf_counter()
    await near.send([b"ping"])
    await far.receive()
    await far.send([b"pong"])
    await near.receive()
    assert 0.1 <= time.perf_counter() - started < 5.0
    proxy.change(delay_seconds=0.0, bytes_per_second=1e6)
    started = time.perf_counter()
    await near.send([bytes(300_000)])
    await far.receive()
    assert 0.25 <= time.perf_counter() - started < 5.0


async def test_a_silent_link_goes_on_where_it_stopped(links: Links) -> None:
    proxy, near, far = links
    proxy.change(silent=True)
    for number in range(100):
        await near.send([b"%d" % number])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await far.receive()
    proxy.change(silent=False)
    assert [bytes((await far.receive())[0]) for _ in range(100)] == [b"%d" % number for number in range(100)]


async def test_a_cut_link_ends_on_both_sides(links: Links) -> None:
    proxy, near, far = links
    proxy.cut()
    for link in (near, far):
        with pytest.raises(ConnectionClosed):
            await link.receive()


def test_what_it_adds_beyond_its_delay_is_small() -> None:
    """The least of many: whoever else works on this machine is not the proxy's doing."""
    with (
        socket.create_server(("127.0.0.1", 0)) as far,
        ShapingProxy("127.0.0.1", far.getsockname()[1], Shape(delay_seconds=0.005)) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port)) as near,
        far.accept()[0] as answers,
    ):
        assert 0.010 <= min(_round_trip_seconds(near, answers) for _ in range(40)) < 0.0112


def _round_trip_seconds(near: socket.socket, far: socket.socket) -> float:
    started = time.perf_counter()
    for sender, receiver in ((near, far), (far, near)):
        sender.sendall(b"ping")
        assert receiver.recv(16) == b"ping"
    return time.perf_counter() - started


def test_threads_and_sockets_end_with_it() -> None:
    before = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as far:
        with ShapingProxy("127.0.0.1", far.getsockname()[1]) as proxy:
            near = socket.create_connection(("127.0.0.1", proxy.port))
            answers, _ = far.accept()
            assert threading.active_count() > before
        with near, answers:
            assert near.recv(1) == answers.recv(1) == b""
    assert threading.active_count() == before


async def test_a_shape_says_what_is_in_flight() -> None:
    assert Shape(delay_seconds=0.1, bytes_per_second=1e6).in_flight_bytes == (256 << 10) + 1e5
