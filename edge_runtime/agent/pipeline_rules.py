"""Who may say what to a stage, and what a frame must look like.

Knows: the plan's devices and a session's order. Does not know: what is held, run or answered (`pipeline_state`).
"""

from __future__ import annotations

from edge_runtime.agent.pipeline_events import (
    COORDINATOR,
    MAX_DECODE_ROWS,
    Instruction,
    Rows,
    Send,
    Work,
)
from edge_runtime.agent.session import Session
from edge_runtime.engine.side_rows import NO_SIDES, SideRows, parted
from edge_runtime.protocol.messages import (
    HOLDS_EXPERTS,
    CloseSession,
    Draft,
    Feed,
    Fence,
    FrameRows,
    LoadStage,
    OpenSession,
    RowsHeld,
    Tokens,
)

PROGRESS_ROWS = 256  # of a prompt, after which the coordinator hears that it is getting on

ForStages = OpenSession | Feed | Draft | FrameRows | Fence | Tokens | RowsHeld | CloseSession


def may_send(order: LoadStage, source: str, message: ForStages) -> bool:
    if order.stage == HOLDS_EXPERTS:
        return False
    is_first, is_tail = order.stage == 0, order.stage == len(order.devices) - 1
    before = COORDINATOR if is_first else order.devices[order.stage - 1]
    match message:
        case OpenSession():
            return source == before
        case Feed() | Draft():
            return is_first and source == COORDINATOR
        case FrameRows():
            return not is_first and source == before
        case Fence():
            return not is_tail and source == order.devices[-1]
        case Tokens() | RowsHeld():
            return is_first and not is_tail and source == order.devices[-1]
        case CloseSession():
            return source == COORDINATOR


Tree = tuple[tuple[int, ...], SideRows]  # a chain's ids, and what stands beside it


def tree_of(frame: FrameRows) -> Tree | None:
    """Its chain and its side rows. None where its parents make no such tree, or one that is too large for a step."""
    try:
        ids, sides = parted(frame.base_row, frame.parents, frame.ids)
    except ValueError:
        return None
    return None if sides and len(frame.ids) > MAX_DECODE_ROWS else (ids, sides)


def frame_problem(
    order: OpenSession, frame: FrameRows, tree: Tree | None, rows: Rows | None
) -> tuple[str, str] | None:
    """(code, reason) of a frame that can never be run. `tree`: of the frame."""
    ids, sides = tree or ((), NO_SIDES)
    end = frame.base_row + len(ids)
    if sides:
        end = max(end, max(sides.positions()) + 1)
    if not ids or frame.base_row < 0 or rows is None or end > order.max_rows:
        return "protocol", f"frame {frame.seq} does not fit the plan of this session"
    if sides and (frame.bidirectional or frame.base_row < order.forced_rows):
        return "protocol", "rows that were given have no others beside them"
    is_whole = (frame.base_row, end) == (0, order.forced_rows)
    if frame.bidirectional != (order.tail == "pooler") or (frame.bidirectional and not is_whole):
        return "protocol", "a sequence that is read both ways must come in one frame"
    return None


def frame_of(work: Work) -> FrameRows:
    """What the next stage gets of a work that has run here."""
    return FrameRows(
        session=work.session,
        lease=work.lease,
        turn=work.turn,
        seq=work.seq,
        base_row=work.base_row,
        parents=(
            *range(work.base_row - 1, work.base_row + len(work.ids) - 1),
            *work.sides.numbered(work.base_row, len(work.ids)),
        ),
        ids=work.ids + work.sides.ids,
        bidirectional=work.bidirectional,
    )


def fences(order: LoadStage, session: Session) -> list[Instruction]:
    """Of the tail, for the stages in between: stage 1 learns of a miss from the ids themselves."""
    fence = Fence(session.id, order.lease, session.turn)
    return [Send(device, fence) for device in order.devices[1:-1]]


def prompt_progress(order: LoadStage, work: Work) -> list[Instruction]:
    """Of the tail: prompt rows that have come through it."""
    message = RowsHeld(work.session, order.lease, work.base_row + len(work.ids), reused=False)
    receivers = order.devices[:1] if order.stage else ()
    if work.base_row // PROGRESS_ROWS != message.rows // PROGRESS_ROWS:
        receivers = (*receivers, COORDINATOR)
    return [Send(to, message) for to in receivers]
