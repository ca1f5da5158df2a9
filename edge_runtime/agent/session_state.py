"""Which generations a stage has open: what OpenSession, its answer and CloseSession do.

Knows: sessions by number, what of earlier ones is reused, who hears of it. Does not know: the order of rows, drafts,
ids (`pipeline_state`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from dataclasses import replace

from edge_runtime.agent.lease_state import LeaseState
from edge_runtime.agent.pipeline_events import (
    COORDINATOR,
    DropRows,
    Ignore,
    Instruction,
    OpenRows,
    RowsOpened,
    Send,
)
from edge_runtime.agent.session import Session, problem_of, split_names
from edge_runtime.core import SessionId
from edge_runtime.engine.page_table import PAGE_TOKENS
from edge_runtime.protocol.messages import NOBODY_ASKS, CloseSession, OpenSession, RowsHeld, SessionFailed

CLOSED_SESSIONS_KEPT = 1 << 16  # an OpenSession that comes after its CloseSession must not open it again


class SessionState(LeaseState):
    def __init__(self) -> None:
        super().__init__()
        self.sessions: dict[SessionId, Session] = {}
        self._closed: OrderedDict[SessionId, None] = OrderedDict()
        # Stage 1: with fed ids to be issued, and how many were in this turn of theirs.
        self._prompts: OrderedDict[SessionId, int] = OrderedDict()

    @property
    def has_prompts(self) -> bool:
        """Stage 1: with ids that wait to be issued."""
        return bool(self._prompts)

    @abstractmethod
    def _issue_prompts(self) -> list[Instruction]:
        """Room became free, or ids came."""

    @abstractmethod
    def _go_on(self, session: Session) -> list[Instruction]:
        """What was fed may be issued now."""

    def _forget_sessions(self) -> None:
        self.sessions.clear()
        self._prompts.clear()
        self._closed.clear()

    def _open(self, order: OpenSession) -> list[Instruction]:
        assert self.order is not None
        key = SessionId(order.session)
        if key in self.sessions or key in self._closed:
            return [Ignore(f"session {key} was opened before")]
        session = self.sessions[key] = Session(order)
        problem = problem_of(order)
        if problem:
            return self._fail(session, "protocol", problem)
        samples = self.is_tail and order.tail == "sampler"
        sampling = order.sampling if samples else None
        names = session.page_names
        open_rows = OpenRows(self.lease, key, order.max_rows, order.prompt_rows, sampling, names)
        if names and order.held_rows != NOBODY_ASKS:
            session.first_row = None  # the compute thread says what is here
            return [open_rows]
        return [open_rows, *self._pass_on_order(session, NOBODY_ASKS)]

    def _rows_opened(self, event: RowsOpened) -> list[Instruction]:
        """Every stage takes what all before it hold, too; the tail's answer is what all of them hold."""
        session = self.sessions.get(event.session)
        if event.lease != self.lease or session is None or session.first_row is not None:
            return [Ignore(f"session {event.session} has nothing to reuse")]
        held = session.held_rows = min(event.rows, session.order.held_rows)
        if self.is_first and not self.is_tail and held:
            return self._pass_on_order(session, held)  # and wait for RowsHeld
        session.begin_at(held)
        if not self.is_first and not session.seq:
            session.rows = held
        answer: list[Instruction] = []
        if self.is_tail:
            message = RowsHeld(session.id, self.lease, held, reused=True)
            answer = [Send(to, message) for to in dict.fromkeys((self._ring_to, COORDINATOR))]
        passed_on = self._pass_on_order(session, NOBODY_ASKS if self.is_first else held)
        return [*passed_on, *answer, *self._go_on(session)]

    def _pass_on_order(self, session: Session, held_rows: int) -> list[Instruction]:
        assert self.order is not None
        if self.is_tail:
            return []
        return [Send(self.order.devices[self._stage + 1], replace(session.order, held_rows=held_rows))]

    @property
    def _ring_to(self) -> str:
        """Whom the tail tells what it tells the coordinator: stage 1, unless that is itself."""
        assert self.order is not None
        return COORDINATOR if self.is_first else self.order.devices[0]

    def _close_kept(self, message: CloseSession) -> list[Instruction]:
        """What the coordinator has names for outlives the session."""
        key = SessionId(message.session)
        session, names = self.sessions.get(key), split_names(message.page_names)
        if session is None or len(message.ids) != len(names) * PAGE_TOKENS:
            return self._close(key)
        return self._close(key, len(session.page_names), names, message.ids)

    def _close(
        self, key: SessionId, first_page: int = 0, names: tuple[bytes, ...] = (), ids: tuple[int, ...] = ()
    ) -> list[Instruction]:
        self._closed[key] = None
        while len(self._closed) > CLOSED_SESSIONS_KEPT:
            self._closed.popitem(last=False)
        self._prompts.pop(key, None)
        if self.sessions.pop(key, None) is None:
            return [Ignore(f"session {key} is not open")]
        return [DropRows(self.lease, key, first_page, names, ids), *self._issue_prompts()]

    def _fail(self, session: Session, code: str, reason: str) -> list[Instruction]:
        failure = Send(COORDINATOR, SessionFailed(session.id, self.lease, code, reason))
        return [*self._close(session.id), failure]
