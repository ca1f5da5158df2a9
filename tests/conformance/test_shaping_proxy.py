"""The bad link the other tests and benchmarks rely on is as bad as it says, and ours gets through it."""

from __future__ import annotations

import asyncio
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
    async with asyncio.timeout(20), ShapingProxy("127.0.0.1", port) as proxy:
        near = await zeromq.connect(proxy.address, DEVICE, SERVER.public)
        far = await listener.accept()
        yield proxy, near, far
        await near.close()
        await listener.close()


async def test_delay_and_rate_hold(links: Links) -> None:
    proxy, near, far = links
    await proxy.change(delay_seconds=0.05)
    started = time.perf_counter()
    await near.send([b"ping"])
    await far.receive()
    await far.send([b"pong"])
    await near.receive()
    assert 0.1 <= time.perf_counter() - started < 5.0
    await proxy.change(delay_seconds=0.0, bytes_per_second=1e6)
    started = time.perf_counter()
    await near.send([bytes(300_000)])
    await far.receive()
    assert 0.25 <= time.perf_counter() - started < 5.0


async def test_a_silent_link_goes_on_where_it_stopped(links: Links) -> None:
    proxy, near, far = links
    await proxy.change(silent=True)
    for number in range(100):
        await near.send([b"%d" % number])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await far.receive()
    await proxy.change(silent=False)
    assert [bytes((await far.receive())[0]) for _ in range(100)] == [b"%d" % number for number in range(100)]


async def test_a_cut_link_ends_on_both_sides(links: Links) -> None:
    proxy, near, far = links
    proxy.cut()
    for link in (near, far):
        with pytest.raises(ConnectionClosed):
            await link.receive()


async def test_a_shape_says_what_is_in_flight() -> None:
    assert Shape(delay_seconds=0.1, bytes_per_second=1e6).in_flight_bytes == (256 << 10) + 1e5
