"""The two messages that every token waits for, rows and ids, to bytes and back without the schema's calls.

`codec` says what is allowed; this is its short cut for what is plainly right: small frames whose every value has
exactly the type it should have. Whatever else comes is left to the schema, which knows what is wrong with it.

Knows: the layout of FrameRows and Tokens. Does not know: other messages, limits, errors.
"""

from __future__ import annotations

from typing import Any, Final

import msgpack

from edge_runtime.core import Token
from edge_runtime.protocol.messages import (
    MAX_ITEMS,
    MESSAGE_TAGS,
    PROTOCOL_VERSION,
    FrameRows,
    Message,
    Tokens,
)

SMALL_BYTES: Final = 2048  # so that nothing large can unfold before its types are looked at

_TAGS: Final = {cls: tag for tag, cls in MESSAGE_TAGS.items()}
_FRAME, _TOKENS = _TAGS[FrameRows], _TAGS[Tokens]
_FRAME_TYPES: Final = (*(int,) * 7, tuple, tuple, bool)
_TOKENS_TYPES: Final = (*(int,) * 5, tuple)
_TOKEN_TYPES: Final = (int, int, type(None), str)
_INTEGERS: Final = {int}


def encoded(message: Message) -> bytes | None:
    """The message's frame. None: not one of these two, or with a value that is not plainly right."""
    values: tuple[Any, ...]
    if type(message) is FrameRows:
        parents, ids = message.parents, message.ids
        values = (
            PROTOCOL_VERSION,
            _FRAME,
            message.session,
            message.lease,
            message.turn,
            message.seq,
            message.base_row,
            parents,
            ids,
            message.bidirectional,
        )
        is_right = tuple(map(type, values)) == _FRAME_TYPES and _are_integers(parents) and _are_integers(ids)
    elif type(message) is Tokens:
        tokens = _token_values(message.tokens)
        values = (PROTOCOL_VERSION, _TOKENS, message.session, message.lease, message.turn, tokens)
        is_right = tuple(map(type, values)) == _TOKENS_TYPES
    else:
        return None
    if not is_right:
        return None
    try:
        frame: bytes = msgpack.packb(values)
    except (ValueError, OverflowError):
        return None
    return frame if len(frame) <= SMALL_BYTES else None


def decoded(frame: bytes | bytearray | memoryview) -> Message | None:
    """The message in a frame. None: not one of these two, or not plainly right. Raises nothing."""
    if len(frame) > SMALL_BYTES:
        return None
    try:
        values = msgpack.unpackb(frame, use_list=False)
    except (ValueError, msgpack.UnpackException):
        return None
    if type(values) is not tuple or values[:1] != (PROTOCOL_VERSION,):
        return None
    types = tuple(map(type, values))
    if types == _FRAME_TYPES and values[1] == _FRAME:
        is_right = _are_integers(values[7]) and _are_integers(values[8])
        return FrameRows(*values[2:]) if is_right else None
    if types == _TOKENS_TYPES and values[1] == _TOKENS:
        for token in values[5]:
            if type(token) is not tuple or tuple(map(type, token)) != _TOKEN_TYPES:
                return None
        return Tokens(values[2], values[3], values[4], tuple([Token(*token) for token in values[5]]))
    return None


def _are_integers(values: tuple[Any, ...]) -> bool:
    return not set(map(type, values)) - _INTEGERS and len(values) <= MAX_ITEMS


def _token_values(tokens: tuple[Token, ...]) -> tuple[tuple[Any, ...], ...] | None:
    """None where one has more to say, or is none."""
    if type(tokens) is not tuple:
        return None
    found = []
    for token in tokens:
        if type(token) is not Token:
            return None
        values = (token.position, token.id, token.logprob, token.finish)
        if tuple(map(type, values)) != _TOKEN_TYPES:
            return None
        found.append(values)
    return tuple(found)
