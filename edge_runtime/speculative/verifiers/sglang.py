"""SGLang's own `POST /generate`: log-probabilities of the prompt from `logprob_start_len` on.

`meta_info.input_token_logprobs` is a list of [logprob, id, text] that begins at that place, whose own logprob is null;
`input_top_logprobs` beside it holds a list of the likeliest. SGLang's prefix cache is used up to that place, so a
window costs its drafts and little more.

Knows: this format. Does not know: HTTP, what becomes of a verdict.
"""

from __future__ import annotations

from typing import Any

from edge_runtime.errors import ProtocolError
from edge_runtime.speculative.verifiers.base import (
    NO_PROMPT_LOGPROBS,
    Decoded,
    Json,
    Verdict,
    Window,
    as_id,
    at,
    list_at,
)
from edge_runtime.speculative.verifiers.places import Candidate, likeliest, logprob_of


class Sglang:
    name = "sglang"
    path = "/generate"

    def verify_body(self, window: Window) -> Json:
        body = _body(window.prompt, 1)
        if not window.drafts:
            return body
        # The place before the first draft: its successor is the first whose log-probability is computed.
        start = len(window.ids) - 1
        asked = {"return_logprob": True, "logprob_start_len": start, "top_logprobs_num": 1}
        return {**body, **asked, "return_text_in_logprobs": False}

    def read_verdict(self, window: Window, answer: Json) -> Verdict:
        meta = at(answer, "meta_info")
        generated = list_at(answer, "output_ids")
        if len(generated) != 1:
            raise ProtocolError(f"the server generated {len(generated)} tokens, though it was asked for one")
        own = _own(window, meta) if window.drafts else []
        cached = meta.get("cached_tokens") if isinstance(meta, dict) else None
        return Verdict(
            (*own, as_id(generated[0])), _reason(meta) == "stop", cached if isinstance(cached, int) else None
        )

    def decode_body(self, ids: tuple[int, ...], max_tokens: int, *, ignore_end: bool) -> Json:
        body = _body(list(ids), max_tokens)
        if ignore_end:
            body["sampling_params"]["ignore_eos"] = True
        return {**body, "stream": True}

    def read_event(self, event: Json, have: int) -> Decoded:
        """Events hold all ids so far, or (--incremental-streaming-output) the new ones: `completion_tokens` tells."""
        meta = at(event, "meta_info")
        ids = tuple(as_id(token) for token in list_at(event, "output_ids"))
        total = as_id(at(meta, "completion_tokens"))
        if len(ids) == total:
            ids = ids[have:]
        elif have + len(ids) != total:
            raise ProtocolError(f"the server streamed {have + len(ids)} tokens and counts {total}")
        reason = _reason(meta)
        return Decoded(ids, ended=reason == "stop", finished=bool(reason))

    def text_body(self, text: str) -> Json:
        sampling = {"temperature": 0, "max_new_tokens": 1}
        return {"text": text, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}

    def read_text_ids(self, answer: Json) -> tuple[int, ...]:
        return tuple(as_id(at(entry, 1)) for entry in list_at(answer, "meta_info", "input_token_logprobs"))

    def prompt_tokens(self, window: Window) -> int:
        return len(window.prompt)

    def computed_tokens(self, window: Window) -> int:
        return len(window.drafts) + 1


def _body(ids: list[int], max_tokens: int) -> Json:
    return {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": max_tokens}}


def _reason(meta: Any) -> str:
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    return str(reason.get("type") or "") if isinstance(reason, dict) else str(reason or "")


def _own(window: Window, meta: Any) -> list[int]:
    """Aligned from the end: versions differ in whether the place at the start is in the list."""
    count = len(window.drafts)
    if not isinstance(meta, dict) or not isinstance(meta.get("input_token_logprobs"), list):
        raise ProtocolError(
            "the server does not return log-probabilities of the prompt",
            hint="/generate must know return_logprob and logprob_start_len",
            code=NO_PROMPT_LOGPROBS,
        )
    given, tops = meta["input_token_logprobs"][-count:], list_at(meta, "input_top_logprobs")[-count:]
    if len(given) != count or len(tops) != count:
        raise ProtocolError(f"the server gave log-probabilities of {len(given)} drafts, not of {count}")
    own = []
    for index, draft in enumerate(window.drafts):
        entry, position = given[index], len(window.ids) + index
        top = [Candidate(as_id(at(one, 1)), logprob_of(at(one, 0)), 1) for one in list_at(tops, index)[:1]]
        drafted = Candidate(as_id(at(entry, 1)), logprob_of(at(entry, 0)), 2)
        both = top if top and top[0].id == drafted.id else [*top, drafted]
        own.append(likeliest(both, draft, position))
    return own
