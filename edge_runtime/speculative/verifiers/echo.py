"""The classic completions API: `echo` with `logprobs` gives log-probabilities of the prompt's tokens.

`choices[0].logprobs` has `tokens`, `token_logprobs` and `top_logprobs`, of prompt and generated tokens in a row; the
first place is null. A draft is right iff no token of its place is more probable. What the server would have written
instead is known by name only, so it may be UNKNOWN.

Knows: this format. Does not know: HTTP, what becomes of a verdict.
"""

from __future__ import annotations

from typing import Any

from edge_runtime.errors import ProtocolError
from edge_runtime.speculative.verifiers.base import (
    INCONSISTENT,
    NO_PROMPT_LOGPROBS,
    UNKNOWN,
    Json,
    Verdict,
    Window,
    at,
    list_at,
    object_at,
)
from edge_runtime.speculative.verifiers.completions import Completions, cached_tokens
from edge_runtime.speculative.verifiers.places import TOLERANCE_NATS, logprob_of
from edge_runtime.speculative.verifiers.token_names import TokenNames


class Echo(Completions):
    name = "echo"

    def __init__(self, model: str, names: TokenNames) -> None:
        super().__init__(model, names, {"logprobs": 1})

    def verify_body(self, window: Window) -> Json:
        return self.body(window.prompt, 1, echo=True) if window.drafts else self.body(window.prompt, 1)

    def read_verdict(self, window: Window, answer: Json) -> Verdict:
        if not window.drafts:
            return self.one_generated(answer)
        choice = object_at(answer, "choices", 0)
        logprobs = choice.get("logprobs")
        given = list_at(logprobs, "token_logprobs") if isinstance(logprobs, dict) else []
        length = len(window.prompt)
        if len(given) != length + 1:
            raise ProtocolError(
                f"the server gave log-probabilities of {len(given)} places, not of {length + 1}",
                hint="it does not echo the prompt with log-probabilities; it can't verify drafts",
                code=NO_PROMPT_LOGPROBS,
            )
        ids = self.named(logprobs)
        if len(ids) != length + 1:
            raise ProtocolError("the server names another number of tokens than it has log-probabilities of")
        tops = list_at(logprobs, "top_logprobs")
        own = [
            self._own(draft, given[place], at(tops, place), ids[place])
            for place, draft in enumerate(window.drafts, len(window.ids))
        ]
        return Verdict((*own, ids[-1]), choice.get("finish_reason") == "stop", cached_tokens(answer))

    def _own(self, draft: int, given: Any, top: Any, named: int) -> int:
        if named not in (draft, UNKNOWN):
            raise ProtocolError("the server echoes other tokens than it was sent", code=INCONSISTENT)
        if not isinstance(top, dict) or not top:
            raise ProtocolError("the server gives no likeliest token of a place", code=NO_PROMPT_LOGPROBS)
        best = max(top, key=lambda name: logprob_of(top[name]))
        if logprob_of(given) > logprob_of(top[best]) + TOLERANCE_NATS:
            raise ProtocolError(
                "a token of the prompt is more probable than the likeliest one", code=INCONSISTENT
            )
        own = self._names.id_of(best)
        if own == UNKNOWN and logprob_of(given) == logprob_of(top[best]):
            return (
                draft  # the same log-probability to the last bit: it is the token without a name of its own
            )
        return own

    def text_body(self, text: str) -> Json:
        return self.body(text, 1, echo=True)

    def read_text_ids(self, answer: Json) -> tuple[int, ...]:
        return self.named(at(answer, "choices", 0, "logprobs"))[:-1]

    def prompt_tokens(self, window: Window) -> int:
        return len(window.prompt)

    def computed_tokens(self, window: Window) -> int:
        return len(window.prompt)
