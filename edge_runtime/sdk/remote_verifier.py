"""RemoteVerifier: AsyncRemoteVerifier for programs without an event loop.

Knows: how to wait for the other one. Does not know: servers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Unpack

from edge_runtime.sdk.async_verifier import AsyncRemoteVerifier, VerifyOptions
from edge_runtime.sdk.blocking import Blocking, BlockingStream
from edge_runtime.sdk.results import Result
from edge_runtime.sdk.verifier_check import AUTO, Server
from edge_runtime.sdk.verifier_link import SILENCE_SECONDS
from edge_runtime.sdk.verifier_stream import VerifiedStream
from edge_runtime.sdk.verifier_windows import Usage


class VerifiedTokens(BlockingStream[VerifiedStream]):
    """As BlockingStream. `usage`: what it cost the server."""

    @property
    def usage(self) -> Usage:
        return self._stream.usage


class RemoteVerifier(Blocking):
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
        super().__init__(self._verifier, "edge-runtime-verifier")

    @property
    def url(self) -> str:
        return self._verifier.url

    @property
    def requests(self) -> int:
        return self._verifier.requests

    def server(self) -> Server:
        return self._wait(self._verifier.server())

    def generate(self, prompt: str | Sequence[int], **options: Unpack[VerifyOptions]) -> Result:
        return self._wait(self._verifier.generate(prompt, **options))

    def stream(self, prompt: str | Sequence[int], **options: Unpack[VerifyOptions]) -> VerifiedTokens:
        return VerifiedTokens(self._thread, self._verifier.stream(prompt, **options))
