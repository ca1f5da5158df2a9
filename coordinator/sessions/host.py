"""All sessions that are alive: their tasks, and the way of each message to the session it is for.

Knows: which session has which key and number. Does not know: what sessions do, or what the cluster decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

from coordinator import events as ev
from coordinator.scheduling.draft_load import draft_load
from coordinator.sessions.draft_ledger import DraftCounts
from coordinator.sessions.live_session import LiveSession
from coordinator.sessions.page_names import PageNames
from coordinator.sessions.port import Fail, Inbound, KeptPages
from coordinator.speed_meter import SpeedMeter
from coordinator.state import Pipeline
from edge_runtime.errors import RequestFailed
from edge_runtime.protocol.messages import CloseSession, Draft, Feed, Message, OpenSession

log = logging.getLogger(__name__)

SLOWEST_STEP = 20.0  # times the predicted time of a token: others share the pipeline
SLOWEST_PREFILL = 4.0


class SessionHost:
    """Implements SessionPort for the sessions it runs."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        *,
        clock: Callable[[], float],
        next_session: Callable[[], Awaitable[int]],
        post: Callable[[str, Message], None],
        tell: Callable[[ev.Event], None],
        pipeline: Callable[[int], Pipeline | None],
        meter: SpeedMeter,
        step_seconds: float,
        names: PageNames,
    ) -> None:
        """`pipeline(lease)`: the one under this lease, broken or not. `step_seconds`: beyond what was measured."""
        self._tasks = tasks
        self._clock = clock
        self._next_session = next_session
        self._post = post
        self._tell = tell
        self._pipeline = pipeline
        self._meter = meter
        self._step_seconds = step_seconds
        self._names = names
        self._sessions: dict[str, LiveSession] = {}
        self._by_number: dict[int, str] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self.drafts: dict[str, DraftCounts] = {}  # by source, of all sessions ever

    # ------------------------------------------------------------ life

    def begin(
        self,
        session: LiveSession,
        tenant: str,
        class_map: tuple[str, ...],
        when_over: Callable[[], None] = lambda: None,
    ) -> None:
        """Run it, and put it in the queue for a pipeline."""
        self._sessions[session.key] = session
        self._running[session.key] = self._tasks.create_task(self._live(session, when_over))
        self._tell(ev.SessionSubmitted(session.key, tenant, session.rows, class_map, self._clock()))

    async def _live(self, session: LiveSession, when_over: Callable[[], None]) -> None:
        try:
            await session.run()
        except Exception:
            # One request's failure, of whatever kind (a full disk under the journal, say), must not end the others'.
            log.exception("request %s failed in an unforeseen way", session.key)
        finally:
            self._sessions.pop(session.key, None)
            self._running.pop(session.key, None)
            self._tell(ev.SessionEnded(session.key, self._clock(), session.has_progressed))
            when_over()

    def get(self, key: str) -> LiveSession | None:
        return self._sessions.get(key)

    @property
    def sessions(self) -> Iterable[LiveSession]:
        return list(self._sessions.values())

    @property
    def open(self) -> int:
        """Sessions that are on a pipeline now."""
        return len(self._by_number)

    @property
    def waiting(self) -> int:
        return len(self._sessions) - len(self._by_number)

    async def drain(self, seconds: float) -> None:
        """Wait a while for those that run now."""
        running = list(self._running.values())
        if running and seconds > 0:
            await asyncio.wait(running, timeout=seconds)

    async def stop(self) -> None:
        """At once; the journal keeps what they have. Their devices hear of it before links are closed."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    # ------------------------------------------------------------ messages in

    def deliver(self, key: str, message: Inbound) -> bool:
        session = self._sessions.get(key)
        if session is None:
            return False
        session.deliver(message)
        return True

    def deliver_to_number(self, number: int, message: Inbound) -> None:
        """Messages for sessions that are closed are dropped in silence: they are late."""
        key = self._by_number.get(number)
        if key is not None:
            self.deliver(key, message)

    def key_of(self, number: int) -> str:
        """ "" where it is closed."""
        return self._by_number.get(number, "")

    def fail(self, key: str, error: RequestFailed) -> None:
        self.deliver(key, Fail(error))

    # ------------------------------------------------------------ SessionPort

    @property
    def clock(self) -> Callable[[], float]:
        return self._clock

    async def next_session(self) -> int:
        return await self._next_session()

    def start(self, key: str, opening: OpenSession, feed: Feed) -> None:
        self._by_number[opening.session] = key
        pipeline = self._pipeline(opening.lease)
        if pipeline is not None and not pipeline.broken:
            self._post(pipeline.members[0], opening)
            self._post(pipeline.members[0], feed)

    def draft(self, draft: Draft) -> None:
        pipeline = self._pipeline(draft.lease)
        if pipeline is not None and not pipeline.broken:
            self._post(pipeline.members[0], draft)

    def draft_load(self, lease: int) -> float:
        pipeline = self._pipeline(lease)
        if pipeline is None:
            return 0.0
        sharing = sum(session.lease == lease for session in self._sessions.values())
        return draft_load(sharing, pipeline.plan)

    def drafted(self, source: str, counts: DraftCounts) -> None:
        self.drafts[source] = self.drafts.get(source, DraftCounts()) + counts

    def close(self, session: int, lease: int, kept: KeptPages) -> None:
        """A pipeline that is over needs no telling: its sessions went with its lease."""
        self._by_number.pop(session, None)
        pipeline = self._pipeline(lease)
        if pipeline is not None and not pipeline.broken:
            for member in pipeline.members:
                self._post(member, CloseSession(session, lease, kept.names, kept.ids))

    def page_names(self, lease: int, tenant: str, ids: Sequence[int], *, after: bytes = b"") -> bytes:
        pipeline = self._pipeline(lease)
        if pipeline is None or not pipeline.is_row_invariant:
            return b""
        return self._names.chain(tenant, pipeline.class_map, ids, after=after)

    def broke(self, key: str, lease: int, reason: str, *, progressed: bool) -> None:
        log.warning("request %s is started again: %s", key, reason)
        self._tell(ev.SessionBroke(key, lease, reason, progressed, self._clock()))

    def patience_seconds(self, lease: int, rows: int) -> float:
        pipeline = self._pipeline(lease)
        if pipeline is None:
            return self._step_seconds
        plan = pipeline.plan
        decode_seconds = SLOWEST_STEP / max(plan.predicted_tokens_per_second, 1e-3)
        prefill_seconds = SLOWEST_PREFILL * rows / max(plan.predicted_prefill_tokens_per_second, 1e-3)
        return self._step_seconds + decode_seconds + prefill_seconds

    def stalled(self, key: str, lease: int, since: float, *, progressed: bool) -> None:
        self._tell(ev.SessionStalled(key, lease, since, progressed))

    def faulty_tail(self, key: str, lease: int, reason: str) -> None:
        pipeline = self._pipeline(lease)
        if pipeline is not None and not pipeline.broken:
            self._tell(ev.StageFaulted(pipeline.members[-1], lease, key, reason))

    def committed(self, lease: int, count: int, seconds: float) -> None:
        self._meter.add(count, seconds, now=self._clock(), lease=lease, is_alone=len(self._sessions) == 1)
