"""Devices that lie, stall or talk nonsense, and more requests than anybody can serve: a clear end, and nothing left."""

from __future__ import annotations

import asyncio
import os
import resource
from contextlib import aclosing
from dataclasses import replace

import pytest

from coordinator.config import parse_split
from coordinator.service import TokenEvent
from edge_runtime.core import RequestId, Token
from edge_runtime.errors import CapacityError
from edge_runtime.protocol.messages import CloseSession, LoadStage, SessionFailed, Tokens, UnloadStage
from tests.support.coordinator_world import FAST, PROMPT, World, collect, request, until, world
from tests.support.fake_agents import FakeAgent, undisturbed

PATIENT = replace(FAST, exclude_seconds=30.0)


def sockets() -> int:
    return sum(os.readlink(f"/proc/self/fd/{fd}").startswith("socket:") for fd in open_files())


def open_files() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        found.append(fd)
    return found


async def status_of(w: World, name: str) -> tuple[str, str]:
    return next((d.state, d.reason) for d in w.runtime.status().devices if d.name == name)


# ---------------------------------------------------------------- devices


async def test_a_device_that_lies_about_its_memory_is_left_out_and_the_others_serve(tmp_path):
    """It says it has room for all, and fails when it loads; it keeps failing, and rests longer each time."""
    async with world(tmp_path, split=parse_split("auto"), limits=FAST) as w:
        liar = FakeAgent(w.cluster, "liar", memory_bytes=1 << 40, fails_to_load="out of memory")
        honest = FakeAgent(w.cluster, "zz", memory_bytes=1 << 20)
        await liar.start(w.runtime)
        await until(lambda: w.cluster.told_to("liar", LoadStage))
        await honest.start(w.runtime)
        await asyncio.wait_for(w.runtime.loop.serving.wait(), 10)
        assert w.runtime.status().plan.stages == (("zz", 0, 3),)
        state = w.runtime.loop.state.devices[liar.device_id]
        assert state.failure == "out of memory"
        assert [e.id for e in await collect(w.runtime.generate(request()))] == undisturbed(PROMPT, 7, 8)


async def test_a_stage_that_has_no_room_for_a_token_is_as_good_as_none(tmp_path):
    async with world(tmp_path, split=parse_split("auto"), limits=PATIENT) as w:
        (full,) = await w.start("a", kv_tokens=0)
        await until(lambda: _failure(w, full))
        assert "no room" in (await status_of(w, "a"))[1]


async def test_a_silent_stage_with_a_beating_heart_is_planned_around(tmp_path):
    """b takes the work and does nothing with it; a and b go on saying that they live, a that it computes."""
    limits = replace(PATIENT, step_seconds=0.2)
    async with world(tmp_path, limits=limits) as w:
        a, b = await w.serve("a", "b")
        w.cluster.pace.allow(3)
        seen: list[TokenEvent] = []
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(collect(w.runtime.generate(request()), seen))
            beating = tasks.create_task(beat(a, b))
            await until(lambda: len(seen) == 3)
            await until(lambda: _failure(w, b))
            w.cluster.pace.allow_all()
            await running
            beating.cancel()
        assert [event.id for event in seen] == undisturbed(PROMPT, 7, 8)
        state, reason = await status_of(w, "b")
        assert state == "excluded"
        assert "heartbeats" in reason
        assert w.runtime.status().plan.stages == (("a", 0, 3),)


def _failure(w: World, agent: FakeAgent) -> str:
    device = w.runtime.loop.state.devices.get(agent.device_id)
    return "" if device is None else device.failure


async def beat(a: FakeAgent, b: FakeAgent) -> None:
    steps = 0
    while True:
        await asyncio.sleep(0.02)  # heartbeats are what this is about
        steps += 1
        await a.beat(steps, steps=steps)
        await b.beat(steps, steps=1)


async def test_an_engine_that_fails_every_step_is_left_out_not_blamed_on_each_request(tmp_path):
    async with world(tmp_path, limits=PATIENT) as w:
        await w.serve("a", "b")
        w.cluster.answer = lambda o, feed: (
            SessionFailed(o.session, o.lease, "engine", "the rows are not finite")
            if w.cluster.members_of(o.lease) == ("a", "b")
            else None
        )
        ended = await asyncio.gather(
            *(collect(w.runtime.generate(request(f"r{n}"))) for n in range(4)), return_exceptions=True
        )
        assert all([e.id for e in events] == undisturbed(PROMPT, 7, 8) for events in ended)
        state, reason = await status_of(w, "a")  # the first stage is the one that says so here
        assert state == "excluded"
        assert "not finite" in reason
        assert w.runtime.status().plan.stages == (("b", 0, 3),)


@pytest.mark.parametrize(
    "nonsense",
    [Token(2, 10**6), Token(2, -1), Token(2**40, 1), Token(9, 1)],
    ids=["no such id", "negative id", "far off", "hole"],
)
async def test_absurd_tokens_end_the_tail_not_the_requests(tmp_path, nonsense):
    async with world(tmp_path, limits=PATIENT) as w:
        _, tail = await w.serve("a", "b")
        w.cluster.pace.allow(0)
        requests = [asyncio.ensure_future(collect(w.runtime.generate(request(f"r{n}")))) for n in range(3)]
        answered: set[int] = set()
        async with asyncio.timeout(10):
            while not w.runtime.loop.state.devices[tail.device_id].failure:
                for opening in w.cluster.opened():
                    if opening.session not in answered:
                        answered.add(opening.session)
                        await tail.send(Tokens(opening.session, opening.lease, 0, (nonsense,)))
                await asyncio.sleep(0)
        w.cluster.pace.allow_all()
        for events in await asyncio.gather(*requests):
            assert [event.id for event in events] == undisturbed(PROMPT, 7, 8)
        assert "sent id" in (await status_of(w, "b"))[1]


async def test_a_tail_that_repeats_itself_for_ever_does_not_hide_that_nothing_comes(tmp_path):
    async with world(tmp_path, stall_seconds=0.1) as w:
        _, tail = await w.serve("a", "b")
        w.cluster.pace.allow(0)
        running = asyncio.ensure_future(collect(w.runtime.generate(request())))
        async with asyncio.timeout(10):
            while len(w.cluster.opened()) < 2:
                for opening in w.cluster.opened():
                    await tail.send(Tokens(opening.session, opening.lease, 0, (Token(0, 1),)))
                await asyncio.sleep(0.01)
        w.cluster.pace.allow_all()
        assert [event.id for event in await running] == undisturbed(PROMPT, 7, 8)


async def test_tokens_for_sessions_of_another_pipeline_change_nothing(tmp_path):
    async with world(tmp_path, split=parse_split("auto", "", "2")) as w:
        a, b = await w.start("a", "b")
        await until(lambda: len([plan for plan in w.runtime.status().plans if plan.ready]) == 2)
        w.cluster.pace.allow(2)
        seen: list[TokenEvent] = []
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(collect(w.runtime.generate(request()), seen))
            await until(lambda: len(seen) == 2)
            opening = w.cluster.opened()[0]
            serving = w.cluster.told[[m for _, m in w.cluster.told].index(opening)][0]
            other = b if serving == "a" else a
            other_lease = next(p.lease for p in w.runtime.status().plans if p.stages[0][0] == other.name)
            for lease in (opening.lease, other_lease):
                await other.send(Tokens(opening.session, lease, 0, (Token(4, 1),)))
                await other.send(SessionFailed(opening.session, lease, "engine", "no"))
            w.cluster.pace.allow_all()
        assert [event.id for event in seen] == undisturbed(PROMPT, 7, 8)
        assert len(w.cluster.opened()) == 1


# ---------------------------------------------------------------- requests


async def test_a_request_cancelled_before_its_first_token_leaves_nothing(tmp_path):
    async with world(tmp_path) as w:
        await w.serve("a", "b")
        before, sockets_before = len(asyncio.all_tasks()), sockets()
        w.cluster.pace.allow(0)
        for number in range(20):
            async with aclosing(w.runtime.generate(request(f"r{number}"))) as events:
                waiting = asyncio.ensure_future(anext(events))
                await until(lambda number=number: len(w.cluster.opened()) == number + 1)
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
        opened = {opening.session for opening in w.cluster.opened()}
        for name in "ab":
            await until(
                lambda name=name: opened == {m.session for m in w.cluster.told_to(name, CloseSession)}
            )
        w.cluster.pace.allow_all()
        await until(lambda: not w.runtime.loop.state.sessions)
        assert w.runtime.sessions.open == 0
        await until(lambda: len(asyncio.all_tasks()) <= before)
        assert sockets() == sockets_before


async def test_of_ten_thousand_requests_those_that_wait_are_served_and_the_rest_are_told_at_once(tmp_path):
    limits = replace(FAST, max_running=32)
    async with world(tmp_path, max_waiting=200, limits=limits) as w:
        await w.serve("a", "b")
        await collect(w.runtime.generate(request("warm")))
        before, sockets_before = len(asyncio.all_tasks()), sockets()
        rss_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        w.cluster.pace.allow(0)

        async def one(number: int) -> str:
            try:
                events = await collect(w.runtime.generate(request(f"r{number}", 2)))
            except CapacityError as refused:
                return refused.code
            return "served" if [e.id for e in events] == undisturbed(PROMPT, 7, 2) else "wrong"

        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one(number)) for number in range(10_000)]
            await until(lambda: sum(task.done() for task in running) >= 10_000 - 232)
            assert len(w.runtime.loop.state.waiting) <= 200
            w.cluster.pace.allow_all()
        ends = [task.result() for task in running]
        assert ends.count("overloaded") + ends.count("served") == 10_000
        assert 200 <= ends.count("served") <= 232
        await until(lambda: not w.runtime.loop.state.sessions)
        assert w.runtime.sessions.open == 0
        assert not await w.journal.unfinished()
        await until(lambda: len(asyncio.all_tasks()) <= before)
        assert sockets() == sockets_before
        grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss_before) << 10
        assert grown_bytes < 200 << 20
        assert [e.id for e in await collect(w.runtime.generate(request("after")))] == undisturbed(
            PROMPT, 7, 8
        )


async def test_a_request_without_a_token_goes_on_in_the_classes_that_are_there_now(tmp_path):
    async with world(tmp_path) as w:
        agents = await w.serve("a", "b")
        w.cluster.pace.allow(0)
        running = asyncio.ensure_future(collect(w.runtime.generate(request())))
        await until(lambda: w.cluster.opened())
        await w.start("other", class_name="fake-2")
        await until(lambda: any(d.name == "other" and d.state == "ready" for d in w.runtime.status().devices))
        for agent in agents:
            await agent.die()
        w.cluster.pace.allow_all()
        assert [event.id for event in await running] == undisturbed(PROMPT, 7, 8)
        found = await w.journal.request(RequestId("r"))
        assert found is not None
        assert found.entry.class_map == ("fake-2",) * 4


async def test_a_newcomer_is_taken_in_while_nobody_waits(tmp_path):
    limits = replace(FAST, idle_seconds=0.05)
    async with world(tmp_path, split=parse_split("auto"), limits=limits) as w:
        await w.serve("slow", seconds=1e-2)
        first = w.runtime.status().plan.lease
        await w.start("fast", seconds=1e-4)
        await until(lambda: w.runtime.status().plan.lease > first and w.runtime.status().plan.ready)
        plan = w.runtime.status().plan
        assert plan.stages == (("fast", 0, 3),)
        assert "while nobody waited" in plan.reasons[0]
        await until(lambda: w.cluster.told_to("slow", UnloadStage))
        assert [e.id for e in await collect(w.runtime.generate(request()))] == undisturbed(PROMPT, 7, 8)


async def test_a_replica_that_dies_hands_its_sessions_over(tmp_path):
    async with world(tmp_path, split=parse_split("auto", "", "2")) as w:
        agents = await w.start("a", "b")
        await until(lambda: len([plan for plan in w.runtime.status().plans if plan.ready]) == 2)
        leases = {plan.stages[0][0]: plan.lease for plan in w.runtime.status().plans}
        w.cluster.pace.allow(6)
        seen: list[list[TokenEvent]] = [[], []]
        async with asyncio.TaskGroup() as tasks:
            for number in range(2):
                tasks.create_task(collect(w.runtime.generate(request(f"r{number}")), seen[number]))
            await until(lambda: len(seen[0]) + len(seen[1]) == 6)
            assert {opening.lease for opening in w.cluster.opened()} == set(leases.values())
            await agents[1].die()
            w.cluster.pace.allow_all()
        assert all([event.id for event in events] == undisturbed(PROMPT, 7, 8) for events in seen)
        assert [plan.lease for plan in w.runtime.status().plans] == [leases["a"]]
