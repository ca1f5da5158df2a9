"""The drafter's side: whatever is guessed, the drafter's sequence and every frame follow what was committed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import ProtocolError
from edge_runtime.speculative.controller import NEVER, Choice, Controller
from edge_runtime.speculative.draft_loop import Action, DraftLoop, Extend, Propose, Rewind, SendDrafts
from edge_runtime.speculative.drafters.base import Proposal
from edge_runtime.speculative.estimates import Measured
from edge_runtime.speculative.wire import DraftFrame

PROMPT = (1, 2, 3)
MAX_ROWS = 60
VOCABULARY = 50


def truth(position: int) -> int:
    return (7 * position + position * position) % VOCABULARY


class World:
    """A drafter that is right where `guesses` says so, and a link that keeps what is sent."""

    def __init__(self, guesses: list[bool]) -> None:
        self.loop = DraftLoop(len(PROMPT), MAX_ROWS, VOCABULARY, Controller())
        self.guesses = guesses
        self.ids = list(PROMPT)
        self.asked: Propose | None = None
        self.frames: list[DraftFrame] = []
        self.now = 0.0
        self.do(self.loop.start(0.0))

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Rewind(length):
                    del self.ids[length:]
                case Extend(ids):
                    self.ids.extend(ids)
                case Propose():
                    self.asked = action
                case SendDrafts(frame):
                    self.frames.append(frame)

    def answer(self) -> None:
        if self.asked is None:
            return
        asked, self.asked = self.asked, None
        ids = tuple(
            (truth(at) + (0 if self.guesses[at % len(self.guesses)] else 1)) % VOCABULARY
            for at in range(len(self.ids), len(self.ids) + asked.count)
        )
        parents = tuple(range(-1, len(ids) - 1))
        proposal = Proposal(ids, parents, (0.5,) * len(ids), "toy")
        self.do(self.loop.proposed(asked.ticket, proposal, self.now, self.now + 0.01))

    def commit(self, count: int) -> None:
        at = self.loop.length
        ids = [truth(position) for position in range(at, min(at + count, MAX_ROWS))]
        self.do(self.loop.committed(at, ids, self.now))


@settings(deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=9), st.lists(st.integers(0, 4), min_size=20, max_size=120)
)
def test_the_drafters_sequence_is_what_is_committed_and_what_is_in_flight(
    guesses: list[bool], steps: list[int]
) -> None:
    world = World(guesses)
    for step in steps:
        world.now += 0.02
        if step == 0:
            world.answer()
        elif step == 4:
            world.do(world.loop.passed(world.now))
        else:
            world.commit(step)
        length = world.loop.length
        assert world.ids[3:length] == [truth(position) for position in range(3, length)]
        assert len(world.ids) == length + world.loop.in_flight
        assert world.loop.turn <= length
    for frame in world.frames:
        assert frame.base_row + len(frame.ids) <= MAX_ROWS - 1
    counts = world.loop.counts
    assert counts.drafted == counts.accepted + counts.wasted + world.loop.in_flight


def test_what_is_unanswered_is_sent_again_whole_and_from_the_first_open_position() -> None:
    world = World([True])
    world.commit(1)
    world.answer()
    world.answer()
    sent = [token for frame in world.frames for token in frame.ids]
    due = world.loop.wake_at
    assert due is not None
    world.do(world.loop.passed(due))
    assert (world.frames[-1].base_row, list(world.frames[-1].ids)) == (world.loop.length, sent)


def test_drafts_that_were_lost_are_sent_again_though_the_target_goes_on_by_itself() -> None:
    """Its ids fill the gap one by one, and the device would stay ahead of it for ever."""
    world = World([True])
    world.loop._controller = Given(Choice(20, 1, 1))
    for _ in range(20):
        world.now = round(world.now + 0.1, 6)
        world.commit(1)  # at the target's own pace
        for _ in range(2):
            world.answer()
        if (world.loop.wake_at or world.now + 1.0) <= world.now:
            break
    again = world.loop.passed(world.now)
    assert [action.frame.base_row for action in again if isinstance(action, SendDrafts)] == [
        world.loop.length
    ]
    due = world.loop.wake_at
    assert due is not None
    assert due > world.now  # not at once again


def test_nothing_is_sent_over_a_broken_link_and_all_of_it_after() -> None:
    world = World([True])
    world.commit(1)
    world.do(world.loop.link_lost(1.0))
    world.answer()
    assert world.frames == []
    world.do(world.loop.link_resumed(2.0))
    world.answer()
    assert world.frames[-1].base_row == world.loop.length


def test_missing_committed_ids_are_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        World([True]).loop.committed(5, [1], 0.0)


def test_neither_a_stop_id_nor_one_the_target_does_not_have_is_sent() -> None:
    for strange in (9, VOCABULARY):
        loop = DraftLoop(3, MAX_ROWS, VOCABULARY, Controller(), stop_ids=(9,))
        loop.start(0.0)
        (_, asked) = loop.committed(3, [1], 0.0)
        assert isinstance(asked, Propose)
        proposal = Proposal((5, strange, 6), (-1, 0, 1), (0.9, 0.9, 0.9), "toy")
        sent, *_ = loop.proposed(asked.ticket, proposal, 0.0, 0.01)
        assert isinstance(sent, SendDrafts)
        assert sent.frame.ids == (5,)


class Given(Controller):
    """A choice that is given."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.choice = choice

    def choose(self, *_: object) -> Choice:
        return self.choice


