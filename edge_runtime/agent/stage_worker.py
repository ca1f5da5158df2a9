"""The compute thread: owns the Stage and the samplers, takes commands, gives back events.

One batch is in flight at a time; commands that came meanwhile (a cancelled session) are obeyed before the next one, so
KV is free within one step.

The thread runs an event loop, and steps are callbacks of it: links between stages live on it too (`data_plane.py`), so
that between a frame and its step, and between a step and its frame, no other thread has to wake up.

Knows: the thread, its turns, its pauses. Does not know: what a step is (`stage_steps.py`), links, leases.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TypeVar

from edge_runtime.agent.pipeline_events import DropRows, RunRows
from edge_runtime.agent.stage_steps import Deliver, LoadedStage, Order, StageSteps
from edge_runtime.engine.base import Stage
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.transport.eager_loop import EagerLoop

Result = TypeVar("Result")
Job = Callable[[], None]  # something that must not run beside a step: loading, closing
Command = Order | Job

STOP_SECONDS = 10.0  # the longest step we wait for at the end; the thread is a daemon beyond it


class StageWorker:
    """`put` from any thread; events come back through `deliver` on the compute thread, in order."""

    def __init__(
        self,
        deliver: Deliver,
        clock: Callable[[], float] = time.perf_counter,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_idle` is called on the compute thread when a turn has left nothing to do."""
        self.stage = StageSteps(deliver, clock)
        self._deliver = deliver
        self._on_idle = on_idle
        self._clock = clock
        self._lock = threading.Lock()  # of the two below: whoever puts the first command asks for a turn
        self._inbox: deque[Command] = deque()
        self._turn_asked = False
        self._loop = EagerLoop()
        self._end = asyncio.Event()  # these three belong to the loop's thread
        self._beside: set[asyncio.Task[None]] = set()
        self._later: asyncio.TimerHandle | None = None  # a turn after a pause
        self._thread = threading.Thread(target=self._work, name="stage", daemon=True)

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
                self.stage.came(command.work.session)
            self._inbox.append(command)
            if self._turn_asked:
                return
            self._turn_asked = True
        self._ask_for_turn()

    def _give_up(self, command: DropRows) -> None:
        """What runs for a session that goes need not be finished, above all not read from flash."""
        loaded = self.stage.loaded
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
        self.put(self.stage.retire)

    def give_back(self) -> None:
        """Free pages kept for sessions that nobody has begun since the last call. From any thread."""
        self.put(self.stage.give_back)

    def unload(self) -> None:
        """Free sessions and weights. From any thread."""
        self.put(self.stage.unload)

    def install(self, loaded: LoadedStage) -> None:
        """From work given to `call`."""
        self.stage.install(loaded)

    def take_retired(self) -> Stage | None:
        """From work given to `call`: the caller closes it."""
        return self.stage.take_retired()

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
        self.stage.unload()

    def _turn(self) -> None:
        """Obey everything, then one step. Whatever arrives on the loop's links has its turn before the next one."""
        if self._end.is_set():
            return
        if self._later is not None:
            self._later.cancel()
        try:
            while self._inbox:
                command = self._inbox.popleft()
                if callable(command):
                    command()
                else:
                    self.stage.obey(command)
            self._step()
        finally:
            self._plan_turn()

    def _step(self) -> None:
        step = self.stage.step()
        if step is not None:
            self._deliver(step.events)
            step.note()  # later: the next stage waits for what is delivered
        self.stage.measure()

    @property
    def is_idle(self) -> bool:
        """On the compute thread, outside turns: whether nothing waits for one."""
        return not self._turn_asked and not self._end.is_set()

    def settle(self, command: RunRows) -> None:
        """On the compute thread, outside turns: obey the command for a row that ran ahead (`StageSteps.run_ahead`)."""
        self.stage.came(command.work.session)
        self.stage.obey(command)
        self._step()
        if not self._turn_asked:
            self._on_idle()

    def _plan_turn(self) -> None:
        pause_seconds = self.stage.pause_seconds()
        with self._lock:
            self._turn_asked = bool(self._inbox) or pause_seconds == 0
        if self._turn_asked:
            self._loop.call_soon(self._turn)
        elif pause_seconds is not None:
            self._later = self._loop.call_later(pause_seconds, self._turn)
        else:
            self._on_idle()


def _resolve(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():  # else nobody waits any more
        future.set_result(result)


def _reject(future: asyncio.Future[Result], problem: Exception) -> None:
    if not future.done():
        future.set_exception(problem)
