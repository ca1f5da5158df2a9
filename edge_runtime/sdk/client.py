"""Client: AsyncClient for programs without an event loop.

Knows: how to wait for the other one. Does not know: HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from edge_runtime.sdk.async_client import NEVER_OFFLINE, NO_DRAFTS, AsyncClient, Vector
from edge_runtime.sdk.blocking import Blocking, BlockingStream
from edge_runtime.sdk.http import Json
from edge_runtime.sdk.options import GenerateOptions, Message
from edge_runtime.sdk.results import Result, Upgrade
from edge_runtime.sdk.token_stream import RESUME_SECONDS, AsyncTokenStream


class TokenStream(BlockingStream[AsyncTokenStream]):
    """As BlockingStream."""

    @property
    def answered_by(self) -> str:
        """ "target", or "draft" from the moment this device's draft model answers."""
        return self._stream.answered_by

    @property
    def resumed(self) -> int:
        return self._stream.resumed


class Client(Blocking):
    """`with Client(url, api_key=key) as client: print(client.generate("def f").text)`. Safe to use from many threads.

    What is not given comes from the settings (`edge-runtime config show`): `client.url`, `client.api_key`.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_seconds: float | None = None,
        draft: str | Path = NO_DRAFTS,
        offline: str = NEVER_OFFLINE,
        resume_seconds: float = RESUME_SECONDS,
    ) -> None:
        """`draft`: who guesses ahead on this device, "none", "suffix", "model", "auto" or a draft model's bundle.

        `offline`, `resume_seconds`: as AsyncClient.
        """
        self._client = AsyncClient(
            url,
            api_key=api_key,
            timeout_seconds=timeout_seconds,
            draft=draft,
            offline=offline,
            resume_seconds=resume_seconds,
        )
        super().__init__(self._client, "edge-runtime-client")

    @property
    def url(self) -> str:
        return self._client.url

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Result:
        """Continue a prompt (text or token ids) and wait for the whole."""
        return self._wait(self._client.generate(prompt, **options))

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> TokenStream:
        """`for token in client.stream(prompt)`: tokens as they come."""
        return TokenStream(self._thread, self._client.stream(prompt, **options))

    def chat(self, messages: str | Sequence[Message], **options: Unpack[GenerateOptions]) -> Result:
        """Answer a conversation: messages with role and content, or one text of the user's."""
        return self._wait(self._client.chat(messages, **options))

    def stream_chat(
        self, messages: str | Sequence[Message], **options: Unpack[GenerateOptions]
    ) -> TokenStream:
        return TokenStream(self._thread, self._client.stream_chat(messages, **options))

    def upgrade(self, answer: Result) -> Upgrade:
        """Ask the target what the draft model answered offline; says where the ids differ."""
        return self._wait(self._client.upgrade(answer))

    def embed(self, texts: str | Sequence[str]) -> list[Vector]:
        """One vector for each text."""
        return self._wait(self._client.embed(texts))

    def model(self) -> str:
        return self._wait(self._client.model())

    def models(self) -> list[Json]:
        return self._wait(self._client.models())

    def status(self) -> Json:
        """Devices, plan and requests as JSON (needs an administrator's key)."""
        return self._wait(self._client.status())

    def create_join_link(self) -> str:
        """A new one-use link that pairs a device: `edge-runtime agent --join LINK`."""
        return self._wait(self._client.create_join_link())

    def revoke(self, device: str) -> None:
        """Cut a device off, by name or id, for good."""
        self._wait(self._client.revoke(device))

    def ready(self) -> None:
        """Return if a pipeline can serve now; raise TransportError with the reason if not."""
        self._wait(self._client.ready())
