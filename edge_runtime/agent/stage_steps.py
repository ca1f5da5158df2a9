"""What a stage does between two turns of its thread: obey commands, run a step, sample.

A session that fails alone fails alone; anything unexpected breaks the stage.

Knows: stages, batches, samplers. Does not know: threads, links, leases beyond their number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from edge_runtime.agent.next_step import pause_seconds, take_step
from edge_runtime.agent.pipeline_events import (
    CancelRows,
    DropRows,
    Event,
    OpenRows,
    RowsOpened,
    RunRows,
    SessionBroke,
    StageBroke,
    Work,
    WorkFinished,
)
from edge_runtime.agent.ran_ahead import RanAhead
from edge_runtime.agent.row_queue import RowQueue
from edge_runtime.agent.step_batch import batch_of, placed, split_rows
from edge_runtime.agent.step_pace import StepPace
from edge_runtime.agent.tail import TailSession
from edge_runtime.core import SessionId, Token
from edge_runtime.engine.base import Batch, Rows, Stage
from edge_runtime.errors import EdgeRuntimeError

log = logging.getLogger(__name__)

Deliver = Callable[[Sequence[Event]], None]
Answer = Callable[[Rows | None, tuple[Token, ...]], None]
Order = OpenRows | RunRows | CancelRows | DropRows


class LoadedStage:
    """A stage and what the worker must know to run it. `is_first` of its pipeline: it forms groups of sessions."""

    def __init__(
        self,
        lease: int,
        stage: Stage,
        *,
        is_tail: bool,
        vocab_size: int,
        queue: RowQueue,
        is_first: bool = True,
    ) -> None:
        self.lease = lease
        self.stage = stage
        self.is_tail = is_tail
        self.vocab_size = vocab_size
        self.queue = queue
        self.pace = StepPace(forms_groups=is_first)
        self.tails: dict[SessionId, TailSession] = {}
        self.open: set[SessionId] = set()


class Step(NamedTuple):
    loaded: LoadedStage
    works: list[Work]
    events: list[Event]
    began_at: float
    ended_at: float

    def note(self) -> None:
        """What it says of the pace of the stage."""
        decode_rows = sum(work.row_count for work in self.works if work.is_decode)
        rows = sum(work.row_count for work in self.works)
        sessions = [work.session for work in self.works if work.is_decode and work.row_count == 1]
        seconds = self.ended_at - self.began_at
        self.loaded.pace.ended(decode_rows, rows - decode_rows, seconds, self.ended_at, sessions)


class StageSteps:
    """The Stage in force, its queue and its samplers. What happens beside steps goes to `deliver`.

    Everything is for one thread, except `came`.
    """

    def __init__(self, deliver: Deliver, clock: Callable[[], float]) -> None:
        self._deliver = deliver
        self._clock = clock
        self._came_at: dict[SessionId, float] = {}  # decode rows that are not obeyed yet
        self._decode_came_at: float | None = None  # the first decode row since the last step with any began
        self.loaded: LoadedStage | None = None
        self._retired: Stage | None = None
        self._ahead: RanAhead | None = None  # until its command was obeyed
        self.steps = 0  # moves with every batch; read by heartbeats
        self.kv_used_tokens = 0
        self.served_seconds = 0.0, 0.0  # of a row here, and of its round, in the stage that is loaded
        self.open_sessions = 0

    def came(self, session: SessionId) -> None:
        """A decode row that will be obeyed. From any thread, one at a time."""
        now = self._came_at[session] = self._now()
        self._decode_came_at = now if self._decode_came_at is None else self._decode_came_at

    def _now(self) -> float:
        """Of a row that ran ahead: what follows is about the moment at which it came."""
        return self._clock() if self._ahead is None else self._ahead.began_at

    def install(self, loaded: LoadedStage) -> None:
        self.retire()
        self.loaded = loaded

    def take_retired(self) -> Stage | None:
        """The caller closes it."""
        self.retire()
        stage, self._retired = self._retired, None
        return stage

    def retire(self) -> None:
        loaded, self.loaded = self.loaded, None
        if loaded is None:
            return
        for session in loaded.open:
            loaded.stage.drop(session)
        loaded.stage.give_back(all_pages=True)
        if self._retired is not None:
            self._retired.close()
        self._retired = loaded.stage

    def give_back(self) -> None:
        if self.loaded is not None:
            self.loaded.stage.give_back()

    def unload(self) -> None:
        self.retire()
        if self._retired is not None:
            self._retired.close()
            self._retired = None

    def pause_seconds(self) -> float | None:
        """How long to wait for a command before the next step. None: as long as it takes."""
        loaded = self.loaded
        return None if loaded is None else pause_seconds(loaded.queue, loaded.pace, self._now())

    @property
    def only_decoding(self) -> SessionId | None:
        """The one session that decodes, where its next row would run alone and nothing else may happen meanwhile."""
        loaded = self.loaded
        if loaded is None or loaded.queue or not loaded.queue.shared:
            return None
        if getattr(loaded.stage, "peer_experts", None) is not None:
            return None  # links are read while such a step runs
        return loaded.pace.only_decoding

    def run_ahead(self, batch: Batch, answer: Answer) -> RanAhead:
        """Run the one row that `only_decoding` waits for. The command for it has to be the next one.

        `answer` is given the rows [1, E], or the tail's tokens, before anything is noted; it may not raise.
        """
        loaded = self.loaded
        assert loaded is not None
        assert self._ahead is None
        (span,) = batch.spans
        began_at = self._clock()
        where = span.session, span.base_row, span.ids[0], began_at
        try:
            rows = loaded.stage.run(batch)
            if loaded.is_tail:
                tokens = loaded.tails[span.session].sample(span.base_row, span.ids, rows)
                ended_at = self._clock()
                answer(None, tokens)
                self._ahead = RanAhead(*where, ended_at, tokens=tokens)
            else:
                ended_at = self._clock()
                answer(rows, ())
                self._ahead = RanAhead(*where, ended_at, rows)
        except Exception as problem:  # the step says what it means
            self._ahead = RanAhead(*where, self._clock(), problem=problem)
        return self._ahead

    def measure(self) -> None:
        loaded = self.loaded
        self.kv_used_tokens = loaded.stage.kv_used_tokens if loaded else 0
        served = loaded.pace.served if loaded else None
        self.served_seconds = (served.row_seconds, served.round_seconds) if served else (0.0, 0.0)
        self.open_sessions = len(loaded.open) if loaded else 0

    def obey(self, command: Order) -> None:
        lease = command.work.lease if isinstance(command, RunRows) else command.lease
        loaded = self.loaded
        if loaded is None or lease != loaded.lease:
            return  # of a plan that is over: its sessions went with it
        match command:
            case OpenRows():
                self._open(loaded, command)
            case RunRows(work):
                if work.session in loaded.open:
                    loaded.queue.add(work)
                    if work.is_decode:
                        loaded.pace.came(work.session, self._came_at.pop(work.session, None))
            case CancelRows():
                loaded.queue.cancel(command)
            case DropRows():
                if command.page_names and command.session in loaded.open and loaded.queue.shared:
                    loaded.stage.keep(command.session, command.first_page, command.page_names, command.ids)
                self._drop(loaded, command.session)

    def _open(self, loaded: LoadedStage, order: OpenRows) -> None:
        tail = None
        try:
            if order.sampling is not None:
                tail = TailSession(order.sampling, loaded.vocab_size, order.prompt_rows)
            # Where rows depend on their neighbours, those of another session are not what this one would compute.
            names = order.page_names if loaded.queue.shared else ()
            ids = loaded.stage.open(order.session, order.max_rows, names)
        except EdgeRuntimeError as problem:
            self._deliver([SessionBroke(loaded.lease, order.session, problem.code, problem.message)])
            return
        loaded.open.add(order.session)
        if tail is not None:
            tail.adopt(ids)
            loaded.tails[order.session] = tail
        if order.page_names:
            self._deliver([RowsOpened(loaded.lease, order.session, len(ids))])

    def _drop(self, loaded: LoadedStage, session: SessionId) -> None:
        loaded.queue.drop(session)
        loaded.pace.left(session)
        self._came_at.pop(session, None)
        loaded.tails.pop(session, None)
        if session in loaded.open:
            loaded.open.discard(session)
            loaded.stage.drop(session)

    def step(self) -> Step | None:
        loaded = self.loaded
        if loaded is None or self.pause_seconds() != 0:
            return None
        began_at = self._now()
        works = placed(self._take(loaded, began_at), loaded.stage)
        try:
            events = self._run_apart(loaded, works)
        except Exception as problem:  # the engine itself: nothing it holds can be trusted any more
            log.exception("lease %d: the engine failed", loaded.lease)
            self.loaded = None
            loaded.stage.close()
            reason = f"{type(problem).__name__}: {problem}"
            events = [StageBroke(loaded.lease, "engine", reason, "see the agent's log")]
        self.steps += 1
        ahead, self._ahead = self._ahead, None
        return Step(loaded, works, events, began_at, ahead.ended_at if ahead else self._clock())

    def _take(self, loaded: LoadedStage, now: float) -> list[Work]:
        works = take_step(loaded.queue, loaded.pace, now, self._decode_came_at)
        if works and works[0].is_decode:  # they come first
            self._decode_came_at = None
        return works

    def _run_apart(self, loaded: LoadedStage, works: list[Work]) -> list[Event]:
        """All in one batch; where that is refused, one by one, so that the guilty session fails alone."""
        try:
            return self._run(loaded, works)
        except EdgeRuntimeError as problem:
            if len(works) > 1:
                return [event for work in works for event in self._run_apart(loaded, [work])]
            self._drop(loaded, works[0].session)
            return [SessionBroke(loaded.lease, works[0].session, problem.code, problem.message)]

    def _run(self, loaded: LoadedStage, works: list[Work]) -> list[Event]:
        if self._ahead is not None:
            return self._ahead.events_of(works)
        result = loaded.stage.run(batch_of(works))
        if not loaded.is_tail:
            return split_rows(works, result)
        if works[0].bidirectional:
            return [WorkFinished(work, vector) for work, vector in zip(works, result, strict=True)]
        events: list[Event] = []
        start = 0
        for work in works:
            end = start + work.logit_rows + len(work.sides)
            logits = result[start:end]  # [logit_rows + side rows, V]
            start = end
            tokens = loaded.tails[work.session].sample(work.base_row, work.ids, logits, work.sides)
            events.append(WorkFinished(work, None, tokens))
        return events
