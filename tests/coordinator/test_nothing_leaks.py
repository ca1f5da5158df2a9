"""Many requests at once, some of them given up anywhere: at the end no page, row, session, task or socket is left."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from contextlib import aclosing
from pathlib import Path

import pytest

from coordinator.service import GenerateRequest
from edge_runtime.agent.daemon import Agent
from edge_runtime.core import RequestId, SamplingParams
from edge_runtime.errors import CapacityError
from tests.support.coordinator_world import until
from tests.support.whole_cluster import WholeCluster, served

REQUESTS = 160
SHARED = tuple(range(30, 230))


def sockets() -> int:
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
        except OSError:
            continue
    return count


def what_an_agent_holds(agent: Agent) -> dict[str, int]:
    worker, state = agent._plane.worker, agent._plane._state
    loaded = worker.stage.loaded
    assert loaded is not None
    table = loaded.stage._cache.table  # type: ignore[attr-defined]
    return {
        "sessions": len(state.sessions) + len(loaded.open) + len(loaded.tails) + len(table.sessions()),
        "prompts": len(state._prompts),
        "rows": len(loaded.queue),
        "turns": len(loaded.queue._turn_rows),
        "decoding": len(loaded.pace._decoding),
        "away": len(loaded.pace._away._went),
        "reserved": table.reserved_tokens,
        "used and not at rest": table.used_pages - len(table.prefixes.resting),
    }


async def one(cluster: WholeCluster, number: int, rng: random.Random, *, patient: bool = False) -> str:
    """How it ended: with its tokens, refused, or given up after some of them."""
    patience = None if patient else rng.choice([0.0, 0.02, 0.3, None, None])
    prompt = SHARED[: rng.randint(1, 200)] + tuple(rng.randrange(300) for _ in range(rng.randint(1, 300)))
    count = rng.randint(1, 12)
    sampling = SamplingParams(temperature=0.7, seed=number)
    request = GenerateRequest(RequestId(f"r{number}"), f"t{number % 3}", prompt, sampling, count, (), True)
    received = 0
    try:
        async with aclosing(cluster.runtime.generate(request)) as events, asyncio.timeout(patience):
            async for _ in events:
                received += 1
    except CapacityError:
        return "refused"
    except TimeoutError:
        return "given up"
    assert received == count
    return "finished"


@pytest.mark.timeout(180)
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
async def test_nothing_is_left(tmp_path: Path) -> None:
    rng = random.Random(5)
    async with served(tmp_path) as cluster:
        assert await one(cluster, REQUESTS, random.Random(0), patient=True) == "finished"
        before = len(asyncio.all_tasks()), sockets()
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(one(cluster, number, random.Random(rng.random())))
                for number in range(REQUESTS)
            ]
        ends = [task.result() for task in running]
        assert {"finished", "given up"} <= set(ends)
        # Closing is told to the devices, and does not wait for them.
        await until(lambda: all(set(what_an_agent_holds(agent).values()) == {0} for agent in cluster.agents))
        assert cluster.runtime.sessions.open == cluster.runtime.sessions.waiting == 0
        assert not cluster.runtime.loop.state.sessions
        for agent in cluster.agents:
            assert set(what_an_agent_holds(agent).values()) == {0}
            assert agent._plane._peers._lanes.keys() <= {other._pairing.device_id for other in cluster.agents}
            assert not any(lane.waiting for lane in agent._plane._peers._lanes.values())
        gc.collect()
        assert (len(asyncio.all_tasks()), sockets()) == before
