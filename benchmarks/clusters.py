"""Real clusters to measure: a coordinator process, agent processes, HTTP.

Knows: LocalCluster, and what a benchmark adds to it: notes of every step, links through a shaping proxy, memory. Does
not know: requests (`streams.py`), or what is compared.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.models import Model
from benchmarks.proxy_process import proxies
from benchmarks.report import say
from benchmarks.row_notes import Noted, read_notes
from benchmarks.shaping_proxy import Shape
from benchmarks.steps import Step, read_steps
from edge_runtime import AsyncClient, DeviceSpec, LocalCluster
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.sdk.process import ChildProcess

TIMED_AGENT = Path(__file__).with_name("timed_agent.py").absolute()
START_SECONDS = 150.0


@dataclass(frozen=True)
class Forward:
    """A device's data port, and the port of the proxy that leads there."""

    data_port: int
    advertised_port: int


class TimedCluster(LocalCluster):
    """A LocalCluster whose agents note their steps. `forwards`: devices that others reach through a proxy."""

    def __init__(
        self,
        bundle: Path,
        *,
        devices: Sequence[DeviceSpec],
        split: str | Sequence[tuple[int, int]],
        directory: Path,
        forwards: Mapping[str, Forward],
    ) -> None:
        super().__init__(
            bundle,
            devices=devices,
            split=split,
            state_directory=directory,
            start_timeout_seconds=START_SECONDS,
            replicas=1,
        )
        self._notes = directory
        self._forwards = forwards

    def last_words(self) -> str:
        """Ends of the logs, and who has ended."""
        ended = [name for name, agent in self._agents.items() if not agent.is_running]
        if self._coordinator is not None and not self._coordinator.is_running:
            ended.append("the coordinator")
        return f"ended: {', '.join(ended) or 'nobody'}{self._all_logs()}"

    def _agent_process(self, name: str, arguments: list[str], log_path: Path) -> ChildProcess:
        forward = self._forwards.get(name)
        if forward is not None:
            at = arguments.index("--data-address") + 1
            arguments[at] = f"127.0.0.1:{forward.data_port}"
            arguments += ["--advertise", f"127.0.0.1:{forward.advertised_port}"]
        program = (str(TIMED_AGENT), str(self._notes / f"steps-{name}"))
        return ChildProcess(f"device {name}", arguments, log_path, program=program)


class Running:
    """A cluster that serves, its client, and what its processes did."""

    def __init__(self, cluster: LocalCluster, client: AsyncClient, directory: Path) -> None:
        self.client = client
        self.steps: dict[str, list[Step]] = {}  # by device, once the cluster has ended
        self.rows: dict[str, list[Noted]] = {}  # likewise
        self._cluster = cluster
        self._directory = directory

    def drafting_client(self, draft: str | Path) -> AsyncClient:
        """Of a user whose device guesses ahead, in this way or with this model; the caller closes it."""
        return self._cluster.async_client(draft=draft)

    async def status(self) -> dict[str, Any]:
        return await self.client.status()

    async def plan(self) -> dict[str, Any]:
        return dict((await self.status())["plan"])

    async def stages(self) -> list[str]:
        """Devices of the pipeline, in order."""
        return [str(stage[0]) for stage in (await self.plan())["stages"]]

    async def weight_bytes(self) -> dict[str, int]:
        return {str(d["name"]): int(d["weight_bytes"]) for d in (await self.status())["devices"]}

    def rss_bytes(self) -> dict[str, int]:
        """Resident memory of each agent now."""
        return {name: int(psutil.Process(pid).memory_info().rss) for name, pid in self._cluster.pids.items()}

    def read_notes(self) -> None:
        for path in self._directory.glob("steps-*"):
            name = path.name.removeprefix("steps-")
            if path.suffix == ".rows":
                self.rows[name.removesuffix(".rows")] = read_notes(path)
            else:
                self.steps[name] = read_steps(path)


@asynccontextmanager
async def running(
    model: Model,
    devices: Sequence[DeviceSpec],
    *,
    split: str | Sequence[tuple[int, int]] = "auto",
    shape: Shape | None = None,
) -> AsyncGenerator[Running, None]:
    """Start a cluster, wait until it serves. With `shape`, devices reach each other through proxies of that shape."""
    bundle = model.bundle()
    names = ", ".join(f"{device.name} ({device.threads} threads)" for device in devices)
    say(f"starting {names}, split {split}")
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-bench-")))
        forwards = {}
        if shape is not None:
            data_ports = [_free_port() for _ in devices]
            advertised = await stack.enter_async_context(proxies(data_ports, shape))
            for device, data_port, port in zip(devices, data_ports, advertised, strict=True):
                forwards[device.name] = Forward(data_port, port)
        cluster = TimedCluster(bundle, devices=devices, split=split, directory=directory, forwards=forwards)
        async with cluster:
            client = await stack.enter_async_context(cluster.async_client())
            await client.model()  # asked for once; not a part of the first request
            found = Running(cluster, client, directory)
            try:
                yield found
            except EdgeRuntimeError:
                say(f"a request failed; {cluster.last_words()}")
                raise
        found.read_notes()


def device(model: Model, name: str, threads: int, *, reachable: bool = True) -> DeviceSpec:
    return DeviceSpec(name, memory=model.memory, threads=threads, reachable=reachable)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
