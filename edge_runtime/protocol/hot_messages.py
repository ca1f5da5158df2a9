"""The messages that every token waits for, rows and ids, to bytes and back without the schema's calls.

`codec` says what is allowed; this is its short cut for what is plainly right: small frames whose every value has
exactly the type it should have. Whatever else comes is left to the schema, which knows what is wrong with it.

Knows: the layout of FrameRows, Tokens, and a step's worth of them. Does not know: other messages, limits, errors.
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
    StepRows,
    StepTokens,
    Tokens,
)

SMALL_BYTES: Final = 2048  # so that nothing large can unfold before its types are looked at

Values = tuple[Any, ...]  # of a message, in field order

_TAGS: Final = {cls: tag for tag, cls in MESSAGE_TAGS.items()}
_FRAME, _TOKENS = _TAGS[FrameRows], _TAGS[Tokens]
_STEP_ROWS, _STEP_TOKENS = _TAGS[StepRows], _TAGS[StepTokens]
_FRAME_TYPES: Final = (*(int,) * 5, tuple, tuple, bool)
_TOKENS_TYPES: Final = (*(int,) * 3, tuple)
_TOKEN_TYPES: Final = (int, int, type(None), str)
_HEAD_TYPES: Final = (int, int)
_INTEGERS: Final = {int}


def encoded(message: Message) -> bytes | None:
    """The message's frame. None: not one of these, or with a value that is not plainly right."""
    found = _values_of(message)
    if found is None:
        return None
    tag, values = found
    try:
        frame: bytes = msgpack.packb((PROTOCOL_VERSION, tag, *values))
    except (ValueError, OverflowError):
        return None
    return frame if len(frame) <= SMALL_BYTES else None


def decoded(frame: bytes | bytearray | memoryview) -> Message | None:
    """The message in a frame. None: not one of these, or not plainly right. Raises nothing."""
    if len(frame) > SMALL_BYTES:
        return None
    try:
        values = msgpack.unpackb(frame, use_list=False)
    except (ValueError, msgpack.UnpackException):
        return None
    if type(values) is not tuple or tuple(map(type, values[:2])) != _HEAD_TYPES:
        return None
    version, tag = values[:2]
    if version != PROTOCOL_VERSION:
        return None
    if tag == _FRAME:
        return _frame(values[2:])
    if tag == _TOKENS:
        return _tokens(values[2:])
    if len(values) != 3 or type(values[2]) is not tuple:
        return None
    if tag == _STEP_ROWS:
        frames = [_frame(each) for each in values[2]]
        return StepRows(tuple([each for each in frames if each])) if all(frames) else None
    if tag == _STEP_TOKENS:
        sessions = [_tokens(each) for each in values[2]]
        return StepTokens(tuple([each for each in sessions if each])) if all(sessions) else None
    return None


# ---------------------------------------------------------------- out


def _values_of(message: Message) -> tuple[int, Values] | None:
    """Tag and values; None where one is not plainly right."""
    kind = type(message)
    if kind is FrameRows:
        return _with(_FRAME, _frame_values(message))
    if kind is Tokens:
        return _with(_TOKENS, _tokens_values(message))
    if type(message) is StepRows and type(message.frames) is tuple:
        return _with_all(_STEP_ROWS, [_frame_values(each) for each in message.frames])
    if type(message) is StepTokens and type(message.sessions) is tuple:
        return _with_all(_STEP_TOKENS, [_tokens_values(each) for each in message.sessions])
    return None


def _with(tag: int, values: Values | None) -> tuple[int, Values] | None:
    return None if values is None else (tag, values)


def _with_all(tag: int, items: list[Values | None]) -> tuple[int, Values] | None:
    return None if None in items else (tag, (items,))


def _frame_values(message: Any) -> Values | None:
    if type(message) is not FrameRows:
        return None
    parents, ids = message.parents, message.ids
    values = (
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
    return values if is_right else None


def _tokens_values(message: Any) -> Values | None:
    if type(message) is not Tokens:
        return None
    values = (message.session, message.lease, message.turn, _token_values(message.tokens))
    return values if tuple(map(type, values)) == _TOKENS_TYPES else None


def _token_values(tokens: tuple[Token, ...]) -> tuple[Values, ...] | None:
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


# ---------------------------------------------------------------- in


def _frame(values: Any) -> FrameRows | None:
    if type(values) is not tuple or tuple(map(type, values)) != _FRAME_TYPES:
        return None
    return FrameRows(*values) if _are_integers(values[5]) and _are_integers(values[6]) else None


def _tokens(values: Any) -> Tokens | None:
    if type(values) is not tuple or tuple(map(type, values)) != _TOKENS_TYPES:
        return None
    for token in values[3]:
        if type(token) is not tuple or tuple(map(type, token)) != _TOKEN_TYPES:
            return None
    return Tokens(values[0], values[1], values[2], tuple([Token(*token) for token in values[3]]))


def _are_integers(values: tuple[Any, ...]) -> bool:
    return not set(map(type, values)) - _INTEGERS and len(values) <= MAX_ITEMS