def asked(controller: Controller) -> tuple[DraftLoop, Propose]:
    """A loop with one committed id, 1 at position 3."""
    loop = DraftLoop(3, MAX_ROWS, VOCABULARY, controller)
    loop.start(0.0)
    (_, propose) = loop.committed(3, [1], 0.0)
    assert isinstance(propose, Propose)
    return loop, propose


def test_what_is_not_likely_enough_is_held_until_verdicts_make_it_so() -> None:
    """Acceptance is 0.7 before any verdict: two drafts in a row are right with 0.49, three with 0.34."""
    controller = Given(Choice(8, 4, 1, 0.4))
    loop, propose = asked(controller)
    sent, _ = loop.proposed(propose.ticket, Proposal((5, 6, 7), (-1, 0, 1), (), "toy"), 0.0, 0.01)
    assert isinstance(sent, SendDrafts)
    assert (sent.frame.base_row, sent.frame.ids) == (4, (5, 6))
    assert loop.passed(0.02) == []
    sent, extend, *_ = loop.committed(4, [5], 0.05)
    assert isinstance(sent, SendDrafts)
    assert (sent.frame.base_row, sent.frame.ids, extend) == (6, (7,), Extend((7,)))


def test_a_miss_forgets_what_is_held() -> None:
    loop, propose = asked(Given(Choice(8, 4, 1, 0.4)))
    loop.proposed(propose.ticket, Proposal((5, 6, 7), (-1, 0, 1), (), "toy"), 0.0, 0.01)
    rewind, extend, again = loop.committed(4, [9], 0.05)
    assert (rewind, extend) == (Rewind(4), Extend((9,)))
    assert isinstance(again, Propose)


def test_drafts_that_are_never_sent_are_compared_with_what_the_target_says() -> None:
    controller = Given(Choice(1, 1, 1, NEVER))
    loop, propose = asked(controller)
    assert loop.proposed(propose.ticket, Proposal((5,), (-1,), (0.9,), "toy"), 0.0, 0.01) == []
    extend, again = loop.committed(4, [5], 0.05)
    assert (extend, loop.counts.drafted, loop.counts.held) == (Extend((5,)), 0, 1)
    assert isinstance(again, Propose)
    loop.proposed(again.ticket, Proposal((6,), (-1,), (0.9,), "toy"), 0.06, 0.07)
    loop.committed(5, [8], 0.1)
    assert (loop.estimates.measured().verdicts, loop.turn, loop.counts.misses) == (2, 0, 0)


def test_a_target_that_is_loaded_hears_less_and_one_that_is_no_more_hears_all() -> None:
    loop, propose = asked(Controller())
    assert loop.loaded(1.0, 0.005) == []
    proposal = Proposal((5,), (-1,), (0.7,), "toy")
    assert loop.proposed(propose.ticket, proposal, 0.0, 0.01) == []
    sent, *_ = loop.loaded(0.0, 0.02)
    assert isinstance(sent, SendDrafts)
    assert sent.frame.ids == (5,)


