"""Agents that say what real ones say, over real links, with a model that is one line of arithmetic.

For tests of the coordinator: no engine, no weights, and every step can be held.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from coordinator.runtime import CoordinatorRuntime
from edge_runtime.bundle import Bundle, BundleSigningKey, BundleWriter
from edge_runtime.bundle.manifest import Block, Manifest, ModelInfo, Slice
from edge_runtime.core import Token
from edge_runtime.errors import ConnectionClosed
from edge_runtime.protocol import codec
from edge_runtime.protocol.messages import (
    PROTOCOL_VERSION,
    CloseSession,
    Feed,
    Heartbeat,
    Hello,
    LoadStage,
    Message,
    OpenSession,
    PeerLease,
    Ping,
    Pong,
    Pooled,
    ProfileReport,
    ProfileRequest,
    SessionFailed,
    StageFailed,
    StageReady,
    StepTokens,
    Tokens,
)
from edge_runtime.transport import zeromq
from edge_runtime.trust.identity import KeyPair

VOCAB_SIZE = 257
EOS = 256
LAYERS = 4
HIDDEN = 8
MAX_CONTEXT = 512


def write_fake_bundle(path: Path, kind: str = "generator") -> Bundle:
    """Four layers of a KiB each and a tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    writer = BundleWriter(path)
    names = ["embedding", *(f"layers.{i}" for i in range(LAYERS)), "head"]
    for name in names:
        with writer.slice(name) as out:
            out.add(name.encode() * 128)
    writer.add_file("tokenizer", tokenizer.to_str().encode())

    def build(slices: Mapping[str, Slice]) -> Manifest:
        blocks = [Block(name, (), (), (name,), 1024) for name in names]
        model = ModelInfo("fake", "test", kind, HIDDEN, VOCAB_SIZE, MAX_CONTEXT, 64, (EOS,), -1, "fp32")
        template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        return Manifest(
            model, blocks[0], tuple(blocks[1:-1]), blocks[-1], {}, slices, {}, "tokenizer", template, {}
        )

    writer.finish(build, BundleSigningKey(bytes(32)))
    return Bundle.open(path)


def next_id(ids: tuple[int, ...], seed: int) -> int:
    """The model: printable, a function of everything before."""
    return zlib.crc32(bytes(str((ids, seed)), "ascii")) % 90


def undisturbed(prompt: tuple[int, ...], seed: int, count: int) -> list[int]:
    ids = prompt
    for _ in range(count):
        ids = (*ids, next_id(ids, seed))
    return list(ids[len(prompt) :])


class Pace:
    """How many more tokens may be sent."""

    def __init__(self) -> None:
        self._left = float("inf")
        self._changed = asyncio.Event()

    def allow(self, tokens: float) -> None:
        self._left = tokens
        self._changed.set()
        self._changed = asyncio.Event()

    def allow_all(self) -> None:
        self.allow(float("inf"))

    async def take(self) -> None:
        while self._left < 1:
            await self._changed.wait()
        self._left -= 1


