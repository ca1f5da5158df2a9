"""Links of every kind; and every test here leaves no descriptor and no task behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from edge_runtime.transport import zeromq
from edge_runtime.transport.base import Connection
from edge_runtime.trust.admission import Admission
from edge_runtime.trust.identity import KeyPair
from tests.support.carriers import Carrier, Inproc, Network, Pair, Relayed, Websocket

SETTLE_SECONDS = 4.0  # libzmq closes sockets on a thread of its own, after lingering


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def _warm_up() -> None:
    """What a process opens once and keeps: the zmq context, its handler, pyzmq's collector of sent buffers."""
    key = KeyPair.generate()
    listener = await zeromq.listen("tcp://127.0.0.1:0", key, Admission([key.public]))
    link = await zeromq.connect(listener.address, key, key.public)
    await link.send([bytes(1 << 20)])
    await (await listener.accept()).receive()
    await link.close()
    await listener.close()


@pytest.fixture(autouse=True)
async def leaves_nothing_behind() -> AsyncIterator[None]:
    await _warm_up()
    await _settle(lambda: len(asyncio.all_tasks()) == 1, 1.0)
    descriptors = await _lowest_descriptors()
    yield
    await _settle(
        lambda: len(asyncio.all_tasks()) == 1 and _open_descriptors() <= descriptors, SETTLE_SECONDS
    )
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
    assert _open_descriptors() <= descriptors


async def _lowest_descriptors() -> int:
    """The count once the warm-up's sockets are closed: when it has not fallen for a moment."""
    lowest, since = _open_descriptors(), 0
    while since < 3:
        await asyncio.sleep(0.01)
        now = _open_descriptors()
        lowest, since = (now, 0) if now < lowest else (lowest, since + 1)
    return lowest


async def _settle(condition: Callable[[], bool], seconds: float) -> None:
    """Look often, for so long at most; the assertions say what is left then."""
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)


@pytest.fixture(params=[Inproc, Network, Websocket, Relayed], ids=["inproc", "zeromq", "websocket", "relay"])
async def carrier(request: pytest.FixtureRequest) -> AsyncIterator[Carrier]:
    carrier: Carrier = request.param()
    async with asyncio.timeout(30):
        yield carrier
        await carrier.close()


@pytest.fixture
async def links(carrier: Carrier) -> AsyncIterator[tuple[Connection, Connection]]:
    async with AsyncExitStack() as stack:
        yield await Pair(carrier, await carrier.listen()).open(stack)
