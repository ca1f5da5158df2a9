"""What all dialects of `POST /v1/completions` share: plain decoding, and how generated ids are written.

Ids come as `choices[i].token_ids` (vLLM with `return_token_ids`), as `logprobs.token_ids`, or as the tokens'
names in `logprobs.tokens`: "token_id:17" (vLLM with `return_tokens_as_token_ids`), else plain text.

Knows: bodies and answers of completions. Does not know: prompt log-probabilities, HTTP.
"""

from __future__ import annotations

from typing import Any

from edge_runtime.errors import ProtocolError
from edge_runtime.speculative.verifiers.base import UNKNOWN, Decoded, Json, Verdict, as_id, list_at, object_at
from edge_runtime.speculative.verifiers.token_names import TokenNames

VLLM_IDS: Json = {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 0}


class Completions:
    """Base of the dialects. `extra`: fields that a server needs before it writes ids."""

    path = "/v1/completions"

    def __init__(self, model: str, names: TokenNames, extra: Json) -> None:
        self._model = model
        self._names = names
        self._extra = extra

    def body(self, prompt: Any, max_tokens: int, **fields: Any) -> Json:
        head = {"model": self._model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return {**head, **self._extra, **fields}

    def decode_body(self, ids: tuple[int, ...], max_tokens: int, *, ignore_end: bool) -> Json:
        fields = {"ignore_eos": True} if ignore_end else {}
        return self.body(list(ids), max_tokens, stream=True, **fields)

    def read_event(self, event: Json, have: int) -> Decoded:
        if not list_at(event, "choices"):
            return Decoded(())  # the last event may only count tokens
        choice = object_at(event, "choices", 0)
        ids = self.generated(choice)
        if UNKNOWN in ids:
            raise nameless()
        reason = choice.get("finish_reason")
        return Decoded(ids, ended=reason == "stop", finished=bool(reason))

    def generated(self, choice: Json) -> tuple[int, ...]:
        """Ids that one choice generated, UNKNOWN for those whose name several ids share."""
        ids = choice.get("token_ids")
        if isinstance(ids, list):
            return tuple(as_id(token) for token in ids)
        logprobs = choice.get("logprobs")
        if logprobs is None:
            if not choice.get("text"):
                return ()
            raise ProtocolError(
                "the server does not say which ids it generated",
                hint="it needs `return_token_ids` (vLLM 0.10.2 or newer) or log-probabilities",
                code="no_token_ids",
            )
        return self.named(logprobs)

    def named(self, logprobs: Any) -> tuple[int, ...]:
        ids = logprobs.get("token_ids") if isinstance(logprobs, dict) else None
        if isinstance(ids, list):
            return tuple(as_id(token) for token in ids)
        return tuple(self._names.id_of(str(name)) for name in list_at(logprobs, "tokens"))

    def one_generated(self, answer: Json) -> Verdict:
        """The single id of an answer with max_tokens 1, as a verdict on no drafts at all."""
        choice = object_at(answer, "choices", 0)
        ids = self.generated(choice)
        if not ids:
            raise ProtocolError("the server generated nothing, though it was asked for one token")
        return Verdict((ids[-1],), choice.get("finish_reason") == "stop", cached_tokens(answer))


def cached_tokens(answer: Json) -> int | None:
    usage = answer.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    found = details.get("cached_tokens") if isinstance(details, dict) else None
    return found if isinstance(found, int) else None


def nameless() -> ProtocolError:
    return ProtocolError(
        "the server names tokens by their text, and several ids have that text",
        hint="start vLLM with --return-tokens-as-token-ids, or use the dialect vllm or sglang",
        code="no_token_ids",
    )