class FakeCluster:
    """What fake agents share: the pace of generation and a record of what they were told."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.tasks = tasks
        self.agents: dict[str, FakeAgent] = {}  # by device id
        self.told: list[tuple[str, Message]] = []
        self.pace = Pace()
        self.closed: set[int] = set()
        self.answer: Callable[[OpenSession, Feed], Message | None] = lambda opening, feed: None

    def opened(self) -> list[OpenSession]:
        return [message for _, message in self.told if isinstance(message, OpenSession)]

    def members_of(self, lease: int) -> tuple[str, ...]:
        """Names, in order, as agents were told."""
        loads = [m for _, m in self.told if isinstance(m, LoadStage) and m.lease == lease]
        return tuple(self.agents[device].name for device in loads[0].devices)

    def told_to(self, name: str, kind: type[Message]) -> list[Message]:
        return [message for who, message in self.told if who == name and isinstance(message, kind)]

    async def generate(self, tail: FakeAgent, opening: OpenSession, feed: Feed) -> None:
        if opening.tail == "pooler":
            await tail.send(
                Pooled(opening.session, opening.lease), [np.full(HIDDEN, sum(feed.ids), np.float32)]
            )
            return
        ids = feed.ids
        while len(ids) < opening.max_rows and opening.session not in self.closed:
            await self.pace.take()
            token = next_id(ids, opening.sampling.seed)
            finish = "length" if len(ids) + 1 == opening.max_rows else ""
            tokens = Tokens(opening.session, opening.lease, 0, (Token(len(ids), token, None, finish),))
            # Alone, or as a part of what a step of several sessions says.
            await tail.send(tokens if len(ids) % 2 else StepTokens((replace(tokens, session=0), tokens)))
            ids = (*ids, token)


class FakeAgent:
    """`class_name` is the numeric class; `kv_tokens` what it says it holds."""

    def __init__(self, cluster: FakeCluster, name: str, **settings: object) -> None:
        self.cluster = cluster
        self.name = name
        self.key = KeyPair.generate()
        self.device_id = str(self.key.device_id)
        self.class_name = str(settings.get("class_name", "fake-1"))
        self.kv_tokens = int(str(settings.get("kv_tokens", 4096)))
        self.memory_bytes = int(str(settings.get("memory_bytes", 1 << 20)))
        self.seconds = float(str(settings.get("seconds", 1e-3)))  # of one row through one layer
        self.row_invariant = bool(settings.get("row_invariant", True))
        self.fails_to_load = str(settings.get("fails_to_load", ""))
        self.is_silent = False
        self._opening: dict[int, OpenSession] = {}
        self.members: tuple[str, ...] = ()
        self.answers: list[Message] = []  # of the coordinator, to the greeting
        self.gone = asyncio.Event()

    async def pair(self, runtime: CoordinatorRuntime) -> None:
        await runtime.registry.register(self.key.device_id, self.name, self.key.public)

    async def join(self, runtime: CoordinatorRuntime, *, boot_id: str = "boot-1") -> None:
        """Connect and say hello; what follows runs in the cluster's tasks."""
        self.gone.clear()
        self.connection = await zeromq.connect(
            f"tcp://127.0.0.1:{runtime.port}", self.key, runtime.registry.keys.link.public
        )
        self.cluster.agents[self.device_id] = self
        await self.send(Hello(PROTOCOL_VERSION, "test", self.name, boot_id, "", self.memory_bytes, 1, 4242))
        self.cluster.tasks.create_task(self._run())

    async def start(self, runtime: CoordinatorRuntime) -> None:
        await self.pair(runtime)
        await self.join(runtime)

    async def send(self, message: Message, payloads: list[np.ndarray] | None = None) -> None:
        if not self.is_silent:
            with suppress(ConnectionClosed):
                frames = [memoryview(p).cast("B") for p in payloads or []]
                await self.connection.send(codec.encode(message, frames))

    async def die(self) -> None:
        self.is_silent = True
        await self.connection.close()

    async def _run(self) -> None:
        with suppress(ConnectionClosed):
            while True:
                message, _ = codec.decode(await self.connection.receive())
                if not isinstance(message, Ping | PeerLease):
                    self.cluster.told.append((self.name, message))
                await self._answer(message)
        self.gone.set()

    async def _answer(self, message: Message) -> None:
        match message:
            case Ping():
                await self.send(Pong(message.nonce), [np.zeros(message.reply_bytes, np.uint8)])
            case ProfileRequest():
                await self.send(
                    ProfileReport(
                        message.bundle,
                        self.class_name,
                        True,
                        self.seconds,
                        self.seconds / 10,
                        self.seconds,
                        self.memory_bytes,
                        1024,
                    )
                )
            case LoadStage():
                self.members = message.devices
                if self.fails_to_load:
                    await self.send(StageFailed(message.lease, "engine", self.fails_to_load, ""))
                else:
                    ready = StageReady(
                        message.lease, self.class_name, self.row_invariant, 1024, self.kv_tokens
                    )
                    await self.send(ready)
            case OpenSession():
                self._opening[message.session] = message
            case Feed():
                await self._fed(self._opening[message.session], message)
            case CloseSession():
                self.cluster.closed.add(message.session)

    async def _fed(self, opening: OpenSession, feed: Feed) -> None:
        answer = self.cluster.answer(opening, feed)
        if answer is not None:
            await self.send(answer)
            return
        tail = self.cluster.agents[self.members[-1]]
        self.cluster.tasks.create_task(self.cluster.generate(tail, opening, feed))

    async def beat(self, sequence: int = 1, *, steps: int = 0) -> None:
        await self.send(Heartbeat(sequence, steps, 0, 0, 0))


__all__ = ["FakeAgent", "FakeCluster", "SessionFailed", "undisturbed", "write_fake_bundle"]
