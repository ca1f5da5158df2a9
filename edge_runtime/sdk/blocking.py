"""What runs on an event loop, for programs without one: streams, and whoever owns the loop's thread.

Knows: how to wait for a coroutine on another thread. Does not know: servers.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from typing import Any, Generic, TypeVar

from edge_runtime.sdk.closing import AsyncClosing, Closing
from edge_runtime.sdk.loop_thread import LoopThread
from edge_runtime.sdk.results import Result, StreamToken
from edge_runtime.sdk.token_record import RecordedStream

Stream = TypeVar("Stream", bound=RecordedStream)
Value = TypeVar("Value")


class BlockingStream(Closing, Generic[Stream]):
    """`for token in stream`; afterwards `stream.result` has the whole. Closing it early cancels the generation."""

    def __init__(self, thread: LoopThread, stream: Stream) -> None:
        self._thread = thread
        self._stream = stream
        self._tokens = aiter(stream)

    def __iter__(self) -> Iterator[StreamToken]:
        return self

    def __next__(self) -> StreamToken:
        token = self._thread.call(self._next())
        if token is None:
            raise StopIteration
        return token

    async def _next(self) -> StreamToken | None:
        # None for the end: a StopAsyncIteration can't travel through a future.
        return await anext(self._tokens, None)

    def close(self) -> None:
        self._thread.call(self._stream.aclose())

    @property
    def result(self) -> Result:
        return self._stream.result


class Blocking(Closing):
    """Owns an asynchronous client and the thread its loop runs on; closing it closes both."""

    def __init__(self, client: AsyncClosing, thread_name: str) -> None:
        self._owned = client
        self._thread = LoopThread(thread_name)
        self._closed = False

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._thread.call(self._owned.close())
            self._thread.close()

    def _wait(self, coroutine: Coroutine[Any, Any, Value]) -> Value:
        return self._thread.call(coroutine)
