"""What every stream of tokens keeps of what it handed out, and how it is iterated and closed.

Knows: ids, texts, times. Does not know: where tokens come from.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator
from types import TracebackType
from typing import Self

from edge_runtime.sdk.results import Result, StreamToken, Timings, timings_of


class RecordedStream(ABC):
    """`async for token in stream`; afterwards `stream.result` has the whole.

    Leaving the loop early and closing it (`async with`, `aclose`) cancels the generation.
    """

    def __init__(self) -> None:
        self._events = self._run()
        self._ids: list[int] = []
        self._texts: list[str] = []
        self._finish_reason = ""
        self._started = self._last = time.perf_counter()
        self._first: float | None = None
        self.resumed = 0  # how often a broken connection was taken up again

    @abstractmethod
    def _run(self) -> AsyncGenerator[StreamToken, None]:
        """The tokens; closing it cancels."""

    @property
    @abstractmethod
    def result(self) -> Result:
        """What has come so far; the whole once the stream has ended."""

    def __aiter__(self) -> AsyncIterator[StreamToken]:
        return self._events

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._events.aclose()

    # ------------------------------------------------------------ the record

    def _begin_timing(self) -> None:
        self._started = self._last = time.perf_counter()

    def _arrived(self) -> None:
        """Tokens came now."""
        self._last = time.perf_counter()
        self._first = self._last if self._first is None else self._first

    def _record(self, identity: int, text: str) -> StreamToken:
        token = StreamToken(identity, text, len(self._ids))
        self._ids.append(identity)
        self._texts.append(text)
        return token

    def _timings(self, count: int | None = None) -> Timings:
        """Of `count` tokens, or of those recorded here."""
        return timings_of(self._started, self._first, self._last, len(self._ids) if count is None else count)
