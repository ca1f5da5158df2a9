"""The link to the coordinator: dialled, greeted, kept alive, and dialled again for ever.

Knows: Hello and Welcome, heartbeats, silence, refusals and which of them are final. Does not know: plans, sessions,
slices: whatever else arrives goes to the handler.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn, Protocol

from edge_runtime.agent.backoff import Backoff
from edge_runtime.errors import (
    ConnectionClosed,
    EdgeRuntimeError,
    ProtocolError,
    TransportError,
    TrustError,
    VersionError,
)
from edge_runtime.protocol.codec import decode, encode
from edge_runtime.protocol.messages import Heartbeat, Hello, Message, Ping, Pong, Refused, Welcome
from edge_runtime.transport.base import Connection, Frame

log = logging.getLogger(__name__)

GREETING_SECONDS = 10.0
SEND_SECONDS = 60.0
MAX_PONG_BYTES = 1 << 20
MAX_HEARTBEAT_SECONDS = 60.0
# Waiting does not cure these: a person has to do something.
FINAL_REFUSALS = frozenset({"not_admitted", "not_trusted", "revoked", "protocol_version", "usage"})


class ControlHandler(Protocol):
    """What the link tells. None of it may wait."""

    def connected(self, welcome: Welcome) -> None: ...
    def received(self, message: Message, payloads: Sequence[memoryview]) -> None: ...
    def disconnected(self, reason: str) -> None:
        """`reason` "": this side ended it."""
        ...


class ControlLink:
    def __init__(
        self,
        dial: Callable[[], Awaitable[Connection]],
        hello: Hello,
        heartbeat: Callable[[int], Heartbeat],
        handler: ControlHandler,
        backoff: Backoff,
    ) -> None:
        """`dial` makes one try; `heartbeat` is given its sequence number."""
        self._dial = dial
        self._hello = hello
        self._heartbeat = heartbeat
        self._handler = handler
        self._backoff = backoff
        self._connection: Connection | None = None
        self._outbox: asyncio.Queue[tuple[Message, Sequence[Frame]]] = asyncio.Queue()
        self._heard_at = 0.0

    @property
    def is_up(self) -> bool:
        return self._connection is not None

    def post(self, message: Message, payloads: Sequence[Frame] = ()) -> None:
        """Send soon, in order. Without a link it is dropped: whatever plan it is about is over then."""
        if self._connection is not None:
            self._outbox.put_nowait((message, payloads))

    async def send(self, message: Message, payloads: Sequence[Frame] = ()) -> None:
        """Send now, as fast as the coordinator reads. Raises ConnectionClosed, TransportError."""
        if self._connection is None:
            raise ConnectionClosed("there is no link to the coordinator")
        await _send(self._connection, message, payloads)

    async def run(self) -> NoReturn:
        """For ever. Raises TrustError or VersionError where a refusal is final."""
        while True:
            try:
                await self._once()
            except EdgeRuntimeError as problem:
                if problem.code in FINAL_REFUSALS:
                    log.error(
                        "the coordinator refuses this device: %s hint: %s", problem.message, problem.hint
                    )
                    raise
                seconds = self._backoff.next_seconds()
                log.warning("no link to the coordinator: %s; next try in %.1f s", problem.message, seconds)
                await asyncio.sleep(seconds)

    async def _once(self) -> None:
        connection = await self._dial()
        reason = ""
        try:
            welcome = await self._greet(connection)
            self._backoff.reset()
            self._connection = connection
            self._outbox = asyncio.Queue()
            self._handler.connected(welcome)
            await self._serve(connection, welcome)
        except EdgeRuntimeError as problem:
            reason = f"the link to the coordinator broke: {problem.message}"
            raise
        finally:
            if self._connection is not None:
                self._connection = None
                self._handler.disconnected(reason)
            await connection.close()

    async def _greet(self, connection: Connection) -> Welcome:
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                await connection.send(encode(self._hello))
                answer, _ = decode(await connection.receive())
        except TimeoutError:
            raise TransportError(f"the coordinator did not answer within {GREETING_SECONDS:g} s") from None
        if isinstance(answer, Refused):
            raise _refusal(answer)
        if not isinstance(answer, Welcome):
            raise ProtocolError(f"the coordinator answers Hello with Welcome, not {type(answer).__name__}")
        if not 0 < answer.heartbeat_seconds <= answer.timeout_seconds <= MAX_HEARTBEAT_SECONDS * 60:
            raise ProtocolError("the coordinator's heartbeat makes no sense")
        return answer

    async def _serve(self, connection: Connection, welcome: Welcome) -> None:
        parts = (
            self._read(connection),
            self._write(connection),
            self._beat(connection, welcome.heartbeat_seconds),
            self._listen_for_silence(connection, welcome.timeout_seconds),
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                for part in parts:
                    tasks.create_task(part)
        except* EdgeRuntimeError as problems:
            raise _first(problems) from None

    async def _read(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        while True:
            message, payloads = decode(await connection.receive())
            self._heard_at = loop.time()
            if isinstance(message, Ping):
                if not 0 <= message.reply_bytes <= MAX_PONG_BYTES:
                    raise ProtocolError(f"the coordinator asks for a reply of {message.reply_bytes} bytes")
                self.post(Pong(message.nonce), [bytes(message.reply_bytes)])
            elif isinstance(message, Refused) and message.code in FINAL_REFUSALS:
                raise _refusal(message)
            elif not isinstance(message, Pong):
                self._handler.received(message, payloads)

    async def _write(self, connection: Connection) -> None:
        while True:
            await _send(connection, *await self._outbox.get())

    async def _beat(self, connection: Connection, every_seconds: float) -> None:
        sequence = 0
        while True:
            sequence += 1
            await _send(connection, self._heartbeat(sequence), ())
            await asyncio.sleep(every_seconds)

    async def _listen_for_silence(self, connection: Connection, timeout_seconds: float) -> None:
        """A coordinator that has nothing to say is asked whether it is there."""
        loop = asyncio.get_running_loop()
        nonce = 0
        while True:
            await asyncio.sleep(timeout_seconds / 3)
            silence_seconds = loop.time() - self._heard_at
            if silence_seconds > timeout_seconds:
                raise TransportError(f"nothing was heard of the coordinator for {silence_seconds:.1f} s")
            if silence_seconds > timeout_seconds / 4:
                nonce += 1
                await _send(connection, Ping(nonce, 8), ())


async def _send(connection: Connection, message: Message, payloads: Sequence[Frame]) -> None:
    try:
        async with asyncio.timeout(SEND_SECONDS):
            await connection.send(encode(message, payloads))
    except TimeoutError:
        raise TransportError(f"the coordinator took no message for {SEND_SECONDS:g} s") from None


def _refusal(refused: Refused) -> EdgeRuntimeError:
    kind = VersionError if refused.code == "protocol_version" else TrustError
    return kind(refused.reason, hint=refused.hint, code=refused.code)


def _first(problems: BaseExceptionGroup[EdgeRuntimeError]) -> EdgeRuntimeError:
    """A final refusal if there is one among them: it is the reason for the others."""
    flat = list(_flatten(problems))
    return next((problem for problem in flat if problem.code in FINAL_REFUSALS), flat[0])


def _flatten(problems: BaseExceptionGroup[EdgeRuntimeError]) -> list[EdgeRuntimeError]:
    found: list[EdgeRuntimeError] = []
    for problem in problems.exceptions:
        found.extend(_flatten(problem) if isinstance(problem, BaseExceptionGroup) else [problem])
    return found
