"""The choices of one request: what each has so far, and their events as one flow.

Knows: how several generations run side by side, end together, and are given up together. Does not know: dialects, HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from coordinator.api.metrics import GenerationMetrics
from coordinator.service import TokenEvent
from edge_runtime.errors import EdgeRuntimeError, RequestFailed

QUEUE_EVENTS = 64  # a reader that is slower than this holds its generations back

Deliver = Callable[[int, TokenEvent], Awaitable[None]]


@dataclass(slots=True)
class Choice:
    """One choice as far as it has come. `previous` is the id its next token follows."""

    index: int
    previous: int | None = None
    prompt_ids: tuple[int, ...] = ()
    texts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    token_characters: int = 0  # of the tokens' own texts: where the next one starts
    copy: int = 0  # of its prompt: 0 to n - 1
    cached_tokens: int = 0  # of its prompt, that needed no computing
    accepted_drafts: int = 0
    wasted_drafts: int = 0

    def absorb(self, event: TokenEvent) -> None:
        self.texts.append(event.text)
        self.ids.append(event.id)
        self.previous = event.id
        self.finish_reason = event.finish_reason
        self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        self.accepted_drafts += event.accepted_drafts
        self.wasted_drafts += event.wasted_drafts

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a choice's events come from."""

    events: AsyncIterator[TokenEvent]
    metrics: GenerationMetrics | None = None  # None where a stream is only read again


@dataclass(frozen=True, slots=True)
class _End:
    error: EdgeRuntimeError | None = None


_Queue = asyncio.Queue[tuple[int, TokenEvent | _End]]


async def run_choices(
    sources: Sequence[Source],
    deliver: Deliver,
    *,
    idle: Callable[[], Awaitable[None]],
    first_idle_seconds: float,
    idle_seconds: float,
) -> None:
    """Deliver every event of every source, in order within each; `idle` runs whenever nothing came for a while.

    The first failure, of a source or of `deliver`, stops all sources. Every source is closed when this returns or
    raises, which is what cancels generations.
    """
    queue: _Queue = asyncio.Queue(QUEUE_EVENTS)
    try:
        async with asyncio.TaskGroup() as group:
            for index, source in enumerate(sources):
                group.create_task(_pump(index, source, queue))
            remaining, patience = len(sources), first_idle_seconds
            while remaining:
                try:
                    async with asyncio.timeout(patience):
                        index, item = await queue.get()
                except TimeoutError:
                    await idle()
                    patience = idle_seconds
                    continue
                patience = idle_seconds
                if isinstance(item, TokenEvent):
                    await deliver(index, item)
                elif item.error is not None:
                    raise item.error
                else:
                    remaining -= 1
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from None


async def _pump(index: int, source: Source, queue: _Queue) -> None:
    try:
        async with contextlib.aclosing(drained(source)) as events:
            async for event in events:
                await queue.put((index, event))
        await queue.put((index, _End()))
    except EdgeRuntimeError as error:
        await queue.put((index, _End(error)))


async def drained(source: Source) -> AsyncGenerator[TokenEvent, None]:
    """The events up to the one that finishes, counted in the metrics. Closing this closes the source, which cancels.

    Raises RequestFailed where the events end before that, and what the source raises.
    """
    finish_reason, failure = "", "cancelled"
    try:
        async for event in source.events:
            if source.metrics is not None:
                source.metrics.token(event.cached_tokens)
            finish_reason = event.finish_reason
            yield event
            if finish_reason:
                return
        raise RequestFailed("The generation ended before it was finished.")
    except EdgeRuntimeError as error:
        failure = error.code
        raise
    except Exception:
        failure = "internal_error"
        raise
    finally:
        if source.metrics is not None:
            if finish_reason:
                source.metrics.finished(finish_reason)
            else:
                source.metrics.failed(failure)
        await _close(source.events)


async def _close(events: AsyncIterator[TokenEvent]) -> None:
    """Closing is what cancels; iterators that are no generators have nothing to close."""
    close = getattr(events, "aclose", None)
    if close is not None:
        await close()
