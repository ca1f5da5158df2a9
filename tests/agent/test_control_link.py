"""The link to the coordinator, over in-process connections: greeting, silence, refusals, dialling again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from random import Random

import pytest

from edge_runtime.agent.backoff import Backoff
from edge_runtime.agent.control_link import ControlLink
from edge_runtime.errors import ConnectionClosed, EdgeRuntimeError, TransportError, TrustError, VersionError
from edge_runtime.protocol.codec import decode, encode
from edge_runtime.protocol.messages import (
    PROTOCOL_VERSION,
    Heartbeat,
    Hello,
    Message,
    Ping,
    Pong,
    Refused,
    UnloadStage,
    Welcome,
)
from edge_runtime.transport import inproc
from edge_runtime.transport.base import Connection
from edge_runtime.trust.admission import Admission
from edge_runtime.trust.identity import KeyPair

HELLO = Hello(PROTOCOL_VERSION, "0", "phone", "boot", "", 1, 1, 0)
WELCOME = Welcome("id", 5.0, 30.0)


class Agent:
    """What the link tells, written down."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[object] = asyncio.Queue()

    def connected(self, welcome: Welcome) -> None:
        self.told.put_nowait(welcome)

    def received(self, message: Message, payloads: Sequence[memoryview]) -> None:
        self.told.put_nowait(message)

    def disconnected(self, reason: str) -> None:
        self.told.put_nowait(("disconnected", reason))

    async def next(self) -> object:
        async with asyncio.timeout(10):
            return await self.told.get()


class Bench:
    def __init__(self, listener: inproc.InprocListener, key: KeyPair) -> None:
        self.listener = listener
        self.agent = Agent()
        self.failing_dials = 0
        self.dials = 0

        async def dial() -> Connection:
            self.dials += 1
            if self.dials <= self.failing_dials:
                raise TransportError("nobody listens")
            return await inproc.connect(listener.address, key, listener.key.public)

        def heartbeat(sequence: int) -> Heartbeat:
            return Heartbeat(sequence, 0, 0, 0, 0)

        backoff = Backoff(Random(0), first=1e-4, most=1e-3)
        self.link = ControlLink(dial, HELLO, heartbeat, self.agent, backoff)

    async def accept(self, answer: Message = WELCOME) -> Connection:
        """The coordinator's side: takes Hello, answers, and reads the first heartbeat of a welcome."""
        async with asyncio.timeout(10):
            connection = await self.listener.accept()
            assert decode(await connection.receive())[0] == HELLO
            await connection.send(encode(answer))
            if isinstance(answer, Welcome):
                assert decode(await connection.receive())[0] == Heartbeat(1, 0, 0, 0, 0)
        return connection


@asynccontextmanager
async def bench(*, runs: bool = True) -> AsyncIterator[Bench]:
    agent_key, server_key = KeyPair.generate(), KeyPair.generate()
    listener = await inproc.listen("inproc://", server_key, Admission([agent_key.public]))
    made = Bench(listener, agent_key)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(made.link.run()) if runs else None
        try:
            yield made
        finally:
            if running is not None:
                running.cancel()
            await listener.close()


async def test_it_greets_and_passes_messages_both_ways() -> None:
    async with bench() as made:
        connection = await made.accept()
        assert await made.agent.next() == WELCOME
        assert made.link.is_up
        await connection.send(encode(UnloadStage(3)))
        assert await made.agent.next() == UnloadStage(3)
        made.link.post(UnloadStage(4))
        assert decode(await connection.receive())[0] == UnloadStage(4)
        await made.link.send(UnloadStage(5))
        assert decode(await connection.receive())[0] == UnloadStage(5)


async def test_pings_are_answered_with_as_many_bytes_as_asked_for() -> None:
    async with bench() as made:
        connection = await made.accept()
        await connection.send(encode(Ping(7, 1000)))
        message, (payload,) = decode(await connection.receive())
        assert message == Pong(7)
        assert len(payload) == 1000


async def test_it_dials_until_somebody_is_there() -> None:
    async with bench(runs=False) as made:
        made.failing_dials = 5
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(made.link.run())
            await made.accept()
            assert made.dials == 6
            task.cancel()


async def test_a_link_that_breaks_is_made_anew() -> None:
    async with bench() as made:
        connection = await made.accept()
        assert await made.agent.next() == WELCOME
        await connection.close()
        gone = await made.agent.next()
        assert isinstance(gone, tuple)
        assert "broke" in gone[1]
        await made.accept()
        assert await made.agent.next() == WELCOME


async def test_without_a_link_posts_are_dropped_and_sends_are_refused() -> None:
    async with bench(runs=False) as made:
        made.link.post(UnloadStage(1))
        with pytest.raises(ConnectionClosed):
            await made.link.send(UnloadStage(1))


async def test_a_quiet_coordinator_is_asked_and_a_dead_one_is_given_up() -> None:
    async with bench() as made:
        connection = await made.accept(Welcome("id", 0.03, 0.09))
        assert isinstance(await made.agent.next(), Welcome)
        async with asyncio.timeout(10):
            while not isinstance(message := decode(await connection.receive())[0], Ping):
                assert isinstance(message, Heartbeat)
        gone = await made.agent.next()  # nobody answered
        assert isinstance(gone, tuple)
        assert "nothing was heard" in gone[1]


async def test_nonsense_from_the_coordinator_ends_the_connection_not_the_agent() -> None:
    async with bench() as made:
        connection = await made.accept()
        assert await made.agent.next() == WELCOME
        await connection.send([b"\xc1"])
        assert isinstance(await made.agent.next(), tuple)
        await made.accept()


@pytest.mark.parametrize("answer", [UnloadStage(1), Welcome("id", 0.0, 1.0), Welcome("id", 2.0, 1.0)])
async def test_a_greeting_that_makes_no_sense_is_tried_again(answer: Message) -> None:
    async with bench() as made:
        connection = await made.listener.accept()
        await connection.receive()
        await connection.send(encode(answer))
        await made.accept()
        assert await made.agent.next() == WELCOME


@pytest.mark.parametrize(
    ("code", "kind"),
    [("protocol_version", VersionError), ("revoked", TrustError), ("not_trusted", TrustError)],
)
async def test_final_refusals_end_the_link_with_their_reason(code: str, kind: type[EdgeRuntimeError]) -> None:
    async with bench(runs=False) as made, asyncio.TaskGroup() as tasks:
        coordinator = tasks.create_task(made.accept(Refused(code, "because", "do this")))
        with pytest.raises(kind, match="because") as caught:
            await made.link.run()
        assert caught.value.hint == "do this"
        await coordinator


async def test_a_refusal_in_the_middle_ends_the_link() -> None:
    async with bench(runs=False) as made, asyncio.TaskGroup() as tasks:

        async def revoke() -> None:
            connection = await made.accept()
            await connection.send(encode(Refused("revoked", "because", "do this")))

        tasks.create_task(revoke())
        with pytest.raises(TrustError, match="because"):
            await made.link.run()


async def test_other_refusals_are_tried_again() -> None:
    async with bench() as made:
        await made.accept(Refused("protocol", "no Hello came in time", ""))
        await made.accept()
        assert await made.agent.next() == WELCOME
