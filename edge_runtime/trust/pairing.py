"""How an unknown device becomes a registered one: `enroll` on the device, `EnrollmentServer` on the coordinator.

The server's key is in the join link, so the first contact is authenticated already; the token proves the invitation;
the CURVE handshake proves the device's key. The listener for this admits any key, and knows one message.

Knows: the exchange, its limits and refusals. Does not know: where tokens and devices are kept.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from edge_runtime.core import DEVICE_NAME_RULE, DeviceId, is_device_name
from edge_runtime.errors import ConnectionClosed, EdgeRuntimeError, ProtocolError, TransportError, TrustError
from edge_runtime.protocol import codec
from edge_runtime.protocol.messages import EnrollAccepted, EnrollRequest, Message, Refused
from edge_runtime.transport import zeromq
from edge_runtime.transport.base import Connection, Listener
from edge_runtime.trust.admission import AnyKey
from edge_runtime.trust.identity import KEY_BYTES, KeyPair
from edge_runtime.trust.tokens import JoinLink, new_token, token_hash

__all__ = [
    "EnrollmentServer",
    "JoinLink",
    "Pairing",
    "enroll",
    "listen_for_devices",
    "new_token",
    "token_hash",
]

log = logging.getLogger(__name__)

ENROLL_TIMEOUT_SECONDS = 10.0
ENROLL_LIMITS = zeromq.Limits(
    frame_bytes=64 << 10, window_bytes=64 << 10, unaccepted=32, connections_per_key=1
)

_FRESH_LINK = "get a fresh join link from the coordinator"
_REFUSALS = {
    "unknown": Refused("token_unknown", "this join token is not known to the coordinator", _FRESH_LINK),
    "used": Refused("token_used", "this join token was used already; each pairs one device", _FRESH_LINK),
    "expired": Refused("token_expired", "this join token has expired", _FRESH_LINK),
}
_TOO_MANY = Refused(
    "too_many_attempts", "there were too many attempts to pair", "wait a minute and try again"
)
_NOT_NOW = Refused(
    "enrollment_failed", "the coordinator could not register the device", "see the coordinator's log"
)
_BAD_NAME = Refused(
    "bad_device_name",
    DEVICE_NAME_RULE,
    "choose another name",
)
_BAD_REQUEST = Refused(
    "bad_request", "this port takes pairing requests only", "dial the coordinator's main port"
)

Spend = Callable[[str], Awaitable[str]]
Register = Callable[[DeviceId, str, bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Pairing:
    """What a device keeps of having been paired."""

    device_id: DeviceId
    coordinator_address: str
    server_key: bytes  # CURVE: the only peer the device will talk to at that address
    signing_key: bytes  # Ed25519: whose peer leases and bundles it believes


async def enroll(link: JoinLink, key: KeyPair, device_name: str) -> Pairing:
    """Register this device's key with the coordinator the link names. Raises TrustError with the reason it refused."""
    connection = await zeromq.connect(
        link.enroll_address, key, link.server_key, timeout_seconds=ENROLL_TIMEOUT_SECONDS
    )
    try:
        async with asyncio.timeout(ENROLL_TIMEOUT_SECONDS):
            await connection.send(codec.encode(EnrollRequest(link.token, device_name)))
            answer, _payloads = codec.decode(await connection.receive())
    except (TimeoutError, ConnectionClosed) as error:
        raise TransportError(
            "the coordinator did not answer the pairing request",
            hint="see the coordinator's log, then try again",
        ) from error
    finally:
        await connection.close()
    return _pairing(link, key, answer)


def _pairing(link: JoinLink, key: KeyPair, answer: Message) -> Pairing:
    if isinstance(answer, Refused):
        raise TrustError(answer.reason, hint=answer.hint, code=answer.code)
    if not isinstance(answer, EnrollAccepted):
        raise ProtocolError(f"{type(answer).__name__} is no answer to a pairing request")
    if answer.device_id != key.device_id or len(answer.signing_key) != KEY_BYTES:
        raise TrustError("the coordinator registered another key than this device's", hint=_FRESH_LINK)
    # The link's own host is known to reach the coordinator from here; its idea of its address may not be.
    return Pairing(key.device_id, link.address, link.server_key, answer.signing_key)


