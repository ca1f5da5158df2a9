"""`/v1/chat/completions`: its table and its shapes.

Knows: this dialect. The flow from request to answer is in `handlers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from coordinator.api.errors import ApiError
from coordinator.api.openai.choices import Choice
from coordinator.api.openai.dialect import Json
from coordinator.api.openai.generation import COMMON, HARMLESS, MAX_TOKENS, MAX_TOP_LOGPROBS
from coordinator.api.openai.logprobs import TokenText, chat_entry
from coordinator.api.openai.parameters import Harmless, Parameter, Table, boolean, integer, one_of
from coordinator.service import TokenEvent

TABLE = Table(
    (
        *COMMON,
        Parameter("messages", "a list of messages with text", lambda value: value, is_required=True),
        Parameter(
            "max_completion_tokens", "1 or more; the newer name of `max_tokens`", integer(1, MAX_TOKENS)
        ),
        Parameter("logprobs", "true or false", boolean, False),
        Parameter("top_logprobs", f"0 to {MAX_TOP_LOGPROBS}, with `logprobs`", integer(0, MAX_TOP_LOGPROBS)),
    ),
    (
        *HARMLESS,
        Harmless("tools", "[]", one_of([])),
        Harmless("tool_choice", '"none" or "auto"', one_of("none", "auto")),
        Harmless("functions", "[]", one_of([])),
        Harmless("function_call", '"none" or "auto"', one_of("none", "auto")),
        Harmless("parallel_tool_calls", "true or false", one_of(True, False)),
        Harmless("response_format", '{"type": "text"}', one_of({"type": "text"})),
        Harmless("modalities", '["text"]', one_of(["text"])),
        Harmless("add_generation_prompt", "true", one_of(True)),
        Harmless("continue_final_message", "false", one_of(False)),
        Harmless("add_special_tokens", "false", one_of(False)),
    ),
)


def top_logprobs(values: dict[str, Any]) -> int:
    """SamplingParams.top_logprobs of a request: -1 where none were asked for."""
    if values["top_logprobs"] is not None and not values["logprobs"]:
        raise ApiError(
            "`top_logprobs` needs `logprobs` to be true.", code="invalid_value", param="top_logprobs"
        )
    return int(values["top_logprobs"] or 0) if values["logprobs"] else -1


def max_tokens(values: dict[str, Any]) -> tuple[int | None, str]:
    """The one limit of two names, and the name it came under."""
    old, new = values["max_tokens"], values["max_completion_tokens"]
    if old is not None and new is not None and old != new:
        raise ApiError(
            "`max_tokens` and `max_completion_tokens` say different things.",
            code="invalid_value",
            param="max_completion_tokens",
        )
    return (new, "max_completion_tokens") if new is not None else (old, "max_tokens")


@dataclass(slots=True)
class ChatDialect:
    """Messages and deltas."""

    text: TokenText
    with_logprobs: bool
    with_ids: bool
    whole_object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"
    _entries: dict[int, list[Json]] = field(default_factory=dict)  # choice -> its tokens' log-probabilities

    def opening(self, choice: Choice) -> Json | None:
        return _chunk(choice, {"role": "assistant", "content": ""})

    def piece(self, choice: Choice, event: TokenEvent) -> Json | None:
        entries = []
        if self.with_logprobs and event.logprob is not None:
            entries = [chat_entry(self.text, choice.previous, event.id, event.logprob)]
            self._entries.setdefault(choice.index, []).extend(entries)
        if not (event.text or entries or self.with_ids):
            return None
        piece = _chunk(choice, {"content": event.text}, entries)
        return piece | {"token_ids": [event.id]} if self.with_ids else piece

    def closing(self, choice: Choice) -> Json:
        return _chunk(choice, {}) | {"finish_reason": choice.finish_reason}

    def whole(self, choice: Choice) -> Json:
        entries = self._entries.get(choice.index, [])
        whole: Json = {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": {"content": entries, "refusal": None} if self.with_logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        return whole | {"token_ids": choice.ids} if self.with_ids else whole

    def extra(self, choices: list[Choice]) -> Json:
        return (
            {"prompt_token_ids": list(choices[0].prompt_ids)}
            if self.with_ids and choices[0].prompt_ids
            else {}
        )


def _chunk(choice: Choice, delta: Json, entries: list[Json] | None = None) -> Json:
    logprobs = {"content": entries, "refusal": None} if entries else None
    return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
