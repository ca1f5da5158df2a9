"""Writes draft_loop_golden.json: what DraftLoop does with made-up events, for the console's draft_loop.js to do too.

    python -m tests.browser.record_draft_loop

The pace and the loop's time are given, so that positions, frames, orders and when something counts as lost are
compared: how far ahead to draft, and how long a loop takes, each side decides by itself.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from edge_runtime.speculative.controller import Choice, Controller
from edge_runtime.speculative.draft_loop import Action, DraftLoop, Extend, Propose, Rewind, SendDrafts
from edge_runtime.speculative.drafters.base import Proposal
from edge_runtime.speculative.estimates import Estimates

PATH = Path(__file__).with_name("draft_loop_golden.json")
PROMPT, VOCABULARY, STOP_ID, CASES, EVENTS = 3, 50, 49, 24, 90
TOO_SOON_SECONDS = 1e-3


class Given(Controller):
    """A pace that is given."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self._choice = choice

    def choose(self, *_: object) -> Choice:
        assert self._choice is not None
        return self._choice


class GivenLoop(Estimates):
    """A loop's time that is given; `is_measured`: whether it is known or guessed."""

    def __init__(self, seconds: float, is_measured: bool) -> None:
        super().__init__()
        self._seconds, self._is_measured = seconds, is_measured

    @property
    def is_loop_measured(self) -> bool:
        return self._is_measured

    @property
    def slow_loop_seconds(self) -> float:
        return self._seconds


def truth(position: int) -> int:
    return (7 * position + position * position) % (VOCABULARY - 1)


class Recorder:
    """One request: random events, and what the loop answered to each."""

    def __init__(self, case: int) -> None:
        self.random = random.Random(case)
        self.options = {
            "window": self.random.choice((1, 2, 5, 16, 64)),
            "chunk": self.random.choice((1, 2, 4, 16)),
            "maxRows": self.random.choice((20, 90, 400)),
            "loopSeconds": self.random.choice((0.02, 0.4, 12.5)),
            "isLoopMeasured": self.random.random() < 0.7,
        }
        estimates = GivenLoop(self.options["loopSeconds"], self.options["isLoopMeasured"])
        choice = Choice(self.options["window"], self.options["chunk"], 1)
        rows = self.options["maxRows"]
        self.loop = DraftLoop(
            PROMPT, rows, VOCABULARY, Given(choice), estimates=estimates, stop_ids=(STOP_ID,)
        )
        self.right = self.random.choice((0.5, 0.9, 0.98))
        self.sequence = PROMPT  # ids that the drafter follows
        self.asked: list[Propose] = []
        self.linked = True
        self.now = 0.0
        self.events: list[list[Any]] = []
        self.note("start", [], self.loop.start(0.0))

    def note(self, event: str, arguments: list[Any], actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Rewind(length):
                    self.sequence = length
                case Extend(ids):
                    self.sequence += len(ids)
                case Propose():
                    self.asked.append(action)
        counts = self.loop.counts
        figures = [
            self.loop.length,
            self.loop.turn,
            counts.drafted,
            counts.accepted,
            counts.wasted,
            counts.misses,
            counts.resent_frames,
            self.loop.wake_at,
        ]
        self.events.append([event, arguments, self.now, [plain(each) for each in actions], figures])

    def step(self) -> None:
        self.now = round(self.now + self.random.choice((0.001, 0.02, 0.3)), 6)
        kind = self.random.choices(("committed", "proposed", "passed", "link"), (5, 14, 1.2, 0.6))[0]
        if kind == "committed" and self.linked and not self.loop.finish:
            self.commit()
        elif kind == "proposed" and self.asked:
            self.propose()
        elif kind == "passed" and self.linked:
            due = self.loop.wake_at
            if due is not None:  # to the bit when it is due, or just before
                self.now = max(self.now, due if self.random.random() < 0.7 else due - TOO_SOON_SECONDS)
            self.note("passed", [], self.loop.passed(self.now))
        elif kind == "link":
            self.linked = not self.linked
            if self.linked:
                self.note("linkResumed", [], self.loop.link_resumed(self.now))
            else:
                self.note("linkLost", [], self.loop.link_lost(self.now))

    def commit(self) -> None:
        first = self.loop.length - self.random.choice((0, 0, 0, 1, 2))  # some are known already
        first = max(first, PROMPT)
        end = min(self.loop.length + self.random.choice((1, 1, 1, 2, 3, 6)), self.options["maxRows"])
        ids = [truth(position) for position in range(first, end)]
        finish = "length" if end == self.options["maxRows"] else ""
        self.note("committed", [first, ids, finish], self.loop.committed(first, ids, self.now, finish))

    def propose(self) -> None:
        asked = self.asked.pop(0)
        count = 0 if self.random.random() < 0.03 else self.random.randint(1, asked.count)
        ids = [
            truth(position) if self.random.random() < self.right else self.random.randrange(VOCABULARY + 2)
            for position in range(self.sequence, self.sequence + count)
        ]
        proposal = Proposal(tuple(ids), tuple(range(-1, len(ids) - 1)), (0.5,) * len(ids), "toy")
        self.note(
            "proposed", [asked.ticket, ids], self.loop.proposed(asked.ticket, proposal, self.now, self.now)
        )


def plain(action: Action) -> list[Any]:
    match action:
        case SendDrafts(frame):
            return ["send", frame.turn, frame.base_row, list(frame.ids)]
        case Rewind(length):
            return ["rewind", length]
        case Extend(ids):
            return ["extend", list(ids)]
        case Propose(ticket, count):
            return ["propose", ticket, count]


def main() -> None:
    cases = []
    for case in range(CASES):
        recorder = Recorder(case)
        for _ in range(EVENTS):
            recorder.step()
        cases.append({**recorder.options, "events": recorder.events})
    head = {"promptLength": PROMPT, "vocabSize": VOCABULARY, "stopIds": [STOP_ID]}
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    PATH.write_text(f'{{"head": {json.dumps(head)}, "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
