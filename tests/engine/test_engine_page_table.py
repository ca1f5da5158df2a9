"""Pages: none lost, none both free and in use, none written while others use it, in whatever order things come.

The model keeps what a real page would hold: row r of a session is a function of its ids 0..r.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.core import SessionId
from edge_runtime.engine.page_table import PAGE_TOKENS, PageTable, pages_for
from edge_runtime.errors import CapacityError, EngineError

NUM_PAGES = 7
MOST_PAGES = 4  # of a session


def row_value(ids: list[int], row: int) -> int:
    return hash(tuple(ids[: row + 1]))


def names_of(ids: list[int], pages: int) -> list[bytes]:
    return [json.dumps(ids[: (page + 1) * PAGE_TOKENS]).encode() for page in range(pages)]


class Open:
    """What a session should hold: `ids` of its rows, `plan` what the coordinator feeds it."""

    def __init__(self, max_rows: int, plan: list[int], named_rows: int) -> None:
        self.max_rows = max_rows
        self.plan = plan
        self.named_rows = named_rows  # below, rows that were never run follow the plan
        self.ids: list[int] = []
        self.longest = 0  # rows it ever held


class Pages:
    """Sessions over a small table, driven by a seeded schedule: rules drawn one by one rarely fill the memory."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.table = PageTable(NUM_PAGES)
        self.content: list[list[int | None]] = [[None] * PAGE_TOKENS for _ in range(NUM_PAGES)]
        self.model: dict[SessionId, Open] = {}
        self.next = 0

    def step(self) -> None:
        actions = [self.open, self.append, self.append, self.append, self.truncate, self.keep, self.close]
        action = self.rng.choice(actions)
        if self.rng.random() < 0.03:
            self.give_back()
        elif not self.model:
            self.open()
        else:
            action()
        self.check()

    def pick(self) -> tuple[SessionId, Open]:
        session = self.rng.choice(sorted(self.model))
        return session, self.model[session]

    def clear(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.content[page] = [None] * PAGE_TOKENS

    def open(self) -> None:
        """Plans are made of few patterns, so that they often begin alike."""
        rng = self.rng
        max_rows = rng.randint(1, MOST_PAGES * PAGE_TOKENS)
        pattern = [rng.choice((0, 0, 1)) for _ in range(MOST_PAGES)]
        plan = [page for page in pattern for _ in range(PAGE_TOKENS)][:max_rows]
        names = names_of(plan, rng.choice((0, 1, max_rows // PAGE_TOKENS, max_rows // PAGE_TOKENS)))
        names = names[: max_rows // PAGE_TOKENS]
        session = SessionId(self.next)
        self.next += 1
        if self.reserved() + pages_for(max_rows) > NUM_PAGES:
            with pytest.raises(CapacityError):
                self.table.open(session, max_rows, names)
            assert session not in self.table
            return
        held = Open(max_rows, plan, len(names) * PAGE_TOKENS)
        held.ids = self.table.open(session, max_rows, names)
        held.longest = len(held.ids)
        assert held.ids == plan[: len(held.ids)]
        assert len(held.ids) < max_rows, "the last row must be run"
        self.model[session] = held

    def append(self) -> None:
        rng = self.rng
        session, held = self.pick()
        base = rng.choice((len(held.ids), len(held.ids), rng.randint(0, len(held.ids))))
        count = rng.randint(1, 100)
        before = list(self.table.get(session).pages)
        if base + count > held.max_rows and rng.random() < 0.2:
            with pytest.raises(CapacityError):
                self.table.append(session, base, count)
            assert self.table.get(session).pages == before
            return
        count = min(count, held.max_rows - base)
        if not count:
            return
        ids = held.plan[base : base + count]
        if rng.random() < 0.3 and (base < held.longest or base >= held.named_rows):
            ids = [token + 7 for token in ids]  # a new parent: the rows are other ones from here on
        leaves_plan = ids != held.plan[base : base + count]
        moves = self.table.append(session, base, count)
        self.clear(moves.clear)
        for source, target in moves.copy:
            self.content[target] = list(self.content[source])
        held.ids[base:] = ids
        pages = self.table.get(session).pages
        for page in set(pages) - set(before) - {target for _, target in moves.copy}:
            assert self.content[page] == [None] * PAGE_TOKENS, "it holds what another session left"
        for row in range(base, base + count):
            page = pages[row // PAGE_TOKENS]
            assert self.table._users[page] == 1, "written while another session uses it"
            assert page not in self.table.prefixes, "written while it has a name"
            self.content[page][row % PAGE_TOKENS] = row_value(held.ids, row)
        if rng.random() < 0.2:  # the engine failed
            self.clear(self.table.truncate(session, base))
            del held.ids[base:]
        else:
            held.longest = max(held.longest, len(held.ids))
            if leaves_plan:  # rows that were never computed are not known, and do not count
                held.named_rows = min(held.named_rows, base)
            self.clear(self.table.ran(session, base, ids))

    def truncate(self) -> None:
        session, held = self.pick()
        keep = self.rng.randint(0, len(held.ids))
        self.clear(self.table.truncate(session, keep))
        del held.ids[keep:]

    def keep(self) -> None:
        """What the coordinator believes the rows to be may be more than this stage holds, or other rows."""
        session, _ = self.pick()
        most = MOST_PAGES * PAGE_TOKENS
        believed = [9] * most if self.rng.random() < 0.3 else list(self.table.get(session).ids)
        believed += [9] * (most - len(believed))
        first = self.rng.randint(0, 2)
        names = names_of(believed, MOST_PAGES)[first:]
        ids = believed[first * PAGE_TOKENS :]
        self.clear(self.table.keep(session, first, names, ids))

    def close(self) -> None:
        session, _ = self.pick()
        self.clear(self.table.close(session))
        assert self.table.close(session) == []
        del self.model[session]

    def give_back(self) -> None:
        everything = self.rng.random() < 0.5
        self.clear(self.table.give_up_resting() if everything else self.table.grow_older())
        assert not (everything and self.table.prefixes.resting)

    def reserved(self) -> int:
        return sum(pages_for(held.max_rows) for held in self.model.values())

    # ------------------------------------------------------------ what holds after every step

    def check(self) -> None:
        self.no_page_is_lost_or_in_two_states()
        self.every_session_sees_its_own_rows()
        self.a_name_means_the_rows_it_was_given_for()
        self.accounts_agree()

    def no_page_is_lost_or_in_two_states(self) -> None:
        used = Counter(page for session in self.model for page in self.table.get(session).pages)
        resting, free = self.table.prefixes.resting, self.table._free
        assert used == self.table._users
        assert sorted([*used, *resting, *free]) == list(range(NUM_PAGES))
        assert self.table.used_pages == len(used) + len(resting)
        assert all(page in self.table.prefixes for page in resting)
        assert all(page in self.table.prefixes for page, users in used.items() if users > 1)
        assert all(self.content[page] == [None] * PAGE_TOKENS for page in free)

    def every_session_sees_its_own_rows(self) -> None:
        for session, held in self.model.items():
            pages = self.table.get(session).pages
            seen = [self.content[pages[row // 32]][row % 32] for row in range(len(held.ids))]
            assert seen == [row_value(held.ids, row) for row in range(len(held.ids))]

    def a_name_means_the_rows_it_was_given_for(self) -> None:
        for name in self.table.prefixes.names:
            page = self.table.prefixes.find(name)
            assert page is not None
            ids = json.loads(name)
            start = len(ids) - PAGE_TOKENS
            assert list(self.table.prefixes.ids(page)) == ids[start:]
            assert self.content[page] == [row_value(ids, row) for row in range(start, len(ids))]

    def accounts_agree(self) -> None:
        assert self.table.reserved_tokens == self.reserved() * PAGE_TOKENS <= self.table.capacity_tokens
        assert self.table.held_tokens == sum(len(held.ids) for held in self.model.values())
        for session, held in self.model.items():
            mine = self.table.get(session)
            assert (mine.max_rows, mine.rows) == (held.max_rows, len(held.ids))
            assert len(mine.pages) == pages_for(mine.rows) <= pages_for(mine.max_rows)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_whatever_order_things_come_in(seed: int) -> None:
    pages = Pages(random.Random(seed))
    for _ in range(80):
        pages.step()


def run(table: PageTable, session: int, ids: list[int], base_row: int = 0) -> None:
    table.append(SessionId(session), base_row, len(ids))
    table.ran(SessionId(session), base_row, ids)


IDS = list(range(100))
NAMES = names_of(IDS, 3)


def test_a_second_session_finds_the_pages_of_the_first() -> None:
    table = PageTable(8)
    assert table.open(SessionId(1), 100, NAMES) == []
    run(table, 1, IDS[:99])
    assert table.open(SessionId(2), 100, NAMES) == IDS[:96]
    assert table.get(SessionId(2)).pages == table.get(SessionId(1)).pages[:3]
    assert table.used_pages == 4


def test_a_page_is_kept_after_its_session_and_given_up_when_room_is_needed() -> None:
    table = PageTable(4)
    table.open(SessionId(1), 100, NAMES)
    run(table, 1, IDS[:99])
    table.close(SessionId(1))
    assert (table.used_pages, table.reserved_tokens) == (3, 0)
    table.open(SessionId(2), 64)
    run(table, 2, [5] * 64)  # one page is free, one is taken: the last of the chain
    assert [table.prefixes.find(name) is not None for name in NAMES] == [True, True, False]
    table.close(SessionId(2))
    assert table.open(SessionId(3), 100, NAMES) == IDS[:64]


def test_half_a_page_or_an_uncomputed_one_never_gets_a_name() -> None:
    table = PageTable(4)
    table.open(SessionId(1), 100, NAMES)
    run(table, 1, IDS[:40])
    table.append(SessionId(1), 40, 30)  # and then the engine fails, or the session is cancelled
    table.close(SessionId(1))
    assert table.prefixes.names == (NAMES[0],)


def test_a_session_that_needs_less_gives_the_rest_back() -> None:
    """Another stage of the pipeline holds fewer pages: rows start below those found here."""
    table = PageTable(8)
    table.open(SessionId(1), 100, NAMES)
    run(table, 1, IDS[:99])
    table.open(SessionId(2), 100, NAMES)
    run(table, 2, IDS[32:99], base_row=32)
    assert table.get(SessionId(2)).pages[:3] == table.get(SessionId(1)).pages[:3]
    assert table.used_pages == 5  # the last one of each is its own


def test_two_sessions_that_computed_the_same_page_share_one_of_them() -> None:
    table = PageTable(8)
    for session in (1, 2):
        table.open(SessionId(session), 64, NAMES[:1])
    for session in (1, 2):
        table.append(SessionId(session), 0, 32)
    assert table.ran(SessionId(1), 0, IDS[:32]) == []
    assert table.ran(SessionId(2), 0, IDS[:32]) == [1]
    assert table.get(SessionId(2)).pages == [0]


def test_unused_pages_go_after_two_rounds() -> None:
    table = PageTable(4)
    table.open(SessionId(1), 64, NAMES[:1])
    run(table, 1, IDS[:33])
    table.grow_older()
    table.close(SessionId(1))
    assert table.grow_older() == []
    table.open(SessionId(2), 64, NAMES[:1])
    assert table.grow_older() == []  # in use
    table.close(SessionId(2))
    assert table.grow_older() == []
    assert table.grow_older() == [0]
    assert table.used_pages == 0


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
