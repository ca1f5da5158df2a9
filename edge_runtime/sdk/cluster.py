"""LocalCluster: a coordinator and its agents as real processes on this machine.

Knows: which processes to start, when they are ready, and how to leave nothing behind. Does not know: what they do.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from edge_runtime.errors import BundleError, EdgeRuntimeError, TransportError, UsageError
from edge_runtime.sdk.async_client import NO_DRAFTS, AsyncClient
from edge_runtime.sdk.client import Client
from edge_runtime.sdk.device_spec import DeviceSpec
from edge_runtime.sdk.process import STOP_SECONDS, ChildProcess

Split = str | Sequence[tuple[int, int]]
DEMO = "demo"
_POLL_SECONDS = 0.1
_SETTLED = ("ready", "serving", "excluded")


def demo_bundle() -> Path:
    """The bundle that ships inside the package."""
    path = Path(__file__).parents[1] / "demo" / "bundle"
    if not path.is_dir():
        raise BundleError(
            "this installation has no demo bundle",
            hint="reinstall edge-runtime, or give a bundle's directory",
        )
    return path


class LocalCluster:
    """`with LocalCluster(bundle, devices=[DeviceSpec(name="phone")]) as cluster:`, or `async with`.

    `split`: "auto", "even", or a list of (first, last) layers for the first devices; devices beyond it are spares.
    "experts": the first device runs all layers, the others hold the experts that it has no room for.
    `replicas`: pipelines over different devices, "auto" or how many. Devices of one machine share its cores, so "auto"
    is one here. `wire`: rows between layers, "fp32", "fp16" (half the bytes) or "int8" (a quarter; approximate).
    `kv`: keys and values, "fp32" or "int8" (a quarter of the memory; approximate).
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        devices: Sequence[DeviceSpec],
        split: Split = "auto",
        replicas: int | str = "auto",
        wire: str = "fp32",
        kv: str = "fp32",
        state_directory: str | Path | None = None,
        start_timeout_seconds: float = 180.0,
        on_progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        names = [device.name for device in devices]
        if not names:
            raise UsageError("a cluster needs at least one device")
        if len(set(names)) != len(names):
            raise UsageError("two devices of the cluster have the same name")
        self._bundle = demo_bundle() if bundle == DEMO else Path(bundle)
        self._specs = {device.name: device for device in devices}
        self._split, self._named = _split_arguments(split, names)
        self._replicas = _replicas_argument(replicas)
        self._wire, self._kv = wire, kv
        self._own_directory = state_directory is None
        self._directory = Path() if state_directory is None else Path(state_directory)
        self._timeout_seconds = start_timeout_seconds
        self._on_progress = on_progress
        self._coordinator: ChildProcess | None = None
        self._agents: dict[str, ChildProcess] = {}
        self._clients: list[Client] = []
        self._url = ""
        self._api_key = ""
        self._given_up = threading.Event()

    # ------------------------------------------------------------ life

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> LocalCluster:
        try:
            await asyncio.to_thread(self.start)
        except asyncio.CancelledError:
            self._given_up.set()  # the thread stops waiting, and cleans up
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(asyncio.to_thread(self.close))

    def start(self) -> None:
        """Start everything and wait until it serves. On any failure nothing is left running."""
        atexit.register(self.close)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        deadline = time.monotonic() + self._timeout_seconds
        if self._own_directory:
            self._directory = Path(tempfile.mkdtemp(prefix="edge-runtime-"))
        else:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._start_coordinator(deadline)
        for spec in self._specs.values():
            self._start_agent(spec)
        for name in self._specs:
            self._agents[name].wait_for(self._is_connected, deadline)
        self.wait_until_ready(max(deadline - time.monotonic(), 1.0))

    def close(self) -> None:
        """Stop every process and remove the temporary state. Idempotent."""
        atexit.unregister(self.close)
        for client in self._clients:
            client.close()
        self._clients.clear()
        # The coordinator first: agents that leave one by one would make it re-plan.
        processes = [*([self._coordinator] if self._coordinator else []), *self._agents.values()]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in processes:
            process.close(deadline)
        self._coordinator = None
        self._agents.clear()
        if self._own_directory and self._directory != Path():
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = Path()

    # ------------------------------------------------------------ what callers want

    @property
    def url(self) -> str:
        """Of the HTTP API and the console."""
        return self._url

    @property
    def api_key(self) -> str:
        return self._api_key

    @property
    def pids(self) -> dict[str, int]:
        """Device name -> pid of its agent."""
        return {name: agent.pid for name, agent in self._agents.items()}

    @property
    def coordinator_pid(self) -> int:
        return self._running_coordinator().pid

    def client(self, *, draft: str | Path = NO_DRAFTS) -> Client:
        """A client of this cluster; closed with it. `draft`: who guesses ahead on its side."""
        client = Client(self._url, api_key=self._api_key, draft=draft)
        self._clients.append(client)
        return client

    def async_client(self, *, draft: str | Path = NO_DRAFTS) -> AsyncClient:
        """The same for a program with an event loop, which closes it itself: `async with cluster.async_client()`."""
        return AsyncClient(self._url, api_key=self._api_key, draft=draft)

    def status(self) -> dict[str, Any]:
        """Devices, plan and requests, as the console sees them."""
        with Client(self._url, api_key=self._api_key) as client:
            return client.status()

    def devices(self) -> list[dict[str, Any]]:
        return list(self.status()["devices"])

    # ------------------------------------------------------------ changing it

    def add(self, spec: DeviceSpec, *, wait: bool = True) -> None:
        """Pair and start one more device."""
        if spec.name in self._specs:
            raise UsageError(f"the cluster has a device {spec.name!r} already")
        self._specs[spec.name] = spec
        self._bring_up(spec, wait)

    def restart(self, name: str, *, wait: bool = True) -> None:
        """Bring a device back, however it ended: same key, same state, new process."""
        self.stop(name)
        self._bring_up(self._specs[name], wait)

    def stop(self, name: str) -> None:
        """End a device's process. It stays paired."""
        if name not in self._specs:
            raise UsageError(f"the cluster has no device {name!r}", hint=f"it has {', '.join(self._specs)}")
        agent = self._agents.pop(name, None)
        if agent is not None:
            agent.close()

    def wait_until_ready(self, timeout_seconds: float = 60.0) -> None:
        """Until a plan serves and every device has settled. Raises with the reason if that does not come."""
        deadline = time.monotonic() + timeout_seconds
        said, why = "", ""
        with Client(self._url, api_key=self._api_key) as client:
            while time.monotonic() < deadline:
                self._check_processes()
                status = client.status()
                why = self._why_not_ready(status)
                if not why:
                    return
                if why != said:
                    said = why
                    self._on_progress(why)
                time.sleep(_POLL_SECONDS)
        raise TransportError(
            f"the cluster did not get ready in {timeout_seconds:.0f} s: {why}{self._all_logs()}",
            hint="`edge-runtime doctor` checks this machine",
            code="not_ready",
        )

    # ------------------------------------------------------------ inside

    def _start_coordinator(self, deadline: float) -> None:
        self._on_progress("starting the coordinator")
        arguments = ["coordinator", str(self._bundle), "--state", str(self._directory / "coordinator")]
        arguments += ["--http-port", "0", "--join-links", "0", "--split", self._split, "--json"]
        arguments += ["--replicas", self._replicas, "--wire", self._wire, "--kv", self._kv]
        if self._named:
            arguments += ["--devices", ",".join(self._named)]
        self._coordinator = ChildProcess("the coordinator", arguments, self._directory / "coordinator.log")
        ready = self._coordinator.wait_for(lambda event: "url" in event, deadline)
        self._url, self._api_key = str(ready["url"]), str(ready["api_key"])

    def _start_agent(self, spec: DeviceSpec) -> None:
        directory = self._directory / "agents" / spec.name
        arguments = ["agent", "--name", spec.name, "--memory", str(spec.memory_bytes), "--json"]
        arguments += ["--threads", str(spec.threads), "--state", str(directory)]
        arguments += ["--expert-cache", str(spec.expert_cache)]
        arguments += ["--expert-start-bits", str(spec.expert_start_bits)]
        arguments += ["--expert-prediction", spec.expert_prediction]
        arguments += ["--data-address", "127.0.0.1:0" if spec.reachable else "none"]
        if not (directory / "pairing.json").exists():
            with Client(self._url, api_key=self._api_key) as client:
                arguments += [
                    "--join-file",
                    str(_private_file(directory / "join.link", client.create_join_link())),
                ]
        self._on_progress(f"starting device {spec.name}")
        log_path = self._directory / f"agent-{spec.name}.log"
        self._agents[spec.name] = self._agent_process(spec.name, arguments, log_path)

    def _agent_process(self, name: str, arguments: list[str], log_path: Path) -> ChildProcess:
        return ChildProcess(f"device {name}", arguments, log_path)

    def _bring_up(self, spec: DeviceSpec, wait: bool) -> None:
        deadline = time.monotonic() + self._timeout_seconds
        self._start_agent(spec)
        self._agents[spec.name].wait_for(self._is_connected, deadline)
        if wait:
            self.wait_until_ready(max(deadline - time.monotonic(), 1.0))

    def _is_connected(self, event: dict[str, Any]) -> bool:
        if self._given_up.is_set():
            raise EdgeRuntimeError("the cluster's start was cancelled")
        return event.get("event") == "connected"

    def _why_not_ready(self, status: dict[str, Any]) -> str:
        """What is being waited for; "" when all is well."""
        plan = status.get("plan")
        states = {str(device["name"]): device for device in status["devices"]}
        for name, agent in self._agents.items():
            device = states.get(name)
            if agent.is_running and (device is None or device["state"] not in _SETTLED):
                said = "joining" if device is None else f"{device['state']}: {device['reason']}"
                return f"{name} is {said}".rstrip(": ")
        if plan is not None and plan["ready"]:
            return ""
        reasons = (plan or {}).get("reasons") or ("there is no plan yet",)
        states_said = "; ".join(f"{name}: {d['reason']}" for name, d in states.items() if d["reason"])
        return f"{reasons[0]} ({states_said})" if states_said else str(reasons[0])

    def _check_processes(self) -> None:
        if self._given_up.is_set():
            raise EdgeRuntimeError("the cluster's start was cancelled")
        self._running_coordinator().check()

    def _running_coordinator(self) -> ChildProcess:
        if self._coordinator is None:
            raise UsageError(
                "the cluster is not running", hint="use it as `with LocalCluster(…) as cluster:`"
            )
        return self._coordinator

    def _all_logs(self) -> str:
        tails = {name: agent.log_tail() for name, agent in self._agents.items()}
        if self._coordinator is not None:
            tails["coordinator"] = self._coordinator.log_tail()
        return "".join(f"\n{name}:\n{tail}" for name, tail in tails.items() if tail)


def _split_arguments(split: Split, names: Sequence[str]) -> tuple[str, list[str]]:
    """(text of --split, the devices it is about in pipeline order)."""
    if isinstance(split, str):
        if split not in ("auto", "even", "experts"):
            raise UsageError(
                f"{split!r} is not a split",
                hint='use "auto", "even", "experts" or a list of (first, last) layers',
            )
        return split, list(names)
    ranges = [(int(first), int(last)) for first, last in split]
    if not 1 <= len(ranges) <= len(names):
        raise UsageError(f"{len(ranges)} layer ranges for {len(names)} devices")
    return ",".join(f"{first}-{last}" for first, last in ranges), list(names[: len(ranges)])


def _replicas_argument(replicas: int | str) -> str:
    is_count = isinstance(replicas, int) and not isinstance(replicas, bool) and replicas >= 1
    if not is_count and replicas != "auto":
        raise UsageError(f"{replicas!r} is not a number of replicas", hint='use "auto", or 1 and more')
    return str(replicas)


def _private_file(path: Path, text: str) -> Path:
    """Only its owner can read it; a command line, everybody on this machine can."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text + "\n")
    return path
