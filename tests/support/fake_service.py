"""A Service of one process: bytes are tokens, and the answer is the alphabet shifted by the seed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel

from coordinator.service import (
    ClusterStatus,
    DeviceStatus,
    GenerateRequest,
    PlanStatus,
    RequestStatus,
    TokenEvent,
)
from coordinator.sessions.draft_ledger import check_draft
from edge_runtime.bundle.hashing import sha256_digest
from edge_runtime.bundle.manifest import ModelInfo
from edge_runtime.core import RequestId, TokenLogprob
from edge_runtime.errors import CapacityError, EdgeRuntimeError, UsageError
from edge_runtime.protocol.messages import Draft
from edge_runtime.text import TextStream

GENERATOR = ModelInfo("tiny", "fake", "generator", 8, 256, 128, 64, (0,), -1, "fp32")
ENCODER = replace(GENERATOR, name="tiny-encoder", kind="encoder", hidden_size=4)
DEVICES = (
    DeviceStatus("a1" * 16, "phone", "serving", "", 11, (0, 1), 2_000_000, 512 << 20, 0.004, 0.2),
    DeviceStatus("b2" * 16, "laptop", "serving", "", 12, (2, 3), 2_500_000, 4 << 30, 0.001, 0.1),
    DeviceStatus(
        "c3" * 16, "old-tablet", "excluded", "it would slow the pipeline", 13, None, 0, 256 << 20, 0.03, 0.4
    ),
)
PLAN = PlanStatus(
    3, True, "auto", (("phone", 0, 1), ("laptop", 2, 3)), 42.0, 40.5, ("two devices are faster than one",)
)


def _tokenizer_json() -> bytes:
    """Ids are code points, as far as tokens of one character can tell."""
    tokenizer = Tokenizer(WordLevel({chr(code): code for code in range(256)}, unk_token="?"))
    tokenizer.decoder = Fuse()
    return tokenizer.to_str().encode()


TOKENIZER_JSON = _tokenizer_json()


class _Bytes:
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", "replace")


@dataclass
class FakeService:
    model: ModelInfo = GENERATOR
    error: EdgeRuntimeError | None = None  # raised instead of (or after `error_after`) tokens
    error_after: int = 0
    probe_error: EdgeRuntimeError | None = None
    hold: asyncio.Event | None = None  # tokens wait for it, after the first
    max_running: int = 64
    cached_tokens: int = 0  # of every prompt
    ready: bool = True
    replicas: tuple[PlanStatus, ...] = ()  # beside PLAN
    running: dict[RequestId, GenerateRequest] = field(default_factory=dict)
    journal: dict[RequestId, GenerateRequest] = field(default_factory=dict)
    closed: list[RequestId] = field(default_factory=list)
    all_closed: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    generated: int = 0  # tokens of all generations
    probes: int = 0
    revoked: list[str] = field(default_factory=list)
    links: int = 0
    drafts: list[tuple[RequestId, Draft, str]] = field(default_factory=list)
    loads: tuple[float, ...] = (0.0,)  # of the first token, the second, ..; the last one of all that follow

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_chat(self, messages: Sequence[dict[str, object]]) -> list[int]:
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>")

    def decode(self, ids: Sequence[int]) -> str:
        return _Bytes().decode(ids)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        if len(self.running) >= self.max_running:
            raise CapacityError("The queue is full.", code="overloaded")
        self.running[request.id] = self.journal[request.id] = request
        async with self.changed:
            self.changed.notify_all()
        try:
            async for event in self._tokens(request, self.hold):
                yield event
        finally:
            del self.running[request.id]
            self.closed.append(request.id)
            if not self.running:
                self.all_closed.set()

    async def _tokens(
        self, request: GenerateRequest, hold: asyncio.Event | None
    ) -> AsyncIterator[TokenEvent]:
        texts = TextStream(_Bytes(), request.prompt_ids, request.stop)
        for index in range(request.max_tokens):
            if self.error is not None and index == self.error_after:
                raise self.error
            if hold is not None and index:
                await hold.wait()
            await asyncio.sleep(0)
            token = ord("a") + (request.sampling.seed + index) % 26
            piece = texts.push(token, is_last=index == request.max_tokens - 1)
            finish = "stop" if piece.is_stop else "length" if index == request.max_tokens - 1 else ""
            self.generated += 1
            cached = 0 if index else self.cached_tokens
            load = self.loads[min(index, len(self.loads) - 1)]
            yield TokenEvent(index, token, piece.text, _logprob(request, token), finish, cached, load=load)
            if finish:
                return

    async def all_running(self, count: int) -> None:
        """Returns once so many generations run."""
        async with self.changed:
            await self.changed.wait_for(lambda: len(self.running) == count)

    def draft(self, request: RequestId, draft: Draft, source: str) -> None:
        check_draft(draft, self.model.vocab_size)
        self.drafts.append((request, draft, source))

    def tokenizer(self) -> tuple[str, bytes]:
        return sha256_digest(TOKENIZER_JSON), TOKENIZER_JSON

    async def resume(self, request: RequestId, after_index: int) -> AsyncIterator[TokenEvent]:
        if request not in self.journal:
            raise UsageError(f"there is no request {request}")

        async def events() -> AsyncIterator[TokenEvent]:
            async for event in self._tokens(self.journal[request], None):
                if event.index > after_index:
                    yield event

        return events()

    async def embed(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        return [np.array([len(ids), ids[0], sum(ids), 0.25], dtype=np.float32) for ids in sequences]

    async def probe(self) -> None:
        self.probes += 1
        if self.probe_error is not None:
            raise self.probe_error

    def status(self) -> ClusterStatus:
        requests = tuple(
            RequestStatus(str(name), "decode", len(each.prompt_ids), 1, 0.5, 10.0)
            for name, each in self.running.items()
        )
        devices = tuple(
            replace(each, state="revoked", layers=None) if {each.name, each.id} & set(self.revoked) else each
            for each in DEVICES
        )
        plan = PLAN if self.ready else None
        bundle = "sha256:" + "0123456789abcdef" * 4
        plans = (plan, *self.replicas) if plan is not None else ()
        return ClusterStatus(self.model, bundle, 4_500_000, devices, plan, requests, 12.5, 100.0, plans)

    def create_join_link(self) -> str:
        self.links += 1
        return f"edge://127.0.0.1:7001/?enroll=7002&key=abc&token=token{self.links}"

    async def revoke(self, device: str) -> None:
        if not any(device in (each.name, each.id) for each in DEVICES):
            raise UsageError(f"there is no device {device}")
        self.revoked.append(device)


def _logprob(request: GenerateRequest, token: int) -> TokenLogprob | None:
    asked = request.sampling.top_logprobs
    if asked < 0:
        return None
    top = tuple((token + k, -0.5 - k) for k in range(asked))
    return TokenLogprob(-0.5, top)
