"""The rim of drafting: a drafter on its thread, and `DraftLoop` between it and a link.

What the loop orders is done in order: frames go to whoever owns the link, orders to the drafter's thread, whose answers
come back to the event loop. A drafter that fails ends drafting, never the request.

Knows: one thread, one event loop's clock. Does not know: sockets, text, how a drafter is chosen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from edge_runtime.core import SamplingParams
from edge_runtime.speculative.draft_loop import Action, DraftLoop, Extend, Propose, Rewind, SendDrafts
from edge_runtime.speculative.drafters.base import Drafter, Proposal
from edge_runtime.speculative.wire import DraftFrame

log = logging.getLogger(__name__)
THREAD_NAME = "edge-runtime-drafter"

Value = TypeVar("Value")


class DrafterThread:
    """One drafter, and the only thread that calls it. `open` before use, `close` when done."""

    def __init__(self, make: Callable[[], Drafter]) -> None:
        self._make = make
        self._drafter: Drafter | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=THREAD_NAME)

    @property
    def is_open(self) -> bool:
        return self._drafter is not None

    async def open(self) -> None:
        """Make the drafter. Raises what that raises; the thread is then gone."""
        try:
            self._drafter = await asyncio.wrap_future(self._executor.submit(self._make))
        except BaseException as problem:
            # A call that raised has returned; one that was given up may still run, and nobody waits for it.
            self._executor.shutdown(wait=isinstance(problem, Exception), cancel_futures=True)
            raise

    def do(self, call: Callable[[Drafter], Value]) -> Future[Value]:
        """After all calls before it."""
        drafter = self._drafter
        assert drafter is not None
        return self._executor.submit(lambda: call(drafter))

    async def close(self) -> None:
        """Waits for the call that runs, if one does."""
        if self._drafter is None:
            return
        last = self.do(lambda drafter: drafter.close())
        self._drafter = None
        self._executor.shutdown(wait=False)
        await asyncio.wrap_future(last)
        self._executor.shutdown(wait=True)  # nothing is left to do there


class Driver:
    """One request. Every method belongs to the event loop it was made in; none waits.

    `send` takes frames; while there is no link it may drop them. `failure`: why the drafter gave up, or None.
    """

    def __init__(
        self,
        thread: DrafterThread,
        loop: DraftLoop,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        send: Callable[[DraftFrame], None],
    ) -> None:
        self.failure: BaseException | None = None
        self.loop = loop
        self._thread = thread
        self._send = send
        self._events = asyncio.get_running_loop()
        self._clock = self._events.time
        self._alarm: asyncio.TimerHandle | None = None
        self._ended = False
        prompt = tuple(prompt_ids)
        self._do(lambda drafter: drafter.begin(prompt, sampling))
        self._act(loop.start(self._clock()))

    def committed(self, position: int, ids: Sequence[int], finish: str = "") -> None:
        """A committed frame arrived. Raises ProtocolError where ids before it are missing."""
        self._act(self.loop.committed(position, ids, self._clock(), finish))
        if finish:
            self.end(learn=finish != "cancelled")

    def loaded(self, load: float) -> None:
        """The target said how loaded it is, 0 .. 1."""
        self._act(self.loop.loaded(load, self._clock()))

    def link_lost(self) -> None:
        self._act(self.loop.link_lost(self._clock()))

    def link_resumed(self) -> None:
        self._act(self.loop.link_resumed(self._clock()))

    def end(self, *, learn: bool = False) -> None:
        """No more drafts; the drafter is free for another request. `learn`: what was committed may be remembered."""
        if self._ended:
            return
        self._ended = True
        self._set_alarm(None)
        length = self.loop.length

        def end(drafter: Drafter) -> None:
            drafter.rewind(length)  # drafts that were never judged
            drafter.end(learn=learn)

        self._do(end)

    # ------------------------------------------------------------ what the loop orders

    def _act(self, actions: Sequence[Action]) -> None:
        if self._ended or self.failure is not None:
            return
        for action in actions:
            match action:
                case SendDrafts(frame):
                    self._send(frame)
                case Rewind(length):
                    self._do(lambda drafter, length=length: drafter.rewind(length))  # type: ignore[misc]
                case Extend(ids):
                    self._do(lambda drafter, ids=ids: drafter.extend(ids))  # type: ignore[misc]
                case Propose(ticket, count, width):
                    self._propose(ticket, count, width)
        self._set_alarm(self.loop.wake_at)

    def _propose(self, ticket: int, count: int, width: int) -> None:
        def propose(drafter: Drafter) -> tuple[Proposal, float, float]:
            began = self._clock()
            return drafter.propose(count, width), began, self._clock()

        def done(found: tuple[Proposal, float, float]) -> None:
            if not self._ended:
                self._act(self.loop.proposed(ticket, *found))

        self._do(propose, done)

    def _do(self, call: Callable[[Drafter], Value], done: Callable[[Value], None] | None = None) -> None:
        """On the drafter's thread; `done` gets its value here."""
        if self.failure is not None or not self._thread.is_open:
            return

        def report(future: Future[Value]) -> None:
            problem = future.exception()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know
                if problem is not None:
                    self._events.call_soon_threadsafe(self._fail, problem)
                elif done is not None:
                    self._events.call_soon_threadsafe(done, future.result())

        self._thread.do(call).add_done_callback(report)

    def _fail(self, problem: BaseException) -> None:
        if self.failure is None:
            self.failure = problem
            self._set_alarm(None)
            log.warning("drafting stopped, the request goes on: %s: %s", type(problem).__name__, problem)

    # ------------------------------------------------------------ time

    def _set_alarm(self, at_seconds: float | None) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = None if at_seconds is None else self._events.call_at(at_seconds, self._passed)

    def _passed(self) -> None:
        self._act(self.loop.passed(self._clock()))
