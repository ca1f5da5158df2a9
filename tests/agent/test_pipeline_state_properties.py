"""Whatever the links do, a pipeline commits the ids that a plain loop over the model commits.

A simulated coordinator and one to three stages, each a real PipelineState, around a toy model whose rows depend on
everything before them. The links reorder, repeat and delay at will; plans change under way; stages keep pages for the
next request and forget them when they like, and run works in pieces.
"""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.agent.pipeline_events import Work
from edge_runtime.agent.pipeline_state import CHUNKS_UNDER_WAY
from edge_runtime.protocol.messages import (
    CloseSession,
    FrameRows,
    LoadStage,
    RowsHeld,
    StageReady,
    UnloadStage,
)
from tests.support.pipeline_world import Cluster, plans, prompts
from tests.support.toy_stage import STOP_ID, VOCAB, page_names, plain_loop

MISCHIEF = ("any", "any", "repeat", "replay", "lose", "replan")


@settings(max_examples=300, deadline=None)
@given(
    prompts,
    st.integers(1, 8),
    st.integers(1, 5),
    st.lists(plans, min_size=4, max_size=4),
    st.integers(0, 200),
    st.floats(0.0, 0.6),
    st.integers(0, 2**32),
)
def test_any_schedule_commits_the_ids_of_the_plain_loop(
    prompt: list[int],
    new_tokens: int,
    chunk: int,
    some_plans: list[tuple[str, int, list[int]]],
    num_actions: int,
    mischief: float,
    seed: int,
) -> None:
    """A seeded schedule: lists of actions drawn one by one come out too short to get into much trouble."""
    rng = random.Random(seed)
    max_rows = len(prompt) + new_tokens
    cluster = Cluster(prompt, max_rows, chunk)
    cluster.replan(*some_plans[0])
    waiting_plans = some_plans[1:]
    for _ in range(num_actions):
        what = rng.choice(MISCHIEF) if rng.random() < mischief else "step"
        if what == "step":
            cluster.step(rng.randrange(1000))
        elif what == "any" and cluster.flights:
            cluster.deliver(rng.randrange(len(cluster.flights)))
        elif what == "repeat" and cluster.flights:
            cluster.arrive(rng.choice(cluster.flights))
        elif what == "replay" and cluster.delivered:
            cluster.arrive(rng.choice(cluster.delivered))
        elif what == "lose" and cluster.flights:
            lost = rng.choice(cluster.flights)
            if not isinstance(lost.message, LoadStage | StageReady | CloseSession | UnloadStage):
                cluster.flights.remove(lost)
        elif what == "replan" and waiting_plans and not cluster.finish:
            cluster.replan(*waiting_plans.pop())
    while cluster.step(1):  # plans that are still on their way arrive
        pass
    cluster.settle()
    assert not cluster.failures
    assert cluster.ids == plain_loop(prompt, max_rows)
    assert cluster.finish == ("stop" if cluster.ids[-1] == STOP_ID else "length")
    for device in cluster.devices.values():
        assert not device.kv, "a session's KV outlived it"
        assert not device.queue


@settings(max_examples=60, deadline=None)
@given(prompts, st.integers(1, 6), plans, st.lists(st.integers(0, 10_000), max_size=60))
def test_a_late_duplicate_changes_nothing(
    prompt: list[int], new_tokens: int, plan: tuple[str, int, list[int]], late: list[int]
) -> None:
    cluster = Cluster(prompt, len(prompt) + new_tokens, chunk=3)
    cluster.replan(*plan)
    cluster.settle()
    expected = plain_loop(prompt, len(prompt) + new_tokens)
    assert cluster.ids == expected
    history = list(cluster.delivered)
    for index in late:
        cluster.arrive(history[index % len(history)])
        assert not any(device.queue or device.kv for device in cluster.devices.values())
    # a plan asked for again is answered again; nothing else may be said
    assert all(isinstance(flight.message, StageReady) for flight in cluster.flights)
    assert cluster.ids == expected


@settings(max_examples=60, deadline=None)
@given(prompts, st.integers(1, 6), plans, st.data())
def test_a_duplicate_during_the_run_changes_nothing(
    prompt: list[int], new_tokens: int, plan: tuple[str, int, list[int]], data: st.DataObject
) -> None:
    """Repeated messages alone never cost a re-feed: one session is enough."""
    cluster = Cluster(prompt, len(prompt) + new_tokens, chunk=2)
    cluster.replan(*plan)
    for _ in range(400):
        if cluster.delivered and data.draw(st.booleans()):
            index = data.draw(st.integers(0, len(cluster.delivered) - 1))
            cluster.arrive(cluster.delivered[index])
        if not cluster.step(data.draw(st.integers(0, 1))) or cluster.finish:
            break
    assert cluster.ids == plain_loop(prompt, len(prompt) + new_tokens)
    assert cluster.session == cluster.lease * 1000 + 1


@settings(max_examples=150, deadline=None)
@given(
    plans,
    st.sampled_from([5, 16, 32, 40]),
    st.sampled_from([0.0, 0.1, 0.4]),
    st.integers(0, 2**32),
)
def test_requests_that_begin_alike_share_rows_and_nothing_else(
    plan: tuple[str, int, list[int]], chunk: int, mischief: float, seed: int
) -> None:
    """Stages forget pages as they like, links misbehave: the ids are always those of a request that came alone."""
    rng = random.Random(seed)
    beginning = [rng.randrange(VOCAB) for _ in range(96)]
    cluster = Cluster(beginning[:1], 3, chunk)
    cluster.replan(*plan)
    cluster.settle()
    for _ in range(4):
        prompt = beginning[: rng.randint(1, 96)] + [rng.randrange(VOCAB) for _ in range(rng.randint(0, 9))]
        max_rows = len(prompt) + rng.randint(1, 40)
        cluster.begin(prompt, max_rows)
        for _ in range(rng.randint(0, 60)):
            if rng.random() >= mischief:
                cluster.step(rng.randrange(1000))
            elif rng.random() < 0.3:
                rng.choice(list(cluster.devices.values())).forget(rng)
            elif cluster.flights:
                flight = rng.choice(cluster.flights)
                if rng.random() < 0.5:
                    cluster.arrive(flight)
                elif not isinstance(flight.message, CloseSession):
                    cluster.flights.remove(flight)
        cluster.settle()
        assert not cluster.failures
        assert cluster.ids == plain_loop(prompt, max_rows)
        assert not any(device.kv or device.queue for device in cluster.devices.values())


def test_rows_are_reused_by_every_stage_as_far_as_all_hold_them() -> None:
    cluster = Cluster([1], 2, 16)
    cluster.replan("ABC", 3, [1, 2])
    cluster.settle()
    prompt = [n % VOCAB for n in range(100)]
    cluster.begin(prompt, 104)
    cluster.settle()
    rest = page_names(prompt)[1:]
    assert all(set(page_names(prompt)) <= device.pages.keys() for device in cluster.devices.values())
    for name in rest:
        del cluster.devices["B"].pages[name]
    cluster.delivered.clear()
    cluster.begin([*prompt, 5], 104)
    cluster.settle()
    assert cluster.ids == plain_loop([*prompt, 5], 104)
    reused = [f.message for f in cluster.delivered if isinstance(f.message, RowsHeld) and f.message.reused]
    assert [message.rows for message in reused] == [32, 32]  # to stage 1 and to the coordinator
    frames = [f.message for f in cluster.delivered if isinstance(f.message, FrameRows)]
    assert min(frame.base_row for frame in frames) == 32


def test_a_long_prompt_never_piles_up_before_a_slow_stage() -> None:
    """Stage 2 stands still: stage 1 stops at its window, and goes on when rows come through."""
    cluster = Cluster([1], 2, 8)
    cluster.replan("AB", 2, [1])
    cluster.settle()
    prompt = [n % VOCAB for n in range(900)]
    cluster.begin(prompt, 902)
    for _ in range(2000):
        if cluster.devices["A"].queue:
            cluster.devices["A"].run(1)
        elif cluster.flights:
            cluster.deliver(0)
    waiting = sum(len(work.ids) for work in cluster.devices["B"].queue if isinstance(work, Work))
    assert 8 <= waiting <= CHUNKS_UNDER_WAY * 2 * 8
    cluster.settle()
    assert cluster.ids == plain_loop(prompt, 902)
    assert cluster.devices["B"].most_queued_rows <= CHUNKS_UNDER_WAY * 2 * 8 + 1
