"""One agent's connection, from its Hello to its end.

Knows: the greeting, link probes, slice requests, and when a peer breaks the protocol. Does not know: other devices,
plans, sessions: their messages go to the handler.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from coordinator.links.outbox import Outbox
from coordinator.slice_server import SliceServer
from edge_runtime.core import DEVICE_NAME_RULE, is_device_name
from edge_runtime.errors import EdgeRuntimeError, ProtocolError, TransportError, first_of
from edge_runtime.protocol.codec import decode, encode
from edge_runtime.protocol.messages import (
    PROTOCOL_VERSION,
    Hello,
    Message,
    Ping,
    Pong,
    Refused,
    SliceRequest,
    Welcome,
)
from edge_runtime.transport.base import Connection, Frame

log = logging.getLogger(__name__)

HELLO_SECONDS = 5.0
REFUSAL_SECONDS = 1.0
PROBE_SECONDS = 30.0
SMALL_REPLY_BYTES, LARGE_REPLY_BYTES = 8, 1 << 20
SMALL_PROBES = 9
BETWEEN_PROBES_SECONDS = (
    0.01  # rows come once in a while, to processes that sleep: back to back they are faster
)
MAX_SLICE_REQUESTS = 64  # waiting, of one device
SEEN_SECONDS = 0.5  # how often the handler hears that a device is alive


class LinkHandler(Protocol):
    """What a link tells. None of it may wait or raise anything but ProtocolError."""

    def now(self) -> float: ...
    def refusal(self, device_id: str, hello: Hello) -> Refused | None: ...
    def joined(self, device_id: str, connection: int, hello: Hello) -> None: ...
    def measured(
        self, device_id: str, connection: int, rtt_seconds: float, bytes_per_second: float
    ) -> None: ...
    def seen(self, device_id: str, connection: int) -> None: ...
    def received(
        self, device_id: str, connection: int, message: Message, payloads: Sequence[memoryview]
    ) -> None: ...
    def left(self, device_id: str, connection: int, reason: str) -> None: ...


class AgentLink:
    """`number` tells it from every other connection, of this device too."""

    def __init__(
        self,
        number: int,
        connection: Connection,
        handler: LinkHandler,
        slices: SliceServer,
        *,
        timeout_seconds: float,
    ) -> None:
        self.number = number
        self.device_id = connection.peer.device_id
        self._connection = connection
        self._handler = handler
        self._slices = slices
        self._timeout_seconds = timeout_seconds
        self._outbox = Outbox()
        self._slice_requests: asyncio.Queue[SliceRequest] = asyncio.Queue(MAX_SLICE_REQUESTS)
        self._pongs: dict[int, asyncio.Future[int]] = {}
        self._ended = asyncio.Event()
        self._seen_at = 0.0
        self._reason = ""

    # ------------------------------------------------------------ greeting

    async def greet(self) -> Hello | None:
        """Its Hello, answered with Welcome; None where it was refused (the connection is closed then)."""
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello, _ = decode(await self._connection.receive())
            if not isinstance(hello, Hello):
                raise ProtocolError(f"an agent's first message is Hello, not {type(hello).__name__}")
            refused = self._check(hello) or self._handler.refusal(self.device_id, hello)
            if refused is None:
                welcome = Welcome(self.device_id, self._timeout_seconds / 5, self._timeout_seconds)
                self._outbox.put(encode(welcome))
                return hello
        except TimeoutError:
            refused = Refused("protocol", f"no Hello came within {HELLO_SECONDS:g} s", "")
        except EdgeRuntimeError as error:
            refused = Refused(error.code, error.message, error.hint)
        await self._refuse(refused)
        return None

    def _check(self, hello: Hello) -> Refused | None:
        if hello.protocol_version != PROTOCOL_VERSION:
            return Refused(
                "protocol_version",
                f"this device speaks protocol {hello.protocol_version} (edge-runtime {hello.software_version[:40]}), "
                f"the coordinator speaks {PROTOCOL_VERSION}",
                "install the same edge-runtime version on both",
            )
        if not is_device_name(hello.device_name):
            return Refused("usage", DEVICE_NAME_RULE, "give the agent another --name")
        return None

    async def _refuse(self, refused: Refused) -> None:
        log.warning("device %s was refused: %s", self.device_id, refused.reason)
        try:
            async with asyncio.timeout(REFUSAL_SECONDS):
                await self._connection.send(encode(refused))
        except (TimeoutError, TransportError):
            pass  # it is going away in any case
        await self._connection.close()

    # ------------------------------------------------------------ life

    async def run(self) -> str:
        """Until the link ends; returns why. Never raises but for cancellation: an agent can't take us down."""
        parts = (
            self._outbox.drain(self._connection),
            self._read(),
            self._serve(),
            self._measure(),
            self._until_ended(),
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                for part in parts:
                    tasks.create_task(part)
        except* EdgeRuntimeError as problems:
            self._reason = self._reason or str(first_of(problems))
        except* Exception:
            log.exception("device %s was cut off: its link failed in an unforeseen way", self.device_id)
            self._reason = self._reason or "an internal error on its link"
        finally:
            await self._connection.close()
        return self._reason

    def post(self, message: Message, payloads: Sequence[Frame] = ()) -> None:
        if not self._outbox.put(encode(message, payloads)):
            self.end("it takes messages too slowly")

    def end(self, reason: str) -> None:
        """Does not wait: `run` returns soon."""
        self._reason = self._reason or reason
        self._ended.set()

    async def _until_ended(self) -> None:
        await self._ended.wait()
        raise TransportError(self._reason)

    async def _read(self) -> None:
        while True:
            message, payloads = decode(await self._connection.receive())
            self._notice()
            match message:
                case Pong():
                    self._ponged(message, payloads)
                case Ping():
                    self._pinged(message)
                case SliceRequest():
                    if self._slice_requests.full():
                        raise ProtocolError(f"it asks for more than {MAX_SLICE_REQUESTS} chunks at once")
                    self._slice_requests.put_nowait(message)
                case _:
                    self._handler.received(self.device_id, self.number, message, payloads)

    def _notice(self) -> None:
        now = self._handler.now()
        if now - self._seen_at >= SEEN_SECONDS:
            self._seen_at = now
            self._handler.seen(self.device_id, self.number)

    async def _serve(self) -> None:
        while True:
            chunk, data = await self._slices.answer(await self._slice_requests.get())
            self.post(chunk, [data])

    # ------------------------------------------------------------ probes

    async def _measure(self) -> None:
        """Round trip: the first quarter of a few small ones, since one of the two may just be starting. Bandwidth: what
        a large reply takes beyond that."""
        found = []
        for nonce in range(SMALL_PROBES):
            found.append(await self._ping(nonce, SMALL_REPLY_BYTES))
            await asyncio.sleep(BETWEEN_PROBES_SECONDS)
        rtt_seconds = sorted(found)[SMALL_PROBES // 4]
        large_seconds = await self._ping(SMALL_PROBES, LARGE_REPLY_BYTES)
        transfer_seconds = max(large_seconds - rtt_seconds, 1e-6)
        self._handler.measured(self.device_id, self.number, rtt_seconds, LARGE_REPLY_BYTES / transfer_seconds)

    async def _ping(self, nonce: int, reply_bytes: int) -> float:
        waiting = asyncio.get_running_loop().create_future()
        self._pongs[nonce] = waiting
        sent_at = self._handler.now()
        self.post(Ping(nonce, reply_bytes))
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                got_bytes = await waiting
        except TimeoutError:
            raise TransportError(f"it did not answer a ping within {PROBE_SECONDS:g} s") from None
        finally:
            del self._pongs[nonce]
        if got_bytes != reply_bytes:
            raise ProtocolError(f"it answered a ping with {got_bytes} bytes, not {reply_bytes}")
        return self._handler.now() - sent_at

    def _ponged(self, pong: Pong, payloads: Sequence[memoryview]) -> None:
        waiting = self._pongs.get(pong.nonce)
        if waiting is not None and not waiting.done():
            waiting.set_result(sum(payload.nbytes for payload in payloads))

    def _pinged(self, ping: Ping) -> None:
        if not 0 <= ping.reply_bytes <= LARGE_REPLY_BYTES:
            raise ProtocolError(f"it asks for a reply of {ping.reply_bytes} bytes to a ping")
        self.post(Pong(ping.nonce), [bytes(ping.reply_bytes)])
