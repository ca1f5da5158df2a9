"""The compute thread: owns the Stage and the samplers, takes commands, gives back events.

One batch is in flight at a time; commands that came meanwhile (a cancelled session) are obeyed before the next one, so
KV is free within one step. A session that fails alone fails alone; anything unexpected breaks the stage.

The thread runs an event loop, and steps are callbacks of it: links between stages live on it too (`data_plane.py`), so
that between a frame and its step, and between a step and its frame, no other thread has to wake up.

Knows: stages, batches, samplers. Does not know: links, leases beyond their number.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import NamedTuple, TypeVar

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
from edge_runtime.agent.row_queue import RowQueue
from edge_runtime.agent.step_batch import batch_of, placed, split_rows
from edge_runtime.agent.step_pace import StepPace
from edge_runtime.agent.tail import TailSession
from edge_runtime.core import SessionId
from edge_runtime.engine.base import Stage
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.errors import EdgeRuntimeError

log = logging.getLogger(__name__)

Deliver = Callable[[Sequence[Event]], None]  # called on the compute thread
Result = TypeVar("Result")
Job = Callable[[], None]  # something that must not run beside a step: loading, closing
Command = OpenRows | RunRows | CancelRows | DropRows | Job

STOP_SECONDS = 10.0  # the longest step we wait for at the end; the thread is a daemon beyond it


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


class _Step(NamedTuple):
    pace: StepPace
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
        self.pace.ended(decode_rows, rows - decode_rows, seconds, self.ended_at, sessions)


class StageWorker:
    """`put` from any thread; events come back through `deliver` on the compute thread, in order."""

    def __init__(self, deliver: Deliver, clock: Callable[[], float] = time.perf_counter) -> None:
        self._deliver = deliver
        self._clock = clock
        self._decode_came_at: float | None = None  # the first decode row since the last step with any began
        self._lock = threading.Lock()  # of the three below: whoever puts the first command asks for a turn
        self._came_at: dict[SessionId, float] = {}  # decode rows in the inbox
        self._inbox: deque[Command] = deque()
        self._turn_asked = False
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()  # these three belong to the loop's thread
        self._beside: set[asyncio.Task[None]] = set()
        self._later: asyncio.TimerHandle | None = None  # a turn after a pause
        self._loaded: LoadedStage | None = None
        self._retired: Stage | None = None
        self._thread = threading.Thread(target=self._work, name="stage", daemon=True)
        self.steps = 0  # moves with every batch; read by heartbeats
        self.kv_used_tokens = 0
        self.row_seconds = 0.0  # of a step with one decoded row, in the stage that is loaded
        self.open_sessions = 0

    def start(self) -> None:
        self._thread.start()

    def beside(self, work: Coroutine[None, None, None]) -> concurrent.futures.Future[None]:
        """Run `work` on the thread's event loop, between steps; cancelled, and awaited, before the thread ends."""
        return asyncio.run_coroutine_threadsafe(self._followed(work), self._loop)

    async def _followed(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._beside.add(task)
        try:
            await work
        finally:
            self._beside.discard(task)

    def put(self, command: Command) -> None:
        if isinstance(command, DropRows) and not command.page_names:  # else its pages are to be kept
            self._give_up(command)
        with self._lock:
            if isinstance(command, RunRows) and command.work.is_decode:
                now = self._came_at[command.work.session] = self._clock()
                self._decode_came_at = now if self._decode_came_at is None else self._decode_came_at
            self._inbox.append(command)
            if self._turn_asked:
                return
            self._turn_asked = True
        self._ask_for_turn()

    def _give_up(self, command: DropRows) -> None:
        """What runs for a session that goes need not be finished, above all not read from flash."""
        loaded = self._loaded
        if loaded is not None and loaded.lease == command.lease and isinstance(loaded.stage, CpuStage):
            loaded.stage.give_up(command.session)

    def _ask_for_turn(self) -> None:
        if threading.current_thread() is self._thread:
            self._loop.call_soon(self._turn)
        else:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits for this any more
                self._loop.call_soon_threadsafe(self._turn)

    async def call(self, work: Callable[[], Result]) -> Result:
        """Run `work` between two steps and wait for what it returns or raises. It is not interrupted once begun."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def job() -> None:
            outcome: Callable[[], None]
            try:
                outcome = functools.partial(_resolve, future, work())
            except Exception as problem:  # goes to whoever waits
                outcome = functools.partial(_reject, future, problem)
            loop.call_soon_threadsafe(outcome)

        self.put(job)
        return await future

    def retire(self) -> None:
        """Drop every session and queued row now; the weights stay for the next stage. From any thread."""
        self.put(self._retire)

    def give_back(self) -> None:
        """Free pages kept for sessions that nobody has begun since the last call. From any thread."""
        self.put(self._give_back)

    def unload(self) -> None:
        """Free sessions and weights. From any thread."""
        self.put(self._unload)

    def install(self, loaded: LoadedStage) -> None:
        """From work given to `call`."""
        self._retire()
        self._loaded = loaded

    def take_retired(self) -> Stage | None:
        """From work given to `call`: the caller closes it."""
        self._retire()
        stage, self._retired = self._retired, None
        return stage

    def stop(self) -> bool:
        """Wait for the step in flight, close links and the stage. False where the thread is stuck in a step."""
        if self._thread.ident is None:
            self._loop.close()
            return True
        with contextlib.suppress(RuntimeError):  # it ended before
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(STOP_SECONDS)
        return not self._thread.is_alive()

    # ------------------------------------------------------------ on the compute thread

    def _work(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._until_end())

    async def _until_end(self) -> None:
        await self._end.wait()
        tasks = set(self._beside)
        for task in tasks:
            if not task.cancelling():  # else it is closing its links already
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._unload()

    def _turn(self) -> None:
        """Obey everything, then one step. Whatever arrives on the loop's links has its turn before the next one."""
        if self._end.is_set():
            return
        if self._later is not None:
            self._later.cancel()
        try:
            while self._inbox:
                self._obey(self._inbox.popleft())
            step = self._step()
            self._measure()
            if step is not None:
                self._deliver(step.events)
                step.note()  # later: the next stage waits for what is delivered
        finally:
            self._plan_turn()

    def _plan_turn(self) -> None:
        pause_seconds = self._pause_seconds()
        with self._lock:
            self._turn_asked = bool(self._inbox) or pause_seconds == 0
        if self._turn_asked:
            self._loop.call_soon(self._turn)
        elif pause_seconds is not None:
            self._later = self._loop.call_later(pause_seconds, self._turn)

    def _retire(self) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        for session in loaded.open:
            loaded.stage.drop(session)
        loaded.stage.give_back(all_pages=True)
        if self._retired is not None:
            self._retired.close()
        self._retired = loaded.stage

    def _give_back(self) -> None:
        if self._loaded is not None:
            self._loaded.stage.give_back()

    def _unload(self) -> None:
        self._retire()
        if self._retired is not None:
            self._retired.close()
            self._retired = None

    def _pause_seconds(self) -> float | None:
        """How long to wait for a command before the next step. None: as long as it takes."""
        loaded = self._loaded
        if loaded is None or not loaded.queue:
            return None
        if not loaded.queue.shared:
            return 0.0
        queue = loaded.queue
        return loaded.pace.pause_seconds(queue.decode_rows, self._clock(), queue.decode_sessions)

    def _measure(self) -> None:
        loaded = self._loaded
        self.kv_used_tokens = loaded.stage.kv_used_tokens if loaded else 0
        self.row_seconds = loaded.pace.row_seconds if loaded else 0.0
        self.open_sessions = len(loaded.open) if loaded else 0

    def _obey(self, command: Command) -> None:
        if callable(command):
            command()
            return
        lease = command.work.lease if isinstance(command, RunRows) else command.lease
        loaded = self._loaded
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

    def _step(self) -> _Step | None:
        loaded = self._loaded
        if loaded is None or self._pause_seconds() != 0:
            return None
        began_at = self._clock()
        works = placed(self._take(loaded, began_at), loaded.stage)
        try:
            events = self._run_apart(loaded, works)
        except Exception as problem:  # the engine itself: nothing it holds can be trusted any more
            log.exception("lease %d: the engine failed", loaded.lease)
            self._loaded = None
            loaded.stage.close()
            reason = f"{type(problem).__name__}: {problem}"
            events = [StageBroke(loaded.lease, "engine", reason, "see the agent's log")]
        self.steps += 1
        return _Step(loaded.pace, works, events, began_at, self._clock())

    def _take(self, loaded: LoadedStage, now: float) -> list[Work]:
        queue, pace = loaded.queue, loaded.pace
        if not queue.shared:
            return queue.take()
        decode_rows = queue.decode_rows
        if decode_rows:
            came_at, self._decode_came_at = self._decode_came_at, None
            pace.began(decode_rows, now if came_at is None else came_at)
        sessions = pace.groups.most() if queue.decode_sessions is not None else None
        return queue.take(pace.prompt_rows(decode_rows, now), sessions)

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


def _resolve(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():  # else nobody waits any more
        future.set_result(result)


def _reject(future: asyncio.Future[Result], problem: Exception) -> None:
    if not future.done():
        future.set_exception(problem)
