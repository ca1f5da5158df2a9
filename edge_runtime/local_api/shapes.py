"""Answers in OpenAI's two dialects, with the coordinator's fields (docs/http_api.md), made of ids and text.

A test compares every field with the coordinator's own answer. Knows: one choice without log-probabilities.
Does not know: where tokens come from, HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_runtime.local_api.draftable import Draftable

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Head:
    """What every chunk begins with. `created`: Unix seconds."""

    request_id: str
    created: int
    model: str
    fingerprint: str | None  # None: of no bundle that the coordinator serves
    seed: int
    prompt_ids: tuple[int, ...]


@dataclass(slots=True)
class Shapes:
    """The chunks of one answer, or its whole."""

    wanted: Draftable
    head: Head

    def opening(self) -> Json | None:
        """What a stream says before the first token."""
        with_ids, ids = self.wanted.with_ids, list(self.head.prompt_ids)
        if self.wanted.is_chat:
            more = {"prompt_token_ids": ids} if with_ids else {}
            return self._chunk([_delta({"role": "assistant", "content": ""})], more)
        if not with_ids:
            return None
        return self._chunk([_text("") | {"prompt_token_ids": ids, "token_ids": []}])

    def piece(self, identity: int, text: str) -> Json | None:
        """One token; None where it says nothing to the reader."""
        if not (text or self.wanted.with_ids):
            return None
        entry = _delta({"content": text}) if self.wanted.is_chat else _text(text)
        return self._chunk([entry | {"token_ids": [identity]} if self.wanted.with_ids else entry])

    def closing(self, finish_reason: str) -> Json:
        entry = _delta({}) if self.wanted.is_chat else _text("")
        return self._chunk([entry | {"finish_reason": finish_reason}])

    def usage(self, usage: Mapping[str, Any]) -> Json:
        return self._chunk([]) | {"usage": dict(usage)}

    def whole(self, text: str, ids: Sequence[int], finish_reason: str, usage: Mapping[str, Any]) -> Json:
        with_ids, prompt_ids = self.wanted.with_ids, list(self.head.prompt_ids)
        more: Json = {}
        if self.wanted.is_chat:
            message = {"role": "assistant", "content": text, "refusal": None}
            choice: Json = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
            choice |= {"token_ids": list(ids)} if with_ids else {}
            more = {"prompt_token_ids": prompt_ids} if with_ids else {}
        else:
            choice = _text(text) | {"finish_reason": finish_reason}
            choice |= {"prompt_token_ids": prompt_ids, "token_ids": list(ids)} if with_ids else {}
        kind = "chat.completion" if self.wanted.is_chat else "text_completion"
        return self._head(kind) | more | {"choices": [choice], "usage": dict(usage)}

    def event_id(self, tokens: int) -> str:
        """What a client that lost the stream says to the coordinator."""
        return f"{self.head.request_id}/{tokens}"

    def _head(self, kind: str) -> Json:
        head = self.head
        return {
            "id": head.request_id,
            "object": kind,
            "created": head.created,
            "model": head.model,
            "system_fingerprint": head.fingerprint,
            "seed": head.seed,
        }

    def _chunk(self, entries: Sequence[Json], more: Mapping[str, Any] | None = None) -> Json:
        kind = "chat.completion.chunk" if self.wanted.is_chat else "text_completion"
        chunk = self._head(kind) | dict(more or {}) | {"choices": list(entries)}
        return chunk | {"usage": None} if self.wanted.include_usage else chunk


def plain_usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Where no coordinator counted."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def _delta(delta: Json) -> Json:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}


def _text(text: str) -> Json:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
