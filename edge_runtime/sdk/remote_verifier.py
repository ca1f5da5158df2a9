"""RemoteVerifier: AsyncRemoteVerifier for programs without an event loop.

Knows: how to wait for the other one. Does not know: servers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Unpack

from edge_runtime.sdk.async_verifier import AsyncRemoteVerifier, VerifyOptions
from edge_runtime.sdk.loop_thread import LoopThread
from edge_runtime.sdk.results import Result, StreamToken
from edge_runtime.sdk.verifier_check import AUTO, Server
from edge_runtime.sdk.verifier_link import SILENCE_SECONDS
from edge_runtime.sdk.verifier_stream import VerifiedStream
from edge_runtime.sdk.verifier_windows import Usage


class VerifiedTokens:
    """`for token in stream`; afterwards `stream.result` has the whole. Closing it early cancels the generation."""

    def __init__(self, thread: LoopThread, stream: VerifiedStream) -> None:
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

    def __enter__(self) -> VerifiedTokens:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._thread.call(self._stream.aclose())

    @property
    def result(self) -> Result:
        return self._stream.result

    @property
    def usage(self) -> Usage:
        return self._stream.usage


class RemoteVerifier:
    """AsyncRemoteVerifier for programs without an event loop: `with RemoteVerifier(url, tokenizer=PATH) as server`."""

    def __init__(
        self,
        url: str,
        *,
        tokenizer: str | Path,
        draft: str | Path = "auto",
        dialect: str = AUTO,
        model: str = "",
        stop_token_ids: Iterable[int] = (),
        api_key: str = "",
        ca_file: Path | None = None,
        timeout_seconds: float = SILENCE_SECONDS,
        allow_plain_http: bool = False,
    ) -> None:
        """As AsyncRemoteVerifier."""
        self._verifier = AsyncRemoteVerifier(
            url,
            tokenizer=tokenizer,
            draft=draft,
            dialect=dialect,
            model=model,
            stop_token_ids=stop_token_ids,
            api_key=api_key,
            ca_file=ca_file,
            timeout_seconds=timeout_seconds,
            allow_plain_http=allow_plain_http,
        )
        self._thread = LoopThread("edge-runtime-verifier")
        self._closed = False

    def __enter__(self) -> RemoteVerifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._thread.call(self._verifier.close())
            self._thread.close()

    @property
    def url(self) -> str:
        return self._verifier.url

    @property
    def requests(self) -> int:
        return self._verifier.requests

    def server(self) -> Server:
        return self._thread.call(self._verifier.server())

    def generate(self, prompt: str | Sequence[int], **options: Unpack[VerifyOptions]) -> Result:
        return self._thread.call(self._verifier.generate(prompt, **options))

    def stream(self, prompt: str | Sequence[int], **options: Unpack[VerifyOptions]) -> VerifiedTokens:
        return VerifiedTokens(self._thread, self._verifier.stream(prompt, **options))
