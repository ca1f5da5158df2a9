"""A coordinator over real links with scripted agents, and the small things that tests of it need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from coordinator.config import CoordinatorConfig, parse_split
from coordinator.decisions import Limits
from coordinator.journal.memory import MemoryJournal
from coordinator.runtime import CoordinatorRuntime
from coordinator.service import GenerateRequest, TokenEvent
from edge_runtime.core import RequestId, SamplingParams
from tests.support.fake_agents import FakeAgent, FakeCluster, write_fake_bundle

PROMPT = (40, 50)
FAST = Limits(
    device_timeout_seconds=30.0, settle_seconds=0.0, exclude_seconds=0.2, recovery_seconds=5.0, max_attempts=3
)


@dataclass
class World:
    runtime: CoordinatorRuntime
    cluster: FakeCluster
    journal: MemoryJournal

    async def start(self, *names: str, **settings: object) -> list[FakeAgent]:
        agents = [FakeAgent(self.cluster, name, **settings) for name in names]
        for agent in agents:
            await agent.start(self.runtime)
        return agents

    async def serve(self, *names: str, **settings: object) -> list[FakeAgent]:
        """Agents, and a pipeline over them."""
        agents = await self.start(*names, **settings)
        await asyncio.wait_for(self.runtime.loop.serving.wait(), 10)
        return agents


@asynccontextmanager
async def world(path: Path, kind: str = "generator", journal: MemoryJournal | None = None, **config: object):
    if not (path / "bundle").exists():
        write_fake_bundle(path / "bundle", kind)
    journal = journal or MemoryJournal()
    settings = {"split": parse_split("even", "a,b"), "limits": FAST, "drain_seconds": 0.0, **config}
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        runtime = CoordinatorRuntime(
            CoordinatorConfig(path / "bundle", path / "state", **settings),  # type: ignore[arg-type]
            journal=journal,
        )
        cluster = FakeCluster(tasks)
        try:
            async with runtime:
                yield World(runtime, cluster, journal)
        finally:
            cluster.pace.allow_all()
            for agent in cluster.agents.values():
                await agent.die()


def request(name: str = "r", count: int = 8, seed: int = 7, **settings: object) -> GenerateRequest:
    return GenerateRequest(RequestId(name), "tenant", PROMPT, SamplingParams(seed=seed), count, **settings)  # type: ignore[arg-type]


async def collect(
    events: AsyncIterator[TokenEvent], into: list[TokenEvent] | None = None
) -> list[TokenEvent]:
    found = [] if into is None else into
    async with asyncio.timeout(20):
        async for event in events:
            found.append(event)
    return found


async def until(condition) -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(10):
        while not condition():
            turn = loop.create_future()
            loop.call_soon(turn.set_result, None)
            await turn