async def listen_for_devices(address: str, key: KeyPair) -> zeromq.ZeromqListener:
    """The enrolment listener: any key, small messages, few connections."""
    return await zeromq.listen(address, key, AnyKey(), name="enroll", limits=ENROLL_LIMITS)


class AttemptLimiter:
    """At most `attempts` per key within `seconds`. Keeps the latest few thousand keys only."""

    def __init__(self, attempts: int, seconds: float, max_keys: int = 4096) -> None:
        self._attempts = attempts
        self._seconds = seconds
        self._max_keys = max_keys
        self._seen: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def allow(self, key: str, now: float) -> bool:
        started, count = self._seen.pop(key, (now, 0))
        if now - started >= self._seconds:
            started, count = now, 0
        self._seen[key] = (started, count + 1)
        while len(self._seen) > self._max_keys:
            self._seen.popitem(last=False)
        return count < self._attempts


class EnrollmentServer:
    """Answers pairing requests on `listener` while `serve` runs.

    `spend(token_hash)` marks a token used and says "ok", or why not: "unknown", "used", "expired". `register(device_id,
    name, public_key)` must be durable when it returns: only then the device hears that it is accepted.
    """

    def __init__(
        self,
        listener: Listener,
        spend: Spend,
        register: Register,
        *,
        coordinator_address: str,
        signing_public_key: bytes,
        clock: Callable[[], float] = time.monotonic,
        attempts_per_address: int = 30,
        attempts_per_token: int = 5,
    ) -> None:
        self._listener = listener
        self._spend = spend
        self._register = register
        self._coordinator_address = coordinator_address
        self._signing_public_key = signing_public_key
        self._clock = clock
        self._by_address = AttemptLimiter(attempts_per_address, 60.0)
        self._by_token = AttemptLimiter(attempts_per_token, 600.0)

    async def serve(self) -> None:
        """Until the listener is closed."""
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    connection = await self._listener.accept()
                except ConnectionClosed:
                    return
                group.create_task(self._serve_one(connection))

    async def _serve_one(self, connection: Connection) -> None:
        try:
            async with asyncio.timeout(ENROLL_TIMEOUT_SECONDS):
                answer = await self._answer(connection)
                await connection.send(codec.encode(answer))
                await connection.receive()  # the device hangs up when it has read the answer
        except (TimeoutError, EdgeRuntimeError):
            pass  # it left, or it never said anything: nothing was registered, or it can ask again
        finally:
            await connection.close()

    async def _answer(self, connection: Connection) -> EnrollAccepted | Refused:
        device_id = connection.peer.device_id
        remote = str(getattr(connection, "remote", "")).rpartition(":")[0]
        answer: EnrollAccepted | Refused
        if not self._by_address.allow(remote, self._clock()):
            answer = _TOO_MANY
        else:
            answer = await self._decide(connection, await connection.receive())
        if isinstance(answer, Refused):
            log.warning("refused to pair device %s from %s: %s", device_id, remote or "here", answer.reason)
        else:
            log.info("paired device %s from %s", device_id, remote or "here")
        return answer

    async def _decide(self, connection: Connection, frames: list[memoryview]) -> EnrollAccepted | Refused:
        try:
            request, _payloads = codec.decode(frames)
        except ProtocolError as error:
            return Refused(error.code, error.message, error.hint)
        if not isinstance(request, EnrollRequest):
            return _BAD_REQUEST
        if not is_device_name(request.device_name):
            return _BAD_NAME
        hashed = token_hash(request.token)
        if not self._by_token.allow(hashed, self._clock()):
            return _TOO_MANY
        return await self._spend_and_register(connection, hashed, request.device_name)

    async def _spend_and_register(
        self, connection: Connection, hashed: str, name: str
    ) -> EnrollAccepted | Refused:
        peer = connection.peer
        try:
            outcome = await self._spend(hashed)
            if outcome != "ok":
                return _REFUSALS.get(
                    outcome, Refused(f"token_{outcome}", f"the join token is {outcome}", _FRESH_LINK)
                )
            await self._register(DeviceId(peer.device_id), name, peer.public_key)
        except EdgeRuntimeError as error:
            return Refused(error.code, error.message, error.hint)
        except Exception:
            # A full disk at the registry must not end the listener for everybody else.
            log.exception("could not register device %s", peer.device_id)
            return _NOT_NOW
        return EnrollAccepted(peer.device_id, self._coordinator_address, self._signing_public_key)
