"""One running generation: a request, the tokens committed so far, and who listens.

A token is journalled, then shown: nobody ever saw an id that a crash could take back. However often the pipeline under
it is replaced, the request goes on from its journalled ids, and its stream never shows a seam.

Knows: one request's tokens, text, and end. Does not know: devices, plans, other requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from coordinator.service import GenerateRequest, TokenEvent
from coordinator.sessions.draft_ledger import DraftCounts, DraftLedger, check_draft
from coordinator.sessions.live_session import LiveSession, crashed
from coordinator.sessions.port import Cancel, Inbound, KeptPages, Rebind, RequestJournal, SessionPort
from edge_runtime.core import Token
from edge_runtime.engine.page_table import PAGE_TOKENS
from edge_runtime.errors import EdgeRuntimeError, RequestFailed
from edge_runtime.protocol.messages import (
    NOBODY_ASKS,
    PAGE_NAME_BYTES,
    Draft,
    Feed,
    OpenSession,
    RowsHeld,
    Tokens,
)
from edge_runtime.text import Decoder, TextStream

FAILED = "error"
PREFILL_PATIENCE_SECONDS_PER_ROW = 0.05


class Generation(LiveSession):
    """`journal` None: nothing is written (a probe). `tokens`: those of the journal, where it goes on from there."""

    def __init__(
        self,
        request: GenerateRequest,
        port: SessionPort,
        journal: RequestJournal | None,
        *,
        decoder: Decoder,
        eos_ids: Sequence[int],
        vocab_size: int,
        stall_seconds: float,
        tokens: Sequence[Token] = (),
        is_detached: bool = False,
    ) -> None:
        super().__init__(request.id, port, stall_seconds=stall_seconds)
        self.request = request
        self.rows = len(request.prompt_ids) + request.max_tokens
        self.started_at = port.clock()
        self.error: EdgeRuntimeError | None = None
        self._journal = journal
        self._stop_ids = () if request.ignore_eos else tuple(eos_ids)
        self._vocab_size = vocab_size
        self._text = TextStream(decoder, request.prompt_ids, request.stop)
        self._tokens: list[Token] = []
        self._events: list[TokenEvent] = []
        self._changed = asyncio.Event()
        self._listeners = 0
        self.was_abandoned = False
        self._is_detached = is_detached  # it goes on with nobody listening
        self._last_commit_at = 0.0
        self._page_names = b""  # of the leading pages, given when it was opened last
        self._cached_tokens = 0  # of the prompt, where it was opened first
        for token in tokens:
            self._show(token)
        self._drafts = DraftLedger(len(request.prompt_ids) + len(self._tokens), self.rows)
        self._drafter = ""  # who guesses: a source's name, "" for nobody

    # ------------------------------------------------------------ for listeners

    @property
    def generated_tokens(self) -> int:
        return len(self._events)

    @property
    def is_finished(self) -> bool:
        return bool(self.finish_reason)

    @property
    def finish_reason(self) -> str:
        return self._events[-1].finish_reason if self._events else ""

    async def events(self, after_index: int = -1) -> AsyncGenerator[TokenEvent, None]:
        """Events after `after_index`, old ones at once, then live. Closing the last listener's iterator cancels."""
        self._listeners += 1
        at = max(0, after_index + 1)
        try:
            while True:
                while at < len(self._events):
                    event = self._events[at]
                    at += 1
                    yield event
                if self.is_finished:
                    return
                if self.error is not None:
                    raise self.error
                await self._changed.wait()  # woken by every event, and by the end of `run` in any case
        finally:
            self._listeners -= 1
            if self._listeners == 0 and not self._is_detached and not self.is_finished:
                self.deliver(Cancel())

    # ------------------------------------------------------------ for whoever drafts

    @property
    def draft_counts(self) -> DraftCounts:
        return self._drafts.counts

    @property
    def draft_turn(self) -> int:
        """Position of the last guess that was wrong, 0 for none."""
        return self._drafts.turn

    def draft(self, draft: Draft, source: str) -> None:
        """Guesses for stage 1, its lease and session filled in here; dropped while there is no pipeline.

        Raises ProtocolError where they can't be anybody's guesses.
        """
        check_draft(draft, self._vocab_size)
        if self.is_open and not self.ended:
            self._drafter = source
            before = self._drafts.counts
            offered = self._drafts.offer(draft, self._port.draft_load(self._lease))
            if offered is not None:
                self._port.draft(replace(offered, session=self._number, lease=self._lease))
            self._count_drafts(before)

    def _count_drafts(self, before: DraftCounts) -> None:
        counts = self._drafts.counts
        if counts != before:
            self._port.drafted(self._drafter, counts - before)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # ------------------------------------------------------------ as a session

    def _opening(self, number: int, lease: int) -> tuple[OpenSession, Feed]:
        request = self.request
        ids = self._ids()
        self._last_commit_at = 0.0
        # All but the last row: it has to be run, since its logits are what is wanted.
        self._page_names = self._port.page_names(lease, request.tenant, ids[:-1])
        opening = OpenSession(
            session=number,
            lease=lease,
            forced_rows=len(ids),
            prompt_rows=len(request.prompt_ids),
            max_rows=self.rows,
            stop_ids=self._stop_ids,
            sampling=request.sampling,
            tail="sampler",
            page_names=self._page_names,
            held_rows=len(self._page_names) // PAGE_NAME_BYTES * PAGE_TOKENS or NOBODY_ASKS,
        )
        return opening, Feed(number, lease, 0, ids)

    def _ids(self, more: Sequence[Token] = ()) -> tuple[int, ...]:
        return (*self.request.prompt_ids, *(token.id for token in (*self._tokens, *more)))

    def _kept(self, more: Sequence[Token] = ()) -> KeptPages:
        """The answer's pages: the next turn of a conversation begins with them. The last id was never run."""
        ids = self._ids(more)[:-1]
        named = len(self._page_names) // PAGE_NAME_BYTES * PAGE_TOKENS
        rest = ids[named : len(ids) // PAGE_TOKENS * PAGE_TOKENS]
        after = self._page_names[-PAGE_NAME_BYTES:]
        names = self._port.page_names(self._lease, self.request.tenant, rest, after=after)
        return KeptPages(names, rest) if names else KeptPages()

    def _on_rows_held(self, message: RowsHeld) -> None:
        super()._on_rows_held(message)
        if message.reused and not self._tokens and self._openings == 1:
            self._cached_tokens = max(0, min(message.rows, len(self.request.prompt_ids)))

    def _patience_seconds(self) -> float:
        forced_rows = 0 if self._progressed else len(self.request.prompt_ids) + len(self._tokens)
        return self._stall_seconds + forced_rows * PREFILL_PATIENCE_SECONDS_PER_ROW

    async def _on_tokens(self, message: Tokens) -> None:
        """Journal what is new, then show it. Several messages that wait already are journalled in one go."""
        new = self._accept([message, *self._waiting_tokens()])
        if not new:
            return
        first_index = len(self._tokens)
        pieces = self._trim(new)
        pieces = self._judge(pieces)
        if self._journal is not None:
            await self._journal.append_tokens(self.request.id, first_index, tuple(t for t, _ in pieces))
        self._brought()
        self._count(len(pieces))
        finish_reason = pieces[-1][1].finish_reason
        if finish_reason:
            self._close(self._kept([token for token, _ in pieces]))  # now: others need the devices' memory
            if self._journal is not None:
                await self._journal.finish_request(self.request.id, finish_reason)
            self.ended = True
        for token, event in pieces:
            self._tokens.append(token)
            self._events.append(event)
        self._wake()

    def _judge(self, pieces: list[tuple[Token, TokenEvent]]) -> list[tuple[Token, TokenEvent]]:
        """What these ids say about the drafts; the last event of all has the sums."""
        before = self._drafts.counts
        load = self._port.draft_load(self._lease) if self._drafter else 0.0
        for token, _ in pieces:
            self._drafts.committed(token.id, load)
        token, event = pieces[-1]
        if event.finish_reason:
            self._drafts.forget()
            counts = self._drafts.counts
            event = replace(event, accepted_drafts=counts.accepted, wasted_drafts=counts.wasted)
        self._count_drafts(before)
        pieces = [*pieces[:-1], (token, event)]
        return [(token, replace(event, load=load)) for token, event in pieces] if load else pieces

    def _waiting_tokens(self) -> list[Tokens]:
        """Tokens of the open session at the head of the inbox."""
        found: list[Tokens] = []
        kept: list[Inbound] = []
        while not self._inbox.empty():
            message = self._inbox.get_nowait()
            if isinstance(message, Tokens) and not kept:
                if self._is_current(message):
                    found.append(message)
            else:
                kept.append(message)
        for message in kept:
            self._inbox.put_nowait(message)
        return found

    def _accept(self, messages: Sequence[Tokens]) -> list[Token]:
        """The tokens that come next. Ids a stage can't have are as bad as none."""
        position = len(self.request.prompt_ids) + len(self._tokens)
        new: list[Token] = []
        for token in (token for message in messages for token in message.tokens):
            if token.position < position:
                continue  # a late duplicate
            if token.position > position or not 0 <= token.id < self._vocab_size:
                reason = f"the tail sent id {token.id} for row {token.position}; row {position} was next"
                self._port.faulty_tail(self.key, self._lease, reason)
                self._break(reason)
                return []
            new.append(token)
            position += 1
        return new

    def _trim(self, tokens: Sequence[Token]) -> list[tuple[Token, TokenEvent]]:
        """Tokens with what they show, up to the one that ends the request."""
        pieces: list[tuple[Token, TokenEvent]] = []
        for token in tokens:
            event = self._event(len(self._tokens) + len(pieces), token)
            pieces.append((token, event))
            if event.finish_reason:
                break
        return pieces

    def _event(self, index: int, token: Token) -> TokenEvent:
        finish_reason = ""
        if token.id in self._stop_ids:
            finish_reason = "stop"
        elif index + 1 >= self.request.max_tokens:
            finish_reason = "length"
        piece = self._text.push(token.id, is_last=bool(finish_reason))
        if piece.is_stop:
            finish_reason = "stop"
        cached_tokens = 0 if index else self._cached_tokens
        return TokenEvent(index, token.id, piece.text, token.logprob, finish_reason, cached_tokens)

    def _show(self, token: Token) -> None:
        self._events.append(self._event(len(self._tokens), token))
        self._tokens.append(token)

    def _count(self, tokens: int) -> None:
        now = self._port.clock()
        self._port.committed(self._lease, tokens, now - self._last_commit_at if self._last_commit_at else 0.0)
        self._last_commit_at = now

    async def _on_rebind(self, message: Rebind) -> None:
        if self._tokens:
            await self._on_failed(message.error)
            self.ended = True
        elif self._journal is not None:
            await self._journal.rebind_request(self.request.id, message.class_map)

    async def _on_failed(self, error: EdgeRuntimeError) -> None:
        self._close()
        self.error = error
        if self._journal is not None:
            await self._journal.finish_request(self.request.id, FAILED, error.message)

    async def _on_cancelled(self) -> bool:
        """The journal keeps the request open: a reader who comes back gets its ids, and the rest."""
        if self._listeners > 0:
            return False
        self._close(self._kept())
        self.was_abandoned = True
        return True

    def _on_crashed(self) -> None:
        self.error = crashed()

    def _on_ended(self) -> None:
        before = self._drafts.counts
        self._drafts.forget()
        self._count_drafts(before)
        if self.error is None and not self.is_finished:
            self.error = RequestFailed(
                "the coordinator stopped before the request was finished",
                hint="resume it when the coordinator is back",
                code="not_ready",
            )
        self._wake()
