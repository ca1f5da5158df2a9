"""vLLM's own extension of completions: `prompt_logprobs`, for each place the prompt's token and the likeliest one.

`choices[0].prompt_logprobs` is a list as long as the prompt: first null, then objects of
"id" -> {"logprob", "rank", "decoded_token"}. vLLM does not read its prefix cache for such a request (what is cached has
no log-probabilities), so the whole prompt is computed every time: `cheapest.py` knows better ways for long texts.

Knows: this format. Does not know: HTTP, what becomes of a verdict.
"""

from __future__ import annotations

from typing import Any

from edge_runtime.errors import ProtocolError
from edge_runtime.speculative.verifiers.base import (
    NO_PROMPT_LOGPROBS,
    Json,
    Verdict,
    Window,
    as_id,
    at,
    object_at,
)
from edge_runtime.speculative.verifiers.completions import VLLM_IDS, Completions
from edge_runtime.speculative.verifiers.places import Candidate, likeliest, logprob_of
from edge_runtime.speculative.verifiers.token_names import TokenNames


class VllmPrompt(Completions):
    name = "vllm"

    def __init__(self, model: str, names: TokenNames) -> None:
        super().__init__(model, names, VLLM_IDS)

    def verify_body(self, window: Window) -> Json:
        # A window without drafts needs no log-probabilities, and then the server may use its cache.
        fields = {"prompt_logprobs": 1} if window.drafts else {}
        return self.body(window.prompt, 1, **fields)

    def read_verdict(self, window: Window, answer: Json) -> Verdict:
        last = self.one_generated(answer)
        if not window.drafts:
            return last
        places = _places(answer, len(window.prompt))
        first = len(window.ids)
        own = [
            likeliest(_candidates(places[first + index]), draft, first + index)
            for index, draft in enumerate(window.drafts)
        ]
        return Verdict((*own, *last.own), last.ended, last.cached_tokens)

    def text_body(self, text: str) -> Json:
        return self.body(text, 1, prompt_logprobs=0, add_special_tokens=False)

    def read_text_ids(self, answer: Json) -> tuple[int, ...]:
        places = _places(answer, None)[1:]
        if not all(isinstance(place, dict) and place for place in places):
            raise ProtocolError("the server left out the log-probabilities of a place")
        return tuple(as_id(next(iter(place))) for place in places)

    def prompt_tokens(self, window: Window) -> int:
        return len(window.prompt)

    def computed_tokens(self, window: Window) -> int:
        return len(window.prompt)


def _places(answer: Json, length: int | None) -> list[Any]:
    found = object_at(answer, "choices", 0).get("prompt_logprobs")
    if not isinstance(found, list):
        raise ProtocolError(
            "the server does not return log-probabilities of the prompt",
            hint="it must be vLLM (prompt_logprobs), SGLang (/generate), or give `echo` with `logprobs`",
            code=NO_PROMPT_LOGPROBS,
        )
    if length is not None and len(found) != length:
        raise ProtocolError(f"the server gave log-probabilities of {len(found)} places, not of {length}")
    return found


def _candidates(place: Any) -> list[Candidate]:
    if not isinstance(place, dict):
        raise ProtocolError("the server left out the log-probabilities of a place")
    return [
        Candidate(as_id(token), logprob_of(at(entry, "logprob")), entry.get("rank"))
        for token, entry in place.items()
    ]
