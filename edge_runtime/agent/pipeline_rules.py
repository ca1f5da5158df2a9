"""Who may say what to a stage, and what a frame must look like.

Knows: the plan's devices and a session's order. Does not know: what is held, run or answered (`pipeline_state`).
"""

from __future__ import annotations

from edge_runtime.agent.pipeline_events import COORDINATOR, Rows
from edge_runtime.protocol.messages import (
    CloseSession,
    Feed,
    FrameRows,
    LoadStage,
    OpenSession,
    RowsHeld,
    Tokens,
)

ForStages = OpenSession | Feed | FrameRows | Tokens | RowsHeld | CloseSession


def may_send(order: LoadStage, source: str, message: ForStages) -> bool:
    is_first, is_tail = order.stage == 0, order.stage == len(order.devices) - 1
    before = COORDINATOR if is_first else order.devices[order.stage - 1]
    match message:
        case OpenSession():
            return source == before
        case Feed():
            return is_first and source == COORDINATOR
        case FrameRows():
            return not is_first and source == before
        case Tokens() | RowsHeld():
            return is_first and not is_tail and source == order.devices[-1]
        case CloseSession():
            return source == COORDINATOR


def frame_problem(order: OpenSession, frame: FrameRows, rows: Rows | None) -> tuple[str, str] | None:
    """(code, reason) of a frame that can never be run."""
    end = frame.base_row + len(frame.ids)
    chain = tuple(range(frame.base_row - 1, end - 1))
    if frame.parents != chain and len(frame.parents) == len(frame.ids):
        return "unsupported_tree", "this stage runs chains of rows, not trees"
    malformed = not frame.ids or frame.parents != chain or frame.base_row < 0 or rows is None
    if malformed or end > order.max_rows:
        return "protocol", f"frame {frame.seq} does not fit the plan of this session"
    is_whole = (frame.base_row, end) == (0, order.forced_rows)
    if frame.bidirectional != (order.tail == "pooler") or (frame.bidirectional and not is_whole):
        return "protocol", "a sequence that is read both ways must come in one frame"
    return None
