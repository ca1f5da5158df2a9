"""Agent: lend this process to a cluster.

Knows: how settings become an agent's. Does not know: what the agent does (`edge_runtime.agent`).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from edge_runtime.config import load, parse_expert_cache, parse_size
from edge_runtime.errors import UsageError
from edge_runtime.experts.prediction_setting import AUTO
from edge_runtime.experts.start_bits import parse_start_bits


class Agent:
    """`await Agent(join=link, name="laptop", memory="2GiB").run()` serves until cancelled.

    A device that is paired already needs no link; its key and pairing lie in `state_directory`. `memory` is what the
    whole process may use; `expert_cache` is the share of it for experts that live on flash (a size, "all" or "auto").
    `expert_start_bits` 2 or 4 uses bit-nested ones before they are whole: sooner, but tokens depend on when reads end.
    `expert_prediction` "auto" may keep or read the next layer's experts on a guess where that is faster, "off" never.
    """

    def __init__(
        self,
        *,
        name: str,
        memory: str | int,
        threads: int = 1,
        join: str = "",
        state_directory: str | Path | None = None,
        reachable: bool = True,
        expert_cache: str | int = "auto",
        expert_start_bits: str | int = "all",
        expert_prediction: str = AUTO,
    ) -> None:
        from edge_runtime.agent.config import NO_DATA_PORT, AgentConfig

        try:
            memory_bytes = parse_size(memory)
            experts = parse_expert_cache(expert_cache)
            start_bits = parse_start_bits(expert_start_bits)
        except ValueError as problem:
            raise UsageError(f"agent {name}: {problem}") from None
        directory = load().general.state_directory / "agents" / name
        self._config = AgentConfig(
            name=name,
            state_directory=directory if state_directory is None else Path(state_directory),
            memory_budget_bytes=memory_bytes,
            threads=threads,
            join=join,
            expert_cache=experts,
            expert_start_bits=start_bits,
            expert_prediction=expert_prediction,
            data_port=0 if reachable else NO_DATA_PORT,
        )

    async def run(self) -> None:
        """Serve until cancelled. Raises TrustError where the coordinator refuses this device for good."""
        from edge_runtime.agent.daemon import Agent as Daemon

        await Daemon(self._config).run()

    def run_forever(self) -> None:
        """The same for programs without an event loop; Ctrl-C ends it."""
        asyncio.run(self.run())
