"""Log-probabilities in the two shapes of the two dialects.

Knows: how an id becomes the text a person would call "the token". Does not know: sampling, streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_runtime.core import TokenLogprob

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say

Decode = Callable[[Sequence[int]], str]


def finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST


@dataclass(frozen=True, slots=True)
class TokenText:
    """What one id adds after the one before it (tokenizers drop a leading space from a token that stands alone)."""

    decode: Decode

    def __call__(self, previous: int | None, token: int) -> str:
        if previous is not None:
            before, both = self.decode((previous,)), self.decode((previous, token))
            if both.startswith(before) and "\ufffd" not in before:
                return both[len(before) :]
        return self.decode((token,))


def chat_entry(text: TokenText, previous: int | None, token: int, logprob: TokenLogprob) -> dict[str, object]:
    return _chat_item(text(previous, token), logprob.logprob) | {
        "top_logprobs": [_chat_item(text(previous, other), each) for other, each in logprob.top]
    }


def _chat_item(token: str, logprob: float) -> dict[str, object]:
    # A token that is part of a character has no text of its own, so its bytes are not known here.
    data = None if "\ufffd" in token else list(token.encode("utf-8", "replace"))
    return {"token": token, "logprob": finite(logprob), "bytes": data}


@dataclass(slots=True)
class CompletionLogprobs:
    """The completions shape: parallel lists over the tokens of one choice or one chunk."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]

    @classmethod
    def of(
        cls, text: TokenText, previous: int | None, token: int, logprob: TokenLogprob, offset: int
    ) -> CompletionLogprobs:
        own = text(previous, token)
        top: dict[str, float] = {}
        for other, each in logprob.top:
            top.setdefault(text(previous, other), finite(each))
        top.setdefault(own, finite(logprob.logprob))
        return cls([own], [finite(logprob.logprob)], [top], [offset])

    def extend(self, other: CompletionLogprobs) -> None:
        self.tokens += other.tokens
        self.token_logprobs += other.token_logprobs
        self.top_logprobs += other.top_logprobs
        self.text_offset += other.text_offset

    def body(self) -> dict[str, object]:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }
