"""Whatever is guessed, and whatever the links do to the guesses, the ids are those of decoding without drafts.

The cluster of `tests/support/pipeline_world.py`, with somebody who drafts: rightly, wrongly, late, twice, for positions
that do not exist, with turns that never were.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.agent.pipeline_events import COORDINATOR
from edge_runtime.protocol.messages import (
    CloseSession,
    Draft,
    Fence,
    LoadStage,
    StageReady,
    Tokens,
    UnloadStage,
)
from tests.support.pipeline_world import Cluster, Flight, plans, prompts
from tests.support.toy_stage import VOCAB, plain_loop

KINDS = ("right", "right", "right", "wrong", "late", "ahead", "turn", "tree", "junk", "beside", "beside")


class DraftedCluster(Cluster):
    def __init__(self, prompt: list[int], max_rows: int, chunk: int, rng: random.Random) -> None:
        super().__init__(prompt, max_rows, chunk)
        self.rng = rng
        self.truth = plain_loop(prompt, max_rows)
        self.turn = 0
        self.last_end = len(prompt)

    def draft(self, kind: str) -> None:
        if not self.session:
            return
        rng, base = self.rng, len(self.ids)
        if kind == "behind":  # goes on where rows of an earlier draft end
            base, kind = self.last_end, "beside"
        if kind in ("late", "ahead"):
            base += rng.randint(1, 4) * (1 if kind == "ahead" else -1)
        base = max(base, 0)
        count = rng.randint(1, 6)
        ids = self.truth[base : base + count]
        ids += [rng.randrange(VOCAB) for _ in range(count - len(ids))]
        if kind == "wrong":
            ids[rng.randrange(count)] = rng.randrange(VOCAB)
        if kind == "junk":
            ids[rng.randrange(count)] = rng.choice((-1, VOCAB, 1 << 40))
        turn = rng.randrange(2 * self.max_rows) if kind == "turn" else self.turn
        parents = [*range(base - 1, base + count - 1)]
        if kind == "tree":
            parents[rng.randrange(count)] = rng.randrange(-3, base + count)
        if kind == "beside":
            self.add_sides(base, ids, parents)
        guess = Draft(self.session, self.lease, turn, base, tuple(parents), tuple(ids))
        self.last_end = max(len(self.ids), base + count)
        self.post(COORDINATOR, self.plan[0], guess)

    def add_sides(self, base: int, ids: list[int], parents: list[int]) -> None:
        """The chain is wrong somewhere; beside it stand rows of which some are right, and what follows those."""
        rng, count = self.rng, len(ids)
        ids[rng.randrange(count)] = rng.randrange(VOCAB)
        position_of = {row: row for row in range(base - 1, base + count)}
        for number in range(base + count, base + count + rng.randint(1, 6)):
            parent = rng.choice(
                sorted(set(position_of) - ({base + count - 1} if len(ids) == count else set()))
            )
            if parent < 0:
                return
            position = position_of[number] = position_of[parent] + 1
            is_right = rng.random() < 0.7 and position < len(self.truth)
            ids.append(self.truth[position] if is_right else rng.randrange(VOCAB))
            parents.append(parent)

    def judge(self, message: Tokens) -> None:
        """What a drafter that sees the turns of the tail would know."""
        self.turn = max(self.turn, message.turn)

    def deliver_in_order(self, choice: int) -> None:
        """The next message of some link."""
        chosen = self.flights[choice % len(self.flights)]
        link = chosen.source, chosen.to
        self.deliver(next(i for i, f in enumerate(self.flights) if (f.source, f.to) == link))


def check(cluster: DraftedCluster) -> None:
    assert not cluster.failures
    assert cluster.ids == cluster.truth
    for device in cluster.devices.values():
        assert not device.kv, "a session's KV outlived it"
        assert not device.queue
        assert not device.state.sessions


def run(cluster: DraftedCluster, steps: int, drafts: float, kinds: Sequence[str] = KINDS) -> None:
    """Links that keep their order, each at its own speed, and drafts in between."""
    rng = cluster.rng
    for _ in range(steps):
        busy = [device for device in cluster.devices.values() if device.queue]
        if rng.random() < drafts:
            cluster.draft(rng.choice(kinds))
        elif busy and (rng.random() < 0.5 or not cluster.flights):
            rng.choice(busy).run(rng.randrange(1000))
        elif cluster.flights:
            cluster.deliver_in_order(rng.randrange(1000))
            if isinstance(cluster.delivered[-1].message, Tokens):
                cluster.judge(cluster.delivered[-1].message)


@settings(max_examples=200, deadline=None)
@given(
    prompts,
    st.integers(1, 30),
    st.integers(1, 5),
    plans,
    st.sampled_from([0.05, 0.2, 0.6]),
    st.integers(0, 2**32),
)
def test_any_drafts_over_honest_links_change_nothing_and_cost_no_second_session(
    prompt: list[int],
    new_tokens: int,
    chunk: int,
    plan: tuple[str, int, list[int]],
    drafts: float,
    seed: int,
) -> None:
    cluster = DraftedCluster(prompt, len(prompt) + new_tokens, chunk, random.Random(seed))
    cluster.replan(*plan)
    run(cluster, 400, drafts)
    while not cluster.finish and cluster.step(cluster.rng.randrange(1000)):
        pass  # no fresh start: the target goes on by itself
    assert cluster.finish
    assert cluster.session == cluster.lease * 1000 + 1
    cluster.settle()
    check(cluster)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(10, 40),
    st.sampled_from(["A", "AB", "ABC"]),
    st.sampled_from([0.2, 0.4]),
    st.integers(0, 2**32),
)
def test_side_rows_that_are_right_cost_no_second_session(
    new_tokens: int, devices: str, drafts: float, seed: int
) -> None:
    """Ids come that no chain has gone through the stages for, and misses on top of them."""
    cluster = DraftedCluster([1, 2, 3, 4], 4 + new_tokens, 4, random.Random(seed))
    cluster.replan(devices, len(devices), [1, 2])
    while not cluster.finish:
        run(cluster, 1, drafts, ("beside", "behind"))
        cluster.step(cluster.rng.randrange(1000))
    assert cluster.session == cluster.lease * 1000 + 1
    cluster.settle()
    check(cluster)


@settings(max_examples=200, deadline=None)
@given(
    prompts,
    st.integers(1, 20),
    st.integers(1, 5),
    st.lists(plans, min_size=3, max_size=3),
    st.floats(0.0, 0.4),
    st.integers(0, 2**32),
)
def test_any_drafts_over_links_that_lose_repeat_and_reorder_change_nothing(
    prompt: list[int],
    new_tokens: int,
    chunk: int,
    some_plans: list[tuple[str, int, list[int]]],
    mischief: float,
    seed: int,
) -> None:
    rng = random.Random(seed)
    cluster = DraftedCluster(prompt, len(prompt) + new_tokens, chunk, rng)
    waiting_plans = list(some_plans)
    cluster.replan(*waiting_plans.pop())
    for _ in range(rng.randint(0, 250)):
        if rng.random() >= mischief:
            run(cluster, 1, 0.2)
        elif rng.random() < 0.05 and waiting_plans and not cluster.finish:
            cluster.replan(*waiting_plans.pop())
        elif cluster.flights:
            index = rng.randrange(len(cluster.flights))
            what = rng.choice(("any", "repeat", "replay", "lose"))
            flight = cluster.flights[index]
            if what == "any":
                cluster.deliver(index)
            elif what == "repeat":
                cluster.arrive(flight)
            elif what == "replay" and cluster.delivered:
                cluster.arrive(rng.choice(cluster.delivered))
            elif not isinstance(flight.message, LoadStage | StageReady | CloseSession | UnloadStage):
                cluster.flights.remove(flight)
    while cluster.step(1):
        pass
    cluster.settle()
    check(cluster)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_right_drafts_are_committed_in_one_round_and_wrong_ones_leave_the_targets_own_id(stages: int) -> None:
    prompt = [1, 2, 3, 4]
    cluster = DraftedCluster(prompt, 24, 4, random.Random(1))
    cluster.replan("ABC"[:stages], stages, [1, 2])
    assert len(cluster.truth) == 24, "this prompt meets no end id"
    while len(cluster.ids) < 5:
        assert cluster.step(0)
    cluster.delivered.clear()
    wrong = [*cluster.truth[5:11], (cluster.truth[11] + 1) % VOCAB, *cluster.truth[12:14]]
    cluster.post(
        COORDINATOR, "A", Draft(cluster.session, cluster.lease, 0, 5, tuple(range(4, 13)), tuple(wrong))
    )
    while len(cluster.ids) < 13:
        assert cluster.step(0)
    verdicts = [f.message for f in cluster.delivered if isinstance(f.message, Tokens) and not f.to]
    accepted = next(message for message in verdicts if len(message.tokens) > 1)
    assert accepted.tokens[-1].position == 11, "up to the target's own id where the guess was wrong"
    assert accepted.turn == 11
    fences = [f.to for f in cluster.delivered if isinstance(f.message, Fence)]
    assert fences == (["B"] if stages == 3 else [])
    cluster.settle()
    check(cluster)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_draft_that_knows_more_than_stage_1_waits_for_the_ids_it_follows(stages: int) -> None:
    """The coordinator may be nearer to the tail than stage 1 is."""
    prompt = [1, 2, 3, 4]
    cluster = DraftedCluster(prompt, 24, 4, random.Random(1))
    cluster.replan("ABC"[:stages], stages, [1, 2])
    while not cluster.session or cluster.devices["A"].state.sessions == {}:
        assert cluster.step(0)
    while cluster.devices["A"].state.sessions[cluster.session].rows < 4:
        assert cluster.step(0)
    session, lease = cluster.session, cluster.lease
    for base in (6, 8):
        early = Draft(session, lease, 0, base, (base - 1, base), tuple(cluster.truth[base : base + 2]))
        cluster.arrive(Flight(COORDINATOR, "A", early, None))
    cluster.delivered.clear()
    while len(cluster.ids) < 11:
        assert cluster.step(0)
    verdicts = [f.message for f in cluster.delivered if isinstance(f.message, Tokens) and not f.to]
    assert len(verdicts) <= 5, "seven ids: the floor for the first three, then all that waited"
    cluster.settle()
    check(cluster)
