"""The least coordinator an agent can be tested against: real keys, real pairing, real links, scripted plans."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from coordinator.slice_server import SliceServer
from edge_runtime.agent.step_messages import parts
from edge_runtime.bundle import Bundle
from edge_runtime.core import SamplingParams, Token
from edge_runtime.engine.page_table import PAGE_TOKENS
from edge_runtime.errors import ConnectionClosed
from edge_runtime.experts.peer_shares import pack_experts
from edge_runtime.protocol.codec import decode, encode
from edge_runtime.protocol.expert_messages import ExpertShare
from edge_runtime.protocol.messages import (
    HOLDS_EXPERTS,
    NOBODY_ASKS,
    PAGE_NAME_BYTES,
    CloseSession,
    Feed,
    Heartbeat,
    Hello,
    LoadStage,
    Message,
    OpenSession,
    PeerEntry,
    PeerLeaseBody,
    Ping,
    Pong,
    Refused,
    Relay,
    SessionFailed,
    SliceRequest,
    StageFailed,
    StageProgress,
    StageReady,
    Tokens,
    Welcome,
)
from edge_runtime.transport import zeromq
from edge_runtime.transport.base import Connection
from edge_runtime.trust.admission import Admission
from edge_runtime.trust.identity import KeyPair, SigningKey
from edge_runtime.trust.lease import sign_lease
from edge_runtime.trust.pairing import EnrollmentServer, JoinLink, listen_for_devices, new_token

SECONDS = 60.0


@dataclass
class Link:
    """A device that is connected. `inbox` has everything it said but what the mini coordinator answers itself."""

    connection: Connection
    hello: Hello
    inbox: asyncio.Queue[tuple[Message, list[memoryview]]] = field(default_factory=asyncio.Queue)
    beats: asyncio.Queue[Heartbeat] = field(default_factory=asyncio.Queue)

    async def send(self, message: Message) -> None:
        await self.connection.send(encode(message))

    async def expect(self, *kinds: type[Message]) -> tuple[Message, list[memoryview]]:
        """The next message of one of `kinds`; progress is skipped, anything else is a failure."""
        async with asyncio.timeout(SECONDS):
            while True:
                message, payloads = await self.inbox.get()
                if isinstance(message, kinds):
                    return message, payloads
                assert isinstance(message, StageProgress), f"wanted {kinds}, got {message}"

    async def beat(self, is_wanted: Callable[[Heartbeat], bool]) -> Heartbeat:
        """The next heartbeat that is wanted."""
        async with asyncio.timeout(SECONDS):
            while True:
                heartbeat = await self.beats.get()
                if is_wanted(heartbeat):
                    return heartbeat

    async def expect_tokens(self, session: int, count: int) -> list[Token]:
        """At least `count` tokens of `session`."""
        found: list[Token] = []
        while len(found) < count:
            message, _ = await self.expect(Tokens)
            assert isinstance(message, Tokens)
            assert message.session == session
            found.extend(message.tokens)
        return found

    async def ready(self, lease: int) -> StageReady:
        """Its answer to a plan, past whatever it still says about the plan before."""
        while True:
            message, _ = await self.expect(StageReady, StageFailed, Tokens, SessionFailed)
            if isinstance(message, StageReady | StageFailed) and message.lease == lease:
                assert isinstance(message, StageReady), message
                return message


class MiniCoordinator:
    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.key = KeyPair.generate()
        self.signing = SigningKey.generate()
        self.admission = Admission()
        self.links: dict[str, Link] = {}  # by device name
        self.keys: dict[str, bytes] = {}  # of paired devices, by device id
        self.invitations: set[str] = set()
        self.joined = asyncio.Event()
        self.refuse: Callable[[Hello], Refused | None] = lambda hello: None
        self.tamper: Callable[[str, bytes], bytes] = lambda name, data: data
        self.relayed = 0
        self.numbers = iter(range(1, 10_000))
        self._slices = SliceServer(bundle, self.signing.secret)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[MiniCoordinator]:
        self.listener = await zeromq.listen("tcp://127.0.0.1:0", self.key, self.admission)
        enroll = await listen_for_devices("tcp://127.0.0.1:0", self.key)
        server = EnrollmentServer(
            enroll,
            self._spend,
            self._register,
            coordinator_address=self.listener.address,
            signing_public_key=self.signing.public,
        )
        self._ports = [int(address.rpartition(":")[2]) for address in (self.listener.address, enroll.address)]
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(server.serve()), tasks.create_task(self._accept(tasks))]
            try:
                yield self
            finally:
                await self.listener.close()
                await enroll.close()
                for task in running:
                    task.cancel()

    def join_link(self) -> str:
        token = new_token()
        self.invitations.add(token)
        return str(JoinLink("127.0.0.1", self._ports[0], self._ports[1], self.key.public, token))

    async def _spend(self, hashed: str) -> str:
        return "ok" if self.invitations else "unknown"

    async def _register(self, device_id: str, name: str, public_key: bytes) -> None:
        self.admission.allow(public_key)
        self.keys[device_id] = public_key

    async def _accept(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            try:
                connection = await self.listener.accept()
            except ConnectionClosed:
                return
            tasks.create_task(self._serve(connection))

    async def _serve(self, connection: Connection) -> None:
        try:
            hello, _ = decode(await connection.receive())
            assert isinstance(hello, Hello)
            refused = self.refuse(hello)
            if refused is not None:
                await connection.send(encode(refused))
                return
            await connection.send(encode(Welcome(connection.peer.device_id, 0.2, 2.0)))
            link = self.links[hello.device_name] = Link(connection, hello)
            self._announce()
            while True:
                await self._on_message(link, *decode(await connection.receive()))
        except ConnectionClosed:
            return
        finally:
            await connection.close()

    def _announce(self) -> None:
        self.joined.set()
        self.joined = asyncio.Event()

    async def _on_message(self, link: Link, message: Message, payloads: list[memoryview]) -> None:
        match message:
            case SliceRequest():
                chunk, data = await self._slices.answer(message)
                await link.connection.send(encode(chunk, [self.tamper(message.slice, data)]))
            case Heartbeat():
                link.beats.put_nowait(message)
            case Ping():
                await link.connection.send(encode(Pong(message.nonce), [bytes(message.reply_bytes)]))
            case Relay():
                self.relayed += 1
                target = next(x for x in self.links.values() if x.connection.peer.device_id == message.peer)
                relay = Relay(link.connection.peer.device_id, message.lease)
                await target.connection.send(encode(relay, payloads))
            case _:
                for each in parts(message):
                    link.inbox.put_nowait((each, payloads))

    # ------------------------------------------------------------ what a test scripts

    async def wait_for(self, *names: str) -> None:
        async with asyncio.timeout(SECONDS):
            while not set(names) <= self.links.keys():
                await self.joined.wait()

    def device(self, name: str) -> str:
        return self.links[name].connection.peer.device_id

    async def load(
        self, names: Sequence[str], edges: Sequence[int], chunk: int = 4, wire: str = "fp32"
    ) -> int:
        """A plan over `names`, cut before the layers `edges`; sent, not waited for. Returns its lease."""
        lease = next(self.numbers)
        devices = tuple(self.device(name) for name in names)
        bounds = [0, *edges, self.bundle.manifest.num_layers]
        for stage, name in enumerate(names):
            link = self.links[name]
            peers = tuple(
                PeerEntry(
                    self.device(other), self.keys[self.device(other)], self.links[other].hello.data_address
                )
                for other in names
                if other != name
            )
            await link.send(sign_lease(self.signing, PeerLeaseBody(lease, self.device(name), peers)))
            first, last = bounds[stage], bounds[stage + 1] - 1
            await link.send(
                LoadStage(lease, str(self.bundle.digest), stage, devices, first, last, chunk, wire)
            )
        return lease

    async def load_shared(
        self,
        names: Sequence[str],
        places: Sequence[Sequence[int]],
        chunk: int = 4,
        tamper: bytes = b"",
        *,
        on_flash: bool = False,
    ) -> int:
        """All layers on the first of `names`; places[layer][expert] is who holds that expert. Returns the lease.

        `on_flash`: the first one has all of them there, too.
        """
        lease = next(self.numbers)
        devices = [self.device(name) for name in names]
        shares = tuple(
            ExpertShare(
                device, layer, tamper or pack_experts([e for e, p in enumerate(of) if p == n], len(of))
            )
            for layer, of in enumerate(places)
            for n, device in enumerate(devices)
        )
        for number, name in reversed(list(enumerate(names))):
            link = self.links[name]
            peers = tuple(
                PeerEntry(self.device(o), self.keys[self.device(o)], self.links[o].hello.data_address)
                for o in names
                if o != name
            )
            await link.send(sign_lease(self.signing, PeerLeaseBody(lease, self.device(name), peers)))
            stage = HOLDS_EXPERTS if number else 0
            last = self.bundle.manifest.num_layers - 1
            order = LoadStage(
                lease,
                str(self.bundle.digest),
                stage,
                (devices[0],),
                0,
                last,
                chunk,
                shares=shares,
                experts_on_flash=on_flash,
            )
            await link.send(order)
        return lease

    async def open(
        self,
        names: Sequence[str],
        lease: int,
        ids: Sequence[int],
        max_rows: int,
        *,
        sampling: SamplingParams | None = None,
        tail: str = "sampler",
        prompt_rows: int | None = None,
        page_names: bytes = b"",
    ) -> int:
        session = next(self.numbers)
        opening = OpenSession(
            session,
            lease,
            len(ids),
            len(ids) if prompt_rows is None else prompt_rows,
            max_rows,
            self.bundle.manifest.model.eos_ids,
            sampling or SamplingParams(temperature=0.0),
            tail,
            page_names,
            len(page_names) // PAGE_NAME_BYTES * PAGE_TOKENS if page_names else NOBODY_ASKS,
        )
        first = self.links[names[0]]
        await first.send(opening)
        await first.send(Feed(session, lease, 0, tuple(ids)))
        return session

    async def tokens(self, tail: str, *sessions: int) -> dict[int, list[Token]]:
        """What the tail committed to each session, until all have finished."""
        found: dict[int, list[Token]] = {session: [] for session in sessions}
        while not all(tokens and tokens[-1].finish for tokens in found.values()):
            message, _ = await self.links[tail].expect(Tokens)
            assert isinstance(message, Tokens)
            found[message.session].extend(message.tokens)
        return found

    async def close(
        self, names: Sequence[str], lease: int, session: int, kept: tuple[bytes, tuple[int, ...]] = (b"", ())
    ) -> None:
        for name in names:
            await self.links[name].send(CloseSession(session, lease, *kept))
