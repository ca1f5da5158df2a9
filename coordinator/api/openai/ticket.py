"""The id of a request: unguessable, bound to its tenant, and enough to resume its stream.

A stream that broke is resumed from the journal, perhaps by a coordinator that was restarted since. What the journal
does not say (how many choices, when, with which options) is in the id itself, so nothing has to be remembered. An id
changed by hand names no journalled request; an id of another tenant does not verify.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import struct
from dataclasses import dataclass

from edge_runtime.core import RequestId

_FIELDS = struct.Struct("<IBBIQ12s")  # created, choices, options, prompt tokens, seed, random
_TAG_BYTES = 8
RANDOM_BYTES = 12
_USAGE, _TOKEN_IDS, _LOGPROBS = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a request's id says. `is_chat` is in its prefix."""

    is_chat: bool
    created: int  # Unix seconds
    choices: int
    prompt_tokens: int
    seed: int
    random: bytes
    include_usage: bool = False
    return_token_ids: bool = False
    logprobs: bool = False

    def id(self, tenant: str) -> str:
        options = _USAGE * self.include_usage + _TOKEN_IDS * self.return_token_ids + _LOGPROBS * self.logprobs
        fields = _FIELDS.pack(self.created, self.choices, options, self.prompt_tokens, self.seed, self.random)
        text = base64.b32encode(fields + _tag(fields, tenant)).decode("ascii").rstrip("=").lower()
        return _prefix(self.is_chat) + text


def choice_id(request_id: str, choice: int) -> RequestId:
    """The journal's key of one choice."""
    return RequestId(f"{request_id}.{choice}")


def read_ticket(request_id: str, tenant: str) -> Ticket | None:
    """The ticket behind an id given to this tenant; None for anything else."""
    prefix, _, text = request_id.partition("-")
    if prefix not in ("chatcmpl", "cmpl") or len(text) != _TEXT_LENGTH or text != text.lower():
        return None
    try:
        data = base64.b32decode(text.upper() + "=" * (-len(text) % 8))
    except (binascii.Error, ValueError):
        return None
    fields, tag = data[: _FIELDS.size], data[_FIELDS.size :]
    if not hmac.compare_digest(tag, _tag(fields, tenant)):
        return None
    created, choices, options, prompt_tokens, seed, random = _FIELDS.unpack(fields)
    return Ticket(
        prefix == "chatcmpl",
        created,
        choices,
        prompt_tokens,
        seed,
        random,
        bool(options & _USAGE),
        bool(options & _TOKEN_IDS),
        bool(options & _LOGPROBS),
    )


def _prefix(is_chat: bool) -> str:
    return "chatcmpl-" if is_chat else "cmpl-"


def _tag(fields: bytes, tenant: str) -> bytes:
    return hashlib.sha256(b"edge-runtime request id\0" + tenant.encode() + b"\0" + fields).digest()[
        :_TAG_BYTES
    ]


_TEXT_LENGTH = -(-(_FIELDS.size + _TAG_BYTES) * 8 // 5)
