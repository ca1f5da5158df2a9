"""Which requests this device drafts for; all others are the coordinator's, byte for byte.

Only what is plainly one prompt with one choice is taken. Whatever else a body may hold, right or wrong, is left to the
coordinator, so that there is one place where it is judged.

Knows: bytes of a body, two paths. Does not know: HTTP, keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CHAT_PATH, COMPLETION_PATH = "/v1/chat/completions", "/v1/completions"
_OF_THE_SOCKET = frozenset({"kind", "drafter", "resume", "after"})


@dataclass(frozen=True, slots=True)
class Draftable:
    """A request for one choice. `body` is the caller's, whole."""

    path: str
    body: Mapping[str, Any]
    stream: bool
    include_usage: bool
    with_ids: bool

    @property
    def is_chat(self) -> bool:
        return self.path == CHAT_PATH


def draftable(path: str, data: bytes) -> Draftable | None:
    """None: pass it on."""
    body = _plain_object(data)
    if body is None or path not in (CHAT_PATH, COMPLETION_PATH) or not body.keys().isdisjoint(_OF_THE_SOCKET):
        return None
    stream, with_ids = body.get("stream"), body.get("return_token_ids")
    options = body.get("stream_options")
    include_usage = options.get("include_usage") if isinstance(options, dict) else None
    switches = (stream, with_ids, include_usage)
    if not all(each is None or isinstance(each, bool) for each in switches):
        return None
    if not isinstance(options, dict | None) or not _is_one_choice(body, is_chat=path == CHAT_PATH):
        return None
    return Draftable(path, body, bool(stream), bool(include_usage), bool(with_ids))


def _is_one_choice(body: Mapping[str, Any], *, is_chat: bool) -> bool:
    n = body.get("n")
    if not (n is None or (type(n) is int and n == 1)):
        return False
    if body.get("logprobs") not in ((None, False) if is_chat else (None,)):
        return False
    prompt = body.get("prompt")
    is_ids = isinstance(prompt, list) and bool(prompt) and all(type(each) is int for each in prompt)
    return is_chat or isinstance(prompt, str) or is_ids


def _plain_object(data: bytes) -> dict[str, Any] | None:
    """None for what is no JSON object, or one that two readers may read differently."""
    try:
        value = json.loads(data, parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse(name: str) -> float:
    raise ValueError(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key appears twice")
    return fields
