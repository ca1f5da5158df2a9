"""The coordinator, put together: everything below the HTTP API, as the `Service` it asks.

Knows: the order in which parts start and stop, and how a request becomes a session. Does not know: HTTP, flags.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from coordinator import cluster_status
from coordinator import events as ev
from coordinator.config import CoordinatorConfig
from coordinator.control_loop import ControlLoop, why_not_serving
from coordinator.journal.base import Journal, RequestEntry
from coordinator.journal.sqlite import SqliteJournal
from coordinator.links import AgentLinks
from coordinator.placement import model_profile, plan_for
from coordinator.ports import RememberedPorts, reachable_host
from coordinator.registry import Keys, Registry
from coordinator.scheduling.admission import check_context, check_fits, check_queue
from coordinator.service import ClusterStatus, GenerateRequest, TokenEvent
from coordinator.sessions.embedding import Embedding
from coordinator.sessions.generation import FAILED, Generation
from coordinator.sessions.host import SessionHost
from coordinator.sessions.port import Cancel
from coordinator.slice_server import SliceServer
from coordinator.speed_meter import SpeedMeter
from coordinator.text_codec import TextCodec
from edge_runtime.bundle import Bundle
from edge_runtime.bundle.manifest import ModelInfo
from edge_runtime.core import RequestId, SamplingParams, Token
from edge_runtime.errors import EdgeRuntimeError, RequestFailed, UsageError
from edge_runtime.transport import zeromq
from edge_runtime.trust.pairing import EnrollmentServer, listen_for_devices

log = logging.getLogger(__name__)

CANCELLED = "cancelled"
HOUSEKEEPING_SECONDS = 1.0
EMBEDDINGS_AT_ONCE = 32  # of one call
PROOF_SECONDS = 2.0  # a token this young is as good as a probe


class CoordinatorRuntime:
    """Implements Service. `async with CoordinatorRuntime(config) as runtime:` serves until the block ends."""

    def __init__(self, config: CoordinatorConfig, *, journal: Journal | None = None) -> None:
        self.config = config
        self.bundle = Bundle.open(config.bundle)
        self._text = TextCodec(self.bundle)
        self._journal = journal
        self._meter = SpeedMeter()
        self._clock = time.monotonic
        self._started_at = self._clock()
        self._abandoned: dict[RequestId, float] = {}  # streams that broke: resumable until then
        self._names = itertools.count(1)
        self._stack = AsyncExitStack()
        self._is_stopping = False

    # ------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _start(self) -> None:
        config, stack = self.config, self._stack
        config.state_directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._journal is None:
            self._journal = SqliteJournal(config.state_directory / "journal.sqlite3")
            stack.push_async_callback(self._journal.close)
        keys = Keys.load_or_create(config.state_directory)
        self.registry = Registry(self._journal, keys, wall_clock=time.time)
        await self.registry.load()
        listener = await zeromq.listen(
            f"tcp://{_bracketed(config.host)}:{config.port}",
            keys.link,
            self.registry.admission,
            name="agents",
        )
        stack.push_async_callback(listener.close)
        enroll_listener = await listen_for_devices(
            f"tcp://{_bracketed(config.host)}:{config.enroll_port}", keys.link
        )
        stack.push_async_callback(enroll_listener.close)
        self.port, self.enroll_port = _port(listener.address), _port(enroll_listener.address)
        self._tasks = await stack.enter_async_context(_StoppableTasks())
        self._wire_up(listener, keys)
        enrollment = EnrollmentServer(
            enroll_listener,
            self.registry.spend,
            self.registry.register,
            coordinator_address=listener.address,
            signing_public_key=keys.signing.public,
        )
        for part in (self.loop.run(), self.links.run(), enrollment.serve(), self._keep_house()):
            self._tasks.add(part)
        await self._continue_unfinished()

    async def _listen(self, keys: Keys) -> tuple[zeromq.ZeromqListener, zeromq.ZeromqListener]:
        """(for paired devices, for those that join)"""
        config, host = self.config, _bracketed(self.config.host)
        ports = RememberedPorts(config.state_directory / "ports.json")
        admission = self.registry.admission
        listener = await ports.listen(
            "agents",
            config.port,
            lambda port: zeromq.listen(f"tcp://{host}:{port}", keys.link, admission, name="agents"),
        )
        self._stack.push_async_callback(listener.close)
        enroll_listener = await ports.listen(
            "enroll", config.enroll_port, lambda port: listen_for_devices(f"tcp://{host}:{port}", keys.link)
        )
        self._stack.push_async_callback(enroll_listener.close)
        self.port, self.enroll_port = _port(listener.address), _port(enroll_listener.address)
        ports.remember(agents=self.port, enroll=self.enroll_port)
        return listener, enroll_listener

    def _wire_up(self, listener: zeromq.ZeromqListener, keys: Keys) -> None:
        config, manifest = self.config, self.bundle.manifest
        model = model_profile(manifest, config.kv_tokens_wanted)
        self.loop = ControlLoop(
            bundle=self.bundle.digest,
            hidden_size=manifest.model.hidden_size,
            split=config.split,
            limits=config.limits,
            journal=self.journal,
            trust=self.registry,
            planner=lambda state, now: plan_for(
                state, now, model=model, split=config.split, limits=config.limits
            ),
            clock=self._clock,
        )
        self.links = AgentLinks(
            listener,
            self.loop,
            SliceServer(self.bundle, keys.signing.secret),
            members=self.loop.members,
            timeout_seconds=config.limits.device_timeout_seconds,
        )
        self.sessions = SessionHost(
            self._tasks.group,
            clock=self._clock,
            next_session=self.journal.next_session,
            post=self.links.post,
            tell=self.loop.tell,
            pipeline=lambda: self.loop.state.pipeline,
            meter=self._meter,
        )
        self.loop.links, self.loop.sessions = self.links, self.sessions

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_stopping = True
        try:
            await self.sessions.stop()
            for request in list(self._abandoned):
                await self._finish_abandoned(request)
        finally:
            await self._stack.aclose()

    async def drain(self) -> None:
        """Nothing new from now on; what runs gets a moment. The rest goes on from the journal at the next start."""
        self._is_stopping = True
        await self.sessions.drain(self.config.drain_seconds)

    @property
    def journal(self) -> Journal:
        if self._journal is None:
            raise RuntimeError("the coordinator is not started")
        return self._journal

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_SECONDS)
            await self.registry.write_tokens()
            now = self._clock()
            for request in [key for key, until in self._abandoned.items() if until <= now]:
                await self._finish_abandoned(request)

    async def _finish_abandoned(self, request: RequestId) -> None:
        self._abandoned.pop(request, None)
        await self.journal.finish_request(request, CANCELLED)

    async def _continue_unfinished(self) -> None:
        """Accepted before the restart: they go on whether or not somebody listens."""
        for found in await self.journal.unfinished():
            request = found.entry.request
            if found.entry.bundle != self.bundle.digest:
                reason = "the coordinator was started with another bundle before the request was finished"
                await self.journal.finish_request(request, FAILED, reason)
                continue
            generation = self._generation(_request_of(found.entry), found.tokens, is_detached=True)
            if generation.is_finished:
                await self.journal.finish_request(request, generation.finish_reason)
            else:
                log.info("request %s goes on from %d tokens", request, len(found.tokens))
                self._begin(generation, found.entry.class_map)

    # ------------------------------------------------------------ text

    @property
    def model(self) -> ModelInfo:
        return self.bundle.manifest.model

    def encode(self, text: str) -> list[int]:
        return self._text.encode(text)

    def encode_chat(self, messages: Sequence[dict[str, object]]) -> list[int]:
        return self._text.encode_chat(messages)

    def decode(self, ids: Sequence[int]) -> str:
        return self._text.decode(ids)

    # ------------------------------------------------------------ generation

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        self._check(request.prompt_ids, request.max_tokens, kind="generator")
        class_map = await self._class_map(len(request.prompt_ids) + request.max_tokens)
        entry = RequestEntry(
            request.id,
            request.tenant,
            self.bundle.digest,
            class_map,
            request.prompt_ids,
            request.sampling,
            request.max_tokens,
            request.stop,
            request.ignore_eos,
            time.time(),
        )
        try:
            await self.journal.record_request(entry)
        except asyncio.CancelledError:
            self._abandon(request.id)  # it may have been written
            raise
        generation = self._generation(request)
        self._begin(generation, class_map)
        async with aclosing(generation.events()) as events:
            async for event in events:
                yield event

    async def resume(self, request: RequestId, after_index: int) -> AsyncIterator[TokenEvent]:
        running = self.sessions.get(request)
        if isinstance(running, Generation) and not running.ended:
            return running.events(after_index)
        found = await self.journal.request(request)
        if found is None:
            raise UsageError(f"there is no request {request!r}", code="request_not_found")
        generation = self._generation(_request_of(found.entry), found.tokens)
        if found.error or found.finish_reason == CANCELLED:
            generation.error = RequestFailed(found.error or "the request was cancelled when its reader left")
        elif not generation.is_finished:
            self._check_open()
            self._abandoned.pop(request, None)
            self._begin(generation, found.entry.class_map)
        return generation.events(after_index)

    def _generation(
        self,
        request: GenerateRequest,
        tokens: Sequence[Token] = (),
        *,
        is_detached: bool = False,
        is_journalled: bool = True,
    ) -> Generation:
        return Generation(
            request,
            self.sessions,
            self.journal if is_journalled else None,
            decoder=self._text.tokenizer,
            eos_ids=self.model.eos_ids,
            vocab_size=self.model.vocab_size,
            stall_seconds=self.config.stall_seconds,
            tokens=tokens,
            is_detached=is_detached,
        )

    def _begin(self, generation: Generation, class_map: tuple[str, ...]) -> None:
        def when_over() -> None:
            if generation.was_abandoned:
                self._abandon(generation.request.id)

        self.sessions.begin(generation, generation.request.tenant, class_map, when_over)

    def _abandon(self, request: RequestId) -> None:
        self._abandoned[request] = self._clock() + self.config.resume_seconds

    def _check(self, ids: Sequence[int], max_tokens: int, *, kind: str) -> None:
        self._check_open()
        model = self.model
        if model.kind != kind:
            use = "/v1/embeddings" if model.kind == "encoder" else "/v1/completions or /v1/chat/completions"
            raise UsageError(
                f"{model.name} is a model of kind {model.kind}", hint=f"use {use}", code="model_cannot"
            )
        if not ids or not 0 <= min(ids) <= max(ids) < model.vocab_size:
            raise UsageError(f"token ids must be between 0 and {model.vocab_size - 1}, and at least one")
        if max_tokens < 0 or (max_tokens == 0 and kind == "generator"):
            raise UsageError("max_tokens must be at least 1")
        check_context(len(ids), max_tokens, max_context_tokens=model.max_context_tokens)
        check_queue(len(self.loop.state.waiting), max_waiting=self.config.max_waiting)

    def _check_open(self) -> None:
        if self._is_stopping:
            raise RequestFailed("the coordinator is stopping", hint="try again soon", code="not_ready")

    async def _class_map(self, rows: int) -> tuple[str, ...]:
        """Of the live pipeline, waited for a while: what the request's tokens will be a function of."""
        try:
            async with asyncio.timeout(self.config.limits.recovery_seconds):
                while (live := self.loop.state.live) is None:
                    await self.loop.serving.wait()
                    await asyncio.sleep(0)
        except TimeoutError:
            raise why_not_serving(self.loop.state) from None
        check_fits(rows, capacity_tokens=live.kv_capacity_tokens)
        return live.class_map

    # ------------------------------------------------------------ embeddings

    async def embed(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        for ids in sequences:
            self._check(ids, 0, kind="encoder")
        at_once = asyncio.Semaphore(EMBEDDINGS_AT_ONCE)

        async def one(ids: Sequence[int]) -> NDArray[np.float32]:
            async with at_once:
                await self._class_map(len(ids))
                return await self._embed_one(ids)

        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(one(ids)) for ids in sequences]
        except* EdgeRuntimeError as problems:
            raise _first(problems) from None
        return [task.result() for task in running]

    async def _embed_one(self, ids: Sequence[int]) -> NDArray[np.float32]:
        embedding = Embedding(
            f"embed-{next(self._names)}",
            ids,
            self.sessions,
            hidden_size=self.model.hidden_size,
            stall_seconds=self.config.stall_seconds,
        )
        self.sessions.begin(embedding, "", ())
        try:
            return await embedding.vector
        except asyncio.CancelledError:
            embedding.deliver(Cancel())
            raise

    # ------------------------------------------------------------ probe, status, devices

    async def probe(self) -> None:
        if self._is_stopping or self.loop.state.live is None:
            raise why_not_serving(self.loop.state)
        if self._clock() - self._meter.last_token_at() < PROOF_SECONDS:
            return
        first_id = max(self.model.bos_id, 0)
        if self.model.kind == "encoder":
            await self._embed_one([first_id])
            return
        request = GenerateRequest(
            RequestId(f"probe-{next(self._names)}"), "", (first_id,), SamplingParams(temperature=0.0), 1
        )
        generation = self._generation(request, is_journalled=False)
        self.sessions.begin(generation, "", ())
        async with aclosing(generation.events()) as events:
            async for _ in events:
                pass

    def status(self) -> ClusterStatus:
        now, state, limits = self._clock(), self.loop.state, self.config.limits
        generations = [s for s in self.sessions.sessions if isinstance(s, Generation)]
        return ClusterStatus(
            model=self.model,
            bundle=self.bundle.digest,
            model_weight_bytes=self.bundle.manifest.weight_bytes,
            devices=cluster_status.device_statuses(state, self.registry.devices, now, limits.exclude_seconds),
            plan=cluster_status.plan_status(state, self.config.split, self._meter.single_tokens_per_second),
            requests=tuple(cluster_status.request_status(g, now) for g in generations),
            tokens_per_second=self._meter.cluster_tokens_per_second(now),
            uptime_seconds=now - self._started_at,
        )

    def create_join_link(self) -> str:
        return self.registry.new_join_link(reachable_host(self.config.host), self.port, self.enroll_port)

    async def revoke(self, device: str) -> None:
        entry = await self.registry.revoke(device)
        await self.links.cut(entry.device_id, "it was revoked")
        self.loop.tell(ev.DeviceRevoked(entry.device_id, self._clock()))


class _StoppableTasks:
    """A task group whose members end when its block does."""

    def __init__(self) -> None:
        self.group = asyncio.TaskGroup()
        self._parts: list[asyncio.Task[None]] = []

    def add(self, part: Coroutine[object, object, None]) -> None:
        self._parts.append(self.group.create_task(part))

    async def __aenter__(self) -> Self:
        await self.group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in self._parts:
            part.cancel()
        await self.group.__aexit__(kind, error, trace)


def _request_of(entry: RequestEntry) -> GenerateRequest:
    return GenerateRequest(
        entry.request,
        entry.tenant,
        entry.prompt_ids,
        entry.sampling,
        entry.max_tokens,
        entry.stop,
        entry.ignore_eos,
    )


def _first(problems: BaseExceptionGroup[EdgeRuntimeError]) -> EdgeRuntimeError:
    for problem in problems.exceptions:
        return _first(problem) if isinstance(problem, BaseExceptionGroup) else problem
    raise problems


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])
