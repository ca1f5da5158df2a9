"""An accepted request, answered: as one JSON body or as a stream of chunks.

Both ways go through the same choices and the same dialect, so they cannot disagree. Knows: the shape around choices,
usage, event ids. Does not know: how choices look in a dialect, or where events come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from coordinator.api.errors import error_body
from coordinator.api.openai.choices import Choice, Source, run_choices
from coordinator.api.openai.dialect import Dialect, Json
from coordinator.api.openai.ticket import Ticket
from coordinator.service import TokenEvent
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.server_events import DONE, KEEP_ALIVE, KEEP_ALIVE_SECONDS, EventStream, encode_event

REFUSAL_SECONDS = 0.2  # a refusal within this time becomes a status; later ones are told inside the stream


@dataclass(frozen=True, slots=True)
class Answer:
    """Everything needed to answer, but the events."""

    request_id: str
    ticket: Ticket
    model: str
    fingerprint: str  # of the bundle: another bundle may answer the same seed differently
    dialect: Dialect
    choices: list[Choice]

    def _head(self, kind: str) -> Json:
        return {
            "id": self.request_id,
            "object": kind,
            "created": self.ticket.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "seed": self.ticket.seed,
        }

    def usage(self) -> Json:
        """A prompt counts once, however many choices it has: so do its cached tokens."""
        generated = sum(len(choice.ids) for choice in self.choices)
        cached = sum(choice.cached_tokens for choice in self.choices if choice.copy == 0)
        accepted = sum(choice.accepted_drafts for choice in self.choices)
        rejected = sum(choice.wasted_drafts for choice in self.choices)
        usage: Json = {
            "prompt_tokens": self.ticket.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.ticket.prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if accepted or rejected:
            usage["completion_tokens_details"] = {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": rejected,
            }
        return usage

    def _chunk(self, entries: Sequence[Json], more: Json | None = None) -> Json:
        head = self._head(self.dialect.chunk_object) | (more or {}) | {"choices": list(entries)}
        return head | {"usage": None} if self.ticket.include_usage else head

    def _event_id(self) -> str:
        return f"{self.request_id}/{'.'.join(str(len(choice.ids)) for choice in self.choices)}"

    async def whole(self, sources: Sequence[Source]) -> web.Response:
        """Wait for every choice, then answer once."""

        async def deliver(index: int, event: TokenEvent) -> None:
            self.dialect.piece(self.choices[index], event)
            self.choices[index].absorb(event)

        async def idle() -> None:
            pass

        seconds = KEEP_ALIVE_SECONDS
        await run_choices(sources, deliver, idle=idle, first_idle_seconds=seconds, idle_seconds=seconds)
        body = self._head(self.dialect.whole_object) | self.dialect.extra(self.choices)
        body |= {"choices": [self.dialect.whole(choice) for choice in self.choices], "usage": self.usage()}
        return web.json_response(body, headers={"X-Request-Id": self.request_id})

    async def stream(
        self, request: web.Request, sources: Sequence[Source], seen: Sequence[int] = ()
    ) -> web.StreamResponse:
        """`seen`: how many tokens of each choice the client has already, when it comes back."""
        stream = EventStream(request, {"X-Request-Id": self.request_id})
        writer = _StreamWriter(self, stream, list(seen) or [0] * len(self.choices))
        try:
            await run_choices(
                sources,
                writer.deliver,
                idle=writer.idle,
                first_idle_seconds=REFUSAL_SECONDS,
                idle_seconds=KEEP_ALIVE_SECONDS,
            )
        except EdgeRuntimeError as error:
            if not stream.is_started:
                raise
            await stream.write(encode_event(error_body(error)))
        else:
            await writer.finish()
        return stream.response


class _StreamWriter:
    """Writes the chunks of one stream."""

    def __init__(self, answer: Answer, stream: EventStream, seen: list[int]) -> None:
        self._answer = answer
        self._stream = stream
        self._seen = seen

    async def idle(self) -> None:
        if self._stream.is_started:
            await self._stream.write(KEEP_ALIVE)
        else:
            await self._start()

    async def _start(self) -> None:
        answer = self._answer
        await self._stream.start()
        for choice in answer.choices:
            entry = None if self._seen[choice.index] else answer.dialect.opening(choice)
            if entry is not None:
                extra = answer.dialect.extra(answer.choices) if choice.index == 0 else None
                await self._stream.write(encode_event(answer._chunk([entry], extra)))

    async def deliver(self, index: int, event: TokenEvent) -> None:
        answer, choice = self._answer, self._answer.choices[index]
        if not self._stream.is_started:
            await self._start()
        is_new = len(choice.ids) >= self._seen[index]
        entry = answer.dialect.piece(choice, event)
        choice.absorb(event)
        if is_new and entry is not None:
            await self._send(entry)
        if event.finish_reason:
            await self._send(answer.dialect.closing(choice))

    async def _send(self, entry: Json) -> None:
        chunk = self._answer._chunk([entry])
        await self._stream.write(encode_event(chunk, event_id=self._answer._event_id()))

    async def finish(self) -> None:
        answer = self._answer
        if answer.ticket.include_usage:
            await self._stream.write(encode_event(answer._chunk([]) | {"usage": answer.usage()}))
        await self._stream.write(DONE)
