"""From prompts to token ids: text, lists of texts, ids, lists of ids.

Knows: the four forms of a prompt, and that long texts are encoded off the event loop. Does not know: sampling, answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from coordinator.api.errors import ApiError
from coordinator.service import Service
from edge_runtime.bundle.manifest import ModelInfo

INLINE_CHARACTERS = 8192  # what can be encoded in well under a millisecond or two

Prompt = str | tuple[int, ...]


def read_prompts(value: object, *, param: str, limit: int, vocab_size: int) -> list[Prompt]:
    """One prompt or up to `limit` of them, in the order given."""
    if isinstance(value, list) and value and not _is_ids(value):
        if len(value) > limit:
            raise _wrong(param, f"must be at most {limit} prompts, not {len(value)}")
        return [_read_prompt(each, f"{param}[{i}]", vocab_size) for i, each in enumerate(value)]
    return [_read_prompt(value, param, vocab_size)]


def _is_ids(value: list[object]) -> bool:
    return isinstance(value[0], int) and not isinstance(value[0], bool)


def _read_prompt(value: object, param: str, vocab_size: int) -> Prompt:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise _wrong(param, "must be a string or a list of token ids, or a list of those")
    if not value:
        raise _wrong(param, "must not be empty")
    if not all(0 <= each < vocab_size for each in value):
        raise _wrong(param, f"must have token ids from 0 to {vocab_size - 1}")
    return tuple(value)


async def encode(service: Service, prompt: Prompt, *, param: str) -> tuple[int, ...]:
    if isinstance(prompt, tuple):
        return prompt
    if len(prompt) > INLINE_CHARACTERS:
        ids = await asyncio.to_thread(service.encode, prompt)
    else:
        ids = service.encode(prompt)
    if not ids:
        raise _wrong(param, "must not be empty: it has no tokens")
    return tuple(ids)


async def encode_chat(service: Service, messages: Sequence[dict[str, object]]) -> tuple[int, ...]:
    """Never on the event loop: a template may take its whole time limit, and others wait for their tokens."""
    ids = await asyncio.to_thread(service.encode_chat, messages)
    if not ids:
        raise _wrong("messages", "must not be empty: they have no tokens")
    return tuple(ids)


def need_model(given: str, model: ModelInfo) -> None:
    if given != model.name:
        raise ApiError(
            f"The model `{given[:128]}` does not exist here.",
            code="model_not_found",
            param="model",
            hint=f"this coordinator serves `{model.name}`",
        )


def need_kind(model: ModelInfo, kind: str) -> None:
    """A generator cannot embed, an encoder cannot generate."""
    if model.kind != kind:
        use = "/v1/embeddings" if model.kind == "encoder" else "/v1/chat/completions or /v1/completions"
        raise ApiError(
            f"`{model.name}` is {'an encoder' if model.kind == 'encoder' else 'a generator'} and cannot do this.",
            code="model_cannot",
            param="model",
            hint=f"use {use}",
        )


def need_plan(service: Service) -> None:
    """Refuses at once where nothing was ever planned; a pipeline that loads or recovers is worth the service's wait."""
    if service.status().plan is None:
        raise ApiError(
            "There is no pipeline to run this on yet.",
            code="not_ready",
            hint="pair devices, or wait until they are measured; /ready says more",
        )


def _wrong(param: str, complaint: str) -> ApiError:
    return ApiError(f"`{param}` {complaint}.", code="invalid_value", param=param)
