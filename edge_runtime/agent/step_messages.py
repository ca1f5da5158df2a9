"""What one step says to one receiver, in one message: rows to the next stage, ids to stage 1 and the coordinator.

A step of several sessions would else be as many lists on a link, each with its own way through two processes, and the
next stage would begin with the first of them, or wait without knowing for what. Inside, everything is as if the
messages had come one by one.

Knows: messages and rows as values. Does not know: steps, links, rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from edge_runtime.agent.pipeline_events import COORDINATOR, Rows, Send
from edge_runtime.protocol.messages import FrameRows, Message, StepRows, StepTokens, Tokens

MAX_BUNDLE_BYTES = 256 << 10  # of rows in fp32: beyond it copying them costs more than a list

Single = FrameRows | Tokens


def bundled(sends: Sequence[Send]) -> list[Send]:
    """The same, with fewer messages: in the order in which each receiver's first one came, the coordinator last.

    Rows [R, E] of one message follow each other as its frames do. Messages that stand alone stay as they are.
    """
    groups: dict[tuple[str, type], list[list[Send]]] = {}
    for send in sends:
        lists = groups.setdefault((send.to, type(send.message)), [[]])
        if not _fits(lists[-1], send):
            lists.append([])
        lists[-1].append(send)
    found = [_joined(sends) for lists in groups.values() for sends in lists]
    return sorted(found, key=lambda send: send.to == COORDINATOR)  # whose ids nobody's row waits for


def _fits(before: list[Send], send: Send) -> bool:
    if not before:
        return True
    if not isinstance(send.message, Single):
        return False
    return sum(_row_bytes(each) for each in (*before, send)) <= MAX_BUNDLE_BYTES


def _row_bytes(send: Send) -> int:
    return 0 if send.rows is None else send.rows.nbytes


def _joined(sends: list[Send]) -> Send:
    if len(sends) == 1:
        return sends[0]
    to = sends[0].to
    frames = tuple(each.message for each in sends if isinstance(each.message, FrameRows))
    if not frames:
        return Send(to, StepTokens(tuple(each.message for each in sends if isinstance(each.message, Tokens))))
    return Send(to, StepRows(frames), np.concatenate([each.rows for each in sends if each.rows is not None]))


def parts(message: Message) -> tuple[Message, ...]:
    """The messages that it stands for: itself, where it is none of these two."""
    match message:
        case StepRows(frames):
            return frames
        case StepTokens(sessions):
            return sessions
        case _:
            return (message,)


def row_count(message: Message) -> int:
    """Of the payload; 0: there is none."""
    return sum(len(each.ids) for each in parts(message) if isinstance(each, FrameRows))


def parted(message: Message, rows: Rows | None) -> Iterator[tuple[Message, Rows | None]]:
    """Its parts, each with its own of the `rows` [row_count(message), E]; None where these did not fit."""
    begin = 0
    for each in parts(message):
        count = len(each.ids) if isinstance(each, FrameRows) else 0
        yield each, rows[begin : begin + count] if rows is not None and count else None
        begin += count
