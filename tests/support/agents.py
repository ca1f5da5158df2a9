"""Agents as tasks of this process, over real links to a scripted coordinator.

Knows: how they start, serve and stop, and what one device alone would generate. Does not know: what is tested.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from edge_runtime.agent.config import AgentConfig
from edge_runtime.agent.daemon import Agent
from edge_runtime.agent.status import Status
from edge_runtime.bundle import Bundle
from edge_runtime.core import LayerRange, SamplingParams
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.sampler import Sampler
from tests.support.mini_coordinator import MiniCoordinator
from tests.support.stages import Pipeline, span

PROMPT = [5, 17, 42, 99, 3, 7, 150, 11, 60]
NAMES = ("phone", "laptop", "box")


def make_config(directory: Path, name: str, join: str, **changes: object) -> AgentConfig:
    config = AgentConfig(name, directory / name, 4 << 30, 1, join=join)
    return replace(config, **changes)


class Cluster:
    """Agents as tasks of this process."""

    def __init__(self, coordinator: MiniCoordinator, directory: Path, tasks: asyncio.TaskGroup) -> None:
        self.coordinator = coordinator
        self.directory = directory
        self.tasks = tasks
        self.running: dict[str, asyncio.Task[None]] = {}
        self.statuses: dict[str, list[Status]] = {}

    async def start(self, *names: str, **changes: object) -> None:
        for name in names:
            config = make_config(self.directory, name, self.coordinator.join_link(), **changes)
            told = self.statuses.setdefault(name, [])
            self.running[name] = self.tasks.create_task(Agent(config, on_status=told.append).run())
        await self.coordinator.wait_for(*names)

    async def stop(self, *names: str) -> None:
        tasks = [self.running.pop(name) for name in names]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def serve(self, names: Sequence[str], edges: Sequence[int]) -> int:
        lease = await self.coordinator.load(names, edges)
        for name in names:
            await self.coordinator.links[name].ready(lease)
        return lease


@asynccontextmanager
async def cluster_of(bundle: Bundle, directory: Path) -> AsyncIterator[Cluster]:
    """Every task, thread and socket that was made is gone at the end."""
    threads = set(threading.enumerate())
    async with MiniCoordinator(bundle).running() as coordinator, asyncio.TaskGroup() as tasks:
        cluster = Cluster(coordinator, directory, tasks)
        try:
            yield cluster
        finally:
            await cluster.stop(*cluster.running)
    left = {thread.name for thread in set(threading.enumerate()) - threads}
    assert not {name for name in left if name.startswith(("stage", "disk"))}
    assert asyncio.all_tasks() == {asyncio.current_task()}


def one_device_loop(bundle: Bundle, ids: Sequence[int], max_rows: int, sampling: SamplingParams) -> list[int]:
    """The same model in one stage, one row after the other, without any of the agent's machinery."""

    def make(bundle: Bundle, layers: LayerRange) -> CpuStage:
        return CpuStage.load(bundle, layers, threads=1, kv_budget_bytes=64 << 20)

    pipeline = Pipeline.load(bundle, make)
    pipeline.open(1, max_rows)
    sampler = Sampler(sampling, bundle.manifest.model.vocab_size)
    sampler.observe(ids, generated=False)
    ids = list(ids)
    logits = pipeline.run(span(1, 0, ids, 1))
    generated: list[int] = []
    while True:
        token, _ = sampler.sample(logits[-1], len(ids))
        generated.append(token)
        ids.append(token)
        if token in bundle.manifest.model.eos_ids or len(ids) == max_rows:
            return generated
        sampler.observe([token], generated=True)
        logits = pipeline.run(span(1, len(ids) - 1, [token], 1))
