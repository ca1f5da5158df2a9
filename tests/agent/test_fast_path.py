"""A row that was foreseen takes a shorter way: what is sent, held and measured is what the ordinary way leaves."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.agent.predicted_row import MessageWithHole, predicted_row
from edge_runtime.core import SamplingParams, SessionId, Token, TokenLogprob
from edge_runtime.protocol import codec
from edge_runtime.protocol.messages import (
    CloseSession,
    Draft,
    Feed,
    Fence,
    FrameRows,
    Message,
    OpenSession,
    RowsHeld,
    Tokens,
)
from tests.support.bare_stage import LEASE
from tests.support.paced_plane import HIDDEN, VOCAB, PacedPlane, all_of

PROMPT = (5, 6, 7)
MAX_ROWS = 14
GREEDY = SamplingParams(temperature=0.0)


def opened(session: int) -> OpenSession:
    return OpenSession(session, LEASE, len(PROMPT), len(PROMPT), MAX_ROWS, (9,), GREEDY, "sampler")


def tokens_with(token_id: int) -> Tokens:
    return Tokens(70_000, LEASE, 3, (Token(300, token_id),))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_a_hole_takes_every_id_as_the_codec_writes_it(token_id: int, other: int) -> None:
    hole = MessageWithHole.between(tokens_with(0), tokens_with(1))
    frame = codec.encode_message(tokens_with(token_id))
    assert hole.filled(token_id) == frame
    assert hole.id_in(frame) == token_id
    changed = replace(tokens_with(other), turn=4)
    assert hole.id_in(codec.encode_message(changed)) is None


@given(st.binary(max_size=12), st.integers(0, 300))
def test_only_what_the_codec_would_write_is_found_in_a_hole(middle: bytes, cut: int) -> None:
    """Another spelling of the same number is left to the codec, and so is everything else."""
    hole = MessageWithHole.between(tokens_with(0), tokens_with(1))
    frame = (hole.before + middle + hole.after)[cut:]
    found = hole.id_in(frame)
    assert found is None or codec.encode_message(tokens_with(found)) == frame


class Pair:
    """The same stage twice, with and without the short way, in the same world."""

    def __init__(self, stage: int, stages: int, *, takes_first: bool = False) -> None:
        self.fast = PacedPlane(stage, stages, fast=True, takes_first=takes_first)
        self.ordinary = PacedPlane(stage, stages, fast=False)
        self.stage, self.stages = stage, stages
        self.before = "" if stage == 0 else f"device-{stage - 1}"
        self.tail = f"device-{stages - 1}"

    def both(self, source: str, message: Message, payloads: tuple[bytes, ...] = ()) -> None:
        for each in (self.fast, self.ordinary):
            each.now += 0.25
            if source:
                each.arrives(source, message, payloads)
            else:
                each.plane.received(message)

    def turn(self) -> None:
        self.fast.turn()
        self.ordinary.turn()

    def compare(self) -> None:
        fast, ordinary = self.fast, self.ordinary
        assert fast.links.sent == ordinary.links.sent
        assert fast.control.told == ordinary.control.told
        assert fast.stage.batches == ordinary.stage.batches
        assert fast.stage.held == ordinary.stage.held
        assert fast.now == ordinary.now
        assert all_of(fast.state) == all_of(ordinary.state)
        assert all_of(fast.worker.stage.loaded.pace) == all_of(ordinary.worker.stage.loaded.pace)
        assert all_of(fast.worker.stage.loaded.queue) == all_of(ordinary.worker.stage.loaded.queue)
        assert fast.worker.stage.steps == ordinary.worker.stage.steps

    def begin(self, session: int) -> None:
        self.both(self.before, opened(session))
        if self.stage == 0:
            self.both("", Feed(session, LEASE, 0, PROMPT))
            self.turn()
            self.both(self.tail, RowsHeld(session, LEASE, len(PROMPT), reused=False))
        else:
            frame = FrameRows(session, LEASE, 0, 1, 0, tuple(range(-1, len(PROMPT) - 1)), PROMPT, False)
            self.both(self.before, frame, (np.ones((len(PROMPT), HIDDEN), np.float32).tobytes(),))
        self.turn()

    def next_row(self, session: int, token_id: int) -> tuple[str, Message, tuple[bytes, ...]]:
        """Of the session as it stands; at the tail the id is what was sampled."""
        held = self.ordinary.state.sessions.get(SessionId(session))
        if held is None:
            return self.before or self.tail, Fence(session, LEASE, 1), ()
        if self.stage == 0:
            return self.tail, Tokens(session, LEASE, held.turn, (Token(held.rows, token_id),)), ()
        known = held.chain.sure(held.rows) if held.chain.next_position > held.rows else ()
        ids = known[:1] or (token_id,)
        place = held.turn, held.seq + 1, held.rows
        frame = FrameRows(session, LEASE, *place, (held.rows - 1,), ids, False)
        return self.before, frame, (np.full((1, HIDDEN), token_id, np.float32).tobytes(),)

    def close(self) -> None:
        self.fast.close()
        self.ordinary.close()


ROLES = [(0, 2), (1, 2), (1, 3), (2, 3)]


@pytest.mark.parametrize("takes_first", [False, True])
@pytest.mark.parametrize(("stage", "stages"), ROLES)
def test_a_session_that_decodes_alone_takes_the_short_way(stage: int, stages: int, takes_first: bool) -> None:
    pair = Pair(stage, stages, takes_first=takes_first)
    pair.begin(1)
    for token_id in (3, 4, 40, 0, 11):
        pair.both(*pair.next_row(1, token_id))
        if pair.stage == 0 or not pair.ordinary.state.sessions[SessionId(1)].halted:
            pair.turn()
        pair.compare()
    assert pair.ordinary.plane.fast.rows == 0
    assert pair.fast.plane.fast.rows >= 3  # the first row of a session is not foreseen
    assert pair.fast.links.pieces >= 2  # after the first such row sizes are known
    assert pair.ordinary.links.pieces == 0
    assert pair.fast.at_once >= 2 * takes_first
    pair.close()


WHAT = ("row", "row", "row", "row", "row", "turn", "again", "odd", "draft", "fence", "begin", "close", "lost")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ROLES), st.booleans(), st.integers(0, 60), st.floats(0.0, 0.5), st.integers(0, 2**32))
def test_whatever_comes_both_ways_do_the_same(
    role: tuple[int, int], takes_first: bool, events: int, mischief: float, seed: int
) -> None:
    rng = random.Random(seed)
    pair = Pair(*role, takes_first=takes_first)
    pair.begin(1)
    sessions, rows = [1], 0
    last = pair.next_row(1, 3)
    for _ in range(events):
        what = rng.choice(WHAT) if rng.random() < mischief else "row"
        session = rng.choice(sessions)
        source, message, payloads = pair.next_row(session, rng.randrange(VOCAB + 2))
        if what == "row":
            last = source, message, payloads
            pair.both(*last)
        elif what == "again":
            pair.both(*last)
        elif what == "odd":
            pair.both(*odd(rng, source, message, payloads))
        elif what == "draft" and pair.stage == 0:
            held = pair.ordinary.state.sessions.get(SessionId(session))
            row = held.rows if held is not None else 0
            pair.both("", Draft(session, LEASE, 0, row + 1, (row, row + 1), (8, 12)))
        elif what == "fence" and pair.stage < pair.stages - 1:
            pair.both(pair.tail, Fence(session, LEASE, rng.randrange(MAX_ROWS)))
        elif what == "begin" and len(sessions) < 3:
            sessions.append(len(sessions) + 1)
            pair.begin(sessions[-1])
        elif what == "close" and len(sessions) > 1:
            pair.both("", CloseSession(session, LEASE))
        elif what == "lost":
            for each in (pair.fast, pair.ordinary):
                for channel in each.links.channels.values():
                    channel.lost("the link broke")
        ran, rows = pair.fast.plane.fast.rows - rows, pair.fast.plane.fast.rows
        if ran or what == "turn" or rng.random() < 0.8:  # a row that was foreseen has had its turn
            pair.turn()
            pair.compare()
    pair.turn()
    pair.compare()
    pair.close()


def odd(
    rng: random.Random, source: str, message: Message, payloads: tuple[bytes, ...]
) -> tuple[str, Message, tuple[bytes, ...]]:
    """Nearly what was expected."""
    if rng.random() < 0.2:
        return "device-9", message, payloads
    if isinstance(message, Tokens):
        (token,) = message.tokens
        score = TokenLogprob(-1.0, ())
        others = (
            replace(token, finish="stop"),
            replace(token, position=token.position + 1),
            replace(token, logprob=score),
        )
        both = replace(message, tokens=(token, replace(token, position=token.position + 1)))
        return source, rng.choice([both, *(replace(message, tokens=(other,)) for other in others)]), payloads
    if isinstance(message, FrameRows):
        end = message.base_row + 1
        two = replace(message, ids=(*message.ids, 3), parents=(*message.parents, end - 1))
        changed = rng.choice(
            [
                replace(message, seq=message.seq + 1),
                replace(message, turn=message.base_row),
                replace(message, ids=((message.ids[0] + 1) % VOCAB,)),
                replace(message, parents=(message.base_row - 2,)),
            ]
        )
        if rng.random() < 0.3:
            return source, two, (payloads[0] * 2,)
        return source, changed, payloads
    return source, message, payloads


def test_a_row_is_foreseen_for_the_state_as_it_is_and_no_other() -> None:
    pair = Pair(1, 2)
    pair.begin(1)
    pair.both(*pair.next_row(1, 3))
    pair.turn()
    source, message, payloads = pair.next_row(1, 4)
    assert predicted_row(pair.fast.state, SessionId(1)) is not None
    pair.both("", CloseSession(1, LEASE))
    pair.turn()
    assert predicted_row(pair.fast.state, SessionId(1)) is None
    before = pair.fast.plane.fast.rows
    pair.both(source, message, payloads)
    pair.turn()
    pair.compare()
    assert pair.fast.plane.fast.rows == before
    pair.close()


def test_an_engine_that_fails_on_the_short_way_fails_as_on_the_other() -> None:
    pair = Pair(0, 2)
    pair.begin(1)
    for each in (pair.fast, pair.ordinary):
        each.stage.held.clear()  # the engine has lost the session: a bug
    for token_id in (3, 4):
        pair.both(*pair.next_row(1, token_id))
        pair.turn()
    assert pair.fast.control.told == pair.ordinary.control.told
    assert "StageFailed" in str(pair.fast.control.told)
    assert all_of(pair.fast.state) == all_of(pair.ordinary.state)
    pair.close()
