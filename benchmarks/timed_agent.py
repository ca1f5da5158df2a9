"""An agent that notes when each step of its stage began and ended: `python timed_agent.py FILE agent --name …`.

It is the ordinary agent process with its steps watched. The tail's sampler is part of its step. The clock is the
machine's monotonic one, so that the notes of several agents on one machine line up. Beside FILE, FILE.rows says which
rows ran and what was sampled. Knows: steps and times. Does not know: what is made of them (`steps.py`, `row_notes.py`).
"""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECORD = struct.Struct("<ddqqqq")  # begin, end, session, base row, rows in all, KV bytes committed


def watch(path: Path) -> None:
    """Every stage this process loads from now on. Unbuffered: a process that is stopped twice has no time to flush.

    Notes are written when the rows are on their way: writing them is not a part of what they measure.
    """
    from edge_runtime.agent.stage_steps import LoadedStage, StageSteps, Step
    from edge_runtime.agent.tail import TailSession

    notes = path.open("ab", buffering=0)
    rows = path.with_name(path.name + ".rows").open("ab", buffering=0)
    construct, run, note, sample = LoadedStage.__init__, StageSteps._run, Step.note, TailSession.sample
    times = [0.0, 0.0]
    steps: list[tuple[float, float, int, list[Any], list[Any]]] = []  # of this turn

    def timed(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def watched(batch: Any) -> Any:
            times[0] = time.monotonic()
            rows = run(batch)
            times[1] = time.monotonic()
            return rows

        return watched

    def constructed(loaded: LoadedStage, lease: int, stage: Any, **rest: Any) -> None:
        stage.run = timed(stage.run)
        construct(loaded, lease, stage, **rest)

    def stepped(stage_steps: StageSteps, loaded: LoadedStage, works: list[Any]) -> list[Any]:
        events = run(stage_steps, loaded, works)
        kv_bytes = loaded.stage.kv_committed_bytes  # type: ignore[attr-defined]
        steps.append((times[0], times[1], kv_bytes, works, events))
        return events

    def sampled(tail: TailSession, *arguments: Any) -> Any:
        tokens = sample(tail, *arguments)
        times[1] = time.monotonic()
        return tokens

    def noted(done: Step) -> None:
        note(done)
        for begin, end, kv_bytes, works, events in steps:
            count = sum(len(work.ids) for work in works)
            notes.write(RECORD.pack(begin, end, works[0].session, works[0].base_row, count, kv_bytes))
            rows.write(row_note(begin, end, works, events))
        steps.clear()

    LoadedStage.__init__ = constructed  # type: ignore[method-assign, assignment]
    StageSteps._run = stepped  # type: ignore[method-assign, assignment]
    TailSession.sample = sampled  # type: ignore[method-assign, assignment]
    Step.note = noted  # type: ignore[method-assign, assignment]


def row_note(began: float, ended: float, works: list[Any], events: list[Any]) -> bytes:
    """One line of `row_notes.py`."""
    noted = [[work.session, work.base_row, work.is_prompt, work.ids, *_sides(work)] for work in works]
    sampled = [
        [event.work.session, token.position, token.id]
        for event in events
        for token in getattr(event, "tokens", ())
    ]
    return json.dumps({"began": began, "ended": ended, "works": noted, "sampled": sampled}).encode() + b"\n"


def _sides(work: Any) -> tuple[list[int], list[int]]:
    """Ids and parents, side rows numbered after the chain's rows."""
    sides = getattr(work, "sides", None)
    if not sides:
        return [], []
    end = work.base_row + len(work.ids)
    return list(sides.ids), [end + ~parent if parent < 0 else parent for parent in sides.parents]


if __name__ == "__main__":
    from edge_runtime.sdk import child

    watch(Path(sys.argv[1]))
    del sys.argv[1]
    sys.exit(child.run())
