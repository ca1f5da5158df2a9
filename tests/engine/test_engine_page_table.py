"""Pages: none in two sessions, none lost, reservations kept, whatever order sessions come and go in."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_runtime.core import SessionId
from edge_runtime.engine.page_table import PAGE_TOKENS, PageTable, pages_for
from edge_runtime.errors import CapacityError, EngineError

NUM_PAGES = 12


class Pages(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = PageTable(NUM_PAGES)
        self.model: dict[SessionId, tuple[int, int]] = {}  # session -> (max_rows, rows)
        self.next = 0

    def reserved(self) -> int:
        return sum(pages_for(max_rows) for max_rows, _ in self.model.values())

    @rule(max_rows=st.integers(1, 5 * PAGE_TOKENS))
    def open(self, max_rows: int) -> None:
        session = SessionId(self.next)
        self.next += 1
        if self.reserved() + pages_for(max_rows) > NUM_PAGES:
            with pytest.raises(CapacityError):
                self.table.open(session, max_rows)
            assert session not in self.table
        else:
            self.table.open(session, max_rows)
            self.model[session] = (max_rows, 0)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(1, 70))
    def append(self, data: st.DataObject, count: int) -> None:
        session = data.draw(st.sampled_from(sorted(self.model)))
        max_rows, rows = self.model[session]
        base = data.draw(st.integers(0, rows))
        before = list(self.table.get(session).pages)
        if base + count > max_rows:
            with pytest.raises(CapacityError):
                self.table.append(session, base, count)
            assert self.table.get(session).pages == before
            return
        freed = self.table.append(session, base, count)
        self.model[session] = (max_rows, base + count)
        assert set(freed) <= set(before)
        assert not set(freed) & set(self.table.get(session).pages)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.model)))
        max_rows, rows = self.model[session]
        keep = data.draw(st.integers(0, rows))
        self.table.truncate(session, keep)
        self.model[session] = (max_rows, keep)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.model)))
        pages = list(self.table.get(session).pages)
        assert self.table.close(session) == pages
        assert self.table.close(session) == []
        del self.model[session]

    @invariant()
    def no_page_twice_and_none_lost(self) -> None:
        held = [page for session in self.model for page in self.table.get(session).pages]
        assert sorted(held + self.table._free) == list(range(NUM_PAGES))

    @invariant()
    def accounts_agree(self) -> None:
        assert self.table.reserved_tokens == self.reserved() * PAGE_TOKENS <= self.table.capacity_tokens
        assert self.table.held_tokens == sum(rows for _, rows in self.model.values())
        for session, (max_rows, rows) in self.model.items():
            held = self.table.get(session)
            assert (held.max_rows, held.rows) == (max_rows, rows)
            assert len(held.pages) == pages_for(rows) <= pages_for(max_rows)


Pages.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestPages = Pages.TestCase


def test_capacity_error_names_both_numbers() -> None:
    table = PageTable(4)
    table.open(SessionId(1), 64)
    with pytest.raises(CapacityError, match=r"100 tokens; 64 of 128"):
        table.open(SessionId(2), 100)


def test_a_gap_is_refused_with_the_row_wanted() -> None:
    table = PageTable(4)
    table.open(SessionId(1), 64)
    table.append(SessionId(1), 0, 3)
    with pytest.raises(EngineError, match="holds 3"):
        table.append(SessionId(1), 4, 1)


def test_unknown_and_reopened_sessions_are_refused() -> None:
    table = PageTable(4)
    with pytest.raises(EngineError, match="not open"):
        table.append(SessionId(9), 0, 1)
    table.open(SessionId(9), 1)
    with pytest.raises(EngineError, match="already open"):
        table.open(SessionId(9), 1)
    with pytest.raises(EngineError, match="at least 1"):
        table.open(SessionId(10), 0)
