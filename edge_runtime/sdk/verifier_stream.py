"""One generation over somebody else's server: windows of drafts, or its own stream where that is faster.

Knows: the order of drafting, asking and committing; what a broken connection means (ask again from what is certain).
Does not know: formats, how to choose (`pace`), where drafts come from.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

from edge_runtime.errors import ConnectionClosed, ProtocolError
from edge_runtime.sdk.results import Result, StreamToken
from edge_runtime.sdk.token_record import RecordedStream
from edge_runtime.sdk.verifier_drafter import RemoteDrafter
from edge_runtime.sdk.verifier_link import Pauses, VerifierLink
from edge_runtime.sdk.verifier_windows import Answer, Usage, Windows
from edge_runtime.speculative.verifiers.base import UNKNOWN, Decoded, Dialect, Window
from edge_runtime.speculative.verifiers.completions import nameless
from edge_runtime.speculative.verifiers.pace import Pace
from edge_runtime.speculative.verifiers.progress import STOP, Progress
from edge_runtime.text import Decoder, TextStream

DRAFTING_SHARE = 0.25  # of the time of a stream
SETTLE_TOKENS = 2  # one to see again, one to see whether another follows


@dataclass(frozen=True, slots=True)
class Parts:
    """What a stream works with, once the server was examined."""

    link: VerifierLink
    dialect: Dialect
    pace: Pace
    drafter: RemoteDrafter
    progress: Progress
    tokenizer: Decoder
    stops: tuple[str, ...]
    model: str


Open = Callable[[], Awaitable[Parts]]
Release = Callable[[], None]


class VerifiedStream(RecordedStream):
    """One generation of another server's. `usage`: what it cost that server."""

    def __init__(self, open_parts: Open, release: Release) -> None:
        super().__init__()
        self._open_parts = open_parts
        self._release = release
        self._parts: Parts | None = None
        self.usage = Usage()

    @property
    def result(self) -> Result:
        """What has come so far; the whole once the stream has ended."""
        progress = self._parts.progress if self._parts else None
        return Result(
            text="".join(self._texts),
            token_ids=tuple(self._ids),
            finish_reason=self._finish_reason,
            timings=self._timings(),
            prompt_token_ids=tuple(progress.ids[: progress.prompt_tokens]) if progress else (),
            request_id="",
            seed=0,
            model=self._parts.model if self._parts else "",
            accepted_draft_tokens=self.usage.accepted_drafts,
            rejected_draft_tokens=self.usage.rejected_drafts,
        )

    # ------------------------------------------------------------ the caller's side

    async def _run(self) -> AsyncGenerator[StreamToken, None]:
        self._parts = parts = await self._open_parts()
        before = parts.link.requests
        self._begin_timing()
        is_whole = False
        try:
            await parts.drafter.begin(parts.progress.ids)
            async with contextlib.aclosing(self._texts_of(parts)) as tokens:
                async for token in tokens:
                    self.usage.requests = parts.link.requests - before
                    yield token
            self._finish_reason, is_whole = parts.progress.finish, True
        finally:
            self.usage.requests = parts.link.requests - before
            try:
                await parts.drafter.end(learn=is_whole)
            finally:
                self._release()

    async def _texts_of(self, parts: Parts) -> AsyncGenerator[StreamToken, None]:
        """Until the text ends, or a stop string does it."""
        text = TextStream(parts.tokenizer, parts.progress.ids, parts.stops)
        async with contextlib.aclosing(self._generate(parts)) as steps:
            async for ids in steps:
                for place, token in enumerate(ids):
                    is_last = bool(parts.progress.finish) and place == len(ids) - 1
                    piece = text.push(token, is_last=is_last)
                    if piece.is_stop:
                        parts.progress.finish = STOP
                    yield self._hand_out(token, piece.text)
                    if piece.is_stop:
                        return

    def _hand_out(self, token: int, text: str) -> StreamToken:
        self._arrived()
        return self._record(token, text)

    # ------------------------------------------------------------ drafting, asking, committing

    async def _generate(self, parts: Parts) -> AsyncGenerator[list[int], None]:
        """New ids, a step at a time, until the text ends."""
        windows = Windows(parts.link, parts.dialect, self.usage)
        try:
            while not parts.progress.finish:
                window = await windows.next_for(parts.progress.ids) or await self._window(parts)
                if window is not None:
                    answer = await windows.ask(window, self._ahead(parts, window))
                    yield await self._judged(parts, answer)
                    continue
                async with contextlib.aclosing(self._stream(parts)) as steps:
                    async for ids in steps:
                        yield ids
        finally:
            await windows.close()

    async def _window(self, parts: Parts) -> Window | None:
        """The drafts that are worth sending now; None where the server's stream is better."""
        await self._draft(parts)
        count = self._choose(parts, is_streaming=False)
        return Window(tuple(parts.progress.ids), parts.drafter.drafts[:count]) if count else None

    async def _draft(self, parts: Parts) -> float:
        source = parts.drafter.proposal.source  # of the last drafts; a chooser may take another now
        seconds = await parts.drafter.draft(parts.pace.wanted(source))
        parts.pace.drafted(parts.drafter.proposal.source, len(parts.drafter.drafts), seconds)
        return seconds

    def _choose(self, parts: Parts, *, is_streaming: bool) -> int:
        chances = parts.drafter.probabilities[: self._useful(parts)]
        return parts.pace.choose(parts.drafter.proposal.source, chances, is_streaming=is_streaming)

    def _useful(self, parts: Parts) -> int:
        """Drafts at hand that can still come. The last id of all is the server's own: one draft less is of use."""
        return parts.progress.useful(parts.drafter.drafts[: max(0, parts.progress.room - 1)])

    def _ahead(self, parts: Parts, window: Window) -> Window | None:
        """What to send behind `window`, as if its drafts stood and the draft after them were the server's own id."""
        drafts, chances = parts.drafter.drafts, parts.drafter.probabilities
        supposed = len(window.drafts) + 1
        count = parts.pace.ahead(parts.drafter.proposal.source, chances[: self._useful(parts)], supposed)
        if not count:
            return None
        return Window((*window.ids, *drafts[:supposed]), drafts[supposed : supposed + count])

    async def _judged(self, parts: Parts, answer: Answer) -> list[int]:
        window, verdict = answer.window, answer.verdict
        count, accepted = len(window.drafts), verdict.accepted(window)
        parts.pace.verified(count, answer.seconds)
        self.usage.accepted_drafts += accepted
        self.usage.rejected_drafts += count - accepted
        for index, chance in enumerate(parts.drafter.probabilities[: min(accepted + 1, count)]):
            parts.pace.chances.judged(parts.drafter.proposal.source, chance, is_right=index < accepted)
        own = verdict.own[accepted]
        if own == UNKNOWN and not accepted:
            raise nameless()
        certain = [*window.drafts[:accepted], *([] if own == UNKNOWN else [own])]
        return await self._commit(parts, certain, ended=verdict.ended and accepted == count)

    async def _stream(self, parts: Parts) -> AsyncGenerator[list[int], None]:
        """The server's own decoding, until drafts are worth more. A broken stream is asked for again."""
        pause = Pauses()
        while not parts.progress.finish:
            had = parts.progress.generated
            try:
                async with contextlib.aclosing(self._one_stream(parts)) as steps:
                    async for ids in steps:
                        yield ids
                return
            except ConnectionClosed:
                if parts.progress.generated > had:
                    pause = Pauses()
                self.resumed += 1
                if not await pause.again():
                    raise

    async def _one_stream(self, parts: Parts) -> AsyncGenerator[list[int], None]:
        progress, pace = parts.progress, parts.pace
        body = parts.dialect.decode_body(tuple(progress.ids), progress.room, ignore_end=progress.ignore_end)
        self.usage.prompt_tokens += len(progress.ids)
        have, drafting_seconds = 0, 0.0
        began = last = time.perf_counter()
        async with parts.link.events(parts.dialect.path, body) as events:
            async for event in events:
                piece = parts.dialect.read_event(event, have)
                now = time.perf_counter()
                if piece.ids and not have:
                    pace.stream_began(now - began)
                elif piece.ids:
                    pace.streamed(len(piece.ids), now - last)
                have, last = have + len(piece.ids), now
                if piece.ids:
                    yield await self._streamed(parts, piece)
                elif piece.ended:
                    progress.finish = STOP  # it ends without an id of its own
                if piece.finished and not (have or progress.finish):
                    raise ProtocolError("the server generated nothing, and does not say why")
                if piece.finished or progress.finish:
                    break
                # A slow drafter must not slow the stream.
                if drafting_seconds < DRAFTING_SHARE * (now - began):
                    drafting_seconds += await self._draft(parts)
                if self._choose(parts, is_streaming=True):
                    break
            pace.stream_ended(have)

    async def _streamed(self, parts: Parts, piece: Decoded) -> list[int]:
        if len(piece.ids) > parts.progress.room:
            raise ProtocolError("the server generated more tokens than it was asked for")
        drafter, source = parts.drafter, parts.drafter.proposal.source
        # Drafts that were not sent show their worth all the same.
        for draft, chance, token in zip(drafter.drafts, drafter.probabilities, piece.ids, strict=False):
            parts.pace.chances.judged(source, chance, is_right=draft == token)
            if draft != token:
                break
        return await self._commit(parts, list(piece.ids), ended=piece.ended, is_decoded=True)

    async def _commit(
        self, parts: Parts, ids: list[int], *, ended: bool, is_decoded: bool = False
    ) -> list[int]:
        """The ids that count: up to an end, or up to the limit. `is_decoded`: the server went on after them itself."""
        progress = parts.progress
        certain: list[int] = []
        for place, token in enumerate(ids):
            is_last = place == len(ids) - 1
            if not is_decoded and progress.is_doubtful(token) and not (ended and is_last):
                await parts.drafter.committed(certain)
                return certain + await self._settle(parts)
            if ended and is_last and progress.is_doubtful(token):
                progress.learn(token, ends=True)
            progress.commit(token, ended=ended and is_last)
            certain.append(token)
            if progress.finish:
                break
        await parts.drafter.committed(certain)
        return certain

    async def _settle(self, parts: Parts) -> list[int]:
        """The next id may end the text: the server decodes it, and another one or none."""
        progress = parts.progress
        found: tuple[int, ...] = ()
        ended, pause = False, Pauses()
        while not found and not ended:
            body = parts.dialect.decode_body(tuple(progress.ids), SETTLE_TOKENS, ignore_end=False)
            try:
                async with parts.link.events(parts.dialect.path, body) as events:
                    async for event in events:
                        piece = parts.dialect.read_event(event, len(found))
                        found, ended = found + piece.ids, ended or piece.ended
                        if piece.finished:
                            break
            except ConnectionClosed:
                found = ()
                if not await pause.again():
                    raise
        self.usage.prompt_tokens += len(progress.ids)
        if found:
            progress.learn(found[0], ends=ended and len(found) == 1)
        if not found:
            progress.finish = STOP
        kept: list[int] = []
        for place, token in enumerate(found):
            progress.commit(token, ended=ended and place == len(found) - 1)
            kept.append(token)
            if progress.finish:
                break
        await parts.drafter.committed(kept)
        return kept
