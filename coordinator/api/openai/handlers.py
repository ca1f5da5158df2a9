"""From an HTTP request to an answer, for both dialects, and back into a stream that broke.

Knows: the order of checks: body, model, ready, prompt, fit. Does not know: what chunks look like.
"""

from __future__ import annotations

import secrets
from typing import Any

from aiohttp import web

from coordinator.api.body import read_object
from coordinator.api.context import API
from coordinator.api.errors import ApiError
from coordinator.api.guard import key_of
from coordinator.api.openai import chat, completions
from coordinator.api.openai.accept import accept
from coordinator.api.openai.generation import MAX_CHOICES, Options, fit, read_options
from coordinator.api.openai.messages import read_messages
from coordinator.api.openai.prompts import encode, encode_chat, need_kind, need_model, need_plan, read_prompts
from coordinator.api.openai.resume import parse_position, resume
from coordinator.service import Service

SEED_BITS = 53  # of a seed we draw: exact in every JSON reader


async def create_chat(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions"""
    return await _create(request, is_chat=True)


async def create_completion(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions"""
    return await _create(request, is_chat=False)


async def resume_stream(request: web.Request) -> web.StreamResponse:
    """GET /v1/requests/{request}/stream"""
    last = request.headers.get("Last-Event-ID", "")
    return await resume(request, parse_position(last, request.match_info["request"]))


async def _create(request: web.Request, *, is_chat: bool) -> web.StreamResponse:
    api = request.app[API]
    values = (chat.TABLE if is_chat else completions.TABLE).read(await read_object(request))
    need_model(values["model"], api.service.model)
    need_kind(api.service.model, "generator")
    if "Last-Event-ID" in request.headers:
        if not values["stream"]:
            raise ApiError("Only a stream can be resumed.", code="invalid_value", param="stream")
        return await resume(request, parse_position(request.headers["Last-Event-ID"]))
    options, limit_param = _options(values, api.service, is_chat=is_chat)
    if is_chat:
        messages, param = read_messages(values["messages"]), "messages"
        need_plan(api.service)
        prompts = [await encode_chat(api.service, messages)]
    else:
        param = "prompt"
        given = read_prompts(
            values["prompt"], param=param, limit=MAX_CHOICES, vocab_size=api.service.model.vocab_size
        )
        if len(given) * options.n > MAX_CHOICES:
            raise ApiError(
                f"`n` times the number of prompts must be at most {MAX_CHOICES}.",
                code="invalid_value",
                param="n",
            )
        need_plan(api.service)
        prompts = [await encode(api.service, prompt, param=param) for prompt in given]
    context = api.service.model.max_context_tokens
    where = param if options.max_tokens is None else limit_param
    limits = [fit(len(ids), options.max_tokens, context, param=where) for ids in prompts]
    answer, sources = accept(api, key_of(request).tenant, options, prompts, limits, is_chat=is_chat)
    return await (answer.stream(request, sources) if options.stream else answer.whole(sources))


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
