"""`/v1/completions`: its table and its shapes.

Knows: this dialect. The flow from request to answer is in `handlers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from coordinator.api.openai.choices import Choice
from coordinator.api.openai.dialect import Json
from coordinator.api.openai.generation import COMMON, HARMLESS, MAX_CHOICES, MAX_TOP_LOGPROBS
from coordinator.api.openai.logprobs import CompletionLogprobs, TokenText
from coordinator.api.openai.parameters import Harmless, Parameter, Table, integer, one_of
from coordinator.service import TokenEvent

TABLE = Table(
    (
        *COMMON,
        Parameter(
            "prompt",
            f"a string, token ids, or a list of up to {MAX_CHOICES} of those",
            lambda value: value,
            is_required=True,
        ),
        Parameter("logprobs", f"0 to {MAX_TOP_LOGPROBS}", integer(0, MAX_TOP_LOGPROBS)),
    ),
    (
        *HARMLESS,
        Harmless("best_of", "1", one_of(1)),
        Harmless("echo", "false", one_of(False)),
        Harmless("suffix", '""', one_of("")),
        Harmless("add_special_tokens", "true", one_of(True)),
    ),
)


def top_logprobs(values: dict[str, Any]) -> int:
    """SamplingParams.top_logprobs of a request: -1 where none were asked for."""
    return -1 if values["logprobs"] is None else int(values["logprobs"])


def max_tokens(values: dict[str, Any]) -> tuple[int | None, str]:
    return values["max_tokens"], "max_tokens"


@dataclass(slots=True)
class CompletionDialect:
    """Bare text."""

    text: TokenText
    with_logprobs: bool
    with_ids: bool
    whole_object: str = "text_completion"
    chunk_object: str = "text_completion"
    _lists: dict[int, CompletionLogprobs] = field(default_factory=dict)  # choice -> its log-probabilities

    def opening(self, choice: Choice) -> Json | None:
        if not self.with_ids:
            return None
        return _entry(choice, "", None) | {"prompt_token_ids": list(choice.prompt_ids), "token_ids": []}

    def piece(self, choice: Choice, event: TokenEvent) -> Json | None:
        logprobs = None
        if self.with_logprobs and event.logprob is not None:
            logprobs = CompletionLogprobs.of(
                self.text, choice.previous, event.id, event.logprob, choice.token_characters
            )
            choice.token_characters += len(logprobs.tokens[0])
            self._keep(choice, logprobs)
        if not (event.text or logprobs or self.with_ids):
            return None
        piece = _entry(choice, event.text, logprobs)
        return piece | {"token_ids": [event.id]} if self.with_ids else piece

    def _keep(self, choice: Choice, logprobs: CompletionLogprobs) -> None:
        self._lists.setdefault(choice.index, CompletionLogprobs([], [], [], [])).extend(logprobs)

    def closing(self, choice: Choice) -> Json:
        return _entry(choice, "", None) | {"finish_reason": choice.finish_reason}

    def whole(self, choice: Choice) -> Json:
        whole = _entry(choice, choice.text, self._lists.get(choice.index))
        whole["finish_reason"] = choice.finish_reason
        if self.with_ids:
            whole |= {"prompt_token_ids": list(choice.prompt_ids), "token_ids": choice.ids}
        return whole

    def extra(self, choices: list[Choice]) -> Json:
        return {}


def _entry(choice: Choice, text: str, logprobs: CompletionLogprobs | None) -> Json:
    return {
        "index": choice.index,
        "text": text,
        "logprobs": logprobs.body() if logprobs else None,
        "finish_reason": None,
    }
