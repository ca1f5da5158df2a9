"""What the HTTP API, the console and the probes may ask of the rest of the coordinator.

Knows: requests, events and status as values, and the Service interface between `api/` and everything below it.
Does not know: HTTP, sockets, agents. `coordinator/runtime.py` implements it; API tests use a ten-line fake.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundle.manifest import ModelInfo
from edge_runtime.core import RequestId, SamplingParams, TokenLogprob
from edge_runtime.protocol.messages import Draft


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One choice of one API request: choice i of `n` has its own, with seed H(seed, i)."""

    id: RequestId
    tenant: str  # what an API key belongs to
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop: tuple[str, ...] = ()  # strings; the text before the first one is returned
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One journalled token. `text` is what became certain with it ("" inside a character or a possible stop string)."""

    index: int  # among the generated tokens, from 0
    id: int
    text: str
    logprob: TokenLogprob | None = None
    finish_reason: str = ""  # "stop" or "length" on the last event
    cached_tokens: int = 0  # on the first event: of the prompt, that needed no computing
    accepted_drafts: int = 0  # on the last event: guesses that were right,
    wasted_drafts: int = 0  # and those that were run for nothing
    load: float = 0.0  # of the pipeline, for those who draft: 0 .. 1


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    id: str
    name: str
    state: str  # "offline", "joining", "probing", "ready", "loading", "serving", "excluded", "revoked"
    reason: str  # why it is in that state, for a person
    pid: int  # 0 where unknown
    layers: tuple[int, int] | None  # first, last
    weight_bytes: int
    memory_budget_bytes: int
    rtt_seconds: float
    last_seen_seconds: float  # ago


@dataclass(frozen=True, slots=True)
class PlanStatus:
    lease: int
    ready: bool
    split: str  # what was asked for: auto, even, experts, or ranges
    stages: tuple[tuple[str, int, int], ...]  # (device name, first layer, last layer)
    predicted_tokens_per_second: float
    measured_tokens_per_second: float  # of recent single-session decoding; 0 before any
    reasons: tuple[str, ...]
    holders: tuple[tuple[str, int, int], ...] = ()  # (device name, experts, their bytes): no layers


@dataclass(frozen=True, slots=True)
class RequestStatus:
    id: str
    state: str  # "waiting", "prefill", "decode", "recovering"
    prompt_tokens: int
    generated_tokens: int
    age_seconds: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class DraftStatus:
    """Rows drafted since the coordinator started, by who guessed them."""

    source: str
    drafted: int
    accepted: int
    wasted: int


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    model: ModelInfo
    bundle: str  # digest
    model_weight_bytes: int
    devices: tuple[DeviceStatus, ...]
    plan: PlanStatus | None  # the first of `plans`
    requests: tuple[RequestStatus, ...]
    tokens_per_second: float  # of the whole cluster, last few seconds
    uptime_seconds: float
    plans: tuple[
        PlanStatus, ...
    ] = ()  # pipelines at once, over different devices: each session is on one of them
    drafts: tuple[DraftStatus, ...] = ()


class Service(Protocol):
    """Everything below the API."""

    @property
    def model(self) -> ModelInfo: ...

    def encode(self, text: str) -> list[int]:
        """Token ids, with whatever the tokenizer itself adds."""
        ...

    def encode_chat(self, messages: Sequence[dict[str, object]]) -> list[int]:
        """Render the bundle's chat template in a sandbox, then encode without adding special tokens again.

        A template may take its whole time limit: call it from a thread that nobody waits for.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        """Journal, queue and run. Closing the iterator cancels and frees everything.

        Raises CapacityError (never fits; queue full: code "overloaded"), RequestFailed.
        """
        ...

    async def resume(self, request: RequestId, after_index: int) -> AsyncIterator[TokenEvent]:
        """Events after `after_index` of a journalled request, then live ones. Raises UsageError if unknown."""
        ...

    def draft(self, request: RequestId, draft: Draft, source: str) -> None:
        """Guesses for a running generation (session and lease of `draft` are not looked at); late ones are dropped.

        Raises ProtocolError where they are not even wrong: another vocabulary, an impossible tree.
        """
        ...

    def tokenizer(self) -> tuple[str, bytes]:
        """(digest, the tokenizer as JSON): what makes ids of text on a device that drafts."""
        ...

    async def embed(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]: ...

    async def probe(self) -> None:
        """Send one token through the live pipeline. Raises an EdgeRuntimeError that says why it can't serve."""
        ...

    def status(self) -> ClusterStatus: ...

    def create_join_link(self) -> str:
        """A new one-use pairing link."""
        ...

    async def revoke(self, device: str) -> None:
        """By name or id: cut it off now and re-plan."""
        ...
