"""The first message of a drafting socket: a new request, or one to go on with.

Knows: its fields, and what the device has to know to draft. Does not know: sockets, frames.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from coordinator.api.context import Api
from coordinator.api.errors import ApiError
from coordinator.api.openai.accept import accept, make_answer
from coordinator.api.openai.answer import Answer
from coordinator.api.openai.choices import Choice, Source
from coordinator.api.openai.ticket import choice_id, read_ticket
from coordinator.api.openai.wanted import Wanted, read_values, read_wanted
from coordinator.service import Service
from edge_runtime.core import RequestId
from edge_runtime.errors import UsageError

KINDS = ("completion", "chat")
DRAFTERS = ("auto", "model", "suffix", "none")  # what metrics tell apart; others count as "other"


@dataclass(frozen=True, slots=True)
class Opened:
    """`head` is the answer to the device. `max_rows` bounds the rows its drafts may be for. `with_text`: for a device
    without a tokenizer, each frame's text follows it."""

    head: dict[str, object]
    answer: Answer
    source: Source
    choice: RequestId
    prompt_tokens: int
    max_rows: int
    vocab_size: int
    drafter: str
    with_text: bool = False


async def open_or_resume(api: Api, tenant: str, body: dict[str, object]) -> Opened:
    with_text = body.pop("text", False)
    if type(with_text) is not bool:
        raise ApiError("`text` must be true or false.", code="invalid_value", param="text")
    return dataclasses.replace(await _open_or_resume(api, tenant, body), with_text=with_text)


async def _open_or_resume(api: Api, tenant: str, body: dict[str, object]) -> Opened:
    drafter = body.pop("drafter", "other")
    label = drafter if isinstance(drafter, str) and drafter in DRAFTERS else "other"
    if "resume" in body:
        return await _resume(api, tenant, body, label)
    kind = body.pop("kind", "completion")
    if kind not in KINDS:
        raise ApiError(f"`kind` must be one of {', '.join(KINDS)}.", code="invalid_value", param="kind")
    is_chat = kind == "chat"
    wanted = await read_wanted(api.service, read_values(api.service, body, is_chat=is_chat), is_chat=is_chat)
    _need_one(wanted)
    answer, sources = accept(api, tenant, wanted.options, wanted.prompts, wanted.limits, is_chat=is_chat)
    prompt_tokens = len(wanted.prompts[0])
    head = {
        "id": answer.request_id,
        "model": answer.model,
        "system_fingerprint": answer.fingerprint,
        "prompt_token_ids": list(wanted.prompts[0]),
        "sampling": dataclasses.asdict(wanted.options.sampling),
        "max_tokens": wanted.limits[0],
        "stop": list(wanted.options.stop),
        "stop_ids": [] if wanted.options.ignore_eos else list(api.service.model.eos_ids),
        "vocab_size": api.service.model.vocab_size,
        "tokenizer": api.service.tokenizer()[0],
    }
    max_rows = prompt_tokens + wanted.limits[0]
    return _opened(api.service, head, answer, sources[0], prompt_tokens, max_rows, label)


def _need_one(wanted: Wanted) -> None:
    if len(wanted.prompts) * wanted.options.n != 1:
        raise ApiError("A drafting socket takes one prompt and one choice.", code="invalid_value", param="n")
    if wanted.options.sampling.top_logprobs >= 0:
        raise ApiError(
            "Log-probabilities do not fit a drafting socket.", code="unsupported_parameter", param="logprobs"
        )


async def _resume(api: Api, tenant: str, body: dict[str, object], drafter: str) -> Opened:
    """`resume`: the request's id; `after`: how many generated tokens the device has."""
    request_id, after = body.get("resume"), body.get("after", 0)
    if type(after) is not int or not 0 <= after < 2**31 or body.keys() - {"resume", "after"}:
        raise ApiError(
            "`after` must count tokens; nothing else belongs here.", code="invalid_value", param="after"
        )
    ticket = read_ticket(request_id, tenant) if isinstance(request_id, str) else None
    if ticket is None or ticket.choices != 1:
        raise _unknown(request_id)
    assert isinstance(request_id, str)
    try:
        events = await api.service.resume(choice_id(request_id, 0), after - 1)
    except UsageError:
        raise _unknown(request_id) from None
    answer = make_answer(api.service, request_id, ticket, [Choice(0)])
    max_rows = api.service.model.max_context_tokens
    head: dict[str, object] = {"id": request_id, "after": after}
    return _opened(api.service, head, answer, Source(events), ticket.prompt_tokens, max_rows, drafter)


def _opened(
    service: Service,
    head: dict[str, object],
    answer: Answer,
    source: Source,
    prompt_tokens: int,
    max_rows: int,
    drafter: str,
) -> Opened:
    return Opened(
        head,
        answer,
        source,
        choice_id(answer.request_id, 0),
        prompt_tokens,
        max_rows,
        service.model.vocab_size,
        drafter,
    )


def _unknown(request_id: object) -> ApiError:
    return ApiError(
        f"There is no request `{str(request_id)[:128]}`.", code="request_not_found", param="resume"
    )
