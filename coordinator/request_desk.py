"""Where requests are accepted: checked, journalled, begun, resumed, and continued after a restart.

Knows: what must hold before a request is promised anything, and how it becomes a session. Does not know: how sessions
run, links, HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager

import numpy as np
from numpy.typing import NDArray

from coordinator.config import CoordinatorConfig
from coordinator.control_loop import ControlLoop, why_not_serving
from coordinator.decisions import room_of
from coordinator.journal.base import Journal, RequestEntry
from coordinator.scheduling.admission import check_context, check_fits, check_queue
from coordinator.scheduling.assignment import soonest
from coordinator.service import GenerateRequest, TokenEvent
from coordinator.sessions.embedding import Embedding
from coordinator.sessions.generation import FAILED, Generation
from coordinator.sessions.host import SessionHost
from coordinator.sessions.port import Cancel
from coordinator.speed_meter import SpeedMeter
from edge_runtime.bundle.manifest import ModelInfo
from edge_runtime.core import RequestId, SamplingParams, Token
from edge_runtime.errors import EdgeRuntimeError, RequestFailed, UsageError
from edge_runtime.protocol.messages import Draft
from edge_runtime.text import Decoder

log = logging.getLogger(__name__)

CANCELLED = "cancelled"
EMBEDDINGS_AT_ONCE = 32  # of one call
PROOF_SECONDS = 2.0  # a token this young is as good as a probe


class RequestDesk:
    def __init__(
        self,
        config: CoordinatorConfig,
        *,
        bundle: str,
        model: ModelInfo,
        decoder: Decoder,
        journal: Journal,
        loop: ControlLoop,
        sessions: SessionHost,
        meter: SpeedMeter,
    ) -> None:
        self.is_closed = False  # nothing new is accepted
        self._config = config
        self._bundle = bundle
        self._model = model
        self._decoder = decoder
        self._journal = journal
        self._loop = loop
        self._sessions = sessions
        self._meter = meter
        self._entering = 0  # checked, and not yet among the sessions
        self._abandoned: dict[RequestId, float] = {}  # streams that broke: resumable until then
        self._names = itertools.count(1)

    @property
    def generations(self) -> list[Generation]:
        return [session for session in self._sessions.sessions if isinstance(session, Generation)]

    # ------------------------------------------------------------ generation

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        self._check(request.prompt_ids, request.max_tokens, kind="generator")
        with self._waiting_place():
            generation = await self._accept(request)
        async with aclosing(generation.events()) as events:
            async for event in events:
                yield event

    @contextmanager
    def _waiting_place(self) -> Iterator[None]:
        """Between the check and the queue: a crowd that comes at once must not pass the check all together."""
        most = self._config.max_waiting
        check_queue(len(self._loop.state.waiting), max_waiting=most)
        # Those that just came may find a place at once: nobody knows yet how many of them wait.
        free_places = max(0, self._config.limits.max_running - self._sessions.open)
        check_queue(self._entering + self._sessions.waiting, max_waiting=most + free_places)
        self._entering += 1
        try:
            yield
        finally:
            self._entering -= 1

    async def _accept(self, request: GenerateRequest) -> Generation:
        """Journalled, and among the sessions."""
        class_map = await self._class_map(len(request.prompt_ids) + request.max_tokens)
        entry = RequestEntry(
            request.id,
            request.tenant,
            self._bundle,
            class_map,
            request.prompt_ids,
            request.sampling,
            request.max_tokens,
            request.stop,
            request.ignore_eos,
            time.time(),
        )
        try:
            await self._journal.record_request(entry)
        except asyncio.CancelledError:
            self._abandon(request.id)  # it may have been written
            raise
        generation = self._generation(request)
        self._begin(generation, class_map)
        return generation

    async def resume(self, request: RequestId, after_index: int) -> AsyncGenerator[TokenEvent, None]:
        running = self._sessions.get(request)
        if isinstance(running, Generation) and not running.ended:
            return self._joined(running, after_index)
        found = await self._journal.request(request)
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

    async def _joined(self, running: Generation, after_index: int) -> AsyncGenerator[TokenEvent, None]:
        """Where its last reader left just before, it may end before this has its first event: it is begun anew then."""
        try:
            async with aclosing(running.events(after_index)) as events:
                async for event in events:
                    after_index = event.index
                    yield event
            return
        except RequestFailed:
            if not running.was_abandoned:
                raise
        resumed = await self.resume(running.request.id, after_index)
        async with aclosing(resumed) as events:
            async for event in events:
                yield event

    def draft(self, request: RequestId, draft: Draft, source: str) -> None:
        running = self._sessions.get(request)
        if isinstance(running, Generation):
            running.draft(draft, source)

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
            self._sessions,
            self._journal if is_journalled else None,
            decoder=self._decoder,
            eos_ids=self._model.eos_ids,
            vocab_size=self._model.vocab_size,
            stall_seconds=self._config.stall_seconds,
            tokens=tokens,
            is_detached=is_detached,
        )

    def _begin(self, generation: Generation, class_map: tuple[str, ...]) -> None:
        def when_over() -> None:
            if generation.was_abandoned:
                self._abandon(generation.request.id)

        self._sessions.begin(generation, generation.request.tenant, class_map, when_over)

    def _abandon(self, request: RequestId) -> None:
        self._abandoned[request] = self._sessions.clock() + self._config.resume_seconds

    def _check(self, ids: Sequence[int], max_tokens: int, *, kind: str) -> None:
        self._check_open()
        model = self._model
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

    def _check_open(self) -> None:
        if self.is_closed:
            raise RequestFailed("the coordinator is stopping", hint="try again soon", code="not_ready")

    async def _class_map(self, rows: int) -> tuple[str, ...]:
        """Of the pipeline that would serve it soonest, waited for a while: what its tokens will be a function of."""
        try:
            async with asyncio.timeout(self._config.limits.recovery_seconds):
                while self._loop.state.live is None:
                    await self._loop.serving.wait()
                    await asyncio.sleep(0)
        except TimeoutError:
            raise why_not_serving(self._loop.state) from None
        state = self._loop.state
        rooms = [room_of(state, pipeline) for pipeline in state.serving]
        check_fits(rows, capacity_tokens=max(room.capacity_tokens for room in rooms))
        return soonest(rows, rooms).class_map

    # ------------------------------------------------------------ embeddings

    async def embed(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        for ids in sequences:
            self._check(ids, 0, kind="encoder")
        at_once = asyncio.Semaphore(EMBEDDINGS_AT_ONCE)

        async def one(ids: Sequence[int]) -> NDArray[np.float32]:
            async with at_once:
                with self._waiting_place():
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
            self._sessions,
            hidden_size=self._model.hidden_size,
            stall_seconds=self._config.stall_seconds,
        )
        self._sessions.begin(embedding, "", ())
        try:
            return await embedding.vector
        except asyncio.CancelledError:
            embedding.deliver(Cancel())
            raise

    # ------------------------------------------------------------ probe

    async def probe(self) -> None:
        if self.is_closed or self._loop.state.live is None:
            raise why_not_serving(self._loop.state)
        if self._sessions.clock() - self._meter.last_token_at() < PROOF_SECONDS:
            return
        first_id = max(self._model.bos_id, 0)
        if self._model.kind == "encoder":
            await self._embed_one([first_id])
            return
        request = GenerateRequest(
            RequestId(f"probe-{next(self._names)}"), "", (first_id,), SamplingParams(temperature=0.0), 1
        )
        generation = self._generation(request, is_journalled=False)
        self._sessions.begin(generation, "", ())
        async with aclosing(generation.events()) as events:
            async for _ in events:
                pass

    # ------------------------------------------------------------ over time

    async def finish_abandoned(self, now: float) -> None:
        """Streams that nobody came back for count as cancelled (all of them at infinity)."""
        for request in [key for key, until in self._abandoned.items() if until <= now]:
            del self._abandoned[request]
            await self._journal.finish_request(request, CANCELLED)

    async def continue_unfinished(self) -> None:
        """Accepted before the restart: they go on whether or not somebody listens."""
        for found in await self._journal.unfinished():
            request = found.entry.request
            if found.entry.bundle != self._bundle:
                reason = "the coordinator was started with another bundle before the request was finished"
                await self._journal.finish_request(request, FAILED, reason)
                continue
            generation = self._generation(_request_of(found.entry), found.tokens, is_detached=True)
            if generation.is_finished:
                await self._journal.finish_request(request, generation.finish_reason)
            else:
                log.info("request %s goes on from %d tokens", request, len(found.tokens))
                self._begin(generation, found.entry.class_map)


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
