"""What a body asks for, whichever way it came: checked, tokenized, and known to fit.

Knows: the order of checks: fields, model, ready, prompt, fit. Does not know: HTTP, sockets, how it is answered.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.api.errors import ApiError
from coordinator.api.openai import chat, completions
from coordinator.api.openai.generation import MAX_CHOICES, Options, fit, read_options
from coordinator.api.openai.messages import read_messages
from coordinator.api.openai.prompts import encode, encode_chat, need_kind, need_model, need_plan, read_prompts
from coordinator.service import Service

SEED_BITS = 53  # of a seed we draw: exact in every JSON reader


@dataclass(frozen=True, slots=True)
class Wanted:
    """`limits`: tokens that may be generated after each prompt."""

    options: Options
    prompts: tuple[tuple[int, ...], ...]
    limits: tuple[int, ...]


def read_values(service: Service, body: Mapping[str, object], *, is_chat: bool) -> dict[str, Any]:
    """Every parameter with its value or default, of the model served here."""
    values = (chat.TABLE if is_chat else completions.TABLE).read(body)
    need_model(values["model"], service.model)
    need_kind(service.model, "generator")
    return values


async def read_wanted(service: Service, values: dict[str, Any], *, is_chat: bool) -> Wanted:
    options, limit_param = _options(values, service, is_chat=is_chat)
    if is_chat:
        messages, param = read_messages(values["messages"]), "messages"
        need_plan(service)
        prompts = [await encode_chat(service, messages)]
    else:
        param = "prompt"
        prompts = await _read_texts(service, values["prompt"], options.n, param=param)
    where = param if options.max_tokens is None else limit_param
    context = service.model.max_context_tokens
    limits = [fit(len(ids), options.max_tokens, context, param=where) for ids in prompts]
    return Wanted(options, tuple(prompts), tuple(limits))


async def _read_texts(service: Service, prompt: object, n: int, *, param: str) -> list[tuple[int, ...]]:
    given = read_prompts(prompt, param=param, limit=MAX_CHOICES, vocab_size=service.model.vocab_size)
    if len(given) * n > MAX_CHOICES:
        raise ApiError(
            f"`n` times the number of prompts must be at most {MAX_CHOICES}.", code="invalid_value", param="n"
        )
    need_plan(service)
    return [await encode(service, each, param=param) for each in given]


def _options(values: dict[str, Any], service: Service, *, is_chat: bool) -> tuple[Options, str]:
    dialect = chat if is_chat else completions
    values["max_tokens"], param = dialect.max_tokens(values)
    options = read_options(
        values,
        top_logprobs=dialect.top_logprobs(values),
        random_seed=secrets.randbits(SEED_BITS),
        vocab_size=service.model.vocab_size,
    )
    return options, param
