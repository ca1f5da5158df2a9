"""AsyncClient: a coordinator's API as Python calls.

Knows: endpoints and their shapes. Does not know: threads, processes.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np
from numpy.typing import NDArray

from edge_runtime.config import load
from edge_runtime.errors import ProtocolError, UsageError
from edge_runtime.sdk.closing import AsyncClosing
from edge_runtime.sdk.http import HttpSession, Json
from edge_runtime.sdk.options import GenerateOptions, Message, to_body, to_messages, to_prompt
from edge_runtime.sdk.results import DRAFT, Question, Result, Upgrade, first_difference
from edge_runtime.sdk.token_stream import RESUME_SECONDS, AsyncTokenStream

if TYPE_CHECKING:
    from edge_runtime.sdk.drafting import Drafting
    from edge_runtime.sdk.offline import OfflineModel

NO_DRAFTS = "none"
NEVER_OFFLINE = "never"
SEED_BITS = 53  # of a seed we draw: exact in every JSON reader
Vector = NDArray[np.float32]


class AsyncClient(AsyncClosing):
    """`async with AsyncClient(url, api_key=key) as client: result = await client.generate("def f")`.

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

        Drafts change no id, only how fast they come. Four requests of a client are drafted for at a time, each with
        a drafter (and its model) of its own; more come without drafts.

        `offline="draft"`: where the target can't be reached, or a link stays broken for `resume_seconds`, the draft
        model answers alone, and the result says so (`answered_by`); `upgrade` asks the target later. Also an option of
        each call. Raises UsageError.
        """
        settings = load(
            {"client.url": url, "client.api_key": api_key, "client.timeout_seconds": timeout_seconds}
        ).client
        self._http = HttpSession(settings.url, settings.api_key, settings.timeout_seconds)
        self._model = ""
        self._draft, self._resume_seconds = draft, resume_seconds
        self._offline = offline
        self._offline_model: OfflineModel | None = None
        self._may_answer_offline(offline)
        self._drafting = None if str(draft) == NO_DRAFTS else _drafting(self._http, draft)

    async def close(self) -> None:
        if self._drafting is not None:
            await self._drafting.close()
        if self._offline_model is not None:
            await self._offline_model.close()
        await self._http.close()

    @property
    def url(self) -> str:
        return self._http.url

    # ------------------------------------------------------------ generation

    async def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Result:
        """Continue a prompt (text or token ids) and wait for the whole."""
        return await _whole(self.stream(prompt, **options))

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> AsyncTokenStream:
        """`async for token in client.stream(prompt)`: tokens as they come."""
        body = {"prompt": to_prompt(prompt), **to_body(options)}
        return self._stream("/v1/completions", body, options.get("offline"))

    async def chat(self, messages: str | Sequence[Message], **options: Unpack[GenerateOptions]) -> Result:
        """Answer a conversation: messages with role and content, or one text of the user's."""
        return await _whole(self.stream_chat(messages, **options))

    def stream_chat(
        self, messages: str | Sequence[Message], **options: Unpack[GenerateOptions]
    ) -> AsyncTokenStream:
        """`async for token in client.stream_chat("hello")`."""
        body = {"messages": to_messages(messages), **to_body(options)}
        return self._stream("/v1/chat/completions", body, options.get("offline"))

    async def upgrade(self, answer: Result) -> Upgrade:
        """Ask the target what the draft model answered: the same prompt, options and seed.

        Raises UsageError for an answer that is the target's already.
        """
        question = answer.question
        if answer.answered_by != DRAFT or question is None:
            raise UsageError("this answer is the target's: there is nothing to upgrade")
        result = await _whole(self._stream(question.path, dict(question.body), NEVER_OFFLINE))
        return Upgrade(result, first_difference(answer.token_ids, result.token_ids))

    def _stream(self, path: str, body: Json, offline: str | None) -> AsyncTokenStream:
        may_answer = self._may_answer_offline(self._offline if offline is None else offline)
        if may_answer and "seed" not in body:
            body = {**body, "seed": secrets.randbits(SEED_BITS)}  # the same, whoever answers
        stream = self._asking(path, body)
        if not may_answer or self._offline_model is None:
            return stream
        from edge_runtime.sdk.offline_stream import OfflineTokenStream

        return OfflineTokenStream(self._http, stream, self._offline_model, Question(path, body))

    def _asking(self, path: str, body: Json) -> AsyncTokenStream:
        """A stream of the target's."""
        resume_seconds = self._resume_seconds
        if self._drafting is None:
            return AsyncTokenStream(
                self._http, path, lambda: self._with_model(body), resume_seconds=resume_seconds
            )
        from edge_runtime.sdk.draft_stream import DraftTokenStream

        return DraftTokenStream(
            self._drafting, path, lambda: self._with_model(body), resume_seconds=resume_seconds
        )

    def _may_answer_offline(self, choice: str) -> bool:
        """Raises UsageError for what is no choice, or where there is no draft model to answer."""
        if choice == NEVER_OFFLINE:
            return False
        from edge_runtime.sdk.offline import is_allowed, offline_model

        if is_allowed(choice) and self._offline_model is None:
            self._offline_model = offline_model(self._draft)
        return True

    async def _with_model(self, body: Json) -> Json:
        return {"model": await self.model(), **body}

    async def embed(self, texts: str | Sequence[str]) -> list[Vector]:
        """One vector for each text."""
        inputs = [texts] if isinstance(texts, str) else list(texts)
        if not inputs:
            return []
        answer = await self._http.json(
            "POST", "/v1/embeddings", {"model": await self.model(), "input": inputs}
        )
        try:
            items = sorted(answer["data"], key=lambda item: int(item["index"]))
            return [np.asarray(item["embedding"], dtype=np.float32) for item in items]
        except (KeyError, TypeError, ValueError):
            raise ProtocolError("the coordinator's embeddings have an unknown shape") from None

    # ------------------------------------------------------------ the coordinator

    async def model(self) -> str:
        """The name of the model served; asked for once."""
        if not self._model:
            models = await self.models()
            if not models:
                raise ProtocolError("the coordinator serves no model")
            self._model = str(models[0]["id"])
        return self._model

    async def models(self) -> list[Json]:
        answer = await self._http.json("GET", "/v1/models")
        return list(answer.get("data") or ())

    async def status(self) -> Json:
        """Devices, plan and requests as JSON (needs an administrator's key)."""
        return await self._http.json("GET", "/admin/status")

    async def create_join_link(self) -> str:
        """A new one-use link that pairs a device: `edge-runtime agent --join LINK`."""
        return str((await self._http.json("POST", "/admin/join-links"))["link"])

    async def revoke(self, device: str) -> None:
        """Cut a device off, by name or id, for good."""
        from urllib.parse import quote

        await self._http.json("POST", f"/admin/devices/{quote(device, safe='')}/revoke")

    async def ready(self) -> None:
        """Return if a pipeline can serve now; raise TransportError with the reason if not."""
        await self._http.json("GET", "/ready", retries=0)


def _drafting(http: HttpSession, draft: str | Path) -> Drafting:
    from edge_runtime.sdk.drafting import Drafting

    return Drafting(http, draft)


async def _whole(stream: AsyncTokenStream) -> Result:
    async with stream:
        async for _ in stream:
            pass
    return stream.result
