"""The whole coordinator, its HTTP API and real agents in one process, so that a test can look into all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from coordinator.api.app import create_app, serve
from coordinator.api.keys import ApiKey, ApiKeys
from coordinator.config import CoordinatorConfig, parse_split
from coordinator.runtime import CoordinatorRuntime
from edge_runtime.agent.config import AgentConfig
from edge_runtime.agent.daemon import Agent
from edge_runtime.sdk.cluster import demo_bundle

ALICE, BOB = "sk-edge-alice-000000000000", "sk-edge-bob-00000000000000"  # of two tenants; Alice is an admin


@dataclass
class WholeCluster:
    url: str
    runtime: CoordinatorRuntime
    agents: list[Agent]


@asynccontextmanager
async def served(
    directory: Path, names: Sequence[str] = ("a", "b"), *, memory_bytes: int = 1 << 30
) -> AsyncIterator[WholeCluster]:
    """The demo model, split evenly."""
    split = parse_split("even", ",".join(names))
    config = CoordinatorConfig(demo_bundle(), directory / "coordinator", split=split)
    keys = ApiKeys([ApiKey.of(ALICE, tenant="alice"), ApiKey.of(BOB, tenant="bob", is_admin=False)])
    async with CoordinatorRuntime(config) as runtime, asyncio.TaskGroup() as tasks:
        agents = [
            Agent(AgentConfig(name, directory / name, memory_bytes, 1, join=runtime.create_join_link()))
            for name in names
        ]
        running = [tasks.create_task(agent.run()) for agent in agents]
        runner, port = await serve(create_app(runtime, api_keys=keys))
        try:
            async with asyncio.timeout(60):
                await runtime.loop.serving.wait()
            yield WholeCluster(f"http://127.0.0.1:{port}", runtime, agents)
        finally:
            await runner.cleanup()
            for task in running:
                task.cancel()
