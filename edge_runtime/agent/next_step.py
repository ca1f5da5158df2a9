"""Which rows the next step takes, and whether to wait before it: the queue and the pace asked in the right order.

Knows: a queue, a pace. Does not know: clocks (times are given), threads, engines.
"""

from __future__ import annotations

from edge_runtime.agent.pipeline_events import Work
from edge_runtime.agent.row_queue import RowQueue
from edge_runtime.agent.step_pace import StepPace


def pause_seconds(queue: RowQueue, pace: StepPace, now: float) -> float | None:
    """How long to wait for a command before the next step. None: as long as it takes, nothing is queued."""
    if not queue:
        return None
    if not queue.shared:
        return 0.0
    decode_rows, sessions, _prompts = queue.waiting()
    return pace.pause_seconds(decode_rows, now, sessions)


def take_step(queue: RowQueue, pace: StepPace, now: float, decode_came_at: float | None) -> list[Work]:
    """Take what the step that begins now runs. `decode_came_at`: the first decode row since such a step, if known."""
    if not queue.shared:
        return queue.take()
    decode_rows, waiting_sessions, prompts = queue.waiting()
    if decode_rows:
        pace.began(decode_rows, now if decode_came_at is None else decode_came_at)
    sessions = pace.groups.most() if waiting_sessions is not None else None
    if not prompts:
        return queue.take(None, sessions)
    if sessions is not None:
        # The others wait for the next step, beside which prompt rows ride.
        decode_rows = min(decode_rows, sessions)
    return queue.take(pace.prompt_rows(decode_rows, now), sessions)