class WideWorld(World):
    """Beside each draft that is wrong stands the right id, and one more that is not."""

    def answer(self) -> None:
        if self.asked is None:
            return
        asked, self.asked = self.asked, None
        first = len(self.ids)
        rights = [self.guesses[at % len(self.guesses)] for at in range(first, first + asked.count)]
        chain = [(truth(first + i) + (not right)) % VOCABULARY for i, right in enumerate(rights)]
        sides = [
            (i - 1, (truth(first + i) + more) % VOCABULARY) for i in range(asked.count) for more in (0, 2)
        ]
        sides = [(parent, token) for parent, token in sides if token != chain[parent + 1]]
        parents = (*range(-1, asked.count - 1), *(parent for parent, _ in sides))
        chances = (0.5,) * asked.count + (0.2,) * len(sides)
        proposal = Proposal((*chain, *(token for _, token in sides)), parents, chances, "toy")
        self.do(self.loop.proposed(asked.ticket, proposal, self.now, self.now + 0.01))


class Wide(Controller):
    """Always the same choice."""

    def __init__(self, side_chance: float) -> None:
        super().__init__()
        self.side_chance = side_chance

    def choose(self, measured: Measured, committed_ids: int, load: float = 0.0) -> Choice:
        return Choice(8, 1, 3, 0.0, self.side_chance)


@settings(deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=9), st.lists(st.integers(0, 4), min_size=20, max_size=120)
)
def test_side_rows_stand_beside_drafts_and_the_chain_is_as_without(
    guesses: list[bool], steps: list[int]
) -> None:
    wide, narrow = WideWorld(guesses), World(guesses)
    wide.loop._controller = narrow.loop._controller = Wide(0.0)
    for step in steps:
        for world in (wide, narrow):
            world.now += 0.02
            if step == 0:
                world.answer()
            elif step == 4:
                world.do(world.loop.link_resumed(world.now))  # sends again; when to by itself, times say
            else:
                world.commit(step)
    assert wide.ids == narrow.ids
    assert len(wide.frames) == len(narrow.frames)
    for frame, chain in zip(wide.frames, narrow.frames, strict=True):
        count = frame.chain_length
        assert (frame.turn, frame.base_row, frame.ids[:count]) == (chain.turn, chain.base_row, chain.ids)
        beside = list(zip(frame.parents[count:], frame.ids[count:], strict=True))
        assert all(frame.base_row - 1 <= parent < frame.base_row + count - 1 for parent, _ in beside)
        assert all(token != frame.ids[parent + 1 - frame.base_row] for parent, token in beside)
    assert wide.loop.counts.rescued <= wide.loop.counts.misses == narrow.loop.counts.misses


def test_guesses_beside_drafts_are_sent_only_where_they_are_likely_enough() -> None:
    """The chance counts all drafts before: those far ahead stand alone."""
    counts = []
    for side_chance in (0.0, 0.05, 0.3):
        world = WideWorld([True])
        world.loop._controller = Wide(side_chance)
        world.commit(1)
        for _ in range(8):
            world.answer()
        counts.append([len(frame.ids) - frame.chain_length for frame in world.frames])
    every, some, none = counts
    assert set(every) == {1}
    assert some[0] == 1
    assert some[-1] == 0
    assert set(none) == {0}


def test_a_miss_that_was_among_the_side_rows_is_counted_and_no_turn_is_measured_from_it() -> None:
    """The id after it comes from the side row: sooner than the target makes one by itself."""
    world = WideWorld([False])
    world.loop._controller = Wide(0.0)
    world.commit(1)
    world.now = 1.0
    world.commit(1)
    assert world.loop.estimates.measured().floor_seconds == 1.0
    world.answer()  # asked for before the last id was known
    world.answer()
    world.now = 2.0
    world.commit(1)
    world.now = 2.1
    world.commit(1)
    assert (world.loop.counts.misses, world.loop.counts.rescued) == (1, 1)
    assert world.loop.estimates.measured().rescue == 1.0
    assert world.loop.estimates.measured().floor_seconds == 1.0
